"""What an SAE is measured and looked at with: found in its own metadata, unless named otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsight.activations import ActivationSource, ActivationStore, LiveActivations, with_tokens
from sparsight.cli.opening import as_trained, open_model
from sparsight.cli.options import ModelOptions
from sparsight.cli.printing import print_notes
from sparsight.config import load
from sparsight.errors import UserError
from sparsight.images import ImageSource, open_images
from sparsight.sae import SparseAutoencoder
from sparsight.training import TrainRecipe
from sparsight.vision import VisionModel


@dataclass(frozen=True)
class SubjectOptions(ModelOptions):
    """Which activations, model and images; by default those that the SAE was trained on."""

    store: Path | None = None
    """Activation store to read instead of running the model."""

    images: str | None = None
    """Images to run the model over instead, in any form that `extract` takes."""

    model: str | None = None
    """Vision model; default the one that the SAE names."""

    verify: bool = True
    """Compare a store's checksums before it is read."""


class Subjects:
    """Opens models and images for the SAEs of a run, each once.

    Args:
        options: what the user named.
    """

    def __init__(self, options: SubjectOptions) -> None:
        self.options = options
        self._models: dict[str, VisionModel] = {}
        self._images: dict[str, ImageSource] = {}
        self._stores: dict[Path, ActivationStore] = {}

    def activations(self, folder: Path, sae: SparseAutoencoder) -> ActivationSource:
        """The activations that an SAE is to be measured on.

        A store that was named; else, unless other images were named, the store that the run was
        trained on if it is still there; else the model over the images.

        Raises:
            UserError: the SAE does not say where it belongs, and the options do not either.
        """
        if self.options.store is not None and self.options.images is not None:
            raise UserError("A store has its own images; give --store or --images, not both.")
        store = self.options.store or self._store_of(folder)
        if store is not None:
            found = self._stores.get(store) or self._open_store(store)
            return with_tokens(found, sae.metadata.get("tokens"))
        site, tokens = sae.metadata.get("site"), sae.metadata.get("tokens", "all")
        if site is None:
            raise UserError(f"{folder}: this SAE names no site. Give --store with its activations.")
        model, images = self.model(folder, sae), self.images(folder, sae)
        options = self.options
        sites = [site, *filter(None, [sae.metadata.get("target_site")])]
        return LiveActivations(
            model, images, sites, tokens, workers=options.workers, max_failed=options.max_failed
        )

    def model(self, folder: Path, sae: SparseAutoencoder) -> VisionModel:
        """The model that the SAE belongs to.

        Raises:
            UserError: it is not known, or cannot be loaded.
        """
        about = sae.metadata.get("model") or {}
        id, wanted = as_trained(about, self.options, self.options.model)
        if id is None:
            raise UserError(f"{folder}: this SAE names no model. Give one with --model.")
        key = f"{id} {wanted.revision} {wanted.model_dtype} {wanted.scale_jpegs}"
        if key not in self._models:
            self._models[key] = open_model(id, wanted)
        return self._models[key]

    def images(self, folder: Path, sae: SparseAutoencoder) -> ImageSource:
        """The images that were named, else those that the SAE was trained on.

        Raises:
            UserError: they are not known, or not there.
        """
        spec = self.options.images or sae.metadata.get("images")
        if spec is None:
            raise UserError(f"{folder}: this SAE names no images. Give some with --images.")
        if spec not in self._images:
            self._images[spec] = open_images(spec, table=self.options.table)
            print_notes(self._images[spec].notes)
        return self._images[spec]

    def _store_of(self, folder: Path) -> Path | None:
        path = folder / "config.toml"
        if self.options.images or self.options.model or not path.exists():
            return None
        store = load(TrainRecipe, path).store
        if store is not None and not Path(store).is_dir():
            print_notes([f"{store}, which {folder} was trained on, is gone; the model runs."])
            return None
        return None if store is None else Path(store)

    def _open_store(self, path: Path) -> ActivationStore:
        self._stores[path] = ActivationStore(path, verify=self.options.verify)
        return self._stores[path]
