"""What an SAE is made of: its width, sparsity, normaliser and remedy for dead latents."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sparsight.config import check_types
from sparsight.errors import UserError

NormaliserKind = Literal["scale", "standardise", "none"]
BiasInit = Literal["zero", "mean", "geometric_median"]


@dataclass(frozen=True)
class TopK:
    """Keep the k largest pre-activations of a vector, and of those the positive ones.

    Gao et al. 2024, "Scaling and evaluating sparse autoencoders", section 2.3.
    """

    k: int = 32
    """Active latents per vector, at most."""

    def __post_init__(self) -> None:
        check_types(self, "sparsity.")
        if self.k < 1:
            raise UserError(f"sparsity.k is {self.k}; it must be at least 1.")


@dataclass(frozen=True)
class BatchTopK:
    """Keep the k · batch largest pre-activations of a whole batch, and of those the positive ones.

    Vectors may then use more or fewer latents than k. In use, where there is no batch to compare
    with, a latent is active above a threshold that training estimates (Bussmann et al. 2024,
    "BatchTopK sparse autoencoders").
    """

    k: int = 32
    """Active latents per vector, on average."""

    def __post_init__(self) -> None:
        check_types(self, "sparsity.")
        if self.k < 1:
            raise UserError(f"sparsity.k is {self.k}; it must be at least 1.")


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


@dataclass(frozen=True)
class Matryoshka:
    """Reconstruct from prefixes of the dictionary as well, so that early latents stay general.

    The loss is the mean of the prefixes' errors (Bussmann et al. 2025, "Learning multi-level
    features with Matryoshka sparse autoencoders").
    """

    shares: tuple[float, ...] = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
    """Of the latents, in each prefix; rising, and the last is 1."""

    def __post_init__(self) -> None:
        check_types(self, "matryoshka.")
        rising = all(a < b for a, b in zip(self.shares, self.shares[1:], strict=False))
        if not self.shares or not rising or self.shares[0] <= 0 or self.shares[-1] != 1:
            raise UserError(
                f"matryoshka.shares are {self.shares}; they must be positive, rise, and end with 1."
            )

    def widths(self, n_latents: int) -> tuple[int, ...]:
        """Latents of each prefix, at least one; equal ones count once."""
        return tuple(sorted({max(1, round(share * n_latents)) for share in self.shares}))


@dataclass(frozen=True)
class AuxK:
    """Let dead latents model what the living ones leave over (Gao et al. 2024, appendix A.2)."""

    alpha: float = 1 / 32
    """Weight of the auxiliary loss."""

    k: int | None = None
    """Dead latents that are used per vector; None is the power of two nearest to d_in / 2."""

    dead_after: int | None = None
    """Vectors without an activation after which a latent counts as dead; None is 10,000,000 or a
    tenth of the run, whichever is smaller."""

    def __post_init__(self) -> None:
        check_types(self, "auxk.")
        if self.alpha <= 0:
            raise UserError(f"auxk.alpha is {self.alpha}; it must be positive (or auxk None).")
        if self.k is not None and self.k < 1:
            raise UserError(f"auxk.k is {self.k}; it must be at least 1.")
        if self.dead_after is not None and self.dead_after < 1:
            raise UserError(f"auxk.dead_after is {self.dead_after}; it must be at least 1.")


@dataclass(frozen=True)
class SAEConfig:
    """The parts of a `SparseAutoencoder`."""

    n_latents: int | None = None
    """Number of latents; None is `expansion` times the width of the activations."""

    expansion: int = 16
    """Latents per dimension of the activations; used where `n_latents` is None."""

    sparsity: TopK | BatchTopK = field(default_factory=TopK)
    """How few latents a vector may use."""

    normaliser: NormaliserKind = "scale"
    """"scale": subtract the mean, divide by one number so that E‖x‖² = d_in; "standardise": mean
    and deviation of each dimension; "none"."""

    unit_norm_decoder: bool = True
    """Keep each latent's decoder row at norm 1."""

    b_dec_init: BiasInit = "zero"
    """Where the decoder's bias starts, in normalised space; "mean" and "geometric_median" are
    estimated on a sample of the activations."""

    def __post_init__(self) -> None:
        check_types(self)
        if self.n_latents is not None and self.n_latents < 1:
            raise UserError(f"n_latents is {self.n_latents}; it must be at least 1.")
        if self.expansion < 1:
            raise UserError(f"expansion is {self.expansion}; it must be at least 1.")
        if self.n_latents is not None and self.sparsity.k > self.n_latents:
            raise UserError(
                f"sparsity.k is {self.sparsity.k}, more than the {self.n_latents} latents; "
                "lower k or raise n_latents."
            )

    def width(self, d_in: int) -> int:
        """Number of latents for activations of width `d_in`.

        Raises:
            UserError: k is more than that.
        """
        n_latents = self.n_latents or self.expansion * d_in
        if self.sparsity.k > n_latents:
            raise UserError(f"sparsity.k is {self.sparsity.k}, more than the {n_latents} latents.")
        return n_latents
