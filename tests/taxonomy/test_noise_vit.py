"""The ViT trained on noise: the noise, its seeds, and a folder that opens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sparsight.errors import UserError
from sparsight.vision import load_model
from tools.noise_vit.noise import noise_image
from tools.noise_vit.train import Settings, contrastive_loss, train


def test_noise_is_the_same_for_a_seed_and_differs_between_numbers() -> None:
    images = [noise_image(0, number) for number in range(8)]
    assert all((noise_image(0, i) == image).all() for i, image in enumerate(images))
    assert len({image.tobytes() for image in images}) == 8
    assert (noise_image(1, 0) != images[0]).any()
    assert all(image.std() > 2 for image in images)


def test_the_loss_is_lowest_when_the_views_of_an_image_agree() -> None:
    one = torch.nn.functional.normalize(torch.randn(16, 64), dim=1)
    assert contrastive_loss(one, one) < contrastive_loss(one, one.roll(1, 0))


@pytest.mark.slow
def test_a_short_run_opens_and_gives_the_same_bits_again(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one", "two")]
    for path in paths:
        settings = Settings(out=path, steps=2, batch_size=4, width=32, blocks=1, pool=8)
        assert len(train(settings, quiet=True)["loss"]) == 2
    weights = [(path / "model.safetensors").read_bytes() for path in paths]
    assert weights[0] == weights[1]
    model = load_model(str(paths[0]))
    assert "blocks.0.resid_post" in model.sites
    with pytest.raises(UserError, match="is there already"):
        train(settings, quiet=True)


def test_settings_that_cannot_work_are_refused() -> None:
    for wrong in ({"width": 40}, {"kept": 0.0}, {"pool": 8}, {"steps": 0}):
        with pytest.raises(UserError):
            Settings(out=Path("x"), **wrong)  # type: ignore[arg-type]
    assert np.isclose(Settings(out=Path("x")).lr, 1e-3)
