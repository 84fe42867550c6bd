"""DN-CBM (Rao et al. 2024): the bare state of ai-safety-foundation's sparse autoencoder.

ReLU((x − tied_bias) encᵀ + bias) decᵀ + tied_bias, on CLIP embeddings.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from sparsight.errors import SparsightError, UserError
from sparsight.formats.base import Candidate, Foreign, Format, need
from sparsight.pickles import shown
from sparsight.sae.config import SAEConfig
from sparsight.sae.sparsity import ReLU

_TENSORS = ("encoder._weight", "encoder._bias", "decoder._weight", "tied_bias")
_COPIES = ("pre_encoder_bias._bias_reference", "post_decoder_bias._bias_reference")


class DNCBM(Format):
    """The files `sparse_autoencoder_final.pt` of Discover-then-Name."""

    name = "dncbm"
    title = "DN-CBM"

    def recognises(self, candidate: Candidate) -> bool:
        """Return whether a file has encoder, decoder and shared bias under the project's names."""
        return candidate.find(*_TENSORS) is not None

    def load(self, candidate: Candidate) -> Foreign:
        """Read the file.

        Raises:
            UserError: it holds several components.
            SparsightError: the file is damaged.
        """
        file = candidate.find(*_TENSORS)
        assert file is not None
        path = candidate.folder / file
        tensors = candidate.tensors(file)
        ranks = (2, 1, 2, 1)
        encoder, bias, decoder, tied = (
            _single(tensor, rank, path)
            for tensor, rank in zip(need(tensors, _TENSORS, path), ranks, strict=True)
        )
        for key in _COPIES:
            copy = tensors.get(key)
            if copy is not None and not torch.equal(copy.reshape(-1), tied):
                raise SparsightError(f"{path}: {key} is not a copy of tied_bias, as it should be.")
        return Foreign(
            format=self.name,
            d_in=encoder.shape[1],
            config=SAEConfig(
                n_latents=encoder.shape[0],
                sparsity=ReLU(),
                normaliser="none",
                unit_norm_decoder=False,
            ),
            tensors={"W_enc": encoder, "b_enc": bias, "W_dec": decoder.T, "b_dec": tied},
            metadata={"site": "embedding", "source": candidate.source(self.name, file)},
            unknown=tuple(sorted(set(candidate.keys(file)) - {*_TENSORS, *_COPIES})),
        )


def _single(tensor: Tensor, rank: int, path: Path) -> Tensor:
    """Return a tensor without the axis of components, of which there must be one."""
    if tensor.ndim == rank + 1:
        if len(tensor) != 1:
            raise UserError(
                f"{path}: holds {len(tensor)} SAEs, one per component; Sparsight reads files "
                "with one."
            )
        return tensor[0]
    if tensor.ndim != rank:
        raise SparsightError(
            f"{path}: a tensor is {shown(list(tensor.shape))}, expected {rank} axes."
        )
    return tensor
