"""The parts of an SAE, and the additional reconstructions that training may use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sparsight.config import check_types
from sparsight.errors import UserError
from sparsight.kernels.plan import Stage
from sparsight.sae.sparsity import AnySparsity, TopK

NormaliserKind = Literal["scale", "standardise", "none", "layer_norm", "constant_norm"]
BiasInit = Literal["zero", "mean", "geometric_median"]
DecoderInit = Literal["random", "data"]


@dataclass(frozen=True)
class MultiTopK:
    """Reconstruct a second time with more latents, so that one SAE works with several k.

    The loss is L(k) + weight · L(multiple · k) (Gao et al. 2024, section 6.2 and appendix B).
    """

    multiple: int = 4
    """Size of the second code, as a multiple of k."""

    weight: float = 1 / 8
    """Weight of the second reconstruction's error."""

    def __post_init__(self) -> None:
        check_types(self, "multi_topk.")
        if self.multiple < 2:
            raise UserError(f"multi_topk.multiple is {self.multiple}; it must be at least 2.")
        if self.weight <= 0:
            raise UserError(f"multi_topk.weight is {self.weight}; it must be positive.")

    def stages(self, k: int, n_latents: int) -> tuple[Stage, ...]:
        """Return the reconstructions, the SAE's own first.

        Raises:
            UserError: the second code has more latents than there are.
        """
        larger = self.multiple * k
        if larger > n_latents:
            raise UserError(
                f"multi_topk.multiple is {self.multiple}, so the second code has {larger} latents, "
                f"but there are only {n_latents}."
            )
        return Stage(), Stage(self.weight, k=larger)


@dataclass(frozen=True)
class Matryoshka:
    """Also reconstruct from prefixes of the dictionary, so that early latents stay general.

    The loss is the mean of the prefixes' errors (Bussmann et al. 2025, "Learning multi-level
    features with Matryoshka sparse autoencoders"). Prefixes are fixed, or drawn at random for each
    step.
    """

    shares: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Share of the latents in each prefix; ascending, and the last is 1. Unused with `random`."""

    random: int | None = None
    """Number of prefixes drawn per step, including the whole dictionary; the probability of a width
    w is proportional to 1 / w. None uses `shares`."""

    def __post_init__(self) -> None:
        check_types(self, "matryoshka.")
        rising = all(a < b for a, b in zip(self.shares, self.shares[1:], strict=False))
        if not self.shares or not rising or self.shares[0] <= 0 or self.shares[-1] != 1:
            raise UserError(
                f"matryoshka.shares are {self.shares}; they must be positive, ascending, and end "
                "with 1."
            )
        if self.random is not None and self.random < 2:
            raise UserError(f"matryoshka.random is {self.random}; it must be at least 2.")

    @property
    def fusable(self) -> bool:
        """Whether the fused training steps, without autograd, support this."""
        return self.random is None

    def widths(self, n_latents: int) -> tuple[int, ...]:
        """Return the width of each prefix in latents, at least 1; equal ones count once."""
        return tuple(sorted({max(1, round(share * n_latents)) for share in self.shares}))


@dataclass(frozen=True)
class MatryoshkaK:
    """Reconstruct with several k at once, so that one SAE works at every sparsity; only with TopK.

    The loss is Σ weight_j · error(k_j) / Σ weight_j (Zaigrajew et al. 2025, "Interpreting CLIP with
    hierarchical sparse autoencoders").
    """

    ks: tuple[int, ...] | None = None
    """Active latents of each reconstruction, ascending; None doubles from `sparsity.k` to all."""

    weights: Literal["uniform", "reverse"] = "uniform"
    """"uniform"; or "reverse": with m reconstructions, from m for the smallest k down to 1."""

    def __post_init__(self) -> None:
        check_types(self, "matryoshka.")
        if self.ks is not None and (
            not self.ks
            or self.ks[0] < 1
            or any(a >= b for a, b in zip(self.ks, self.ks[1:], strict=False))
        ):
            raise UserError(f"matryoshka.ks are {self.ks}; they must be at least 1 and ascending.")

    @property
    def fusable(self) -> bool:
        """Whether the fused training steps, without autograd, support this."""
        return False

    def stages(self, k: int, n_latents: int) -> tuple[int, ...]:
        """Return every k, including the SAE's own.

        Raises:
            UserError: one is larger than the number of latents.
        """
        ks = self.ks
        if ks is None:
            doubled = [k]
            while doubled[-1] < n_latents:
                doubled.append(min(2 * doubled[-1], n_latents))
            ks = tuple(doubled)
        if ks[-1] > n_latents:
            raise UserError(
                f"matryoshka.ks go up to {ks[-1]}, but there are only {n_latents} latents."
            )
        return tuple(sorted({k, *ks}))


@dataclass(frozen=True)
class Free:
    """Decoder rows are parameters."""


@dataclass(frozen=True)
class Archetypal:
    """Decoder rows stay near the convex hull of data points, so that runs agree.

    D = exp(m) (W A + R): A holds anchors drawn from the data, rows of W are non-negative and sum to
    1, rows of R have at most the norm `delta` (Fel et al. 2025, "Archetypal SAE", section 4).
    `unit_norm_decoder` has no effect.
    """

    n_anchors: int = 1024
    """Number of data points; at most as many as the first batch has are used."""

    delta: float = 1.0
    """Largest distance of a row from the hull, in normalised space."""

    def __post_init__(self) -> None:
        check_types(self, "dictionary.")
        if self.n_anchors < 1:
            raise UserError(f"dictionary.n_anchors is {self.n_anchors}; it must be at least 1.")
        if self.delta < 0:
            raise UserError(f"dictionary.delta is {self.delta}; it must not be negative.")


@dataclass(frozen=True)
class SAEConfig:
    """The parts of a `SparseAutoencoder`."""

    n_latents: int | None = None
    """Number of latents; default: `expansion` times the width of the activations."""

    expansion: int = 16
    """Latents per dimension of the activations; used if `n_latents` is not given."""

    sparsity: AnySparsity = field(default_factory=TopK)
    """How the active latents of a vector are chosen."""

    normaliser: NormaliserKind = "scale"
    """"scale": subtract the mean and divide by one number so that E‖x‖² = d_in; "standardise": use
    the mean and deviation of each dimension; "layer_norm": use the mean and deviation of each
    vector's entries; "constant_norm": scale every vector to norm √d_in; "none"."""

    unit_norm_decoder: bool = True
    """Keep each latent's decoder row at norm 1."""

    subtract_b_dec: bool = True
    """Subtract the decoder's bias before encoding: the encoder reads z − b_dec instead of z."""

    tied: bool = False
    """Use one matrix for encoder and decoder."""

    dictionary: Free | Archetypal = field(default_factory=Free)
    """Constraint on the decoder rows."""

    skip: bool = False
    """Add a linear map of the input to a transcoder (Paulo et al. 2025, "Transcoders beat sparse
    autoencoders for interpretability")."""

    soft_cap: float | None = None
    """Bound activations softly: f becomes cap · tanh(f / cap)."""

    b_dec_init: BiasInit = "zero"
    """Initial value of the decoder's bias, in normalised space; "mean" and "geometric_median" are
    estimated from a sample of the activations."""

    decoder_init: DecoderInit = "random"
    """Initial decoder rows: random directions, or directions of data points, mixed 4 : 1 with
    random ones. Rows from data fit well from the first step; with ReLU, fewer of these latents die,
    but with TopK, more die, because similar rows compete."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.n_latents is not None and self.n_latents < 1:
            raise UserError(f"n_latents is {self.n_latents}; it must be at least 1.")
        if self.n_latents is not None and self.n_latents >= 2**31:
            raise UserError(f"n_latents is {self.n_latents}; it must be below 2^31.")
        if self.expansion < 1:
            raise UserError(f"expansion is {self.expansion}; it must be at least 1.")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise UserError(f"soft_cap is {self.soft_cap}; it must be positive, or None.")
        if self.tied and isinstance(self.dictionary, Archetypal):
            raise UserError("tied and an archetypal dictionary cannot be combined; leave one out.")
        if self.tied and not self.sparsity.has_encoder:
            kind = type(self.sparsity).__name__
            raise UserError(f"tied needs an encoder, which {kind} does not have; leave tied out.")
        if self.n_latents is not None:
            self.sparsity.check_width(self.n_latents)

    @property
    def fusable(self) -> bool:
        """Whether the fused training steps, without autograd, support this."""
        usual = self.subtract_b_dec and not self.tied and isinstance(self.dictionary, Free)
        return usual and self.soft_cap is None and self.sparsity.fusable

    def width(self, d_in: int) -> int:
        """Return the number of latents for activations of width `d_in`.

        Raises:
            UserError: the sparsity does not allow that number.
        """
        n_latents = self.n_latents or self.expansion * d_in
        self.sparsity.check_width(n_latents)
        return n_latents
