"""DN-CBM (Rao et al. 2024): the bare state of ai-safety-foundation's sparse autoencoder.

ReLU((x − tied_bias) encᵀ + bias) decᵀ + tied_bias, on embeddings of CLIP.
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
    """`sparse_autoencoder_final.pt` of Discover-then-Name."""

    name = "dncbm"
    title = "DN-CBM"

    def recognises(self, found: Candidate) -> bool:
        """Encoder, decoder and the bias that they share, under their names with underscores."""
        return found.find(*_TENSORS) is not None

    def load(self, found: Candidate) -> Foreign:
        """Read it.

        Raises:
            UserError: it is of several components at once.
            SparsightError: the file is damaged.
        """
        file = found.find(*_TENSORS)
        assert file is not None
        path = found.folder / file
        tensors = found.tensors(file)
        ranks = (2, 1, 2, 1)
        encoder, bias, decoder, tied = (
            _single(each, rank, path)
            for each, rank in zip(need(tensors, _TENSORS, path), ranks, strict=True)
        )
        for key in _COPIES:
            copy = tensors.get(key)
            if copy is not None and not torch.equal(copy.reshape(-1), tied):
                raise SparsightError(f"{path}: {key} is not tied_bias, of which it is a copy.")
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
            metadata={"site": "embedding", "source": found.source(self.name, file)},
            unknown=tuple(sorted(set(found.keys(file)) - {*_TENSORS, *_COPIES})),
        )


def _single(tensor: Tensor, rank: int, path: Path) -> Tensor:
    """A tensor without the axis of components, of which there must be one."""
    if tensor.ndim == rank + 1:
        if len(tensor) != 1:
            raise UserError(
                f"{path}: holds {len(tensor)} SAEs, one a component; Sparsight reads files of one."
            )
        return tensor[0]
    if tensor.ndim != rank:
        raise SparsightError(
            f"{path}: a tensor is {shown(list(tensor.shape))}, expected {rank} axes."
        )
    return tensor
