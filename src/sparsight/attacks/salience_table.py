"""The result of testing latents for a response to words: a table, on disk, too."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from sparsight.attacks.pairs import AttackPairs
from sparsight.errors import SparsightError, UserError
from sparsight.files import read_json, write_json
from sparsight.folders import replaced, settled
from sparsight.notebooks import need_pandas

if TYPE_CHECKING:
    import pandas

KINDS = ("clean", "control", "attacked")
TABLE, CSV, ABOUT = "salience.parquet", "salience.csv", "salience.json"
CAUSAL = "causal.json"
VERSION = 1


@dataclass(frozen=True)
class SalienceTable:
    """How each latent, or neuron, responds to words on images.

    Attributes:
        mean: by kind (`clean`, `control`, `attacked`), the mean over images of each latent's
            activation (see `statistic`).
        effect: for each latent, the mean paired difference of the contrast.
        effect_size: the effect in standard deviations of the difference (Cohen's d for pairs); 0
            if nothing differs.
        selectivity: (a − b) / (a + b) for the means on the two sides: 1 if the latent is active
            only on the first, 0 if it is equally active on both; for neurons, with absolute values.
        p: p of the permutation test; 1 if the latent was active on no image.
        q: the smallest false discovery rate at which the latent counts as found.
        density: share of vectors on which it is active (not 0; a neuron: above 0), over all three
            kinds.
        tested: whether it was active on any image of the contrast; the correction for multiple
            tests leaves out the others.
        about: site, tokens, contrast, statistic, counts, and what was read.
    """

    mean: dict[str, npt.NDArray[np.float64]]
    effect: npt.NDArray[np.float64]
    effect_size: npt.NDArray[np.float64]
    selectivity: npt.NDArray[np.float64]
    p: npt.NDArray[np.float64]
    q: npt.NDArray[np.float64]
    density: npt.NDArray[np.float64]
    tested: npt.NDArray[np.bool_]
    about: dict[str, Any] = field(repr=False)

    def __len__(self) -> int:
        return len(self.p)

    @property
    def site(self) -> str:
        """The site that was read."""
        return str(self.about["site"])

    @property
    def found(self) -> list[int]:
        """The latents with q at most the requested rate, the largest effect size first."""
        return self.select(selectivity=-1.0)

    @property
    def selective(self) -> list[int]:
        """The latents found that are nearly silent on the other image of a pair; see `select`."""
        return self.select()

    def select(
        self, n: int | None = None, *, fdr: float | None = None, selectivity: float | None = None
    ) -> list[int]:
        """Return the latents found, the largest effect size first.

        Args:
            n: largest number of latents.
            fdr: false discovery rate; default: the requested one.
            selectivity: least selectivity; default: the requested one. A latent that is also active
                without words does something there, which is lost when it is switched off.
        """
        rate = self.about["fdr"] if fdr is None else fdr
        least = self.about["selectivity"] if selectivity is None else selectivity
        hits = np.flatnonzero((self.q <= rate) & self.tested & (self.selectivity >= least))
        order = np.argsort(-np.abs(self.effect_size[hits]), kind="stable")
        chosen: list[int] = hits[order][:n].tolist()
        return chosen

    def chosen(self, latents: Sequence[int] | None = None) -> list[int]:
        """Return the given latents, or else the selective ones.

        Raises:
            UserError: there are none, or a number is out of range.
        """
        chosen = self.selective if latents is None else [int(latent) for latent in latents]
        if not chosen:
            raise UserError(
                f"{self.site}: {len(self.found)} {self.about['unit']}s respond to "
                f"{self.about['compares']} (false discovery rate {self.about['fdr']}, "
                f"{self.about['n_pairs']} pairs), none with a selectivity of at least "
                f"{self.about['selectivity']}. Choose another contrast or site, or lower the "
                "selectivity."
            )
        beyond = [latent for latent in chosen if not 0 <= latent < len(self)]
        if beyond:
            raise UserError(
                f"{self.site} has no {self.about['unit']} {beyond[0]}, only 0 to {len(self) - 1}."
            )
        return chosen

    def table(self) -> pa.Table:
        """Return one row per latent, the strongest first."""
        found = np.zeros(len(self), bool)
        found[self.found] = True
        selective = np.zeros(len(self), bool)
        selective[self.selective] = True
        order = np.lexsort((-np.abs(self.effect_size), self.q))
        columns: dict[str, npt.NDArray[Any]] = {
            self.about["unit"]: np.arange(len(self)),
            "effect": self.effect,
            "effect_size": self.effect_size,
            "selectivity": self.selectivity,
            "p": self.p,
            "q": self.q,
            "density": self.density,
            **{f"mean_{kind}": values for kind, values in self.mean.items()},
            "tested": self.tested,
            "found": found,
            "selective": selective,
        }
        return pa.table({name: values[order] for name, values in columns.items()})

    def to_pandas(self) -> pandas.DataFrame:
        """Return the rows of `table` as a pandas data frame.

        Raises:
            MissingExtra: pandas is not installed.
        """
        need_pandas()
        return self.table().to_pandas()

    @property
    def marks(self) -> list[str]:
        """Hashes of the images that were searched; see `picture_marks`."""
        return list(self.about["pictures"])

    @property
    def fewest(self) -> int:
        """The least number that can be found together, since p is at least 1 / (1 + flips)."""
        least = 1 / (1 + int(self.about["permutations"]))
        share = float(self.about["n_tested"] * least / self.about["fdr"])
        return max(1, math.ceil(share - 1e-9))

    def to_dict(self) -> dict[str, Any]:
        """Return what was done and which latents were found, as JSON-able values."""
        found, selective = self.found, self.selective
        counts = {"n_found": len(found), "n_selective": len(selective)}
        return {**self.about, **counts, "found": found, "selective": selective}

    def save(self, folder: str | Path, causal: Mapping[str, Any] | None = None) -> Path:
        """Write `salience.parquet`, `.csv` and `.json` into a folder, all at once.

        Args:
            folder: created if necessary; files of an earlier search in it are replaced.
            causal: figures of `causal_check` on the latents found, for `causal.json`.
        """
        folder = Path(folder)
        table = self.table()
        with replaced(folder, (TABLE, CSV, ABOUT, CAUSAL)) as staged:
            pq.write_table(table, staged / TABLE)
            pyarrow.csv.write_csv(table, staged / CSV)
            write_json(staged / ABOUT, {"format_version": VERSION, **self.to_dict()})
            if causal is not None:
                write_json(staged / CAUSAL, causal)
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> SalienceTable:
        """Read what `save` wrote.

        Raises:
            UserError: the table does not exist, or has another version.
            SparsightError: the table is damaged.
        """
        folder = settled(Path(folder))
        about = read_json(folder / ABOUT)
        if about.pop("format_version", None) != VERSION:
            raise UserError(
                f"{folder / ABOUT}: was written by another version; search for the latents again."
            )
        try:
            table = pq.read_table(folder / TABLE).sort_by(about["unit"])
            columns = {name: table[name].to_numpy() for name in table.column_names}
            for name in ("n_found", "n_selective", "found", "selective"):
                del about[name]
            return cls(
                mean={kind: columns[f"mean_{kind}"] for kind in KINDS},
                **{
                    name: columns[name]
                    for name in ("effect", "effect_size", "selectivity", "p", "q", "density")
                },
                tested=columns["tested"],
                about=about,
            )
        except FileNotFoundError:
            raise UserError(f"{folder / TABLE}: this file does not exist.") from None
        except (OSError, KeyError, pa.ArrowException) as error:
            raise SparsightError(f"{folder / TABLE}: is damaged ({error}).") from error


def picture_marks(pairs: AttackPairs) -> list[str]:
    """Return a short hash of each image's address, to recognise images that are used again."""
    addresses = (pairs.clean.known(i).uri for i in range(len(pairs)))
    return [hashlib.sha256(address.encode()).hexdigest()[:12] for address in addresses]
