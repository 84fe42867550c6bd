"""The contents of a run folder, read for the report; missing parts are reported, not guessed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsight.errors import SparsightError, UserError
from sparsight.files import read_json
from sparsight.folders import settled
from sparsight.latents.index import LatentIndex
from sparsight.latents.index_files import MANIFEST
from sparsight.progress import logger
from sparsight.sae import SparseAutoencoder
from sparsight.training.run import METRICS, read_metrics, unfinished

WEIGHTS = "sae.safetensors"


@dataclass(frozen=True)
class RunFiles:
    """One SAE and the files around it.

    Attributes:
        folder: folder of the SAE.
        name: short name, unique in the report.
        sae: the SAE.
        config: text of `config.toml`; empty if there is none.
        log: lines of `metrics.jsonl`.
        metrics: contents of `metrics.json`; {} if there is none.
        index: the latent index; None if there is none.
        missing: what is missing, and the command that makes it.
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
        """The positions that it was trained on."""
        known = self.sae.metadata.get("tokens") or (self.index.tokens if self.index else None)
        return str(known or "unknown")

    @property
    def model(self) -> Mapping[str, Any]:
        """Id, revision, hash and shape of the vision model, as far as known."""
        found = self.sae.metadata.get("model") or {}
        if isinstance(found, str):
            found = {"id": found}
        return {**found, **(self.index.manifest["model"] if self.index else {})}


def find_runs(given: str | Path | Iterable[str | Path]) -> list[Path]:
    """Find folders of SAEs: the given ones, or those up to two levels below.

    SAEs that are still in training are left out; the logger "sparsight" reports them.

    Raises:
        UserError: a folder does not exist, or holds no SAE whose training has finished.
    """
    folders = [given] if isinstance(given, str | Path) else list(given)
    found: list[Path] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise UserError(
                f"{folder}: does not exist. Give a run folder, as written by `sparsight train`."
            )
        settled(folder)
        here = [folder / WEIGHTS] if (folder / WEIGHTS).exists() else []
        inside = here or sorted(
            path
            for pattern in (f"*/{WEIGHTS}", f"*/*/{WEIGHTS}")
            for path in folder.glob(pattern)
            if "checkpoints" not in (parts := path.relative_to(folder).parts)
            and not any(part.startswith(".") for part in parts)  # still being written
        )
        open_ends = [] if here else unfinished(folder)
        if not inside and open_ends:
            raise UserError(" ".join(open_ends))
        for each in open_ends:
            logger().warning("Left out: %s", each)
        if not inside:
            raise UserError(
                f"{folder}: neither it nor its sub-folders hold a trained SAE ({WEIGHTS}). Give a "
                f"run "
                "folder, as written by `sparsight train`."
            )
        found += [path.parent for path in inside]
    if not found:
        raise UserError("No run folder given.")
    return list(dict.fromkeys(found))


def read_run(folder: Path, name: str) -> RunFiles:
    """Read a run folder.

    Raises:
        SparsightError: a file is damaged.
        UserError: its index belongs to another SAE.
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
            "Scores: metrics.json is about another SAE; `sparsight evaluate` measures this one."
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
    """Return the shortest ends of the folders' paths that are distinct."""
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
