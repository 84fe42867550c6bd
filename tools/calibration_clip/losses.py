"""What the calibration CLIP minimises: the truth read from it, and the two towers tied."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from sparsight.calibration.captions import BACKGROUND_TEMPLATES, TEMPLATES, WORD_TEMPLATES
from sparsight.calibration.clip import embed_texts, tokenize
from sparsight.calibration.symbols import COLOURS, PATTERNS, SYMBOLS
from tools.calibration_clip.batches import Batch

LARGEST_LOGIT_SCALE = 100.0


class TruthHeads(nn.Module):
    """Linear readers of the truth, for training only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        n_symbols, n_colours = len(SYMBOLS), len(COLOURS)
        self.norm = nn.LayerNorm(width)
        self.patch = nn.ModuleDict(
            {
                "symbol": nn.Linear(width, n_symbols + 1),
                "colour": nn.Linear(width, n_colours + 1),
                "word": nn.Linear(width, n_symbols + 1),
                "letters": nn.Linear(width, 26),
            }
        )
        self.scene = nn.ModuleDict(
            {
                "symbols": nn.Linear(width, n_symbols),
                "colours": nn.Linear(width, n_colours),
                "background": nn.Linear(width, n_colours),
                "pattern": nn.Linear(width, len(PATTERNS)),
                "word": nn.Linear(width, n_symbols + 1),
            }
        )

    def forward(
        self,
        patches: Float[Tensor, "batch patches width"],
        pooled: Float[Tensor, "batch width"],
        batch: Batch,
    ) -> Float[Tensor, ""]:
        """The summed loss of all readers."""
        patches = self.norm(patches)
        read = {name: head(patches).float() for name, head in self.patch.items()}
        of_patches = (
            _where_shown(read["symbol"], batch.patch_symbol, len(SYMBOLS))
            + 0.3 * _where_shown(read["colour"], batch.patch_colour, len(COLOURS))
            + 0.5 * _where_shown(read["word"], batch.patch_word, len(SYMBOLS))
        )
        letters = functional.binary_cross_entropy_with_logits(
            read["letters"], batch.patch_letters, pos_weight=read["letters"].new_tensor(5.0)
        )
        seen = {name: head(pooled).float() for name, head in self.scene.items()}
        of_scene = (
            _soft(seen["symbols"], batch.symbols)
            + 0.3 * _soft(seen["colours"], batch.colours)
            + 0.3 * functional.cross_entropy(seen["background"], batch.background)
            + 0.3 * functional.cross_entropy(seen["pattern"], batch.pattern)
            + 0.5 * functional.cross_entropy(seen["word"], batch.word)
        )
        return of_patches + 5 * letters + of_scene


class Prompts:
    """Tokenized prompts for all names, under templates that change from step to step."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._families = {
            "symbol": [[t.format(name) for name in SYMBOLS] for t in TEMPLATES],
            "word": [[t.format(name) for name in SYMBOLS] for t in WORD_TEMPLATES],
            "ground": [
                [t.format(name) for name in (*COLOURS, *PATTERNS)] for t in BACKGROUND_TEMPLATES
            ],
        }

    def of(self, family: str, step: int) -> list[str]:
        """The prompts of a family at a step."""
        choices = self._families[family]
        return choices[step % len(choices)]


def contrastive_loss(
    model: Any,
    prompts: Prompts,
    images: Float[Tensor, "batch d"],
    batch: Batch,
    step: int,
    word_share: float,
) -> Float[Tensor, ""]:
    """InfoNCE over symbols' names, words or grounds in turn, and the batch's captions."""
    second = "word" if step % 2 else "ground"
    captions = sorted(set(batch.captions))
    texts = [*prompts.of("symbol", step), *prompts.of(second, step // 2), *captions]
    tokens = tokenize(prompts.tokenizer, texts)
    embedded = embed_texts(model, {name: each.to(images.device) for name, each in tokens.items()})
    scale = model.logit_scale.exp().clamp(max=LARGEST_LOGIT_SCALE)
    logits = (scale * images @ embedded.T).float()
    n_first = len(SYMBOLS)
    n_second = len(texts) - n_first - len(captions)
    of_symbols, of_second, of_captions = logits.split([n_first, n_second, len(captions)], dim=1)

    objects = batch.symbols / batch.symbols.sum(dim=-1, keepdim=True)
    written = functional.one_hot(batch.word, n_first + 1)[:, :n_first].float()
    has_word = written.sum(dim=-1, keepdim=True)
    loss = _soft(of_symbols, objects * (1 - word_share * has_word) + word_share * written)
    if second == "word":
        rows = has_word[:, 0] > 0
        if rows.any():
            loss = loss + functional.cross_entropy(of_second[rows], batch.word[rows])
    else:
        colours, patterns = of_second.split([len(COLOURS), len(PATTERNS)], dim=1)
        loss = loss + 0.3 * functional.cross_entropy(colours, batch.background)
        loss = loss + 0.3 * functional.cross_entropy(patterns, batch.pattern)
    column = {text: number for number, text in enumerate(captions)}
    own = torch.tensor([column[text] for text in batch.captions], device=images.device)
    positives = functional.one_hot(own, len(captions)).float()
    both_ways = _soft(of_captions, positives) + _soft(of_captions.T, positives.T)
    return loss + 0.5 * both_ways


def _where_shown(
    logits: Float[Tensor, "batch patches classes"], truth: Int[Tensor, "batch patches"], none: int
) -> Float[Tensor, ""]:
    """Cross-entropy, averaged over patches that show something, and apart over the empty ones."""
    loss = functional.cross_entropy(logits.flatten(0, 1), truth.flatten(), reduction="none")
    shown = (truth.flatten() != none).float()
    of_shown = (loss * shown).sum() / shown.sum().clamp(min=1)
    return of_shown + 0.3 * (loss * (1 - shown)).sum() / (1 - shown).sum().clamp(min=1)


def _soft(
    logits: Float[Tensor, "batch classes"], weights: Float[Tensor, "batch classes"]
) -> Float[Tensor, ""]:
    """Cross-entropy with the classes of a row sharing the target in proportion to `weights`."""
    target = weights / weights.sum(dim=-1, keepdim=True).clamp(min=1e-6)
    return -(target * logits.log_softmax(dim=-1)).sum(dim=-1).mean()
