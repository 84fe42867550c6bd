"""`sparsight export`: write a CLIP in another program's layout, and check that it is the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from sparsight.cli.help import Help
from sparsight.cli.options import CommandOptions, parse
from sparsight.cli.printing import print_notes
from sparsight.errors import UserError
from sparsight.vision.layouts import KEPT_POSITIONS
from sparsight.vision.load import DTYPES, load_model
from sparsight.vision.saving import FILES, Layout, SavedModel, write_model

HELP = Help(
    examples=(
        "runs/tuned/model --layout openai --out tuned.safetensors",
        "openai/clip-vit-large-patch14 --layout open_clip --out for-open-clip/",
    ),
    needed=("model", "out"),
)


@dataclass(frozen=True)
class ExportOptions(CommandOptions):
    """Write a CLIP in another layout, read the copy back, and compare the embeddings of both
    models.

    MODEL is a Hub id, a folder, `open_clip:NAME/PRETRAINED`, `calibration`, or a file of weights in
    OpenAI's layout, such as fine-tuning programs write.
    """

    model: tyro.conf.Positional[str] = ""
    """Hub id, folder, file, `open_clip:…` or `calibration`."""

    layout: Layout = "huggingface"
    """huggingface: a folder for transformers; openai: a state dict with the parameter names of
    OpenAI's code; open_clip: a folder for open_clip's local-dir: scheme."""

    out: Path | None = None
    """Folder to write into; it must be new or empty. The openai layout also allows a new file whose
    name ends in .safetensors or .pt. Required."""

    gmp: bool = False
    """Write the MLPs in the geometric parametrisation (.r and .theta); openai layout only."""

    positions: int | None = None
    """Extend the text context to this many tokens: 248 turns CLIP's 77 positions into
    Long-CLIP's table."""

    kept: int | None = None
    """Number of initial positions that --positions leaves unchanged; default: 20."""

    long_clip: bool = False
    """Write Long-CLIP's two position tables instead of one; openai layout only."""

    dtype: Literal["float32", "bfloat16", "float16"] | None = None
    """Type of the weights on disk; default: float32."""

    tokenizer: str | None = None
    """Folder or Hub id of a tokenizer, if the model has none of its own."""

    revision: str | None = None
    """Branch, tag or commit on the Hub."""


def main(arguments: Sequence[str]) -> None:
    """Parse, write, print the path and how exact the copy is."""
    options = parse(ExportOptions, "export", arguments, helped=HELP)
    if not options.model:
        raise UserError("No model is given; name a Hub id, a folder, a file, or calibration.")
    if options.out is None:
        raise UserError("No destination is given; name a new folder with --out.")
    if options.kept is not None and options.positions is None:
        raise UserError("--kept needs --positions; give the number of positions, too.")
    kept = KEPT_POSITIONS if options.kept is None else options.kept
    from sparsight.vision.long_clip import factor_for, lengthen

    model = load_model(
        options.model, device="cpu", revision=options.revision, tokenizer=options.tokenizer
    )
    if options.positions is not None and options.positions != model.context_length:
        factor = factor_for(options.positions, model.context_length, kept)
        lengthen(model.module, kept=kept, factor=factor)
    saved = write_model(
        model,
        options.out,
        options.layout,
        dtype=None if options.dtype is None else DTYPES[options.dtype],
        gmp=options.gmp,
        long=options.long_clip,
    )
    print(f"{saved.path} · {model.id} → {options.layout} · {_size(saved)}")
    print(f"read back: embeddings differ by {saved.difference:.1e} of their norm")
    print(f"load it with: {_how(saved, options.layout)}")
    print_notes(
        f"OpenAI's own code reads only the weights, and would assume other settings: {note}"
        for note in saved.notes
    )


def _size(saved: SavedModel) -> str:
    files = [saved.path] if saved.path.is_file() else sorted(saved.path.iterdir())
    size = sum(file.stat().st_size for file in files)
    return f"{size / 1e6:,.1f} MB in {len(files)} file{'s' if len(files) > 1 else ''}"


def _how(saved: SavedModel, layout: Layout) -> str:
    ours = f"sparsight.load_model({saved.loads_as!r})"
    if layout == "huggingface":
        return f"transformers.AutoModel.from_pretrained({str(saved.path)!r}), or {ours}"
    if layout == "open_clip":
        return f"open_clip.create_model('local-dir:{saved.path}'), or {ours}"
    if saved.path.suffix in FILES[:1] or saved.path.is_dir():
        return ours
    return f"torch.load({str(saved.path)!r}, weights_only=True), or {ours}"
