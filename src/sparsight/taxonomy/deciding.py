"""The rule: from measures to a kind, without labels, names or ground truth.

First the gate: a latent has a kind only if it stands out from the latents of an untrained SAE of
the same shape on the same images. The score is a linear discriminant between latents with a known
kind and untrained ones; the threshold is a quantile of the untrained latents of the same run. Then
a short list of thresholds says which kind. The weights were fitted by `tools/taxonomy_rule.py`, and
the thresholds of colour, texture and elongation by a search over a grid, on calibration scenes and
SAEs of other seeds than those of the published figures; the thresholds of the other kinds were set
by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from sparsight.errors import UserError
from sparsight.taxonomy.kinds import Kinds
from sparsight.taxonomy.measuring import Measures

Floats = npt.NDArray[np.float64]

FEWEST_IMAGES = 10
"""A latent that is active on fewer images has no kind."""

GATE_WEIGHTS = {
    "selectivity": 3.89,
    "density": 1.313,
    "moran": 17.458,
    "image": 18.859,
    "area": -5.213,
    "colour": 5.235,
    "texture": -5.294,
    "log colour": -0.782,
    "log texture": 0.412,
    "position": 8.799,
}
"""Weights of the features of the gate; see `gate_features`."""


@dataclass(frozen=True)
class Rule:
    """Thresholds that tell kinds apart; see `Measures` for the quantities.

    Attributes:
        false_kinds: share of an untrained SAE's latents that may get a kind.
        colour: least share of variance that goes along with colour.
        texture: the same for texture.
        texture_ratio: least ratio of the share of texture to that of colour, for a texture.
        position: least share of variance that goes along with the position.
        elongation: least ratio of width to height for text.
        scene: least area for a scene, as a share of the patches.
        part: largest area for a part.
    """

    false_kinds: float = 0.05
    colour: float = 0.07
    texture: float = 0.1
    texture_ratio: float = 0.5
    position: float = 0.3
    elongation: float = 1.4
    scene: float = 0.5
    part: float = 0.03

    def __post_init__(self) -> None:
        if not 0 < self.false_kinds < 1:
            raise UserError(
                f"false_kinds is {self.false_kinds}; it must lie between 0 and 1, e.g. 0.05."
            )


def gate_features(measures: Measures) -> dict[str, Floats]:
    """Return the features of the gate, by name; NaN counts as 0."""

    def log(values: Floats, least: float) -> Floats:
        return np.log(np.clip(np.nan_to_num(values), least, 1))

    colour, texture = shares(measures)
    return {
        "selectivity": log(1 - measures.evenness, 0.005),
        "density": log(measures.density, 1e-4),
        "moran": np.nan_to_num(measures.moran),
        "image": np.nan_to_num(measures.image),
        "area": log(measures.area, 1e-3),
        "colour": colour,
        "texture": texture,
        "log colour": log(colour, 1e-3),
        "log texture": log(texture, 1e-3),
        "position": np.nan_to_num(measures.position),
    }


def shares(measures: Measures) -> tuple[Floats, Floats]:
    """Return the shares of colour and of texture: of patches or of images, whichever is larger."""
    colour = np.fmax(np.nan_to_num(measures.colour), np.nan_to_num(measures.image_colour))
    texture = np.fmax(np.nan_to_num(measures.texture), np.nan_to_num(measures.image_texture))
    return colour, texture


def gate_score(measures: Measures) -> Floats:
    """Return how clearly each latent differs from untrained ones; −∞ if it is too rare to tell."""
    features = gate_features(measures)
    score = np.zeros(measures.n_latents)
    for name, weight in GATE_WEIGHTS.items():
        score += weight * features[name]
    score[measures.images < FEWEST_IMAGES] = -np.inf
    return score


def gate_threshold(null: Measures, rule: Rule | None = None) -> float:
    """Return the score that a share `false_kinds` of an untrained SAE's latents exceeds.

    Raises:
        UserError: too few untrained latents are active to tell.
    """
    rule = rule or Rule()
    score = gate_score(null)
    active = score[np.isfinite(score)]
    if len(active) < 1 / rule.false_kinds:
        raise UserError(
            f"Only {len(active)} latents of an untrained SAE are active on {FEWEST_IMAGES} images "
            "or more, too few for a threshold. Use more images."
        )
    return float(np.quantile(active, 1 - rule.false_kinds))


def decide(measures: Measures, threshold: float, rule: Rule | None = None) -> Kinds:
    """Return the kind of each latent.

    Args:
        measures: what was measured of the latents.
        threshold: least score of the gate; see `gate_threshold`.
        rule: the other thresholds.
    """
    rule = rule or Rule()
    colour, texture = shares(measures)
    position, area = np.nan_to_num(measures.position), np.nan_to_num(measures.area)
    elongation = np.nan_to_num(measures.width / np.maximum(measures.height, 0.01))
    kinds = np.full(measures.n_latents, "object", dtype="<U8")
    kinds[area <= rule.part] = "part"
    kinds[area >= rule.scene] = "scene"
    kinds[elongation >= rule.elongation] = "text"
    kinds[colour >= rule.colour] = "colour"
    kinds[(texture >= rule.texture) & (texture >= rule.texture_ratio * colour)] = "texture"
    kinds[(position >= rule.position) & (position > np.maximum(colour, texture))] = "position"
    if np.isnan(measures.area).all():  # one vector per image: nothing is known about places
        kinds[(kinds == "part") | (kinds == "text")] = "object"
    kinds[gate_score(measures) <= threshold] = "none"
    return kinds
