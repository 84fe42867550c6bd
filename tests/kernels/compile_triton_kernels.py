"""Compile every kernel for GPUs of compute capability 8.0, those of float8 for 9.0, in a process of
its own.

No GPU is needed, but the interpreter must be off.
"""

from __future__ import annotations

import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from sparsight.kernels import triton_kernels as kernels

LOW = {"score_groups": ("x", "W"), "update_latents": ("low",)}
BFLOAT16 = ("scores", "maxima")
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
        of_tensor = "*fp32"
        if name in LOW.get(kernel.__name__, ()):
            of_tensor = "*fp8e4nv" if constants["SCALED"] else "*bf16"
        elif kernel is kernels.score_groups and name in BFLOAT16:
            of_tensor = "*bf16"
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
    target = GPUTarget("cuda", 90 if constants.get("SCALED") else 80, 32)
    assembly = triton.compile(source, target=target, options=options).asm
    assert assembly["cubin"]
    if constants.get("SCALED") and kernel is kernels.score_groups:  # Hopper's own product
        assert "wgmma" in assembly["ptx"] and "e4m3" in assembly["ptx"]


def main() -> None:
    tile, rows = kernels.Tile(), kernels.rows_of(768)
    by_rows = {"WIDTH": rows.width, "ENTRIES": rows.entries}
    for scaled in (False, True):
        compile_for_gpu(
            kernels.score_groups, tile.warps, GROUP=kernels.GROUP, VECTORS=tile.vectors,
            LATENTS=tile.latents, DEPTH=tile.depth, TOGETHER=tile.together, SCALED=scaled,
            AS_FLOAT=False,
        )  # fmt: skip
    compile_for_gpu(kernels.score_candidates, rows.warps, **by_rows)
    for stages in (1, 3):
        compile_for_gpu(kernels.reconstruct, rows.warps, N_STAGES=stages, NORMS=True, **by_rows)
    for apply, scaled in ((True, False), (False, False), (True, True)):
        compile_for_gpu(
            kernels.update_latents, rows.warps, UNIT_NORM=True, AUX=True, LOW=True,
            SCALED=scaled, APPLY=apply, LATENTS=kernels.LATENTS_OF_A_PROGRAM, **by_rows,
        )  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        main()
