"""Compile every kernel for GPUs of compute capability 8.0, in a process of its own.

No GPU is needed, but the interpreter must be off.
"""

from __future__ import annotations

import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsight.sae.kernels import triton_kernels as kernels

TARGET = GPUTarget("cuda", 80, 32)
BFLOAT16 = {"score_groups": ("x", "W", "scores", "maxima"), "update_latents": ("low",)}
INTEGERS = {
    "bounds": "*i64", "latents": "*i64", "starts": "*i64", "vectors": "*i64",
    "since_fired": "*i64", "error_rows": "*i32", "aux_rows": "*i32", "needed": "*i1",
    "n_vectors": "i32", "n_latents": "i32", "n_candidates": "i32", "n_main_errors": "i32",
    "width": "i32", "d": "i32", "partial_squares": "*fp64",
}  # fmt: skip


def compile_for_gpu(kernel, num_warps: int, **constants) -> None:
    signature, attributes = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            continue
        of_tensor = "*bf16" if name in BFLOAT16.get(kernel.__name__, ()) else "*fp32"
        signature[name] = INTEGERS.get(name, of_tensor)
        if signature[name].startswith("*") or name in ("d", "width"):
            attributes[place,] = [["tt.divisibility", 16]]
    source = ASTSource(
        kernel,
        signature,
        {(kernel.arg_names.index(name),): each for name, each in constants.items()},
        attributes,
    )
    options = {"num_warps": num_warps, **kernels.FP_FUSION}
    assert triton.compile(source, target=TARGET, options=options).asm["cubin"]


def main() -> None:
    tile, rows = kernels.Tile(), kernels.rows_of(768)
    by_rows = {"WIDTH": rows.width, "ENTRIES": rows.entries}
    compile_for_gpu(
        kernels.score_groups, tile.warps, GROUP=kernels.GROUP, VECTORS=tile.vectors,
        LATENTS=tile.latents, DEPTH=tile.depth, TOGETHER=tile.together, AS_FLOAT=False,
    )  # fmt: skip
    compile_for_gpu(kernels.score_candidates, rows.warps, **by_rows)
    for stages in (1, 3):
        compile_for_gpu(kernels.reconstruct, rows.warps, N_STAGES=stages, NORMS=True, **by_rows)
    for apply in (True, False):
        compile_for_gpu(
            kernels.update_latents, rows.warps, UNIT_NORM=True, AUX=True, LOW=True, APPLY=apply,
            LATENTS=kernels.LATENTS_OF_A_PROGRAM, **by_rows,
        )  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        main()
