"""The text tower as a differentiable function of texts whose tokens are mixtures.

While a text of placeholders runs through the text tower, its token embeddings are replaced at some
positions, so that positions, masks and pooling are those of a text of that length, in any library.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sparsight.errors import UserError
from sparsight.vision.model import VisionModel

_WORD_ENDS = "</w>"  # of CLIP's byte pairs
_WORD_BEGINS = ("Ġ", "▁")  # of GPT-2's byte pairs and of SentencePiece


class SoftText:
    """The text tower of a model, from mixtures of its tokens to text embeddings.

    Args:
        model: a model with a text tower and its own tokenizer, from transformers or open_clip.

    Raises:
        UserError: the model has no text tower, or its tokens cannot be replaced.
    """

    def __init__(self, model: VisionModel) -> None:
        model._require_text()
        self.model = model
        self._tokenizer: Any = getattr(model, "tokenizer", None)
        tables = [
            part
            for name, part in model.module.named_modules()
            if name.endswith("token_embedding") and isinstance(part, nn.Embedding)
        ]
        if len(tables) != 1 or self._tokenizer is None:
            raise UserError(
                f"{model.id}: its text tower cannot take mixtures of tokens (found {len(tables)} "
                "tables of token embeddings); CLIP and SigLIP from transformers and CLIP from "
                "open_clip can."
            )
        self.table = tables[0]

    @cached_property
    def words(self) -> dict[int, str]:
        """The tokens that are whole words with two or more letters, by id."""
        special = set(getattr(self._tokenizer, "all_special_tokens", ()))
        special |= {"<start_of_text>", "<end_of_text>"}
        by_id = {
            number: token
            for number, token in sorted(self._tokens().items())
            if token not in special and number < self.table.num_embeddings
        }
        ends = any(token.endswith(_WORD_ENDS) for token in by_id.values())
        begins = any(token.startswith(_WORD_BEGINS) for token in by_id.values())
        found = {}
        for number, token in by_id.items():
            if (ends and not token.endswith(_WORD_ENDS)) or (
                begins and not ends and not token.startswith(_WORD_BEGINS)
            ):
                continue
            word = token.removesuffix(_WORD_ENDS).lstrip("".join(_WORD_BEGINS))
            if len(word) > 1 and word.isascii() and word.isalpha():
                found[number] = word
        if not found:
            raise UserError(f"{self.model.id}: its vocabulary has no whole words.")
        return found

    def embed(
        self, mixtures: Float[Tensor, "batch length words"]
    ) -> Float[Tensor, "batch d_embed"]:
        """Embed texts in float32, not normalised; gradients flow to the mixtures.

        Args:
            mixtures: for each text and position, the weights of the `words`, in their order.
        """
        table = self.table.weight[self._ids]
        return self._run(mixtures.to(table.dtype) @ table)

    def embed_ids(self, chosen: Int[Tensor, "batch length"]) -> Float[Tensor, "batch d_embed"]:
        """Do the same for one word per position, given by its place in `words`."""
        return self._run(self.table.weight[self._ids[chosen]])

    def _run(self, rows: Float[Tensor, "batch length d"]) -> Float[Tensor, "batch d_embed"]:
        ids, first = self._template(rows.shape[1])

        def replace(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            here = slice(first, first + rows.shape[1])
            after = output[:, here.stop :]
            return torch.cat([output[:, : here.start], rows.to(output.dtype), after], dim=1)

        handle = self.table.register_forward_hook(replace)
        try:
            return self._encode(ids.expand(len(rows), -1)).float()
        finally:
            handle.remove()

    def _encode(self, ids: Int[Tensor, "batch length"]) -> Tensor:
        module: Any = self.model.module
        if hasattr(module, "encode_text"):
            found: Tensor = module.encode_text(ids)
            return found
        features: Any = module.get_text_features(input_ids=ids)
        return features if isinstance(features, Tensor) else features.pooler_output

    @cached_property
    def _ids(self) -> Int[Tensor, " words"]:
        return torch.tensor(list(self.words), device=self.table.weight.device)

    def _template(self, length: int) -> tuple[Int[Tensor, "1 positions"], int]:
        """Return the ids of a text of placeholders, and the position of the first of them."""
        before, after = self._ends
        filler = int(self._ids[0])
        ids = [*before, *[filler] * length, *after]
        if len(ids) > self._context():
            raise UserError(
                f"{self.model.id} reads {self._context()} tokens; {length} words do not fit. Ask "
                "for fewer."
            )
        if self._pads is not None:
            ids += [self._pads] * (self._context() - len(ids))
        return torch.tensor([ids], device=self.table.weight.device), len(before)

    @cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """The tokens that the tokenizer puts before and after a text."""
        word = next(iter(self.words.values()))
        empty, full = self._encoded(""), self._encoded(word)
        shared = 0
        while shared < len(empty) and shared < len(full) and empty[shared] == full[shared]:
            shared += 1
        return empty[:shared], empty[shared:]

    def _encoded(self, text: str) -> list[int]:
        if callable(getattr(self._tokenizer, "convert_ids_to_tokens", None)):
            found: list[int] = self._tokenizer(text)["input_ids"]
            return found
        row = self._tokenizer([text])[0].tolist()
        return row[: row.index(self._tokenizer.eot_token_id) + 1]  # type: ignore[no-any-return]

    @cached_property
    def _pads(self) -> int | None:
        """The token that fills a text up to the full length, if the tower needs that."""
        if hasattr(self.model.module, "encode_text"):
            return 0
        if self.model.family.startswith("siglip"):
            return int(self._tokenizer.pad_token_id)
        return None

    def _context(self) -> int:
        module: Any = self.model.module
        if hasattr(module, "encode_text"):
            return int(module.context_length)
        return int(module.config.text_config.max_position_embeddings)

    def _tokens(self) -> dict[int, str]:
        if callable(getattr(self._tokenizer, "get_vocab", None)):
            return {number: token for token, number in self._tokenizer.get_vocab().items()}
        decoder = getattr(self._tokenizer, "decoder", None)
        if decoder is None or not hasattr(self._tokenizer, "eot_token_id"):
            raise UserError(
                f"{self.model.id}: its tokenizer ({type(self._tokenizer).__name__}) does not list "
                "its words; CLIP's own does."
            )
        return dict(decoder)
