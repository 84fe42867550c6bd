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

from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from sparsight.attacks.latent_reading import Seen, Statistic, activations_on_pairs
from sparsight.attacks.pairs import AttackPairs
from sparsight.attacks.salience_table import SalienceTable, picture_marks
from sparsight.attacks.significance import (
    PERMUTATIONS,
    Alternative,
    benjamini_hochberg,
    sign_flip_p,
)
from sparsight.config import check_seed
from sparsight.editing.interventions import check_belongs
from sparsight.errors import UserError
from sparsight.sae import SparseAutoencoder
from sparsight.vision import PassSettings, VisionModel

Contrast = Literal["word", "writing", "attack"]
"""attacked − control, control − clean, attacked − clean."""

Read = Literal["all", "patches", "cls"]

CONTRASTS: dict[Contrast, tuple[str, str]] = {
    "word": ("attacked", "control"),
    "writing": ("control", "clean"),
    "attack": ("attacked", "clean"),
}
FDR = 0.05
SELECTIVE = 0.9


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
    seen = activations_on_pairs(model, pairs, sae, place, where, statistic, settings)
    return _table(model, pairs, sae, (place, where), test, seen)


def _table(
    model: VisionModel,
    pairs: AttackPairs,
    sae: SparseAutoencoder | None,
    read_at: tuple[str, Read],
    test: _Test,
    seen: Seen,
) -> SalienceTable:
    """Test what was read at a site and positions, and record how."""
    effects = test.effects(seen)
    n, tested = len(seen.values["clean"]), effects["tested"]
    about = {
        "model": model.id,
        "weights_hash": model.weights_hash,
        "unit": "neuron" if sae is None else "latent",
        "site": read_at[0],
        "sae": None if sae is None else sae.fingerprint(),
        "tokens": read_at[1],
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

    def effects(self, seen: Seen) -> dict[str, npt.NDArray[Any]]:
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


def _check_choice(name: str, value: object, choices: Any) -> None:
    if value not in get_args(choices):
        raise UserError(f"{name} is {value!r}; expected {' or '.join(get_args(choices))}.")
