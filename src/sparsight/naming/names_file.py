"""`names.parquet`: what every method says about every latent, and the best accepted names."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsight.errors import SparsightError, UserError
from sparsight.latents import LatentIndex, LatentName
from sparsight.latents.index_files import LATENTS, NAMES, parquet
from sparsight.latents.names import names_of, with_names

TRUTH = "truth"

ORDER = (TRUTH, "labels", "text", "splice", "vlm", "centroid", "causal")
"""Methods by precedence: where several accept a name, the first one's is shown. Truth comes first,
but counts only where the user asks for it; then labels, whose precision is measured on the user's
own images; then by precision on the calibration images (docs/guide/names.md)."""

OPINIONS = ("centroid", "causal")
"""Methods whose names stand beside the others' as second opinions and are never shown alone."""

WORDS = {
    TRUTH: "truth (F1 on held-out images)",
    "labels": "labels (F1 on held-out images)",
    "text": "text (correlation over all images, in SDs of untrained latents)",
    "splice": "splice (weight of the word in SpLiCE)",
    "vlm": "vlm (correlation over images that were not shown, in SDs of untrained latents)",
    "centroid": "centroid (cosine with the strongest images, in SDs of untrained latents)",
    "causal": "causal (shift of the image embedding, in SDs of untrained latents)",
}
"""What a name's source is called in the index; other methods go by their own name."""

_KEY = b"sparsight"
_PAIR = pa.struct([("name", pa.string()), ("score", pa.float64())])
SCHEMA = pa.schema(
    [
        ("latent", pa.int32()),
        ("method", pa.string()),
        ("name", pa.string()),
        ("score", pa.float64()),
        ("threshold", pa.float64()),
        ("accepted", pa.bool_()),
        ("runners_up", pa.list_(_PAIR)),
        ("figures", pa.map_(pa.string(), pa.float64())),
    ]
)


@dataclass(frozen=True)
class NameTable:
    """The rows of `names.parquet`.

    Attributes:
        rows: one row per latent and method, sorted by method, then latent: `latent`, `method`,
            `name` (null: no candidate), `score`, `threshold`, `accepted`, `runners_up` (`name` and
            `score`, best first), `figures` (what else the method measured).
        about: by method: rate of false names asked and measured, sizes, vocabulary, ….
        shown: methods whose names may stand in the index's own table.
    """

    rows: pa.Table
    about: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    shown: tuple[str, ...] = ()

    @classmethod
    def of_nothing(cls) -> NameTable:
        """Return a table without rows."""
        return cls(SCHEMA.empty_table())

    @classmethod
    def of(cls, index: LatentIndex) -> NameTable:
        """Read the names of an index; empty if it has none.

        Raises:
            SparsightError: the file is damaged.
            UserError: the names are of another SAE.
        """
        path = index.file(NAMES)
        if path is None:
            return cls.of_nothing()
        try:
            table = pq.read_table(io.BytesIO(path.read_bytes()))
            about = json.loads((table.schema.metadata or {})[_KEY])
            rows = table.cast(SCHEMA)
            own = cls(rows, about["methods"], tuple(about["shown"]))
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise SparsightError(
                f"{path}: is damaged ({error}). Drop the names with `sparsight name RUN --forget`."
            ) from error
        if about.get("sae") != index.manifest["sae"]["hash"]:
            raise UserError(
                f"{path}: names latents of another SAE. Drop these names with `sparsight name RUN "
                "--forget`."
            )
        return own

    def methods(self) -> list[str]:
        """Return the methods that have rows, in the order of precedence."""
        return sorted(self.about, key=precedence)

    def with_method(
        self, method: str, rows: Sequence[Mapping[str, Any]], about: Mapping[str, Any]
    ) -> NameTable:
        """Return the table with the rows of one method in place of its former ones."""
        kept = self.without([method])
        new = pa.Table.from_pylist(list(rows), SCHEMA)
        joined = pa.concat_tables([kept.rows, new]).sort_by(
            [("method", "ascending"), ("latent", "ascending")]
        )
        return NameTable(joined, {**kept.about, method: about}, kept.shown)

    def without(self, methods: Collection[str]) -> NameTable:
        """Return the table without the rows of some methods."""
        keep = [method not in methods for method in self.rows["method"].to_pylist()]
        return NameTable(
            self.rows.filter(pa.array(keep, pa.bool_())),
            {name: about for name, about in self.about.items() if name not in methods},
            tuple(name for name in self.shown if name not in methods),
        )

    def showing(self, methods: Collection[str]) -> NameTable:
        """Return the table with more methods whose names may be shown."""
        shown = sorted({*self.shown, *methods}, key=precedence)
        return NameTable(self.rows, self.about, tuple(shown))

    def best(self) -> dict[int, LatentName]:
        """Return the accepted name of each latent from the first method in `ORDER`.

        Second opinions (`OPINIONS`) are shown only if no other method may be.
        """
        main = [method for method in self.shown if method not in OPINIONS] or list(self.shown)
        rank = {method: i for i, method in enumerate(main)}
        found: dict[int, tuple[int, LatentName]] = {}
        columns = ("latent", "method", "name", "score", "threshold", "accepted")
        values = (self.rows[column].to_pylist() for column in columns)
        for latent, method, name, score, threshold, accepted in zip(*values, strict=True):
            if not accepted or method not in rank:
                continue
            if latent not in found or rank[method] < found[latent][0]:
                source = WORDS.get(method, method)
                found[latent] = (rank[method], LatentName(name, score, source, threshold))
        return {latent: name for latent, (_, name) in found.items()}

    def write(self, index: LatentIndex, *, keep_others: bool = True) -> LatentIndex:
        """Write the file, and the best names into the index's table, both or neither.

        Args:
            index: the index.
            keep_others: keep names in the index's table that no method has given, such as those
                that a person has set with `set_names`; they come before all others.

        Raises:
            UserError: the methods' names have changed on disk since `index` was opened.
        """
        latest = index.latest()
        if latest.manifest["files"].get(NAMES) != index.manifest["files"].get(NAMES):
            raise UserError(
                f"{index.folder / NAMES}: another process has named latents in the meantime. Name "
                "them again; its names are kept."
            )
        index = latest
        about = {
            "sae": index.manifest["sae"]["hash"],
            "methods": self.about,
            "shown": list(self.shown),
        }
        rows = self.rows.replace_schema_metadata({_KEY: json.dumps(about, sort_keys=True)})
        ours = {*WORDS.values(), *ORDER, *self.about}
        others = {k: name for k, name in names_of(index).items() if name.source not in ours}
        names = {**self.best(), **(others if keep_others else {})}
        table = with_names(index.table, names, forget=True)
        return index.with_files({NAMES: parquet(rows), LATENTS: parquet(table)})


def precedence(method: str) -> tuple[int, str]:
    """Return a key that sorts methods by `ORDER`, unknown ones last."""
    return (ORDER.index(method) if method in ORDER else len(ORDER), method)
