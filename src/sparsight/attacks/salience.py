"""Find the latents of an SAE, or neurons of an MLP, that respond to words, with paired tests.

Every image is seen twice, and the two versions differ only in what is written on them. Three
contrasts ask three questions:

- `word` (attacked − control): the name of a class against nonsense of the same length, place and
  style. Latents that differ read the word.
- `writing` (control − clean): nonsense against nothing. Latents that differ see letters, or the
  band.
- `attack` (attacked − clean): the whole attack, the two together.

The null hypothesis is that the two images of a pair are exchangeable. Then the sign of a pair's
difference is that of a coin toss: flipping the signs of whole pairs gives the null distribution of
the mean difference, whatever the distribution of activations (Fisher 1935, "The Design of
Experiments", section 21). One set of flips serves all latents. The procedure of Benjamini and
Hochberg (1995) controls the false discovery rate over latents.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from torch import Tensor

from sparsight.attacks.pairs import AttackPairs
from sparsight.attacks.passes import PairPass
from sparsight.attacks.significance import (
    PERMUTATIONS,
    Alternative,
    benjamini_hochberg,
    sign_flip_p,
)
from sparsight.config import check_seed
from sparsight.editing.interventions import check_belongs
from sparsight.errors import SparsightError, UserError
from sparsight.files import read_json, write_json
from sparsight.folders import replaced, settled
from sparsight.notebooks import need_pandas
from sparsight.sae import SparseAutoencoder
from sparsight.vision import PassSettings, VisionModel

if TYPE_CHECKING:
    import pandas

Contrast = Literal["word", "writing", "attack"]
"""attacked − control, control − clean, attacked − clean."""

Statistic = Literal["mean", "max"]
"""The statistic over an image's positions."""

Read = Literal["all", "patches", "cls"]

CONTRASTS: dict[Contrast, tuple[str, str]] = {
    "word": ("attacked", "control"),
    "writing": ("control", "clean"),
    "attack": ("attacked", "clean"),
}
KINDS = ("clean", "control", "attacked")
FDR = 0.05
SELECTIVE = 0.9
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


def find_text_salient(
    model: VisionModel,
    pairs: AttackPairs,
    sae: SparseAutoencoder | None = None,
    *,
    site: str | None = None,
    tokens: Read | None = None,
    contrast: Contrast = "word",
    statistic: Statistic = "mean",
    alternative: Alternative = "greater",
    fdr: float = FDR,
    selectivity: float = SELECTIVE,
    permutations: int = PERMUTATIONS,
    seed: int = 0,
    check: bool = True,
    batch_size: int = 64,
    workers: int | None = None,
    quiet: bool = True,
) -> SalienceTable:
    """Test each latent of an SAE, or each neuron of a site, for a response to words.

    Args:
        model: the model.
        pairs: from `make_pairs`; measure the effect of the latents found on other images.
        sae: the SAE; without one, the site's own coordinates are tested, such as the neurons of
            `blocks.7.mlp_post`.
        site: where; default: the SAE's site.
        tokens: which positions; default: those that the SAE was trained on, `all` without one.
        contrast: what is compared; see the top of this module.
        statistic: statistic over an image's positions.
        alternative: which differences count.
        fdr: false discovery rate of `found`.
        selectivity: least selectivity of `selective`; 0.9 means 19 times as active with as without.
        permutations: number of random sign flips; all flips are tried if there are no more.
        seed: seed of the flips.
        check: check that the SAE belongs to this model and site.
        batch_size: images at a time.
        workers: processes that decode and draw.
        quiet: show no progress line.

    Raises:
        UserError: the SAE belongs to another model; the site, tokens or contrast do not exist; or
            fewer than two images load.
        SparsightError: an activation is not finite.
    """
    test = _Test(contrast, statistic, alternative, fdr, selectivity, permutations, seed)
    place, where = _read_at(model, sae, site, tokens, check)
    settings = PassSettings(batch_size, workers, quiet)
    seen = _activations(model, pairs, sae, place, where, statistic, settings)
    effects = test.effects(seen)
    n, tested = len(seen.values["clean"]), effects["tested"]
    about = {
        "model": model.id,
        "weights_hash": model.weights_hash,
        "unit": "neuron" if sae is None else "latent",
        "site": place,
        "sae": None if sae is None else sae.fingerprint(),
        "tokens": where,
        **test.about(n),
        "n_pairs": n,
        "n_tested": int(tested.sum()),
        "failed": seen.failed,
        "pairs": pairs.about,
        "pictures": picture_marks(pairs),
    }
    return SalienceTable(
        mean={kind: values.mean(axis=0) for kind, values in seen.values.items()},
        density=np.sum(list(seen.active.values()), axis=0) / seen.vectors,
        about=about,
        **effects,
    )


@dataclass(frozen=True)
class _Test:
    """The comparison, and what counts as a response; see `find_text_salient`."""

    contrast: Contrast
    statistic: Statistic
    alternative: Alternative
    fdr: float
    selectivity: float
    permutations: int
    seed: int

    def __post_init__(self) -> None:
        _check_choice("contrast", self.contrast, Contrast)
        _check_choice("statistic", self.statistic, Statistic)
        _check_choice("alternative", self.alternative, Alternative)
        if not 0 < self.fdr < 1:
            raise UserError(f"fdr is {self.fdr}; it must lie between 0 and 1.")
        if not -1 <= self.selectivity <= 1:
            raise UserError(f"selectivity is {self.selectivity}; it must lie between -1 and 1.")
        if self.permutations < 19:
            raise UserError(
                f"permutations is {self.permutations}; with fewer than 19 no p is below 0.05."
            )
        check_seed(self.seed)

    def effects(self, seen: _Seen) -> dict[str, npt.NDArray[Any]]:
        """Return the columns of a `SalienceTable` that come from the comparison."""
        first, second = CONTRASTS[self.contrast]
        a, b = seen.values[first], seen.values[second]
        difference = a - b
        tested = (seen.active[first] + seen.active[second]) > 0
        effect = difference.mean(axis=0)
        deviation = difference.std(axis=0, ddof=1)
        total = np.abs(a).mean(axis=0) + np.abs(b).mean(axis=0)
        change = np.abs(a).mean(axis=0) - np.abs(b).mean(axis=0)
        p, q = np.ones(len(effect)), np.ones(len(effect))
        p[tested] = sign_flip_p(
            difference[:, tested],
            permutations=self.permutations,
            seed=self.seed,
            alternative=self.alternative,
        )
        q[tested] = benjamini_hochberg(p[tested])
        return {
            "effect": effect,
            "effect_size": np.divide(
                effect, deviation, out=np.zeros_like(effect), where=deviation > 0
            ),
            "selectivity": np.divide(change, total, out=np.zeros_like(change), where=total > 0),
            "p": p,
            "q": q,
            "tested": tested,
        }

    def about(self, n_pairs: int) -> dict[str, Any]:
        """Describe the test, for a table's `about`."""
        flips = self.permutations
        return {
            "contrast": self.contrast,
            "compares": " - ".join(CONTRASTS[self.contrast]),
            "statistic": f"{self.statistic} over positions",
            "alternative": self.alternative,
            "fdr": self.fdr,
            "selectivity": self.selectivity,
            "permutations": min(flips, 2**n_pairs) if n_pairs < 63 else flips,
            "seed": self.seed,
        }


def _read_at(
    model: VisionModel,
    sae: SparseAutoencoder | None,
    site: str | None,
    tokens: Read | None,
    check: bool,
) -> tuple[str, Read]:
    """Return the site and the positions that are read."""
    name = site or (sae.metadata.get("site") if sae is not None else None)
    if name is None:
        raise UserError("No site is given. Give one, or an SAE that names its site.")
    place = model.canonical_site(str(name))
    if sae is not None:
        check_belongs(sae, model, place, strict=check)
    where = tokens or (sae.metadata.get("tokens") if sae is not None else None) or "all"
    if where == "mean":  # the SAE was trained on the mean over the patches
        where = "patches"
    _check_choice("tokens", where, Read)
    model.token_count(place, where)
    return place, where


def picture_marks(pairs: AttackPairs) -> list[str]:
    """Return a short hash of each image's address, to recognise images that are used again."""
    addresses = (pairs.clean.known(i).uri for i in range(len(pairs)))
    return [hashlib.sha256(address.encode()).hexdigest()[:12] for address in addresses]


@dataclass
class _Seen:
    """Activations on the images that loaded in every kind: one row per image."""

    values: dict[str, npt.NDArray[np.float64]]
    active: dict[str, npt.NDArray[np.float64]]
    """Number of vectors on which each latent is active, by kind."""
    vectors: int
    failed: dict[str, int]


@torch.no_grad()
def _activations(
    model: VisionModel,
    pairs: AttackPairs,
    sae: SparseAutoencoder | None,
    site: str,
    tokens: str,
    statistic: Statistic,
    settings: PassSettings,
) -> _Seen:
    reduce = latent_reducer(model, sae, site, tokens, statistic)
    width = model.d_in(site) if sae is None else sae.n_latents
    n = len(pairs)
    values = {kind: np.zeros((n, width), np.float32) for kind in KINDS}
    counts = {kind: np.zeros((n, width), np.int32) for kind in KINDS}
    with PairPass(model, pairs, KINDS, "text salience", settings) as seen:
        for kind, batch in seen:
            value, count = reduce(batch.pixels)
            if not bool(value.isfinite().all()):
                raise SparsightError(
                    f"{model.id}, {site}: activations on {kind} images are not finite."
                )
            values[kind][batch.indices] = value.cpu().numpy()
            counts[kind][batch.indices] = count.cpu().numpy()
    loaded = seen.loaded
    if loaded.sum() < 2:
        raise UserError(
            f"{pairs.clean.spec}: {int(loaded.sum())} of {n:,} images load in every kind; at least "
            "two are needed."
        )
    return _Seen(
        values={kind: rows[loaded].astype(np.float64) for kind, rows in values.items()},
        active={kind: rows[loaded].sum(axis=0, dtype=np.float64) for kind, rows in counts.items()},
        vectors=int(loaded.sum()) * len(KINDS) * model.token_count(site, tokens),  # type: ignore[arg-type]
        failed=seen.failed,
    )


def latent_reducer(
    model: VisionModel,
    sae: SparseAutoencoder | None,
    site: str,
    tokens: str,
    statistic: Statistic,
) -> Callable[[Tensor], tuple[Float[Tensor, "batch width"], Tensor]]:
    """Return a function that reduces each latent's activations over an image's positions.

    It maps preprocessed images to the mean or maximum, and to the number of positions on which the
    latent is active. Without an SAE, it reduces the site's own coordinates.
    """

    def reduce(pixels: Tensor) -> tuple[Tensor, Tensor]:
        x = model.read(pixels, [site], tokens)[site].float()  # type: ignore[arg-type]
        batch, positions = x.shape[:2]
        if sae is None:
            value = x.mean(dim=1) if statistic == "mean" else x.amax(dim=1)
            return value, (x > 0).sum(dim=1)
        code = sae.encode(x.flatten(0, 1).to(sae.W_dec.device))
        image = code.rows // positions
        value = torch.zeros(batch, sae.n_latents, device=code.values.device)
        count = torch.zeros_like(value)
        where = (image, code.indices)
        count.index_put_(where, (code.values != 0).float(), accumulate=True)
        if statistic == "mean":
            value.index_put_(where, code.values.float(), accumulate=True)
            return value / positions, count
        flat = image * sae.n_latents + code.indices
        value.view(-1).scatter_reduce_(0, flat, code.values.float(), "amax", include_self=True)
        return value, count

    return reduce


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        raise UserError(f"{name} is {value!r}; expected {' or '.join(get_args(choices))}.")
