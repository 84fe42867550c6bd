from __future__ import annotations

import numpy as np
import pytest

from activation_parts import BLOCK_1
from sparsight.activations import (
    ActivationStore,
    HeldOut,
    LiveActivations,
    held_out_of,
    seen_in_training,
)
from sparsight.activations.sampling import sampled
from sparsight.errors import UserError
from sparsight.images import ImageSource, open_images
from sparsight.vision import VisionModel


def test_the_held_out_images_follow_from_their_number_share_and_seed() -> None:
    places = HeldOut(0.25).places(100)
    assert len(places) == 25 and (np.diff(places) > 0).all()
    assert (places == HeldOut(0.25, seed=0).places(100)).all()
    assert not np.array_equal(places, HeldOut(0.25, seed=1).places(100))
    assert [len(HeldOut(share).places(2)) for share in (0.01, 0.99)] == [1, 1]
    for wrong in (0.0, 1.0, float("nan")):
        with pytest.raises(UserError, match="held_out is"):
            HeldOut(wrong)
    with pytest.raises(UserError, match="too few"):
        HeldOut(0.5).places(1)


def test_a_store_and_live_activations_are_split_alike_whatever_the_tokens(
    kept_store: ActivationStore, model: VisionModel, photos: ImageSource
) -> None:
    held_out = HeldOut(0.3, seed=4)
    live = LiveActivations(model, photos, [BLOCK_1], workers=0)
    expected = set(held_out.places(len(photos)).tolist())
    for source in (kept_store, kept_store.with_tokens("cls"), live, live.with_tokens("cls")):
        rest, held = held_out.split(source)
        assert set(held.image_indices.tolist()) <= expected
        assert not set(rest.image_indices.tolist()) & expected
        assert rest.n_images + held.n_images == source.n_images
        assert len({rest.fingerprint, held.fingerprint, source.fingerprint}) == 3
        assert held.tokens == source.tokens


def test_a_view_of_live_activations_reads_only_its_images(
    model: VisionModel, photos: ImageSource
) -> None:
    live = LiveActivations(model, photos, [BLOCK_1], workers=0)
    view = live.select([1, 2])
    whole = {
        int(image): x
        for batch in live.ordered([BLOCK_1])
        for image, x in zip(batch.image_indices, batch.activations[BLOCK_1], strict=True)
    }
    (batch,) = view.ordered([BLOCK_1])
    for number, place in enumerate(view.image_indices[batch.image_indices].tolist()):
        assert (batch.activations[BLOCK_1][number] - whole[place]).abs().max() < 1e-4
    assert len(view.source()) == 2 and view.n_listed == len(photos)
    assert view.model_info["images"] == photos.spec
    with pytest.raises(UserError, match="image 0 is not read here"):
        view.select([0])


def test_it_is_known_whether_images_were_seen_in_training(kept_store: ActivationStore) -> None:
    held_out = HeldOut(0.3)
    rest, held = held_out.split(kept_store)
    about = {"images": kept_store.model_info["images"]}
    split = {**about, "held_out": held_out.to_metadata(rest)}
    assert seen_in_training(about, held) is True
    assert [seen_in_training(split, each) for each in (held, rest, kept_store)] == [
        False, True, True,
    ]  # fmt: skip
    assert seen_in_training({"images": "others/"}, held) is False
    assert seen_in_training({}, held) is None
    whole = str(about["images"])
    for trained, expected in (
        (f"{whole}?sample=2&seed=0", None),
        (f"{whole}[0:2]", None),
        (f"{whole}?table=labels.csv", None),
        (f"other{whole}[0:2]", False),
    ):
        assert seen_in_training({"images": trained}, kept_store) is expected
    grown = {**about, "held_out": {**split["held_out"], "n_images": 50}}
    assert seen_in_training(grown, held) is None
    with pytest.raises(UserError, match=r"chosen among 50, but this source has \d+"):
        held_out_of(grown).split(kept_store)


def test_a_sample_of_live_activations_still_knows_which_images_it_is_of(
    model: VisionModel, photos: ImageSource
) -> None:
    live = LiveActivations(model, photos, [BLOCK_1], workers=0)
    held_out = HeldOut(0.5)
    _, held = held_out.split(live)
    about = {"images": photos.spec, "held_out": held_out.to_metadata(live)}
    few = sampled(held, 2)
    assert few.n_images == 2 and few.source().spec != photos.spec
    assert seen_in_training(about, few) is False
    assert seen_in_training({"images": photos.spec}, sampled(live, 2)) is True


def test_worlds_of_other_seeds_are_other_images_and_larger_ones_hold_the_smaller(
    model: VisionModel,
) -> None:
    some = LiveActivations(model, open_images("calibration:60:0[5:9]"), [BLOCK_1], workers=0)
    for trained, expected in (
        ("calibration:60:0", True),
        ("calibration:90:0", None),
        ("calibration:60:1", False),
        ("calibration:60:0:single", False),
    ):
        assert seen_in_training({"images": trained}, some) is expected
