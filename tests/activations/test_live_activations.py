from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from activation_parts import BLOCK_0, BLOCK_1, N_IMAGES, everything, save_photos
from sparsight.activations import ActivationStore, LiveActivations
from sparsight.errors import SparsightError, UserError
from sparsight.images import ImageSource, open_images
from sparsight.vision import VisionModel

SITES = [BLOCK_0, BLOCK_1]
FOUR_IMAGES = 4 * 5 * 2 * 32 * 4
"""Bytes of a window of four images of both sites."""


def rows(x: torch.Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in x]


def test_live_activations_are_those_of_a_store(
    model: VisionModel, photos: ImageSource, kept_store: ActivationStore
) -> None:
    live = LiveActivations(model, photos, SITES, workers=0)
    batches = list(live.ordered(SITES, batch_images=4))  # the batches of the store
    assert torch.cat([b.image_indices for b in batches]).tolist() == list(range(N_IMAGES))
    for site in SITES:
        x = torch.cat([batch.activations[site] for batch in batches])
        assert torch.equal(x, everything(kept_store, site))
    assert live.n_images == kept_store.n_images
    assert all(live.n_tokens[site] == kept_store.n_tokens[site] for site in SITES)


def test_statistics_are_exact_for_few_images_and_a_sample_of_many(
    model: VisionModel, photos: ImageSource, kept_store: ActivationStore
) -> None:
    exact = LiveActivations(model, photos, SITES, workers=0, batch_size=4).stats(BLOCK_1)
    stored = kept_store.stats(BLOCK_1)
    assert exact.count == stored.count
    torch.testing.assert_close(exact.mean, stored.mean, rtol=1e-12, atol=1e-14)
    sample = LiveActivations(model, photos, SITES, workers=0, statistics_images=6).stats(BLOCK_1)
    again = LiveActivations(model, photos, SITES, workers=0, statistics_images=6).stats(BLOCK_1)
    assert sample.count == 6 * 5
    assert torch.equal(sample.mean, again.mean)
    assert (sample.mean - stored.mean).abs().max() < stored.second_moment.sqrt().max()


@pytest.mark.parametrize("window_bytes", [1, FOUR_IMAGES, 1 << 30])
def test_every_vector_comes_once_per_epoch(
    model: VisionModel, photos: ImageSource, window_bytes: int
) -> None:
    live = LiveActivations(model, photos, SITES, workers=0, batch_size=1, window_bytes=window_bytes)
    # One at a time, as the stream does: last bits depend on the batch.
    ordered = torch.cat([b.activations[BLOCK_1] for b in live.ordered([BLOCK_1], 1)])
    expected = sorted(rows(ordered.flatten(0, 1)))
    stream = live.stream(SITES, N_IMAGES)
    for _ in range(2):
        epoch = torch.cat([next(stream)[BLOCK_1] for _ in range(5)])
        assert sorted(rows(epoch)) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_a_restored_live_stream_gives_the_same_bits(
    model: VisionModel, photos: ImageSource, workers: int
) -> None:
    live = LiveActivations(
        model, photos, SITES, workers=workers, batch_size=2, window_bytes=FOUR_IMAGES
    )
    stream = live.stream(SITES, 17, seed=2)
    cursors, drawn = [], []
    for _ in range(12):
        cursors.append(json.loads(json.dumps(stream.state_dict())))
        drawn.append(next(stream))
    for at in (0, 1, 6, 8):
        fresh = LiveActivations(
            model, photos, SITES, workers=workers, batch_size=2, window_bytes=FOUR_IMAGES
        ).stream(SITES, 17, seed=2)
        fresh.load_state_dict(cursors[at])
        for expected in drawn[at : at + 4]:
            found = next(fresh)
            assert all(torch.equal(found[site], expected[site]) for site in SITES)


def test_images_that_fit_in_a_window_go_through_the_model_once(
    model: VisionModel, tmp_path: Path
) -> None:
    folder = save_photos(tmp_path / "photos", 6)
    live = LiveActivations(model, open_images(str(folder)), [BLOCK_0], workers=0)
    stream = live.stream([BLOCK_0], 30)
    first = next(stream)[BLOCK_0]
    shutil.rmtree(folder)
    second = next(stream)[BLOCK_0]
    assert sorted(rows(first)) == sorted(rows(second))
    assert not torch.equal(first, second)


def test_broken_images_are_left_out_reported_and_counted(
    model: VisionModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = open_images(str(save_photos(tmp_path / "photos", broken=(2, 9))))
    live = LiveActivations(
        model, images, SITES, workers=0, batch_size=2, window_bytes=FOUR_IMAGES, max_failed=0.1
    )
    stream = live.stream(SITES, 21 * 5)
    one, two = (sorted(rows(next(stream)[BLOCK_1].round(decimals=3))) for _ in range(2))
    assert one == two
    assert live.n_images == 21 and len(live.failures) == 2
    told = capsys.readouterr().err
    assert [told.count(f"{name}: could not be read") for name in ("even/002.jpg", "odd/009.jpg")]
    assert told.count("could not be read") == 2
    assert sum(len(batch.image_indices) for batch in live.ordered(SITES)) == 21


def test_too_many_broken_images_stop(model: VisionModel, tmp_path: Path) -> None:
    images = open_images(str(save_photos(tmp_path / "photos", broken=(2, 9))))
    live = LiveActivations(model, images, SITES, workers=0)
    with pytest.raises(SparsightError, match=r"of 23 images could not .* 0\.01 .*002\.jpg"):
        next(live.stream(SITES, 10))
    for path in (tmp_path / "photos").rglob("*.jpg"):
        path.write_bytes(b"no picture")
    images = open_images(str(tmp_path / "photos"))
    live = LiveActivations(model, images, SITES, workers=0, max_failed=1)
    with pytest.raises(SparsightError, match="Not a single image could be read"):
        next(live.stream(SITES, 10))


def test_nan_stops_and_names_site_and_image(own_model: VisionModel, photos: ImageSource) -> None:
    with torch.no_grad():
        own_model.module.vision_model.encoder.layers[1].mlp.fc2.bias[3] = float("nan")
    live = LiveActivations(own_model, photos, SITES, workers=0)
    with pytest.raises(SparsightError, match=rf"{BLOCK_1}: .*NaN .*image even/000\.jpg"):
        list(live.ordered(SITES))


def test_mistakes_are_refused(model: VisionModel, photos: ImageSource) -> None:
    with pytest.raises(UserError, match="sites"):
        LiveActivations(model, photos, [])
    with pytest.raises(UserError, match="has no site"):
        LiveActivations(model, photos, ["blocks.9.resid_post"])
    with pytest.raises(UserError, match="1 or more"):
        LiveActivations(model, photos, SITES, batch_size=0)
    with pytest.raises(UserError, match="share"):
        LiveActivations(model, photos, SITES, max_failed=-1)
    live = LiveActivations(model, photos, [BLOCK_0, "embedding"])
    with pytest.raises(UserError, match="Not read here"):
        live.stats(BLOCK_1)
    with pytest.raises(UserError, match=rf"{BLOCK_0} \(5\), embedding \(1\)"):
        live.stream([BLOCK_0, "embedding"], 4)
