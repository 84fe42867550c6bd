"""A verb: `sparsight brightness`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparsight.cli.help import Help
from sparsight.cli.options import CommandOptions, parse
from sparsight.images import open_images

HELP = Help(examples=("--images photos/",), needed=("images",))


@dataclass(frozen=True)
class BrightnessOptions(CommandOptions):
    """Print how bright each image is."""

    images: str = "calibration:4"
    """What `open_images` takes."""


def main(arguments: Sequence[str]) -> None:
    """Parse, measure, print: a line per image, from 0 to 1."""
    options = parse(BrightnessOptions, "brightness", arguments, helped=HELP)
    source = open_images(options.images)
    for index in range(len(source)):
        brightness = np.asarray(source.load(index)).mean() / 255
        print(f"{source.info(index).id}\t{brightness:.3f}")
