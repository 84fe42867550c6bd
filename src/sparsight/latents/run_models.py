"""The vision models of runs, each loaded once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sparsight.errors import SparsightError, UserError
from sparsight.latents.run_files import RunFiles
from sparsight.vision import VisionModel, load_model


class RunModels:
    """Loads each vision model once, as the run used it; remembers why one could not be loaded."""

    def __init__(self, given: VisionModel | str | None) -> None:
        self._given = load_model(given) if isinstance(given, str) else given
        self._found: dict[str, VisionModel | str] = {}

    def of(self, run: RunFiles, *, needed: bool = True) -> VisionModel | str | None:
        """Return the model of a run, or the reason why it is not available.

        Args:
            run: the SAE and the files around it.
            needed: whether a model is needed; if not, and none was given, the result is None.

        Raises:
            UserError: the given model is another one.
        """
        if self._given is None and not needed:
            return None
        wanted = run.model
        model = self._given or self._load(wanted)
        if isinstance(model, str):
            return model
        if wanted.get("weights_hash") not in (None, model.weights_hash):
            text = (
                f"{model.id} is not the model of {run.folder} ({wanted.get('id')}): its weights "
                "differ."
            )
            if self._given is not None:
                raise UserError(text)
            return text
        return model

    def _load(self, wanted: Mapping[str, Any]) -> VisionModel | str:
        id, revision, dtype = str(wanted.get("id")), wanted.get("revision"), wanted.get("dtype")
        scaled = "jpeg_min_side" in (wanted.get("preprocessing") or {})
        key = f"{id} {revision} {dtype} {scaled}"
        if key not in self._found:
            try:
                self._found[key] = load_model(
                    id, revision=revision, dtype=dtype, scale_jpegs=scaled
                )
            except SparsightError as error:
                self._found[key] = str(error)
        return self._found[key]
