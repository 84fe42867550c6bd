"""Whether an SAE was trained on a model's weights and at a site of it."""

from __future__ import annotations

from collections.abc import Mapping

from sparsight.errors import UserError
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel


def check_belongs(
    sae: SparseAutoencoder, model: VisionModel, site: str, *, strict: bool = True
) -> None:
    """Check that an SAE's codes mean something at a site of a model.

    Args:
        sae: the SAE; facts that its metadata lacks are not compared.
        model: the model.
        site: the canonical name of the site.
        strict: compare weights and site, not only the width.

    Raises:
        UserError: the SAE was trained on other weights, at another site, or for another width.
    """
    about: Mapping[str, object] = sae.metadata.get("model") or {}
    named = about.get("id") or "a model that it does not name"
    if sae.d_in != model.d_in(site):
        raise UserError(
            f"The SAE takes vectors of width {sae.d_in} (it was trained on {named}, "
            f"{sae.metadata.get('site') or 'site unknown'}), but {site} of {model.id} has "
            f"{model.d_in(site)}."
        )
    if not strict:
        return
    trained = about.get("weights_hash")
    if trained is not None and trained != model.weights_hash:
        raise UserError(
            f"The SAE was trained on {named} (weights {str(trained)[:8]}), but this model is "
            f"{model.id} (weights {model.weights_hash[:8]}), where its latents mean something "
            "else. Pass check=False (--no-check) to use it anyway."
        )
    own = sae.metadata.get("site")
    if own is not None and model.canonical_site(str(own)) != site:
        raise UserError(
            f"The SAE was trained at {own} of {named}, but the edit is at {site}. Pass check=False "
            "(--no-check) to use it anyway."
        )
