"""The calibration world as a source of images: scenes rendered on demand, with ground truth."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from sparsight.images.selection import format_selection
from sparsight.images.source import ImageInfo, ImageSource, View

if TYPE_CHECKING:
    from sparsight.calibration.world import CalibrationWorld, RenderedScene, Scene

DEFAULT_SCENES = 10_000


class CalibrationImages(ImageSource):
    """Scenes of `CalibrationWorld(n_scenes, seed)`.

    The id is `SEED/NUMBER`, or `SEED-single/NUMBER` for single objects. Scene i is the same
    whatever `n_scenes` is.

    Args:
        n_scenes: how many scenes the world has.
        seed: which of the infinitely many worlds.
        numbers: the scenes shown; all by default.
        single: one object per scene and no word: the scenes of a clean zero-shot test.
        view: how the spec names the scenes shown; by default by their numbers.
    """

    def __init__(
        self,
        n_scenes: int = DEFAULT_SCENES,
        seed: int = 0,
        numbers: npt.NDArray[np.int64] | None = None,
        single: bool = False,
        view: View | None = None,
    ) -> None:
        self.n_scenes = n_scenes
        self.seed = seed
        self._numbers = numbers
        self.single = single
        self._whole = f"calibration:{n_scenes}:{seed}{':single' if single else ''}"
        if numbers is None:
            self._named = View.whole(self._whole, n_scenes)
        else:
            self._named = view or View.of(self._whole, numbers)
        self.spec = self._named.spec

    @cached_property
    def world(self) -> CalibrationWorld:
        """The world that the scenes come from."""
        from sparsight.calibration.world import CalibrationWorld, WorldConfig

        config = WorldConfig.single() if self.single else None
        return CalibrationWorld(self.n_scenes, self.seed, config)

    def number(self, index: int) -> int:
        """Return the number in the world of the scene at `index` here."""
        self._check_index(index)
        return index if self._numbers is None else int(self._numbers[index])

    def scene(self, index: int) -> Scene:
        """Return the ground truth about image `index`."""
        return self.world.scene(self.number(index))

    def render(self, index: int) -> RenderedScene:
        """Render image `index`, with the masks of its parts."""
        return self.world.render(self.number(index))

    def __len__(self) -> int:
        return self.n_scenes if self._numbers is None else len(self._numbers)

    def info(self, index: int) -> ImageInfo:
        """See `ImageSource.info`."""
        number, scene = self.number(index), self.scene(index)
        return ImageInfo(
            id=f"{self.seed}{'-single' if self.single else ''}/{number:05d}",
            uri=f"{self._whole}[{number}]",
            label=scene.label,
            caption=scene.caption,
        )

    def load(self, index: int, min_side: int | None = None) -> Image.Image:
        """See `ImageSource.load`."""
        return Image.fromarray(np.asarray(self.render(index).image))

    def fingerprint(self) -> str:
        """Hash the world, the numbers and the first rendered scenes: a new renderer is another."""
        scenes = "" if self._numbers is None else format_selection(self._numbers)
        digest = hashlib.sha256((self._whole + scenes).encode())
        for index in range(min(3, len(self))):
            digest.update(np.asarray(self.render(index).image).tobytes())
        return digest.hexdigest()

    def select(self, indices: Sequence[int] | npt.NDArray[np.int64]) -> CalibrationImages:
        """See `ImageSource.select`; the ground truth stays available."""
        chosen = self._checked(indices)
        return self._shown(chosen, self._named.select(chosen))

    def _view(self, places: npt.NDArray[np.int64], spec: str) -> CalibrationImages:
        return self._shown(places, View.whole(spec, len(places)))

    def _shown(self, places: npt.NDArray[np.int64], view: View) -> CalibrationImages:
        numbers = places if self._numbers is None else self._numbers[places]
        return CalibrationImages(self.n_scenes, self.seed, numbers, self.single, view)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "world"}
