"""The sparse autoencoder: one class, put together from the parts that its configuration names."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsight.errors import UserError
from sparsight.sae.code import SparseCode
from sparsight.sae.config import BatchTopK, SAEConfig
from sparsight.sae.initialisation import initial_parameters
from sparsight.sae.kernels import backend
from sparsight.sae.normaliser import Normaliser


class SAEOutput(NamedTuple):
    """What a forward pass gives."""

    x_hat: Float[Tensor, "batch d_in"]
    """The reconstruction, in the units of x."""

    code: SparseCode
    """The active latents."""


class SparseAutoencoder(nn.Module):
    """Activations in and out in the model's own units; the normaliser is inside.

    With z = normaliser(x): the code is TopK(W_enc (z − b_dec) + b_enc), its values at least 0; the
    reconstruction is normaliser⁻¹(Σ f_i W_dec[i] + b_dec) (Gao et al. 2024, section 2.3). Rows are
    latents in both matrices. With `BatchTopK` the k · batch largest of a batch are kept while
    training (`train()`), and all from `threshold` on in use (`eval()`).

    Args:
        d_in: width of the activations.
        config: the parts.
        normaliser: fitted to the activations; the identity if None.
        sample: some activations in normalised space, for the scale of the initial encoder.
        seed: of the initial parameters.
        metadata: where the SAE belongs: model, site, tokens, images, …; JSON-able.

    Raises:
        UserError: k is more than the number of latents.
    """

    def __init__(
        self,
        d_in: int,
        config: SAEConfig | None = None,
        *,
        normaliser: Normaliser | None = None,
        sample: Float[Tensor, "batch d_in"] | None = None,
        seed: int = 0,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        config = config or SAEConfig()
        self.d_in = d_in
        self.n_latents = config.width(d_in)
        self.config = dataclasses.replace(config, n_latents=self.n_latents)
        self.metadata: dict[str, Any] = dict(metadata or {})
        start = initial_parameters(d_in, self.config, seed, sample)
        self.W_enc = nn.Parameter(start["W_enc"])
        self.b_enc = nn.Parameter(start["b_enc"])
        self.W_dec = nn.Parameter(start["W_dec"])
        self.b_dec = nn.Parameter(start["b_dec"])
        self.threshold: Tensor | None
        batch = isinstance(config.sparsity, BatchTopK)
        self.register_buffer("threshold", torch.zeros(()) if batch else None)
        self.normaliser = normaliser or Normaliser.identity(d_in, config.normaliser)

    def encode(self, x: Float[Tensor, "batch d_in"]) -> SparseCode:
        """The active latents of each vector.

        Raises:
            UserError: the vectors have another width.
        """
        self._check(x)
        z = self.normaliser(x)
        parameters = (self.W_enc, self.b_enc, self.b_dec)
        k = self.config.sparsity.k
        if self.threshold is None:
            values, indices = backend().encode_topk(z, *parameters, k)
            return SparseCode.from_padded(values, indices, self.n_latents)
        if self.training:
            found = backend().encode_batch_topk(z, *parameters, k)
        else:
            found = backend().encode_above(z, *parameters, float(self.threshold))
        return SparseCode.from_ragged(*found, self.n_latents)

    def decode(self, code: SparseCode) -> Float[Tensor, "batch d_in"]:
        """The reconstruction of a code, in the units of x."""
        values = code.values.to(self.W_dec.dtype)
        z_hat = backend().decode(values, code.indices, code.offsets, self.W_dec, self.b_dec)
        out: Tensor = self.normaliser.invert(z_hat)
        return out

    def forward(self, x: Float[Tensor, "batch d_in"]) -> SAEOutput:
        """Encode and decode."""
        code = self.encode(x)
        return SAEOutput(self.decode(code), code)

    def fold(self) -> SparseAutoencoder:
        """The same function of x without a normaliser; the codes are the same, too.

        With x̂ = s ⊙ (f W_dec + b_dec) + m: W_enc ← W_enc / s, W_dec ← s ⊙ W_dec and
        b_dec ← s ⊙ b_dec + m. Decoder rows no longer have norm 1.
        """
        folded = SparseAutoencoder(
            self.d_in,
            dataclasses.replace(self.config, normaliser="none", unit_norm_decoder=False),
            metadata=self.metadata,
        ).to(self.W_enc.device, self.W_enc.dtype)
        mean, scale = self.normaliser.mean, self.normaliser.scale
        with torch.no_grad():
            folded.W_enc.copy_(self.W_enc / scale)
            folded.b_enc.copy_(self.b_enc)
            folded.W_dec.copy_(self.W_dec * scale)
            folded.b_dec.copy_(self.b_dec * scale + mean)
            if folded.threshold is not None and self.threshold is not None:
                folded.threshold.copy_(self.threshold)
        folded.train(self.training)
        return folded

    def fingerprint(self) -> str:
        """Hex SHA-256 over the parameters: the same in memory, saved, and loaded again."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
            data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
            digest.update(data.numpy().data)
        return digest.hexdigest()

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write `config.json`, `sae.safetensors` and a model card; see `sparsight.sae.files`."""
        from sparsight.sae.files import save

        return save(self, Path(folder))

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, revision: str | None = None, device: str | None = None
    ) -> SparseAutoencoder:
        """Load from a folder or a Hub id; see `sparsight.sae.files`.

        Raises:
            UserError: there is no SAE at that place.
            SparsightError: its files are damaged.
        """
        from sparsight.sae.files import load

        return load(name, revision=revision, device=device)

    def _check(self, x: Tensor) -> None:
        if x.ndim != 2 or x.shape[1] != self.d_in:
            raise UserError(
                f"The SAE takes vectors of width {self.d_in} as [batch, {self.d_in}]; "
                f"got a tensor of shape {list(x.shape)}."
            )
