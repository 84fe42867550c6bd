"""What a run folder holds, read for the report: what is missing is said, not guessed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsight.errors import SparsightError, UserError
from sparsight.files import read_json
from sparsight.folders import settled
from sparsight.latents.index import MANIFEST, LatentIndex
from sparsight.progress import logger
from sparsight.sae import SparseAutoencoder
from sparsight.training.run import METRICS, read_metrics, unfinished

WEIGHTS = "sae.safetensors"


@dataclass(frozen=True)
class RunFiles:
    """One SAE and everything that lies around it.

    Attributes:
        folder: of the SAE.
        name: short, unique in the report.
        sae: the SAE.
        config: the text of `config.toml`, empty if there is none.
        log: lines of `metrics.jsonl`.
        metrics: `metrics.json`, {} if there is none.
        index: the latent index, None if there is none.
        missing: what is not there, and the command that makes it.
    """

    folder: Path
    name: str
    sae: SparseAutoencoder
    config: str = ""
    log: Sequence[Mapping[str, Any]] = ()
    metrics: Mapping[str, Any] = field(default_factory=dict)
    index: LatentIndex | None = None
    missing: tuple[str, ...] = ()

    @property
    def site(self) -> str:
        """Where in the model the SAE reads."""
        return str(self.sae.metadata.get("site") or (self.index.site if self.index else "unknown"))

    @property
    def tokens(self) -> str:
        """Which positions it was trained on."""
        known = self.sae.metadata.get("tokens") or (self.index.tokens if self.index else None)
        return str(known or "unknown")

    @property
    def model(self) -> Mapping[str, Any]:
        """Id, revision, hash and shape of the vision model, as far as they are known."""
        found = self.sae.metadata.get("model") or {}
        if isinstance(found, str):
            found = {"id": found}
        return {**found, **(self.index.manifest["model"] if self.index else {})}


def find_runs(given: str | Path | Iterable[str | Path]) -> list[Path]:
    """Folders of SAEs: the given ones, or what lies in them up to two levels deep.

    What is still to be trained is left out, which the logger "sparsight" tells.

    Raises:
        UserError: a folder is not there, or holds no SAE, or none whose training is finished.
    """
    folders = [given] if isinstance(given, str | Path) else list(given)
    found: list[Path] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder. Give a run folder, as `train` made it.")
        settled(folder)
        here = [folder / WEIGHTS] if (folder / WEIGHTS).exists() else []
        inside = here or sorted(
            path
            for pattern in (f"*/{WEIGHTS}", f"*/*/{WEIGHTS}")
            for path in folder.glob(pattern)
            if "checkpoints" not in (parts := path.relative_to(folder).parts)
            and not any(part.startswith(".") for part in parts)  # on its way there
        )
        open_ends = [] if here else unfinished(folder)
        if not inside and open_ends:
            raise UserError(" ".join(open_ends))
        for each in open_ends:
            logger().warning("Left out: %s", each)
        if not inside:
            raise UserError(
                f"{folder}: holds no trained SAE ({WEIGHTS}), nor do its sub-folders. Give a run "
                "folder, as `sparsight train` made it."
            )
        found += [path.parent for path in inside]
    if not found:
        raise UserError("No run folder given.")
    return list(dict.fromkeys(found))


def read_run(folder: Path, name: str) -> RunFiles:
    """Read a run folder.

    Raises:
        SparsightError: a file that is there is damaged.
        UserError: the index in it belongs to another SAE.
    """
    sae = SparseAutoencoder.from_pretrained(folder, device="cpu")
    missing: list[str] = []
    config = _read_text(folder / "config.toml")
    log = read_metrics(folder / METRICS)
    if not log:
        missing.append("Training curves: no metrics.jsonl; `sparsight train` writes it.")
    metrics: Mapping[str, Any] = {}
    if (folder / "metrics.json").exists():
        metrics = read_json(folder / "metrics.json")
    if metrics.get("sae", sae.fingerprint()) != sae.fingerprint():
        metrics = {}
        missing.append(
            "Scores: metrics.json is about another SAE than the one here; `sparsight evaluate` "
            "measures this one."
        )
    elif "fvu" not in metrics:
        missing.append("Scores: not measured; `sparsight evaluate` writes metrics.json.")
    index = None
    if (folder / "index" / MANIFEST).exists():
        index = LatentIndex.open(folder / "index", sae)
    else:
        missing.append("Latents: no index; `sparsight index` builds it.")
    return RunFiles(folder, name, sae, config, log, metrics, index, tuple(missing))


def run_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the folders' paths that tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(folder) for folder in folders]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8") if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        raise SparsightError(f"{path}: cannot be read ({error}).") from error
