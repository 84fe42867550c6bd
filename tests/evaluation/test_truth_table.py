from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from evaluation_parts import Scenes, TensorActivations
from sparsight.errors import UserError
from sparsight.evaluation import Passes, truth_table
from sparsight.evaluation.choosing import MIN_POSITIVES, Halves
from sparsight.evaluation.localising import heat_threshold
from sparsight.evaluation.ranks import auc_of_pairs
from sparsight.evaluation.scenes import SceneTruth
from sparsight.sae import SparseCode

N, N_FEATURES, SIGN = 360, 40, -1
PATTERNS = ("checkered", "dotted", "plain", "striped")


def as_code(x):
    """The vectors themselves as a code: feature j is entry j."""
    return SparseCode.from_padded(x, torch.arange(x.shape[1]).expand_as(x), x.shape[1])


@dataclass
class World:
    images: object
    x: torch.Tensor  # [scenes, CLS and 64 patches, features]


@pytest.fixture(scope="module")
def world():
    """Feature 10 + i is strong where pattern i is, with noise everywhere; CLS holds nonsense."""
    images = Scenes(N, 7)
    g = torch.Generator().manual_seed(0)
    x = torch.rand(N, 65, N_FEATURES, generator=g) * 0.4
    x *= torch.rand(x.shape, generator=g) < 0.3
    x[:, 0] = 5
    for scene in range(N):
        shown = images.scene(scene)
        for i, pattern in enumerate(PATTERNS):
            mask = torch.from_numpy(images.render(scene).mask("pattern", pattern)).flatten()
            x[scene, 1:, 10 + i] += mask.float()
        for colour in sorted(shown.attributes()["object_colour"])[:1]:
            mask = torch.from_numpy(images.render(scene).mask("object_colour", colour)).flatten()
            if colour == "red":
                x[scene, 1:, 20] += mask.float()
    return World(images, x)


def table_of(world, features=as_code, x=None, batch=50, seed=0, **about):
    x = world.x if x is None else x
    about = {"grid": (8, 8)} | about
    activations = TensorActivations(x, world.images, **about)
    passes = Passes(activations, activations.sites[0], batch_images=batch)
    return truth_table(features, passes, world.images, seed=seed)


@pytest.fixture(scope="module")
def table(world):
    return table_of(world)


def test_planted_features_are_found_where_they_are(table):
    for i, pattern in enumerate(PATTERNS):
        entry = table.entries[f"pattern/{pattern}"]
        assert entry["latent"] == 10 + i
        assert entry["auc"] > 0.999 and entry["f1"] > 0.97 and entry["iou"] > 0.95
        assert entry["pooling"] == "mean" and 0.3 < entry["heat_threshold"] <= 1.0
    assert table.entries["object_colour/red"]["latent"] == 20
    assert table.entries["object_colour/red"]["pooling"] == "max"


def test_scores_equal_those_computed_by_hand_on_the_held_out_half(world, table):
    halves = Halves.split(N, 0)
    entry = table.entries["pattern/striped"]
    shows = torch.tensor([world.images.scene(i).pattern == "striped" for i in range(N)])
    scores = world.x[:, 1:, entry["latent"]].mean(dim=1)
    held = halves.held_out
    auc = auc_of_pairs(scores[held, None], shows[held, None])
    assert entry["auc"] == pytest.approx(float(auc), abs=1e-12)
    called = scores[held].double() > entry["threshold"]
    f1 = 2 * (called & shows[held]).sum() / (called.sum() + shows[held].sum())
    assert entry["f1"] == pytest.approx(float(f1), abs=1e-6)
    assert (entry["n_positive"], entry["n"]) == (int(shows[held].sum()), len(held))
    ious, inside, union, everywhere = [], 0, 0, []
    for scene in held[shows[held]].tolist():
        mask = world.images.render(scene).mask("pattern", "striped").flatten()
        if mask.any():
            lit = (world.x[scene, 1:, entry["latent"]] > entry["heat_threshold"]).numpy()
            inside, union = inside + (lit & mask).sum(), union + (lit | mask).sum()
            ious.append((lit & mask).sum() / (lit | mask).sum())
            everywhere.append(mask.mean())
    assert entry["iou"] == pytest.approx(np.mean(ious), abs=1e-9)
    assert entry["iou_pooled"] == pytest.approx(inside / union, abs=1e-9)
    assert entry["iou_everywhere"] == pytest.approx(np.mean(everywhere), abs=1e-9)
    assert entry["n_masks"] == len(ious)


def test_held_out_scenes_do_not_affect_any_choice(world, table):
    changed = world.x.clone()
    held = Halves.split(N, 0).held_out
    changed[held] = changed[held].flip(2)
    other = table_of(world, x=changed)
    for name in ("latent", "threshold", "heat_threshold", "auc_selection"):
        assert {k: v.get(name) for k, v in other.entries.items()} == {
            k: v.get(name) for k, v in table.entries.items()
        }
    assert other.entries["pattern/striped"]["auc"] < 0.8


def test_halves_are_disjoint_and_cover_everything():
    halves = Halves.split(101, 3)
    both = torch.cat([halves.selection, halves.held_out])
    assert torch.equal(both.sort().values, torch.arange(101))
    assert not torch.equal(halves.selection, Halves.split(101, 4).selection)


def test_features_that_know_nothing_score_at_chance_on_held_out_scenes(world):
    noise = torch.rand(N, 65, 300, generator=torch.Generator().manual_seed(5))
    found = table_of(world, x=noise, features=lambda x: x)
    chosen = [entry["auc_selection"] for entry in found.entries.values()]
    held_out = [entry["auc"] for entry in found.entries.values()]
    assert np.mean(chosen) > 0.65 and abs(np.mean(held_out) - 0.5) < 0.04
    colours = found.summary["object_colour"]["auc"]
    assert colours["interval"][0] < colours["mean"] < colours["interval"][1]


def test_the_table_does_not_depend_on_how_the_scenes_are_batched(world, table):
    other = table_of(world, batch=17)
    assert other.entries == table.entries and other.names == table.names


def test_a_feature_of_the_opposite_sign_is_found_with_its_sign(world, table):
    found = table_of(world, features=lambda x: SIGN * x)
    entry = found.entries["pattern/striped"]
    assert (entry["latent"], entry["sign"]) == (13, -1)
    same = table.entries["pattern/striped"]
    assert entry["auc"] == same["auc"] and entry["iou"] == pytest.approx(same["iou"], abs=0.02)
    assert found.names == {}


def test_rare_attributes_are_skipped_with_a_reason(world, table):
    truth = SceneTruth.of(world.images, range(N), (8, 8))
    asked = set(table.entries)
    assert asked | set(table.skipped) == set(truth.attributes) and not asked & set(table.skipped)
    halves = Halves.split(N, 0)
    for column, attribute in enumerate(truth.attributes):
        counts = [
            int(truth.shows[half, column].sum()) for half in (halves.selection, halves.held_out)
        ]
        assert (attribute in asked) == (min(counts) >= MIN_POSITIVES)
    assert "5 with and without are needed" in next(iter(table.skipped.values()))
    assert table.summary["pattern"]["n"] == 4


def test_latents_are_named_after_the_attribute_that_they_detect_best(table):
    for i, pattern in enumerate(PATTERNS):
        assert table.names[10 + i]["attribute"] == f"pattern/{pattern}"
        assert table.names[10 + i]["f1"] == pytest.approx(table.entries[f"pattern/{pattern}"]["f1"])
    assert table.names[20]["attribute"] == "object_colour/red"
    scores = [name["f1"] for name in table.names.values()]
    assert scores == sorted(scores, reverse=True)


def test_one_vector_per_image_gives_auc_but_no_iou(world):
    x = world.x[:, 1:].mean(dim=1, keepdim=True)
    found = table_of(world, x=x, tokens="mean", grid=None)
    entry = found.entries["pattern/striped"]
    assert entry["latent"] == 13 and entry["auc"] > 0.999 and entry["iou"] is None
    assert "iou" not in found.summary["pattern"]


def test_masks_follow_the_grid_of_the_model(world):
    fine = SceneTruth.of(world.images, range(40), (16, 16))
    own = SceneTruth.of(world.images, range(40), (8, 8))
    doubled = own.masks.view(-1, 8, 8).repeat_interleave(2, 1).repeat_interleave(2, 2)
    assert torch.equal(fine.masks, doubled.flatten(1))
    coarse = SceneTruth.of(world.images, range(40), (4, 4))
    share = own.masks.view(-1, 4, 2, 4, 2).float().mean(dim=(2, 4))
    assert torch.equal(coarse.masks, (share >= 0.5).flatten(1))


def test_images_that_failed_do_not_shift_the_truth(world, table):
    kept = [i for i in range(N) if i % 9]
    found = table_of(world, x=world.x[kept], indices=kept)
    assert found.entries["pattern/striped"]["auc"] > 0.999
    assert found.entries["pattern/striped"]["iou"] > 0.95


def test_the_heat_threshold_is_the_best_of_its_candidates():
    g = torch.Generator().manual_seed(0)
    masks = torch.rand(30, 16, generator=g) < 0.4
    heat = torch.rand(30, 16, generator=g) * (0.3 + masks)
    threshold = heat_threshold(heat, masks)

    def iou(t):
        lit = heat > t
        return float(((lit & masks).sum(1) / (lit | masks).sum(1)).mean())

    assert iou(threshold) >= max(iou(t) for t in np.linspace(0, 1.3, 40)) - 0.01
    assert heat_threshold(torch.zeros(3, 16), masks[:3]) == 0


def test_too_few_scenes_are_refused(world):
    with pytest.raises(UserError, match="20 scenes or more, but there are 12"):
        table_of(world, x=world.x[:12])
