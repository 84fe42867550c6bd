"""What an SAE is made of, and what training may add: more reconstructions."""

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
    """Reconstruct a second time with more latents, so that few serve many values of k.

    The loss is L(k) + weight · L(multiple · k) (Gao et al. 2024, section 6.2 and appendix B).
    """

    multiple: int = 4
    """How many times k the second code has."""

    weight: float = 1 / 8
    """Of the second reconstruction's error."""

    def __post_init__(self) -> None:
        check_types(self, "multi_topk.")
        if self.multiple < 2:
            raise UserError(f"multi_topk.multiple is {self.multiple}; it must be at least 2.")
        if self.weight <= 0:
            raise UserError(f"multi_topk.weight is {self.weight}; it must be positive.")

    def stages(self, k: int, n_latents: int) -> tuple[Stage, ...]:
        """The reconstructions, that of the SAE first.

        Raises:
            UserError: the second code has more latents than there are.
        """
        larger = self.multiple * k
        if larger > n_latents:
            raise UserError(
                f"multi_topk.multiple is {self.multiple}: {larger} latents, more than the "
                f"{n_latents} there are."
            )
        return Stage(), Stage(self.weight, k=larger)


@dataclass(frozen=True)
class Matryoshka:
    """Reconstruct from prefixes of the dictionary as well, so that early latents stay general.

    The loss is the mean of the prefixes' errors (Bussmann et al. 2025, "Learning multi-level
    features with Matryoshka sparse autoencoders"), of fixed prefixes or of some that are drawn
    anew for every step.
    """

    shares: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Of the latents, in each prefix; rising, and the last is 1. Not used with `random`."""

    random: int | None = None
    """Number of prefixes that are drawn for a step, the whole dictionary among them; a width w has
    a probability in proportion to 1 / w. None takes `shares`."""

    def __post_init__(self) -> None:
        check_types(self, "matryoshka.")
        rising = all(a < b for a, b in zip(self.shares, self.shares[1:], strict=False))
        if not self.shares or not rising or self.shares[0] <= 0 or self.shares[-1] != 1:
            raise UserError(
                f"matryoshka.shares are {self.shares}; they must be positive, rise, and end with 1."
            )
        if self.random is not None and self.random < 2:
            raise UserError(f"matryoshka.random is {self.random}; it must be at least 2.")

    @property
    def fusable(self) -> bool:
        """Whether the training steps without autograd compute it."""
        return self.random is None

    def widths(self, n_latents: int) -> tuple[int, ...]:
        """Latents of each prefix, at least one; equal ones count once."""
        return tuple(sorted({max(1, round(share * n_latents)) for share in self.shares}))


@dataclass(frozen=True)
class MatryoshkaK:
    """Reconstruct with several k at once, so that one SAE serves every sparsity; only with TopK.

    The loss is Σ weight_j · error(k_j) / Σ weight_j (Zaigrajew et al. 2025, "Interpreting CLIP with
    hierarchical sparse autoencoders").
    """

    ks: tuple[int, ...] | None = None
    """Active latents of each reconstruction, rising; None doubles from `sparsity.k` to all."""

    weights: Literal["uniform", "reverse"] = "uniform"
    """"uniform", or "reverse": with m reconstructions m for the smallest k, down to 1."""

    def __post_init__(self) -> None:
        check_types(self, "matryoshka.")
        if self.ks is not None and (
            not self.ks
            or self.ks[0] < 1
            or any(a >= b for a, b in zip(self.ks, self.ks[1:], strict=False))
        ):
            raise UserError(f"matryoshka.ks are {self.ks}; they must be at least 1, and rise.")

    @property
    def fusable(self) -> bool:
        """Whether the training steps without autograd compute it."""
        return False

    def stages(self, k: int, n_latents: int) -> tuple[int, ...]:
        """Every k, that of the SAE among them.

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
            raise UserError(f"matryoshka.ks go up to {ks[-1]}, more than the {n_latents} latents.")
        return tuple(sorted({k, *ks}))


@dataclass(frozen=True)
class Free:
    """Decoder rows are parameters."""


@dataclass(frozen=True)
class Archetypal:
    """Decoder rows stay near the convex hull of data points, so that runs agree.

    D = exp(m) (W A + R): A are anchors drawn from the data, rows of W are not negative and sum to
    1, those of R have at most the norm `delta` (Fel et al. 2025, "Archetypal SAE", section 4).
    `unit_norm_decoder` has no effect.
    """

    n_anchors: int = 1024
    """Data points, at most as many as the first batch has."""

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
    """Number of latents; None is `expansion` times the width of the activations."""

    expansion: int = 16
    """Latents per dimension of the activations; used where `n_latents` is None."""

    sparsity: AnySparsity = field(default_factory=TopK)
    """How few latents a vector may use."""

    normaliser: NormaliserKind = "scale"
    """"scale": subtract the mean, divide by one number so that E‖x‖² = d_in; "standardise": mean
    and deviation of each dimension; "layer_norm": mean and deviation of each vector's entries;
    "constant_norm": every vector to norm √d_in; "none"."""

    unit_norm_decoder: bool = True
    """Keep each latent's decoder row at norm 1."""

    subtract_b_dec: bool = True
    """The encoder reads z − b_dec; False: z."""

    tied: bool = False
    """Encoder and decoder are one matrix."""

    dictionary: Free | Archetypal = field(default_factory=Free)
    """What decoder rows may be."""

    skip: bool = False
    """Transcoders: add a linear map of the input (Paulo et al. 2025, "Transcoders beat sparse
    autoencoders for interpretability")."""

    soft_cap: float | None = None
    """Bend activations f to cap · tanh(f / cap)."""

    b_dec_init: BiasInit = "zero"
    """Where the decoder's bias starts, in normalised space; "mean" and "geometric_median" are
    estimated on a sample of the activations."""

    decoder_init: DecoderInit = "random"
    """Where decoder rows start: random directions, or those of data points, mixed with random ones
    4 : 1. Rows from data fit from the first step on, and with ReLU fewer of them die; with k places
    more do, since rows that are alike compete."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.n_latents is not None and self.n_latents < 1:
            raise UserError(f"n_latents is {self.n_latents}; it must be at least 1.")
        if self.n_latents is not None and self.n_latents >= 2**31:
            raise UserError(f"n_latents is {self.n_latents}; it must be below 2^31.")
        if self.expansion < 1:
            raise UserError(f"expansion is {self.expansion}; it must be at least 1.")
        if self.soft_cap is not None and self.soft_cap <= 0:
            raise UserError(f"soft_cap is {self.soft_cap}; it must be positive (or None).")
        if self.tied and isinstance(self.dictionary, Archetypal):
            raise UserError("tied weights and an archetypal dictionary exclude each other.")
        if self.tied and not self.sparsity.has_encoder:
            kind = type(self.sparsity).__name__
            raise UserError(f"{kind} has no encoder that could be tied; leave tied out.")
        if self.n_latents is not None:
            self.sparsity.check_width(self.n_latents)

    @property
    def fusable(self) -> bool:
        """Whether the training steps without autograd compute it."""
        usual = self.subtract_b_dec and not self.tied and isinstance(self.dictionary, Free)
        return usual and self.soft_cap is None and self.sparsity.fusable

    def width(self, d_in: int) -> int:
        """Number of latents for activations of width `d_in`.

        Raises:
            UserError: the sparsity cannot be had with so many.
        """
        n_latents = self.n_latents or self.expansion * d_in
        self.sparsity.check_width(n_latents)
        return n_latents
