"""A search for vectors whose active latents a selection in low precision would miss.

The vectors are of the kinds that rounding treats alike: few levels beside a large entry, integers,
sparse ones, copies, and rows of the dictionary itself; bounds that take errors for independent fail
on them. The truth is a product in float64; a latent is missed where it is above the threshold, or
the k-th score, by more than float32 can be off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
from step_parts import NEEDS_INT8, use_variant
from torch import Tensor

from sparsight.kernels import bounds, inference, using
from sparsight.kernels.native import build, library
from sparsight.kernels.selection import ragged_scores
from sparsight.sae import (
    BatchTopK,
    Gated,
    JumpReLU,
    ReLU,
    SAEConfig,
    SparseAutoencoder,
    TopK,
)

KINDS = ("topk", "relu", "jumprelu", "batchtopk", "gated")
FAMILIES = (
    "levels", "signs", "integers", "sparse", "copies", "rows", "constant", "ramp", "halves",
    "huge dimension", "normal",
)  # fmt: skip
SCALES = (1.0, 1e-3, 1e4, 1e-12, 1e12)
ROWS = 256
K = 8


def vectors(family: str, W: Tensor, generator: torch.Generator) -> Tensor:
    """Return vectors of a family, `[ROWS, d_in]`."""
    d = W.shape[1]

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    level = 0.05 + 0.9 * float(uniform(1))
    x = level * (uniform(ROWS, d) < 0.5).float()
    if family == "signs":
        x = 2 * x - level
    if family == "integers":
        x = (4 * normal(ROWS, d)).round() * level
    if family == "sparse":
        x = torch.where(uniform(ROWS, d) < 0.05, normal(ROWS, d), 0)
    if family == "copies":
        x = normal(4, d)[torch.arange(ROWS) % 4]
    if family == "rows":  # rounding errors all point the same way as a row of the dictionary
        x = 0.4 * W[torch.arange(ROWS) % len(W)].sign() * level
    if family == "constant":
        x = torch.full((ROWS, d), level) * (1 + 1e-3 * normal(ROWS, 1))
    if family == "ramp":
        x = torch.linspace(-1, 1, d) * (0.5 + uniform(ROWS, 1))
    if family == "halves":  # each number half a step from the next codes
        x = (torch.randint(-9, 9, (ROWS, d), generator=generator) + 0.4999) * (5 / 127)
    if family == "normal":
        x = normal(ROWS, d)
    elif family not in ("copies", "ramp"):
        x[:, 0] = 5.0
    if family == "huge dimension":
        x[:, d // 2] = 300 * (1 + 0.1 * normal(ROWS))
    return x


def dictionary(like: str, n: int, d: int, generator: torch.Generator) -> Tensor:
    """Return encoder rows of norm 1, `[n, d]`."""
    W = torch.randn(n, d, generator=generator)
    if like == "positive":
        W = W.abs()
    if like == "levels":
        W = 0.33 * (torch.rand(n, d, generator=generator) < 0.5)
        W[:, 1 % d] = 5.0
    if like == "twins":
        W = W[torch.arange(n) % max(1, n // 3)]
    return W / W.norm(dim=1, keepdim=True).clamp(min=1e-9)


@dataclass
class Case:
    x: Tensor
    W: Tensor
    scores: Tensor
    cut: float
    off: Tensor

    @classmethod
    def of(cls, family: str, like: str, n: int, d: int, scale: float, seed: int) -> Case:
        generator = torch.Generator().manual_seed(seed)
        W = dictionary(like, n, d, generator)
        x = scale * vectors(family, W, generator)
        scores = x.double() @ W.double().T
        cut = float(scores.flatten().kthvalue(int(scores.numel() * 0.97)).values.float().relu())
        # The bias matters, too.
        off = (d + 64) * 2.0**-23 * (x.double().norm(dim=1, keepdim=True) + abs(cut))
        return cls(x, W, scores, cut, off)

    def encoder(self, kind: str) -> SparseAutoencoder:
        n, d = self.W.shape
        sparsity = {
            "topk": TopK(K), "relu": ReLU(), "jumprelu": JumpReLU(),
            "batchtopk": BatchTopK(K), "gated": Gated(),
        }[kind]  # fmt: skip
        config = SAEConfig(n_latents=n, sparsity=sparsity, normaliser="none", subtract_b_dec=False)
        sae = SparseAutoencoder(d, config).requires_grad_(False).eval()
        sae.W_enc.copy_(self.W)
        sae.b_enc.fill_(-self.cut if kind in ("relu", "gated") else 0.0)
        if kind == "gated":
            sae.b_mag.fill_(-self.cut)
        if kind in ("jumprelu", "batchtopk"):
            sae.threshold.fill_(self.cut)
        return sae

    def missed(self, kind: str, active: Tensor) -> int:
        """Return how many latents were missed that are clearly active."""
        least: Tensor | float = self.cut
        if kind == "topk":
            least = self.scores.topk(K + 1, dim=1).values[:, -1:].clamp(min=0)
        return int(((self.scores > least + self.off) & ~active).sum())


def assert_none_is_missed(case: Case, kind: str) -> None:
    sae = case.encoder(kind)
    together = sae.encode(case.x)
    assert case.missed(kind, together.dense() != 0) == 0
    parts = [sae.encode(part) for part in case.x.split(100)]
    for name in ("indices", "values"):  # whatever the size of the call: bit by bit
        apart = torch.cat([getattr(part, name) for part in parts])
        assert torch.equal(getattr(together, name), apart)


BACK_ENDS = [
    *(f"native-{variant}" for variant in build.VARIANTS),
    pytest.param("torch-int8", marks=NEEDS_INT8),
    "torch-bfloat16",
    "dense",
]


@contextmanager
def back_end(name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    kernels, _, rest = name.partition("-")
    if kernels == "native" and rest:
        use_variant(rest, monkeypatch)
        monkeypatch.setattr(library, "multiplies_int8", lambda: True)  # the portable one, too
    if kernels == "torch":
        monkeypatch.setattr(bounds, "fast_int8", lambda device: rest == "int8")
        monkeypatch.setattr(bounds, "fast_bfloat16", lambda device: True)
    with using("auto" if kernels == "native" else kernels):
        yield


@pytest.mark.parametrize("name", BACK_ENDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_no_active_latent_is_missed(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with back_end(name, monkeypatch):
        for i, like in enumerate(("positive", "levels")):
            case = Case.of(family, like, 200, 96, SCALES[i], 1)
            for kind in ("topk", "relu") if name == "dense" else KINDS:
                sae = case.encoder(kind)
                if name == "dense":
                    assert case.missed(kind, sae.encode(case.x).dense() != 0) == 0
                else:
                    assert_none_is_missed(case, kind)


@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
@pytest.mark.parametrize("variant", build.VARIANTS)
def test_a_native_dictionary_misses_no_latent_in_either_precision(
    variant: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_variant(variant, monkeypatch)
    for family in FAMILIES:
        case = Case.of(family, "positive", 300, 130, 1.0, 2)
        b = torch.zeros(300)
        for like in (None, case.x):
            made = library.Dictionary(case.W, b, precision, like)
            values, latents, counts = made.above(case.x, case.W, b, case.cut)
            rows = torch.repeat_interleave(torch.arange(ROWS), counts)
            active = torch.zeros(case.scores.shape, dtype=torch.bool)
            active[rows, latents] = True
            assert case.missed("relu", active) == 0
            assert (values >= case.cut).all()
            out = torch.empty(ROWS, K), library.int32(ROWS, K)
            made.topk(case.x, case.W, b, K, out=out)
            assert case.missed("topk", torch.zeros_like(active).scatter(1, out[1].long(), 1)) == 0


THRESHOLDS = (0.0, -0.0, 1e-42, -1e-42, math.inf, -math.inf, 1e30, -1e30)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_thresholds_and_other_vectors_do_not_affect_a_vector(
    threshold: float, compiled: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    W, x = (torch.randn(n, 40, generator=generator) for n in (90, 300))
    b = torch.randn(90, generator=generator)
    b[3], b[4], b[5], W[6], W[7] = 1e20, -1e20, -math.inf, 0, 1e-30
    x[0], x[1], x[2], x[3, 3], x[4] = 0, 1e-42, 1e-20, 1e20, 1e-3 * x[4]
    alone = x.clone()
    x[9, 2], x[10], x[11, 0] = math.nan, math.nan, math.inf
    fine = torch.arange(300)[x.isfinite().all(dim=1)]
    with using("auto" if compiled else "torch"):
        found = inference.latents_above(x, W, b, threshold)
        for rows in (torch.arange(300), fine):
            parts = [inference.latents_above(x[part], W, b, threshold) for part in rows.split(37)]
            of = torch.repeat_interleave(torch.arange(300), found[2])
            kept = torch.isin(of, rows)
            assert torch.equal(found[1][kept], torch.cat([part[1] for part in parts]))
            assert torch.equal(found[2][rows], torch.cat([part[2] for part in parts]))
        top = inference.strongest_latents(x, W, b, K)
        assert torch.equal(top[fine], inference.strongest_latents(alone, W, b, K)[fine])
        apart = [inference.strongest_latents(part, W, b, K) for part in x[fine].split(37)]
        assert torch.equal(top[fine], torch.cat(apart))
    scores = torch.addmm(b.double(), x.double(), W.double().T)[fine]
    off = 1e-5 * (x.double().norm(dim=1)[fine, None] * W.double().norm(dim=1) + b.abs())
    active = torch.zeros(300, 90, dtype=torch.bool)
    active[torch.repeat_interleave(torch.arange(300), found[2]), found[1]] = True
    off = off.nan_to_num(0, 0, 0)
    assert not ((scores > threshold + off) & ~active[fine]).any()
    assert not ((scores < threshold - off) & active[fine]).any()


def test_scores_of_a_vector_have_the_same_bits_in_any_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, 77, generator=generator) for n in (50, 60))
    b = torch.randn(60, generator=generator)
    latents = torch.arange(60).repeat(50)
    starts = torch.arange(0, 3001, 60)
    for score in (library.scores, ragged_scores):
        together = score(x, W, b, starts, latents).view(50, 60)
        torch.testing.assert_close(together, torch.addmm(b, x, W.T))
        for row in range(50):
            for at in (0, 5, 58):
                of = torch.tensor([at, at + 1])
                alone = score(x[row : row + 1], W, b, torch.tensor([0, 2]), of)
                assert torch.equal(alone, together[row, of])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_search_finds_no_vector_whose_active_latents_are_missed(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    names = ["native"]
    if bounds.supports_int8(torch.device("cpu")):
        names.append("torch-int8")
    names.append("torch-bfloat16")

    @hypothesis.settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True,
        suppress_health_check=list(hypothesis.HealthCheck),
    )  # fmt: skip
    @hypothesis.given(
        family=st.sampled_from(FAMILIES),
        like=st.sampled_from(["positive", "levels", "normal", "twins"]),
        n=st.integers(20, 160),
        d=st.integers(2, 140),
        scale=st.sampled_from(SCALES),
        seed=st.integers(0, 2**31),
        name=st.sampled_from(names),
    )
    def search(family: str, like: str, n: int, d: int, scale: float, seed: int, name: str) -> None:
        case = Case.of(family, like, n, d, scale, seed)
        with monkeypatch.context() as patch, back_end(name, patch):
            assert_none_is_missed(case, kind)

    search()


EXAMPLES = 1_000
"""Number of batches in which the search must find nothing, per kind."""
