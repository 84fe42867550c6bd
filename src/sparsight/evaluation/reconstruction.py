"""How well activations are reconstructed: streaming sums in float64."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.errors import SparsightError, UserError


class ReconstructionMeter:
    """Sums over vectors x and their reconstructions x̂, batch by batch.

    Every figure but `fvu_batch` is independent of how the data set is cut into batches.

    Args:
        n_tokens: positions per image.
        d_in: width of the activations.
        device: device of the sums.
        what: name of what is measured, for messages.
    """

    def __init__(
        self,
        n_tokens: int,
        d_in: int,
        device: torch.device | str = "cpu",
        what: str = "reconstruction",
    ) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.what = what
        self.n_images = 0
        self._sum = zeros(n_tokens, d_in)
        self._squares, self._errors = zeros(n_tokens), zeros(n_tokens)
        self._cosine, self._hat_squares, self._products = zeros(), zeros(), zeros()
        self._clipscope_ev, self._clipscope_n = zeros(), zeros()
        self._batch_fvu, self._batches = zeros(), zeros()

    def add(
        self, x: Float[Tensor, "batch tokens d_in"], x_hat: Float[Tensor, "batch tokens d_in"]
    ) -> None:
        """Add a batch of images.

        Raises:
            UserError: the shapes differ from each other, or from the number of positions and the
                width.
        """
        if x.shape != x_hat.shape or x.shape[1:] != self._sum.shape:
            raise UserError(
                f"{self.what}: x is {list(x.shape)} and x̂ {list(x_hat.shape)}; both must be "
                f"[batch, {self._sum.shape[0]}, {self._sum.shape[1]}]."
            )
        x, x_hat = x.double(), x_hat.double()
        squares = x.square().sum(dim=2)
        errors = (x - x_hat).square().sum(dim=2)
        hat_squares = x_hat.square().sum(dim=2)
        products = (x * x_hat).sum(dim=2)
        total = x.sum(dim=0)
        self.n_images += len(x)
        self._sum += total
        self._squares += squares.sum(dim=0)
        self._errors += errors.sum(dim=0)
        self._hat_squares += hat_squares.sum()
        self._products += products.sum()
        # A zero vector has no direction: its cosine counts as 0.
        norms = (squares * hat_squares).sqrt()
        self._cosine += torch.where(norms > 0, products / norms, 0).sum()
        spread = squares - x.sum(dim=2).square() / x.shape[2]
        varies = spread > 1e-12 * squares
        self._clipscope_ev += torch.where(varies, 1 - errors / spread, 0).sum()
        self._clipscope_n += varies.sum()
        variance = squares.sum() - total.sum(dim=0).square().sum() / squares.numel()
        counts = variance > 1e-12 * squares.sum()
        self._batch_fvu += torch.where(counts, errors.sum() / variance, 0)
        self._batches += counts

    def result(self, n_prefix: int | None = None, has_cls: bool = False) -> dict[str, Any]:
        """Return the figures of docs/concepts/metrics.md, for JSON; None if one is not defined.

        Args:
            n_prefix: number of measured positions before the first patch; None without a grid of
                patches (one vector per image).
            has_cls: whether the first of them is CLS. If patches follow, CLS and patches each get
                an FVU of their own, centred on their own mean.

        Raises:
            UserError: no vectors were added.
            SparsightError: a sum is not finite.
        """
        n_tokens, d_in = self._sum.shape
        n = self.n_images * n_tokens
        if n == 0:
            raise UserError(f"{self.what}: no vectors to measure.")
        self.check_finite()
        squares, errors = self._squares.sum(), self._errors.sum()
        variance = squares - self._sum.sum(dim=0).square().sum() / n
        by_position = self._squares - self._sum.square().sum(dim=1) / self.n_images
        fvu = _ratio(errors, variance, squares)
        result: dict[str, Any] = {
            "fvu": fvu,
            "explained_variance": None if fvu is None else 1 - fvu,
            "mse": float(errors) / (n * d_in),
            "clipscope_mse": float(errors) / n,
            "clipscope_ev": _mean(self._clipscope_ev, self._clipscope_n),
            "fvu_batch": _mean(self._batch_fvu, self._batches),
            "cosine": float(self._cosine) / n,
            "relative_bias": _ratio(self._hat_squares, self._products, squares),
            "fvu_by_position": [
                _ratio(*of) for of in zip(self._errors, by_position, self._squares, strict=True)
            ],
            "mse_by_position": (self._errors / (self.n_images * d_in)).tolist(),
        }
        if n_prefix is not None and n_tokens > n_prefix > 0 and has_cls:
            result["fvu_cls"] = self._fvu_of(0, 1)
            result["fvu_patches"] = self._fvu_of(n_prefix, n_tokens)
        return result

    def check_finite(self) -> None:
        """Raise a `SparsightError` if an activation or a reconstruction was NaN or infinite."""
        if not bool(torch.isfinite(self._errors).all() & torch.isfinite(self._squares).all()):
            raise SparsightError(f"{self.what}: activations or reconstructions are not finite.")

    def _fvu_of(self, first: int, stop: int) -> float | None:
        """Return the FVU of the positions `first` … `stop − 1` alone."""
        total = self._sum[first:stop].sum(dim=0)
        squares, n = self._squares[first:stop].sum(), self.n_images * (stop - first)
        return _ratio(self._errors[first:stop].sum(), squares - total.square().sum() / n, squares)

    @property
    def mean(self) -> Float[Tensor, " d_in"]:
        """x̄, float64."""
        return self._sum.sum(dim=0) / (self.n_images * len(self._sum))


def _ratio(top: Tensor, bottom: Tensor, size: Tensor) -> float | None:
    """Return `top / bottom`; None if the bottom is only rounding error compared with `size`."""
    return float(top / bottom) if float(bottom.abs()) > 1e-12 * float(size) else None


def _mean(total: Tensor, n: Tensor) -> float | None:
    return float(total / n) if float(n) else None
