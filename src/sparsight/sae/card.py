"""The model card of an SAE: a README whose header the Hub reads.

Every saved SAE has the plain card that `model_card` makes from the SAE alone;
`sparsight.publishing`, which knows more, replaces parts of it and adds sections.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsight.redaction import without_folders
from sparsight.sae.autoencoder import SparseAutoencoder

UNKNOWN = "not recorded"
TAGS = ("sparse-autoencoder", "interpretability")

# What YAML reads as text without quotes; `yes`, `no`, `on`, `1.0`, `null`, … are not.
_PLAIN = re.compile(r"[A-Za-z][\w-]*/[\w./-]*\w|[a-z]+-[a-z-]*[a-z]|[a-z]{6,}")


@dataclass(frozen=True)
class ModelCard:
    """The parts of a model card; `text` puts them together."""

    title: str
    """The title, as plain text."""
    rows: Sequence[tuple[str, str]]
    """The table below the title, in Markdown; cells with `escape`."""
    usage: str
    """Python code that runs as it is."""
    header: Mapping[str, str | Sequence[str]] = field(default_factory=dict)
    """What the Hub reads in addition to the library's name and the tags."""
    sections: Sequence[tuple[str, str]] = ()
    """Heading and Markdown text of each section below the usage."""

    def text(self) -> str:
        """Return the text of the README."""
        parts = [f"# {escape(self.title)}", table(("", ""), self.rows), fenced(self.usage)]
        for heading, text in self.sections:
            parts += [f"## {heading}", text.strip()]
        header: dict[str, str | Sequence[str]] = {"library_name": "sparsight", "tags": TAGS}
        return f"---\n{_yaml({**header, **self.header})}---\n" + "\n\n".join(parts) + "\n"


def model_card(sae: SparseAutoencoder, place: str = "this folder or Hub id") -> ModelCard:
    """Make the card from what an SAE knows about itself: what it reads, its shape, its usage.

    Args:
        sae: the SAE.
        place: what `from_pretrained` takes.
    """
    about = sae.metadata
    id = str(model_of(sae).get("id", UNKNOWN))
    kind = "Transcoder" if sae.is_transcoder else "Sparse autoencoder"
    rows: dict[str, Any] = {"model": id, "site": about.get("site", UNKNOWN)}
    if sae.is_transcoder:
        rows["predicts"] = about.get("target_site", UNKNOWN)
    rows |= {
        "tokens": about.get("tokens", UNKNOWN),
        "images": about.get("images") or UNKNOWN,
        "width of the activations": f"{sae.d_in:,}",
        "latents": f"{sae.n_latents:,}",
        "sparsity": sae.config.sparsity.describe(training="source" not in sae.metadata),
        "normaliser": sae.config.normaliser,
        "vectors trained on": number(about.get("n_vectors")),
    }
    predicted = "y_hat" if sae.is_transcoder else "x_hat"
    return ModelCard(
        title=f"{kind} for {'a vision model' if id == UNKNOWN else without_folders(id)}",
        rows=[(name, escape(without_folders(str(value)))) for name, value in rows.items()],
        usage=(
            "import torch\n"
            "import sparsight as sp\n\n"
            f"sae = sp.SparseAutoencoder.from_pretrained({json.dumps(place)})\n"
            f"x = torch.randn(8, {sae.d_in})  # use activations at the site instead\n"
            "code = sae.encode(x)  # which latents are active, and how strongly\n"
            f"{predicted} = sae.decode(code)"
        ),
    )


def model_of(sae: SparseAutoencoder) -> Mapping[str, Any]:
    """Return what the SAE says about its vision model, at least its `id`; {} if nothing."""
    model = sae.metadata.get("model") or {}
    return model if isinstance(model, Mapping) else {"id": str(model)}


def number(value: Any) -> str:
    """Write a count with separators between thousands."""
    return f"{value:,}" if isinstance(value, int) else UNKNOWN if value is None else str(value)


def escape(text: str) -> str:
    """Put a text into one line in which Markdown and HTML have no meaning."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(" ".join(text.split()), quote=False))


def fenced(code: str, language: str = "python") -> str:
    """Return a block of code that no line in it can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", code)), default=0))
    return f"{fence}{language}\n{code.strip()}\n{fence}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table; its cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _yaml(values: Mapping[str, str | Sequence[str]]) -> str:
    lines: list[str] = []
    for key, value in values.items():
        if isinstance(value, str):
            lines.append(f"{key}: {_scalar(value)}")
        elif value:
            lines += [f"{key}:", *(f"- {_scalar(item)}" for item in value)]
    return "".join(line + "\n" for line in lines)


def _scalar(value: str) -> str:
    """Write a text as YAML; quoted as in JSON if it could be read as anything else."""
    return value if _PLAIN.fullmatch(value) else json.dumps(value, ensure_ascii=False)
