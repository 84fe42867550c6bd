"""Fused steps of all back ends against plain dense autograd and `torch.optim.Adam`."""

from __future__ import annotations

import ctypes
import math
import subprocess
from pathlib import Path

import pytest
import torch
from step_parts import (
    BATCH,
    LR,
    N_LATENTS,
    NEEDS_INT8,
    PLANS,
    TORCH_INT8,
    K,
    Ours,
    Reference,
    assert_same_gradients,
    assert_same_steps,
    dead_latents,
    make_problem,
    plans,
    use_variant,
    with_aux,
)

from sparsight.errors import UserError
from sparsight.kernels import bounds, choose
from sparsight.kernels.native import build, library

BACK_ENDS = [
    ("torch", "float32"),
    ("native", "float32"),
    ("native", "bfloat16"),
    ("native", "int8"),
]


DEAD = dead_latents()


@pytest.mark.parametrize("massive", [False, True], ids=["even", "massive"])
@pytest.mark.parametrize("n_dead", [0, 12, len(DEAD)], ids=["plain", "auxk-few", "auxk-many"])
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("kernels", "precision"), BACK_ENDS)
def test_gradients_and_ten_steps_match_dense_autograd(
    kernels: str, precision: str, name: str, n_dead: int, massive: bool
) -> None:
    plan = with_aux(PLANS[name]) if n_dead else PLANS[name]
    dead = DEAD[:n_dead] if n_dead else None
    ours = Ours(kernels, precision, plan, make_problem(torch.float64, massive))
    problem = make_problem(torch.float64, massive)
    truth = Reference(plan, problem)
    assert_same_steps(ours, truth, problem.batches, dead)


@pytest.mark.parametrize("with_dead", [False, True], ids=["plain", "auxk"])
@pytest.mark.parametrize("name", ["topk", "batch-topk", "multi-topk", "matryoshka"])
def test_fully_scored_vectors_train_like_the_others(name: str, with_dead: bool) -> None:
    problems = [make_problem(torch.float64, n_latents=1200) for _ in "ab"]
    for problem in problems:  # latents so similar that int8 cannot distinguish them
        W_enc = problem.parameters["W_enc"]
        W_enc.copy_(W_enc[0] + 1e-3 * W_enc)
        problem.parameters["b_enc"].mul_(1e-3)
    W, b = (problems[0].parameters[each] for each in ("W_enc", "b_enc"))
    x = problems[0].batches[0]
    out = x.new_empty(len(x), K), library.int32(len(x), K)
    _, given_up = library.Dictionary(W, b, "int8").topk(x, W, b, K, out=out)
    assert given_up > 0
    dead = torch.arange(1, 1200, 2) if with_dead else None
    plan = plans(1200)[name]
    if with_dead:
        plan = with_aux(plan, 100)
    ours = Ours("native", "int8", plan, problems[0])
    assert_same_steps(ours, Reference(plan, problems[1]), problems[1].batches[:2], dead)


@pytest.mark.parametrize("with_dead", [False, True], ids=["plain", "auxk"])
@pytest.mark.parametrize("name", ["topk", "multi-topk"])
@pytest.mark.parametrize(("kernels", "precision"), [("torch", "float32"), ("native", "int8")])
def test_latents_with_many_entries_are_summed_like_the_others(
    kernels: str, precision: str, name: str, with_dead: bool
) -> None:
    problems = [make_problem(torch.float64, n_latents=700, d_in=300, batch=200) for _ in "ab"]
    for problem in problems:
        problem.parameters["b_enc"][7] += 20.0  # active in each vector
    dead = torch.arange(1, 700, 2) if with_dead else None
    plan = with_aux(PLANS[name], 150) if with_dead else PLANS[name]
    ours = Ours(kernels, precision, plan, problems[0])
    truth = Reference(plan, problems[1])
    assert_same_steps(ours, truth, problems[1].batches[:3], dead)


@pytest.mark.parametrize(("kernels", "precision"), [*BACK_ENDS, ("torch", "bfloat16"), TORCH_INT8])
def test_losses_of_ten_steps_in_float32_match_dense_autograd(kernels: str, precision: str) -> None:
    plan = with_aux(PLANS["topk"])
    ours = Ours(kernels, precision, plan, make_problem(torch.float32))
    problem = make_problem(torch.float32)
    truth = Reference(plan, problem)
    for number, z in enumerate(problem.batches, start=1):
        mine = ours.fused.step(z, lr=LR, number=number, dead=DEAD)
        assert float(mine.loss) == pytest.approx(truth.step(z, DEAD).loss.item(), abs=1e-6)


@pytest.mark.parametrize(("kernels", "precision"), BACK_ENDS)
@pytest.mark.parametrize("clip", [1e-3, 0.05, 10.0])
def test_clipping_uses_the_whole_gradient(kernels: str, precision: str, clip: float) -> None:
    plan = with_aux(PLANS["topk"])
    ours = Ours(kernels, precision, plan, make_problem(torch.float64), clip)
    problem = make_problem(torch.float64)
    truth = Reference(plan, problem, clip)
    for number, z in enumerate(problem.batches[:3], start=1):
        dead = DEAD if number == 2 else DEAD[:12]
        mine = ours.fused.step(z, lr=LR, number=number, dead=dead)
        truth.step(z, dead)
        torch.testing.assert_close(mine.grad_norm, truth.norm, rtol=1e-10, atol=0)
        assert_same_gradients(ours, truth)


@pytest.mark.parametrize("name", ["topk", "batch-matryoshka"])
@pytest.mark.parametrize(("kernels", "precision"), BACK_ENDS)
def test_vectors_and_dead_latents_may_be_more_or_fewer_at_each_step(
    kernels: str, precision: str, name: str
) -> None:
    plan = with_aux(PLANS[name])
    ours = Ours(kernels, precision, plan, make_problem(torch.float64, batch=200))
    problem = make_problem(torch.float64, batch=200)
    truth = Reference(plan, problem)
    sizes = [(30, 12), (200, N_LATENTS), (1, 5), (97, 100), (96, 1), (150, 0)]
    for number, (z, (n, n_dead)) in enumerate(zip(problem.batches, sizes, strict=False), start=1):
        dead = torch.arange(N_LATENTS - n_dead, N_LATENTS) if n_dead else None
        mine = ours.fused.step(z[:n], lr=LR, number=number, dead=dead)
        found = truth.step(z[:n], dead)
        torch.testing.assert_close(mine.loss.double(), found.loss.detach(), rtol=1e-10, atol=0)
        assert_same_gradients(ours, truth)


@pytest.mark.parametrize(("kernels", "precision"), [*BACK_ENDS, ("torch", "bfloat16")])
def test_auxk_sends_gradient_to_the_encoder_of_dead_latents(kernels: str, precision: str) -> None:
    problem = make_problem(torch.float32)
    problem.parameters["b_enc"][DEAD] -= 0.8  # the main code chooses few of them
    ours = Ours(kernels, precision, with_aux(PLANS["topk"]), problem)
    figures = ours.fused.step(problem.batches[0], lr=LR, number=1, dead=DEAD)
    assert figures.aux_loss > 0
    untouched = [i for i in DEAD.tolist() if ours.since_fired[i] > 0]
    assert len(untouched) > 15
    of_W_enc = ours.moments["W_enc"][0][untouched].norm(dim=1)
    assert (of_W_enc > 0).double().mean() > 0.5
    assert (ours.moments["b_enc"][0][untouched] != 0).double().mean() > 0.5


@pytest.mark.parametrize(("kernels", "precision"), BACK_ENDS)
def test_a_step_counts_how_long_latents_have_been_silent(kernels: str, precision: str) -> None:
    plan = PLANS["multi-topk"]
    ours = Ours(kernels, precision, plan, make_problem(torch.float64))
    problem = make_problem(torch.float64)
    truth = Reference(plan, problem)
    expected = torch.zeros(N_LATENTS, dtype=torch.int64)
    for number, z in enumerate(problem.batches[:4], start=1):
        ours.fused.step(z, lr=LR, number=number)
        fired = (truth.step(z, None).code > 0).any(dim=0)
        expected = torch.where(fired, 0, expected + BATCH)
        assert torch.equal(ours.since_fired, expected)


@pytest.mark.parametrize(("kernels", "precision"), [("native", "int8"), ("torch", "bfloat16")])
def test_a_step_detects_that_the_encoder_was_changed(kernels: str, precision: str) -> None:
    problem = make_problem(torch.float32)
    ours = Ours(kernels, precision, PLANS["topk"], problem)
    ours.fused.step(problem.batches[0], lr=LR, number=1)
    with torch.no_grad():
        problem.parameters["b_enc"].fill_(-100.0)
        problem.parameters["b_enc"][7:12] = 100.0
    ours.fused.step(problem.batches[1], lr=LR, number=2)
    assert (ours.since_fired == 0).nonzero().flatten().tolist() == [7, 8, 9, 10, 11]


def test_threads_do_not_change_the_bits_of_a_native_step() -> None:
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            problem = make_problem(torch.float32, n_latents=1500, d_in=45, batch=1000)
            ours = Ours("native", "int8", with_aux(PLANS["multi-topk"], 400), problem)
            for number, z in enumerate(problem.batches[:4], start=1):
                ours.fused.step(z, lr=LR, number=number, dead=torch.arange(0, 1500, 2))
            found.append(problem.parameters)
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(found[0][name], other[name]) for name in other)


@pytest.mark.parametrize("massive", [False, True], ids=["even", "massive"])
@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
@pytest.mark.parametrize(("n", "d_in", "k"), [(1000, 64, 32), (777, 101, 7), (70, 5, 70)])
def test_native_selection_is_exact(
    n: int, d_in: int, k: int, precision: str, massive: bool
) -> None:
    generator = torch.Generator().manual_seed(3)
    W = torch.randn(n, d_in, generator=generator) * torch.rand(n, 1, generator=generator)
    b = torch.randn(n, generator=generator)
    x = torch.randn(1500, d_in, generator=generator)
    if massive:
        x[:, :2] *= 100
    dictionary = library.Dictionary(W, b, precision)
    values, latents = torch.empty(1500, k), library.int32(1500, k)
    dictionary.topk(x, W, b, k, out=(values, latents))
    truth = torch.addmm(b.double(), x.double(), W.double().T).topk(k, dim=1)
    same = (latents.long().sort(dim=1).values == truth.indices.sort(dim=1).values).all(dim=1)
    assert same.double().mean() >= 0.999  # except for ties in float32
    torch.testing.assert_close(
        values.sort(dim=1, descending=True).values.double(), truth.values, rtol=1e-5, atol=1e-4
    )
    threshold = truth.values[:, -1].median().item()
    found, of, counts = dictionary.above(x, W, b, threshold, room=16)
    scores = torch.addmm(b, x, W.T)
    assert abs(int(counts.sum()) - int((scores >= threshold).sum())) <= 2
    rows = torch.repeat_interleave(torch.arange(1500), counts)
    torch.testing.assert_close(found, scores[rows, of], rtol=1e-5, atol=1e-3)


def test_native_selection_from_no_vectors_finds_nothing() -> None:
    x, W, b = torch.empty(0, 9), torch.ones(70, 9), torch.zeros(70)
    dictionary = library.Dictionary(W, b, "int8")
    counts, _ = dictionary.topk(x, W, b, 3, out=(torch.empty(0, 3), library.int32(0, 3)))
    assert len(counts) == 0
    assert all(len(each) == 0 for each in dictionary.above(x, W, b, 0.5))


def test_vectors_with_infinity_or_nan_do_not_break_native_selection() -> None:
    problem = make_problem(torch.float32)
    z = problem.batches[0]
    z[3, 1], z[5, 2] = math.nan, math.inf
    ours = Ours("native", "int8", PLANS["topk"], problem)
    figures = ours.fused.step(z, lr=LR, number=1)
    assert not torch.isfinite(figures.loss)


@pytest.mark.parametrize("variant", build.VARIANTS)
def test_each_compiled_variant_gives_the_same_step(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_variant(variant, monkeypatch)
    for name in ("topk", "batch-topk"):
        for precision in ("int8", "bfloat16"):
            test_gradients_and_ten_steps_match_dense_autograd(
                "native", precision, name, len(DEAD), False
            )
    test_latents_with_many_entries_are_summed_like_the_others("native", "int8", "topk", True)


HOLDING = r"""
typedef struct { char bytes[64]; } Shapes;
void hold(const Shapes *shapes) { __asm__ volatile("ldtilecfg %0" : : "m"(*shapes)); }
void held(Shapes *shapes) { __asm__ volatile("sttilecfg %0" : "=m"(*shapes)); }
"""


def test_the_shapes_of_amx_tiles_are_left_as_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_variant("amx", monkeypatch)
    source, compiled = tmp_path / "holding.c", tmp_path / "holding.so"
    source.write_text(HOLDING)
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", source, "-o", compiled], check=True)
    other = ctypes.CDLL(str(compiled))
    stated, found = ctypes.create_string_buffer(64), ctypes.create_string_buffer(64)
    stated[0] = 1  # palette
    stated[16], stated[48] = 24, 5  # bytes of a row, and rows, of the first tile
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, 70, generator=generator) for n in (90, 110))
    dictionary = library.Dictionary(W, torch.zeros(110), "int8")
    out = torch.empty(90, 5), library.int32(90, 5)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        other.hold(stated)
        dictionary.topk(x, W, torch.zeros(110), 5, out=out)
        other.held(found)
        assert found.raw == stated.raw
    finally:
        other.hold(ctypes.create_string_buffer(64))
        torch.set_num_threads(before)


@pytest.mark.alone
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted on Linux")
def test_steps_on_many_threads_start_no_new_ones() -> None:
    def largest() -> int:
        return max(int(each.name) for each in Path("/proc/self/task").iterdir())

    before = torch.get_num_threads()
    torch.set_num_threads(12)
    try:
        problem = make_problem(torch.float32, n_latents=700, batch=200)
        ours = Ours("native", "int8", with_aux(PLANS["topk"], 100), problem)
        dead = torch.arange(1, 700, 3)
        ours.fused.step(problem.batches[0], lr=LR, number=1, dead=dead)
        after_one = largest()
        for number, z in enumerate(problem.batches[1:], start=2):
            ours.fused.step(z, lr=LR, number=number, dead=dead)
        assert largest() == after_one
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("k_inner", [0, 3, 100])
def test_native_selection_from_a_threshold(k_inner: int) -> None:
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, 40, generator=generator) for n in (50, 300))
    b = torch.randn(300, generator=generator) - 12
    x[3, 0], x[4, 1] = math.nan, math.inf
    x[6] = 0.0
    x[5] = 1e-42  # its scale has no inverse in float32
    out = torch.full((50, 128), 7.0), library.int32(50, 128)
    counts = library.Dictionary(W, b, "int8").select(
        x, W, b, k=128, k_inner=k_inner, threshold=0.0, out=out
    )
    scores = torch.addmm(b.double(), x.double(), W.double().T)
    assert counts[3:6].tolist() == [-1, -1, -1]
    assert 0 in counts and (counts > 3).any()
    for row in (row for row in range(50) if row not in (3, 4, 5)):
        ranked = scores[row].argsort(descending=True)[: int((scores[row] >= 0).sum())].tolist()
        found = out[1][row].tolist()
        assert found[len(ranked) :] == [-1] * (128 - len(ranked)) and counts[row] == len(ranked)
        assert found[: len(ranked)] == sorted(ranked[:k_inner]) + sorted(ranked[k_inner:])


@pytest.mark.parametrize(("kernels", "precision"), BACK_ENDS)
def test_one_vector_leaves_nothing_for_the_auxiliary_loss(kernels: str, precision: str) -> None:
    problem = make_problem(torch.float64, batch=1)
    ours = Ours(kernels, precision, with_aux(PLANS["topk"]), problem)
    figures = [
        ours.fused.step(z, lr=LR, number=i + 1, dead=DEAD) for i, z in enumerate(problem.batches)
    ]
    assert all(each.aux_loss == 0 for each in figures)


def test_kernels_that_do_not_run_here_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    with pytest.raises(UserError, match="run on the CPU, not on cuda"):
        choose("native", "auto", torch.device("cuda"))
    with pytest.raises(UserError, match=r"'int8' needs the kernels 'native'.* 'torch' on cuda"):
        choose("torch", "int8", torch.device("cuda"))
    with pytest.raises(UserError, match="'dense' select exactly"):
        choose("dense", "int8", cpu)
    import sparsight.kernels as kernels

    monkeypatch.setattr(kernels, "load_native", lambda: None)
    assert choose("auto", "float32", cpu) == ("torch", "float32")
    with pytest.raises(UserError, match="without a C compiler"):
        choose("native", "auto", cpu)
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(UserError, match=r"'int8' needs .* VNNI, but these are 'torch' on cpu"):
        choose("auto", "int8", cpu)


@pytest.mark.parametrize("variant", build.VARIANTS)
def test_int8_is_chosen_if_the_processor_is_fast_at_it(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_variant(variant, monkeypatch)
    expected = "float32" if variant == "portable" else "int8"
    assert choose("native", "auto", torch.device("cpu")) == ("native", expected)


@pytest.mark.parametrize(
    ("has_int8", "has_bfloat16", "has_tiles", "expected"),
    [
        (True, True, False, "int8"),
        (True, False, False, "int8"),
        (False, True, False, "bfloat16"),
        (True, True, True, "bfloat16"),
        (True, False, True, "int8"),
    ],
)
def test_plain_torch_selects_in_the_fastest_precision(
    has_int8: bool,
    has_bfloat16: bool,
    has_tiles: bool,
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: has_int8)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_tiles)
    monkeypatch.setattr(bounds, "_multiplies_exactly", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    assert choose("torch", "auto", torch.device("cpu")) == ("torch", expected)


@pytest.mark.parametrize("ratio", [100, 600])
def test_a_huge_dimension_loses_no_latent(ratio: int) -> None:
    generator = torch.Generator().manual_seed(0)
    n, d_in, k = 1000, 256, 16
    W = torch.nn.functional.normalize(torch.randn(n, d_in, generator=generator), dim=1)
    W[:, 5] = 0.02 * torch.randn(n, generator=generator)
    x = 16 * W[torch.randint(0, n, (400,), generator=generator)]
    x += 0.3 * torch.randn(400, d_in, generator=generator)
    x[:, 5] = ratio * x.std()
    out = torch.empty(400, k), library.int32(400, k)
    b = torch.zeros(n)
    truth = (x.double() @ W.double().T).topk(k, dim=1).indices.sort(dim=1).values
    for like in (None, x):
        _, given_up = library.Dictionary(W, b, "int8", like).topk(x, W, b, k, out=out)
        assert torch.equal(out[1].long().sort(dim=1).values, truth)
    assert given_up == 0  # because the dictionary fits the vectors


@pytest.mark.parametrize(
    ("kernels", "has_bfloat16", "next_best"),
    [
        ("native", True, "bfloat16"),
        pytest.param("torch", True, "bfloat16", marks=NEEDS_INT8),
        pytest.param("torch", False, "float32", marks=NEEDS_INT8),
    ],
)
def test_int8_is_dropped_if_it_does_not_fit(
    kernels: str, has_bfloat16: bool, next_best: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    problem = make_problem(torch.float32, n_latents=3000)
    W_enc = problem.parameters["W_enc"]
    W_enc.copy_(W_enc[0] + 1e-3 * W_enc)  # so similar that int8 cannot distinguish them
    problem.parameters["b_enc"].zero_()
    ours = Ours(kernels, "int8", PLANS["topk"], problem)
    assert ours.fused.name.startswith(f"{kernels}-int8")
    for number, z in enumerate(problem.batches[:2], start=1):
        ours.fused.step(z, lr=LR, number=number)
        assert ours.fused.name.startswith(f"{kernels}-{next_best}")


def test_int8_is_refitted_to_vectors_that_have_moved() -> None:
    problem = make_problem(torch.float32, n_latents=3000)
    ours = Ours("native", "int8", PLANS["topk"], problem)
    given_up = []
    for number, z in enumerate(problem.batches[:4], start=1):
        z[:, 0] += 0 if number == 1 else 3000.0
        ours.fused.step(z, lr=LR, number=number)
        x, W, b = z - ours.fused.b_dec, ours.fused.W_enc, ours.fused.b_enc
        out = x.new_empty(len(x), K), library.int32(len(x), K)
        given_up.append(ours.fused.dictionary.topk(x, W, b, K, out=out)[1])
    assert given_up[1:] == [0, 0, 0]
    assert ours.fused.name.startswith("native-int8")


def test_a_library_built_from_other_sources_is_not_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    library.load.cache_clear()
    monkeypatch.setattr(build, "fingerprint", lambda: "0" * 16)
    try:
        assert library.load() is None
    finally:
        library.load.cache_clear()
