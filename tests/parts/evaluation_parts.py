"""Small real parts: a CLIP with text tower, pictures with labels and captions, activations."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from sparsight.calibration import CalibrationWorld, RenderedScene, Scene
from sparsight.errors import UserError
from sparsight.images import CalibrationImages, ImageInfo, ImageSource
from sparsight.sae import SAEConfig, SparseAutoencoder, TopK

LABELS = ("cat", "dog", "sun", "anchor", "red_rose", "fish", "tree")
SITE = "blocks.1.resid_post"
N_TOKENS = 17

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


def save_model(family: str, folder: Path) -> Path:
    """A model with random weights: 3 blocks, width 32, 32-pixel pictures, 4 × 4 patches."""
    torch.manual_seed(0)
    tower = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 32,
        "patch_size": 8,
    }
    words = ["<pad>", "<unk>", "<start>", "a", "photo", "of", ".", *LABELS, "red", "rose", "<end>"]
    text = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": len(words),
        "max_position_embeddings": 16,
        "eos_token_id": len(words) - 1,
        "bos_token_id": 2,
        "pad_token_id": 0,
    }
    if family == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=tower, projection_dim=16))
        kind = CLIPImageProcessor
    else:
        model = SiglipModel(
            SiglipConfig(text_config=text | {"projection_size": 32}, vision_config=tower)
        )
        kind = SiglipImageProcessor
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
        model.logit_scale.fill_(3.0)
    model.save_pretrained(folder)
    kind(size={"height": 32, "width": 32}, do_center_crop=False).save_pretrained(folder)
    tok = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Whitespace()
    tok.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 2), ("<end>", len(words) - 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
        model_max_length=16,
    ).save_pretrained(folder)
    return folder


class Pictures(ImageSource):
    """Pictures of noise; every `without`-th has neither label nor caption."""

    def __init__(self, n: int, without: int = 0) -> None:
        self.n, self.without, self.spec = n, without, f"noise:{n}"

    def __len__(self) -> int:
        return self.n

    def info(self, index: int) -> ImageInfo:
        if self.without and index % self.without == 0:
            return ImageInfo(str(index), str(index))
        label = LABELS[(3 * index) % len(LABELS)]
        other = LABELS[(5 * index + index // 7) % len(LABELS)]
        return ImageInfo(str(index), str(index), label, f"a {label} of {other}")

    def load(self, index: int) -> Image.Image:
        pixels = torch.randint(0, 256, (4, 4, 3), generator=torch.Generator().manual_seed(index))
        return Image.fromarray(pixels.byte().numpy()).resize((32, 32), Image.Resampling.NEAREST)

    def fingerprint(self) -> str:
        return self.spec


class Scenes(CalibrationImages):
    """Scenes of the calibration world, each drawn once in the life of the process."""

    def scene(self, index: int) -> Scene:
        return _rendered(self.seed, self.number(index)).scene

    def render(self, index: int) -> RenderedScene:
        return _rendered(self.seed, self.number(index))


@functools.cache
def _rendered(seed: int, number: int) -> RenderedScene:
    return CalibrationWorld(number + 1, seed).render(number)


class TensorActivations:
    """Activations [images, tokens, d_in] in memory."""

    def __init__(
        self,
        x: Tensor,
        images: ImageSource | None = None,
        *,
        tokens: str = "all",
        site: str = SITE,
        n_prefix: int = 1,
        grid: tuple[int, int] | None = None,
        indices: Sequence[int] | None = None,
        **model_info: Any,
    ) -> None:
        self.x, self.images, self.tokens, self.sites = x, images, tokens, (site,)
        self.n_images, self.n_tokens = len(x), {site: x.shape[1]}
        self.indices = torch.tensor(indices) if indices is not None else torch.arange(len(x))
        self.model_info = {"patch_grid": grid, "n_prefix": n_prefix, **model_info}

    def canonical_site(self, site: str) -> str:
        if site not in self.sites:
            raise UserError(f"holds no site {site!r}, only: {', '.join(self.sites)}")
        return site

    def d_in(self, site: str) -> int:
        return self.x.shape[2]

    def source(self) -> ImageSource:
        if self.images is None:
            raise OSError("the pictures are gone")
        return self.images

    def ordered(self, sites: Sequence[str], batch_images: int = 64) -> Iterator[SimpleNamespace]:
        for start in range(0, len(self.x), batch_images):
            part = slice(start, start + batch_images)
            yield SimpleNamespace(
                image_indices=self.indices[part], activations={sites[0]: self.x[part]}
            )


def make_sae(
    d_in: int = 32, n_latents: int = 96, k: int = 4, normaliser: Any = None, **metadata: Any
) -> SparseAutoencoder:
    config = SAEConfig(n_latents=n_latents, sparsity=TopK(k=k), normaliser="none")
    sae = SparseAutoencoder(
        d_in,
        config,
        normaliser=normaliser,
        seed=1,
        metadata={"site": SITE, "tokens": "all"} | metadata,
    )
    return sae.requires_grad_(False)


def perfect_sae(d_in: int, **metadata: Any) -> SparseAutoencoder:
    """Latents ±x_j: the reconstruction is x to the last bit."""
    sae = make_sae(d_in, 2 * d_in, d_in, **metadata)
    eye = torch.eye(d_in)
    sae.W_enc.copy_(torch.cat([eye, -eye]))
    sae.W_dec.copy_(torch.cat([eye, -eye]))
    return sae
