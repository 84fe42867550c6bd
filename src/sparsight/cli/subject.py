"""The activations, model and images of an SAE: as its metadata names them, or as the user does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sparsight.activations import ActivationSource, ActivationStore, LiveActivations, with_tokens
from sparsight.cli.opening import as_trained, open_model
from sparsight.cli.options import ModelOptions
from sparsight.cli.printing import print_notes
from sparsight.config import read_toml
from sparsight.errors import UserError
from sparsight.images import ImageSource, open_images
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel


@dataclass(frozen=True)
class SubjectOptions(ModelOptions):
    """Activations, model and images; by default those on which the SAE was trained."""

    store: Path | None = None
    """Activation store to read, instead of running the model."""

    images: str | None = None
    """Other images to run the model over, in any form that `extract` takes."""

    model: str | None = None
    """Vision model; default: the model that the SAE names."""

    verify: bool = True
    """Verify a store's checksums before reading it."""


class Subjects:
    """Open models, images and stores for the SAEs of a run, each only once.

    Args:
        options: the user's options.
    """

    def __init__(self, options: SubjectOptions) -> None:
        self.options = options
        self._models: dict[str, VisionModel] = {}
        self._images: dict[str, ImageSource] = {}
        self._stores: dict[Path, ActivationStore] = {}

    def activations(self, folder: Path, sae: SparseAutoencoder) -> ActivationSource:
        """Open the activations on which to measure an SAE.

        These are the named store; otherwise, unless other images are named, the store on which the
        run was trained, if it still exists; otherwise the model is run over the images.

        Raises:
            UserError: neither the SAE nor the options name the site.
        """
        if self.options.store is not None and self.options.images is not None:
            raise UserError("A store has its own images; give either --store or --images.")
        store = self.options.store or self._store_of(folder)
        if store is not None:
            opened = self._stores.get(store) or self._open_store(store)
            return with_tokens(opened, sae.metadata.get("tokens"))
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
        """Load the model to which the SAE belongs.

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
        """Open the named images, or else those on which the SAE was trained.

        Raises:
            UserError: they are not known, or do not exist.
        """
        spec = self.options.images or sae.metadata.get("images")
        if spec is None:
            raise UserError(f"{folder}: this SAE names no images. Give them with --images.")
        if spec not in self._images:
            self._images[spec] = open_images(spec, table=self.options.table)
            print_notes(self._images[spec].notes)
        return self._images[spec]

    def _store_of(self, folder: Path) -> Path | None:
        path = folder / "config.toml"
        if self.options.images or self.options.model or not path.exists():
            return None
        store = read_toml(path).get("store")
        if store is not None and not Path(store).is_dir():
            print_notes(
                [
                    f"{store}, on which {folder} was trained, no longer exists; running the model "
                    "instead."
                ]
            )
            return None
        return None if store is None else Path(store)

    def _open_store(self, path: Path) -> ActivationStore:
        self._stores[path] = ActivationStore(path, verify=self.options.verify)
        return self._stores[path]
