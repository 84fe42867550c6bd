"""Search a collection of images by text or image, with embeddings as they are or edited.

The edits are those of an SAE on the site `embedding`: search by its reconstructions, by only some
of its latents, or with latents turned up or down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize

from sparsight.config import check_positive
from sparsight.editing.actions import Set
from sparsight.editing.changes import frozen
from sparsight.editing.edits import LatentEdit, checked_numbers
from sparsight.editing.interventions import Intervention, check_belongs
from sparsight.errors import UserError
from sparsight.images import ImageSource
from sparsight.sae import SparseAutoencoder, SparseCode
from sparsight.vision import ImagePass, PassSettings, VisionModel
from sparsight.vision.queries import check_query

SITE = "embedding"
Mode = Literal["plain", "reconstructed", "filtered", "query", "steered"]
"""How embeddings are compared; see `Collection.search`."""


@dataclass(frozen=True)
class Hit:
    """One image that a search returned.

    Attributes:
        rank: rank, from 1.
        image: the image's place in the source.
        id: the image's id.
        label: its label, if it has one.
        caption: its caption, if it has one.
        cosine: cosine with the query.
    """

    rank: int
    image: int
    id: str
    label: str | None
    caption: str | None
    cosine: float


@dataclass(frozen=True)
class SearchResult:
    """The result of a search, and how it was made.

    Attributes:
        query: the text, or the image's name.
        mode: see `Collection.search`.
        hits: the images, the best first.
        latents: latents that were kept or steered; empty in modes without latents.
        about: facts for the record.
    """

    query: str
    mode: Mode
    hits: tuple[Hit, ...]
    latents: tuple[int, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        return {
            "query": self.query,
            "mode": self.mode,
            "latents": list(self.latents),
            "about": dict(self.about),
            "hits": [dict(vars(hit)) for hit in self.hits],
        }


@dataclass(frozen=True)
class Collection:
    """Images and their embeddings.

    Attributes:
        model: the model that embedded them.
        images: the source.
        places: places in the source of the images that could be read.
        embeddings: their embeddings, not normalised.
        failed: places of images that could not be read, with the reasons.
    """

    model: VisionModel
    images: ImageSource
    places: tuple[int, ...]
    embeddings: Float[Tensor, "n d_embed"]
    failed: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return len(self.places)

    def embed_query(self, query: str | Image.Image) -> Float[Tensor, " d_embed"]:
        """Embed a text or an image.

        Raises:
            UserError: it is a text and the model has no text tower; or the text is empty or too
                long.
        """
        if isinstance(query, str):
            check_query(self.model, query)
            with torch.no_grad():
                return self.model.embed_texts([query])[0].cpu()
        with torch.no_grad():
            pixels = self.model.transform(query.convert("RGB"))[None]
            return self.model.embed_images(pixels)[0].cpu()

    @torch.no_grad()
    def highest(self, sae: SparseAutoencoder, latents: Sequence[int]) -> list[float]:
        """Return the largest activation of each of these latents in the collection."""
        view = frozen(sae).cpu()
        code = view.encode(self.embeddings.to(view.W_dec.dtype))
        found = torch.zeros(sae.n_latents, dtype=code.values.dtype)
        found.scatter_reduce_(0, code.indices, code.values, "amax")
        chosen = checked_numbers(latents, sae.n_latents, "latent", "the SAE") or ()
        return [float(found[latent]) for latent in chosen]

    @torch.no_grad()
    def search(
        self,
        query: str | Image.Image | Float[Tensor, " d_embed"],
        mode: Mode = "plain",
        *,
        sae: SparseAutoencoder | None = None,
        latents: Sequence[int] = (),
        edits: Sequence[LatentEdit] | LatentEdit = (),
        top: int = 24,
        n_query_latents: int = 8,
        check: bool = True,
        name: str | None = None,
    ) -> SearchResult:
        """Return the images whose embeddings are closest to the query's, by cosine.

        - `plain`: embeddings as they are.
        - `reconstructed`: dec(f), the SAE's reconstruction of each image.
        - `filtered`: dec of only the chosen `latents`, without the decoder's bias, which is the
          same for all. Images on which none of them is active come last.
        - `query`: `filtered` by the `n_query_latents` strongest latents of the query itself.
        - `steered`: x + dec(f′) − dec(f) with `edits`.

        An image as query is treated like the collection. A text keeps its own embedding, since the
        SAE was not trained on texts; only `filtered` and `query` encode it, after moving it by the
        difference between the collection's mean and the mean of its labels or captions (the
        modality gap: Liang et al. 2022, "Mind the gap"). If none of the chosen latents is active on
        the moved text, its component along their decoder rows is used, minus the collection's mean.

        Args:
            query: a text, an image, or an embedding, which counts as that of an image.
            mode: how embeddings are compared.
            sae: an SAE on the site `embedding`; needed in all modes except `plain` and `steered`.
            latents: the latents for mode `filtered`.
            edits: the edits for mode `steered`.
            top: number of images to return.
            n_query_latents: number of latents for mode `query`.
            check: check that the SAE was trained on this model's weights and site.
            name: name of the query, for the record.

        Raises:
            UserError: the mode needs an argument that is missing, the SAE belongs to another model
                or site, or no latent chosen for `filtered` is active on any image, or on the query
                image.
        """
        check_positive(top=top)
        is_text = isinstance(query, str)
        vector = query if isinstance(query, Tensor) else self.embed_query(query)
        shown = name or (query if isinstance(query, str) else "image")
        chosen: tuple[int, ...] = tuple(int(latent) for latent in latents)
        if mode == "plain":
            cosine = _cosine(self.embeddings, vector)
        elif mode == "steered":
            given = [edits] if isinstance(edits, LatentEdit) else list(edits)
            cosine, chosen = self._steered(given, vector, is_text, check)
        else:
            if sae is None:
                raise UserError(f"Mode {mode!r} needs an SAE on the site 'embedding'.")
            check_belongs(sae, self.model, SITE, strict=check)
            cosine, chosen = self._through(sae, mode, vector, is_text, chosen, n_query_latents)
        about = {
            "model": self.model.id,
            "compared": self.model.image_embedding,
            "images": self.images.spec,
            "n_images": len(self),
            "failed": len(self.failed),
        }
        return SearchResult(shown, mode, self._best(cosine, top), chosen, about)

    def compare(
        self,
        query: str | Image.Image,
        modes: Sequence[Mode],
        *,
        sae: SparseAutoencoder | None = None,
        latents: Sequence[int] = (),
        activation: float | None = None,
        top: int = 24,
        n_query_latents: int = 8,
        check: bool = True,
        name: str | None = None,
    ) -> list[SearchResult]:
        """Search in several modes, side by side; see `search`.

        Args:
            query: a text or an image.
            modes: how embeddings are compared.
            sae: an SAE on the site `embedding`; needed in all modes except `plain`.
            latents: the latents for modes `filtered` and `steered`.
            activation: the activation to which mode `steered` sets the latents; default: the
                largest of each in the collection.
            top: number of images to return.
            n_query_latents: number of latents for mode `query`.
            check: check that the SAE was trained on this model's weights and site.
            name: name of the query, for the record.

        Raises:
            UserError: see `search`; or a latent to steer is active on no image, so that it has no
                largest activation.
        """
        edits: list[LatentEdit] = []
        if "steered" in modes:
            if sae is None:
                raise UserError("Mode 'steered' needs an SAE on the site 'embedding'.")
            value: float | list[float] = activation or 0.0
            if activation is None:
                value = self.highest(sae, latents)
                if never := [n for n, most in zip(latents, value, strict=True) if most <= 0]:
                    raise UserError(
                        f"Latent {never[0]} is not active on any image, so it has no largest "
                        "activation to be set to. Give --activation (activation=)."
                    )
            edits = [LatentEdit(sae, latents, Set(value), SITE, "all")]
        return [
            self.search(
                query,
                mode,
                sae=sae,
                latents=latents,
                edits=edits,
                top=top,
                n_query_latents=n_query_latents,
                check=check,
                name=name,
            )
            for mode in modes
        ]

    def _best(self, cosine: Float[Tensor, " n"], top: int) -> tuple[Hit, ...]:
        """Return the images with the largest cosines, the best first."""
        order = cosine.argsort(descending=True, stable=True)[:top].tolist()
        hits = []
        for rank, row in enumerate(order, start=1):
            place = self.places[row]
            info = self.images.known(place)
            hits.append(Hit(rank, place, info.id, info.label, info.caption, float(cosine[row])))
        return tuple(hits)

    def _steered(
        self,
        edits: Sequence[LatentEdit],
        vector: Float[Tensor, " d_embed"],
        is_text: bool,
        check: bool,
    ) -> tuple[Float[Tensor, " n"], tuple[int, ...]]:
        """Return the cosines of edited embeddings, and the edited latents."""
        if not edits:
            raise UserError("Mode 'steered' needs edits: LatentEdit(sae, [latent], Set(…)).")
        for edit in edits:
            check_belongs(edit.sae, self.model, SITE, strict=check)
        change = Intervention(edits, per_image=True, device="cpu")
        target = vector if is_text else change(vector[None])[0]
        steered = tuple(latent for edit in edits for latent in edit.latents or ())
        return _cosine(change(self.embeddings), target), steered

    def _through(
        self,
        sae: SparseAutoencoder,
        mode: Mode,
        vector: Float[Tensor, " d_embed"],
        is_text: bool,
        chosen: tuple[int, ...],
        n_query_latents: int,
    ) -> tuple[Float[Tensor, " n"], tuple[int, ...]]:
        """Return the cosines of embeddings that passed an SAE, and the kept latents."""
        view = frozen(sae).cpu()
        code = view.encode(self.embeddings.to(view.W_dec.dtype))
        if mode == "reconstructed":
            target = vector
            if not is_text:
                target = view.decode(view.encode(vector[None].to(view.W_dec.dtype)))[0]
            return _cosine(view.decode(code), target), ()
        if is_text:
            vector = self._as_image(vector)
        own = view.encode(vector[None].to(view.W_dec.dtype))
        if mode == "query":
            check_positive(n_query_latents=n_query_latents)
            strongest = own.values.abs().argsort(descending=True)[:n_query_latents]
            chosen = tuple(own.indices[strongest].tolist())
        if not chosen:
            raise UserError(
                "Mode 'filtered' needs latents."
                if mode == "filtered"
                else "No latent is active on the query, so there is nothing to compare by. Use "
                "another mode."
            )
        wrong = [latent for latent in chosen if not 0 <= latent < sae.n_latents]
        if wrong:
            raise UserError(f"The SAE has no latent {wrong[0]}; it has 0 to {sae.n_latents - 1}.")
        kept = torch.zeros(sae.n_latents, dtype=torch.bool)
        kept[list(chosen)] = True
        rows = view.W_dec * (1 if view.normaliser.per_vector else view.normaliser.scale)
        filtered = _only(code, kept) @ rows[kept]
        target = _only(own, kept)[0] @ rows[kept]
        if mode == "filtered" and not bool(filtered.any()):
            raise UserError(_inactive(chosen, f"any of the {len(self)} images"))
        if not is_text and not bool(target.any()):
            raise UserError(_inactive(chosen, "the query image"))
        if not bool(target.any()):
            # No chosen latent is active on the text: use the text's component along their rows.
            centred = vector - self.embeddings.mean(dim=0)
            basis = torch.linalg.qr(rows[kept].double().T).Q.to(centred.dtype)
            target = basis @ (basis.T @ centred)
        return _cosine(filtered, target), chosen

    def _as_image(self, vector: Float[Tensor, " d_embed"]) -> Float[Tensor, " d_embed"]:
        """Move a text's embedding to where those of images are."""
        length = float(self.embeddings.norm(dim=1).mean())
        unit = normalize(vector, dim=0)
        middle = normalize(self.embeddings, dim=1).mean(dim=0)
        texts = self._own_texts()
        if texts is not None:
            unit = unit - texts.mean(dim=0) + middle
        return length * unit

    def _own_texts(self) -> Float[Tensor, "texts d_embed"] | None:
        """Return unit embeddings of the collection's captions and labels; None if it has none."""
        infos = [self.images.known(i) for i in self.places]
        found = {
            info.caption or f"a photo of a {info.label}"
            for info in infos
            if info.caption or info.label
        }
        if not found:
            return None
        return normalize(self.model.embed_texts(sorted(found)[:1000]).cpu(), dim=1)


@torch.no_grad()
def embed_collection(
    model: VisionModel,
    images: ImageSource,
    *,
    max_images: int | None = None,
    seed: int = 0,
    batch_images: int = 64,
    workers: int | None = None,
    quiet: bool = True,
) -> Collection:
    """Embed every image of a source; active edits of the model take effect.

    Args:
        model: any model; without a joint space of images and texts, only images can be queries, and
            `VisionModel.image_embedding` says what is compared.
        images: the images.
        max_images: size of a random sample of the images; default: all images.
        seed: seed of the sample.
        batch_images: images at a time.
        workers: processes that decode.
        quiet: show no progress line.

    Raises:
        UserError: no image could be read.
    """
    check_positive(max_images=max_images, batch_images=batch_images)
    images = images if max_images is None else images.sample(max_images, seed)
    if not len(images):
        raise UserError(f"{images.spec}: holds no images.")
    places: list[int] = []
    rows: list[Tensor] = []
    settings = PassSettings(batch_images, workers, quiet)
    with ImagePass(model, images, "embedding", settings) as seen:
        for batch in seen:
            places += batch.indices
            rows.append(model.embed_images(batch.pixels).cpu())
    return Collection(model, images, tuple(places), torch.cat(rows), tuple(seen.failures))


def _cosine(
    rows: Float[Tensor, "n d_embed"], vector: Float[Tensor, " d_embed"]
) -> Float[Tensor, " n"]:
    """Return cosines; rows of zeros count as opposite to the vector."""
    cosine = normalize(rows.float(), dim=1) @ normalize(vector.float(), dim=0)
    found: Tensor = torch.where((rows != 0).any(dim=1), cosine, -1.0)
    return found


def _inactive(latents: Sequence[int], where: str) -> str:
    shown = ", ".join(map(str, latents[:8])) + (", …" if len(latents) > 8 else "")
    return f"None of the chosen latents ({shown}) is active on {where}. Choose other latents."


def _only(code: SparseCode, kept: Tensor) -> Float[Tensor, "rows kept"]:
    """Return the activations of the kept latents, dense."""
    place = kept.cumsum(0) - 1
    hit = kept[code.indices]
    out = code.values.new_zeros(len(code), int(kept.sum()))
    return out.index_put((code.rows[hit], place[code.indices[hit]]), code.values[hit])
