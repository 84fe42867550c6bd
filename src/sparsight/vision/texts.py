"""`TextEmbedder`: embed texts in the space that they share with images."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sparsight.errors import UserError
from sparsight.text import without_surrogates


class TextEmbedder(ABC):
    """What a `VisionModel` does with texts, if it has a text tower.

    Attributes:
        id: what `load_model` was called with.
        family: the architecture's name.
        module: the underlying torch module, text tower included.
        has_text: whether `embed_texts` is available.
    """

    id: str
    family: str
    module: nn.Module
    has_text: bool

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the weights are."""

    @abstractmethod
    def _tokenize(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Tokenize texts on the CPU and truncate long ones; called only if `has_text`."""

    @abstractmethod
    def _count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text, start and end included; called only if `has_text`."""

    @abstractmethod
    def _embed_tokens(self, tokens: Mapping[str, Tensor]) -> Float[Tensor, "n d_embed"]:
        """Embed one batch of the output of `_tokenize`; called only if `has_text`."""

    @abstractmethod
    def _context_length(self) -> int:
        """Return how many tokens the text tower takes; called only if `has_text`."""

    @property
    def context_length(self) -> int:
        """The number of tokens that a text may have, start and end included.

        Raises:
            UserError: the model has no text tower.
        """
        self._require_text()
        return self._context_length()

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """Count the tokens of each text before truncation, start and end included.

        Raises:
            UserError: the model has no text tower.
        """
        self._require_text()
        return self._count_tokens([without_surrogates(text) for text in texts])

    def tokenize(self, texts: Sequence[str], *, truncate: bool = True) -> dict[str, Tensor]:
        """Turn texts into the input of `embed_tokens`.

        Args:
            texts: at least one.
            truncate: truncate texts that are longer than `context_length`; False refuses them.

        Returns:
            Tensors on the CPU by name, one row per text: `input_ids`, and whatever else the text
            tower needs.

        Raises:
            UserError: the model has no text tower, `texts` is empty or a bare string, or
                a text is too long and `truncate` is False.
        """
        self._require_text()
        if isinstance(texts, str) or not texts:
            raise UserError("tokenize takes a list of at least one text.")
        texts = [without_surrogates(text) for text in texts]  # tokenizers refuse surrogates
        if not truncate:
            self._refuse_long(texts)
        return self._tokenize(texts)

    def embed_tokens(self, tokens: Mapping[str, Tensor]) -> Float[Tensor, "n d_embed"]:
        """Embed one batch of the output of `tokenize`, in float32, not normalised.

        Runs under autograd if gradients are on.

        Raises:
            UserError: the model has no text tower.
        """
        self._require_text()
        here = {name: ids.to(self.device, non_blocking=True) for name, ids in tokens.items()}
        return self._embed_tokens(here).float()

    def embed_texts(
        self, texts: Sequence[str], batch_size: int = 256, *, truncate: bool = True
    ) -> Float[Tensor, "n d_embed"]:
        """Embed texts in float32, not normalised, `batch_size` at a time.

        Args:
            texts: at least one.
            batch_size: texts in one pass.
            truncate: truncate texts that are longer than `context_length`; False refuses them.

        Raises:
            UserError: the model has no text tower, `texts` is empty or a bare string, or
                a text is too long and `truncate` is False.
        """
        self._require_text()
        if isinstance(texts, str) or not texts:
            raise UserError("embed_texts takes a list of at least one text.")
        texts = [without_surrogates(text) for text in texts]
        if not truncate:
            self._refuse_long(texts)
        batches = [list(texts[i : i + batch_size]) for i in range(0, len(texts), batch_size)]
        return torch.cat([self.embed_tokens(self._tokenize(batch)) for batch in batches])

    @property
    def logit_scale(self) -> float:
        """The factor that turns cosine similarities into logits (already exponentiated).

        Raises:
            UserError: the model has no text tower.
        """
        self._require_text()
        return float(self.module.logit_scale.detach().exp())  # type: ignore[operator]

    @property
    def logit_bias(self) -> float:
        """The bias that is added to the logits: SigLIP's, otherwise 0. It changes no ranking."""
        bias = getattr(self.module, "logit_bias", None)
        return 0.0 if bias is None else float(bias)

    def _require_text(self) -> None:
        if not self.has_text:
            raise UserError(
                f"{self.id} ({self.family}) has no text tower, so text embeddings and zero-shot "
                "classification are not available. CLIP and SigLIP models have one."
            )

    def _refuse_long(self, texts: Sequence[str]) -> None:
        limit = self._context_length()
        counts = self._count_tokens(texts)
        long = [i for i, count in enumerate(counts) if count > limit]
        if not long:
            return
        first = long[0]
        text = texts[first] if len(texts[first]) <= 80 else f"{texts[first][:77]}..."
        others = f" {len(long)} texts are too long." if len(long) > 1 else ""
        raise UserError(
            f"Text {first + 1} of {len(texts)} is too long for {self.id}: it has {counts[first]} "
            f"tokens, and {limit} fit, start and end included ({text!r}).{others} Shorten it, or "
            "truncate it with truncate=True."
        )
