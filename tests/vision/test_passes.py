"""Every loop over images is the one pass: it loads what the model sees, counts and cleans up."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sparsight.errors import SparsightError, UserError
from sparsight.images import ImageSource, open_images
from sparsight.interruption import Stop, Terminated
from sparsight.vision import ImagePass, PassSettings, VisionModel, load_model

HERE = PassSettings(batch_size=3, workers=0, quiet=False)
SOURCE = Path(__file__).parents[2] / "src" / "sparsight"
N, BROKEN = 8, (3, 4, 5)


@pytest.fixture(scope="module")
def clip(model: Callable[[str], VisionModel]) -> VisionModel:
    return model("clip")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    """Eight images, of which the three of the second batch are broken."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(N):
        Image.new("RGB", (40, 40), (30 * i, 9, 9)).save(folder / f"{i}.png")
    for i in BROKEN:
        (folder / f"{i}.png").write_bytes(b"text")
    return open_images(folder)


def test_no_loop_over_images_stands_outside_the_one_pass():
    outside = {
        str(path.relative_to(SOURCE))
        for path in SOURCE.rglob("*.py")
        if path.parent.name != "images"
        if re.search(r"load_batches\(|\bDataLoader\b|min_side=model\.min_side", path.read_text())
    }
    assert outside == {"vision/passes.py"}


def test_a_pass_gives_what_the_model_sees_and_counts_what_fails(clip, images, capsys):
    with ImagePass(clip, images, "looking", HERE) as seen:
        batches = list(seen)
    assert [batch.indices for batch in batches] == [[0, 1, 2], [6, 7]]
    expected = torch.stack([clip.transform(images.load(i)) for i in (6, 7)])
    assert torch.equal(batches[1].pixels, expected)
    assert [place for place, _ in seen.failures] == list(BROKEN) and seen.n_loaded == 5
    assert "looking: 8/8 images" in capsys.readouterr().err
    assert [batch.indices for batch in ImagePass(clip, images, settings=HERE).batches()][1] == []
    assert not capsys.readouterr().err


def test_a_pass_with_classes_loads_only_their_images(clip, images):
    with ImagePass(clip, images, settings=HERE, classes={7: 1, 3: 0, 2: 4}) as seen:
        (batch,) = seen
    assert batch.indices == [2, 7] and seen.classes_of(batch).tolist() == [4, 1]


def test_jpegs_are_decoded_at_the_size_that_the_model_sets(folder, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "0.jpg")
    images = open_images(tmp_path)
    scaled = load_model(str(folder("clip")), device="cpu", scale_jpegs=True)
    (batch,) = ImagePass(scaled, images, settings=HERE)
    assert torch.equal(batch.pixels[0], scaled.transform(images.load(0, scaled.min_side)))
    assert not torch.equal(batch.pixels[0], scaled.transform(images.load(0)))


def test_too_many_failures_stop_a_pass_and_name_the_first(clip, images):
    passing = ImagePass(clip, images, settings=HERE, max_failed=0.3)
    with pytest.raises(SparsightError, match=r"3 of 8 images could not be read.*: 3\.png: "):
        list(passing)
    with pytest.raises(
        UserError, match=r"none of its 2 images could be read.*first failure: 4\.png: "
    ):
        list(ImagePass(clip, images, settings=HERE, indices=[4, 5]))
    with pytest.raises(UserError, match="max_failed is 2"):
        ImagePass(clip, images, max_failed=2)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_in_a_loop_ends_its_pass(clip, images, workers):
    kept: list[Iterator[object]] = []

    def look() -> None:
        with ImagePass(clip, images, "looking", PassSettings(2, workers)) as seen:
            kept.append(batches := iter(seen))
            next(batches)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        look()
    with pytest.raises(StopIteration):
        next(kept[0])


def test_a_signal_is_let_through_while_a_pass_waits(clip, images):
    stop = Stop()
    batches = iter(ImagePass(clip, images, settings=HERE, stop=stop))
    assert next(batches).indices == [0, 1, 2]
    stop.note(15, None)
    with pytest.raises(Terminated):
        next(batches)
