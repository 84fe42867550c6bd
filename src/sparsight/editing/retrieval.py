"""Search a collection of pictures by text or picture, with embeddings as they are or edited.

The edits are those of an SAE on the site `embedding`: search by what it reconstructs, by some of
its latents alone, or with latents turned up and down.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
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
from sparsight.images import ImageError, ImageSource, decode_image
from sparsight.images.decoding import read_image_file
from sparsight.sae import SparseAutoencoder, SparseCode
from sparsight.vision import ImagePass, PassSettings, VisionModel

SITE = "embedding"
Mode = Literal["plain", "reconstructed", "filtered", "query", "steered"]
"""How embeddings are compared; see `Collection.search`."""


@dataclass(frozen=True)
class Hit:
    """One picture that was found.

    Attributes:
        rank: from 1.
        image: its place in the source.
        id: of the image.
        label: where it has one.
        caption: likewise.
        cosine: with the query.
    """

    rank: int
    image: int
    id: str
    label: str | None
    caption: str | None
    cosine: float


@dataclass(frozen=True)
class SearchResult:
    """What a search found, and with what.

    Attributes:
        query: the text, or the picture's name.
        mode: see `Collection.search`.
        hits: the best first.
        latents: those that were kept or steered; empty in modes without.
        about: facts for the record.
    """

    query: str
    mode: Mode
    hits: tuple[Hit, ...]
    latents: tuple[int, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The same as JSON-able values."""
        return {
            "query": self.query,
            "mode": self.mode,
            "latents": list(self.latents),
            "about": dict(self.about),
            "hits": [dict(vars(hit)) for hit in self.hits],
        }


@dataclass(frozen=True)
class Collection:
    """Pictures and their embeddings.

    Attributes:
        model: what embedded them.
        images: the source.
        places: those that could be read, by their place in the source.
        embeddings: as they come, not normalised.
        failed: pictures that could not be read, with the reason.
    """

    model: VisionModel
    images: ImageSource
    places: tuple[int, ...]
    embeddings: Float[Tensor, "n d_embed"]
    failed: tuple[tuple[int, str], ...] = ()

    def __len__(self) -> int:
        return len(self.places)

    def embed_query(self, query: str | Image.Image) -> Float[Tensor, " d_embed"]:
        """Embed a text or a picture.

        Raises:
            UserError: a text, and the model has no text tower; or one that is empty or too long.
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
        """The largest activation of each of these latents in the collection."""
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
        """The pictures whose embeddings are closest to the query's, by cosine.

        - `plain`: as they are.
        - `reconstructed`: dec(f), the SAE's reconstruction of each picture.
        - `filtered`: dec of the chosen `latents` alone, without the decoder's bias, which is the
          same for all. A picture on which none is active comes last.
        - `query`: `filtered` by the query's own strongest latents, `n_query_latents` of them.
        - `steered`: x + dec(f′) − dec(f) with `edits`.

        A picture as query is treated as the collection is. A text keeps its own embedding, which
        the SAE has never seen the like of; only in `filtered` and `query` is it encoded, moved by
        the difference of the collection's mean and the mean of its labels or captions (the modality
        gap: Liang et al. 2022, "Mind the gap"). If none of the chosen latents is active on it
        there, what counts is its share along their decoder rows, the collection's mean taken off.

        Args:
            query: a text, a picture, or an embedding of one that counts as a picture.
            mode: how embeddings are compared.
            sae: on the site `embedding`; needed in all modes but `plain` and `steered`.
            latents: of mode `filtered`.
            edits: of mode `steered`.
            top: pictures to give.
            n_query_latents: of mode `query`.
            check: make sure that the SAE was trained on this model's weights and site.
            name: of the query, for the record.

        Raises:
            UserError: the mode lacks something, the SAE is of another model or site, or no chosen
                latent of `filtered` is active on any picture, or on the one searched by.
        """
        check_positive(top=top)
        is_text = isinstance(query, str)
        vector = query if isinstance(query, Tensor) else self.embed_query(query)
        shown = name or (query if isinstance(query, str) else "picture")
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
            sae: on the site `embedding`; needed in all modes but `plain`.
            latents: of modes `filtered` and `steered`.
            activation: what mode `steered` sets the latents to; default the largest of each in
                the collection.
            top: images to give.
            n_query_latents: of mode `query`.
            check: make sure that the SAE was trained on this model's weights and site.
            name: of the query, for the record.

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
                        f"Latent {never[0]} is not active on any picture, so that there is no "
                        "largest activation to set it to. Give --activation."
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
        """The images of the largest cosines, the best first."""
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
        """Cosines of edited embeddings, and the latents that were edited."""
        if not edits:
            raise UserError("Mode 'steered' needs edits: LatentEdit(sae, [latent], Set(…)).")
        for edit in edits:
            check_belongs(edit.sae, self.model, SITE, strict=check)
        change = Intervention(edits, per_image=True, device="cpu")
        asked = vector if is_text else change(vector[None])[0]
        steered = tuple(latent for edit in edits for latent in edit.latents or ())
        return _cosine(change(self.embeddings), asked), steered

    def _through(
        self,
        sae: SparseAutoencoder,
        mode: Mode,
        vector: Float[Tensor, " d_embed"],
        is_text: bool,
        chosen: tuple[int, ...],
        n_query_latents: int,
    ) -> tuple[Float[Tensor, " n"], tuple[int, ...]]:
        """Cosines behind an SAE, and the latents that were kept."""
        view = frozen(sae).cpu()
        code = view.encode(self.embeddings.to(view.W_dec.dtype))
        if mode == "reconstructed":
            asked = vector
            if not is_text:
                asked = view.decode(view.encode(vector[None].to(view.W_dec.dtype)))[0]
            return _cosine(view.decode(code), asked), ()
        if is_text:
            vector = self._as_picture(vector)
        own = view.encode(vector[None].to(view.W_dec.dtype))
        if mode == "query":
            check_positive(n_query_latents=n_query_latents)
            strongest = own.values.abs().argsort(descending=True)[:n_query_latents]
            chosen = tuple(own.indices[strongest].tolist())
        if not chosen:
            raise UserError(
                "Mode 'filtered' needs latents."
                if mode == "filtered"
                else "No latent is active on the query: nothing is left to compare."
            )
        wrong = [each for each in chosen if not 0 <= each < sae.n_latents]
        if wrong:
            raise UserError(f"There is no latent {wrong[0]}; the SAE has 0 to {sae.n_latents - 1}.")
        kept = torch.zeros(sae.n_latents, dtype=torch.bool)
        kept[list(chosen)] = True
        rows = view.W_dec * (1 if view.normaliser.per_vector else view.normaliser.scale)
        pictures = _only(code, kept) @ rows[kept]
        asked = _only(own, kept)[0] @ rows[kept]
        if mode == "filtered" and not bool(pictures.any()):
            raise UserError(_inactive(chosen, f"any of the {len(self)} pictures"))
        if not is_text and not bool(asked.any()):
            raise UserError(_inactive(chosen, "the picture that is searched by"))
        if not bool(asked.any()):
            # No chosen latent is active on the text: compare with the text's share along them.
            centred = vector - self.embeddings.mean(dim=0)
            basis = torch.linalg.qr(rows[kept].double().T).Q.to(centred.dtype)
            asked = basis @ (basis.T @ centred)
        return _cosine(pictures, asked), chosen

    def _as_picture(self, vector: Float[Tensor, " d_embed"]) -> Float[Tensor, " d_embed"]:
        """A text's embedding, moved to where pictures' are."""
        length = float(self.embeddings.norm(dim=1).mean())
        unit = normalize(vector, dim=0)
        middle = normalize(self.embeddings, dim=1).mean(dim=0)
        texts = self._own_texts()
        if texts is not None:
            unit = unit - texts.mean(dim=0) + middle
        return length * unit

    def _own_texts(self) -> Float[Tensor, "texts d_embed"] | None:
        """Unit embeddings of what the collection says about itself; None if nothing."""
        infos = [self.images.known(i) for i in self.places]
        found = {
            info.caption or f"a photo of a {info.label}"
            for info in infos
            if info.caption or info.label
        }
        if not found:
            return None
        return normalize(self.model.embed_texts(sorted(found)[:1000]).cpu(), dim=1)


def check_texts(model: VisionModel) -> None:
    """Make sure that a model's images can be searched by text.

    Raises:
        UserError: it has no joint space of images and texts, or no text tower.
    """
    if not (model.has_joint_space and model.has_text):
        lacks = "text tower" if model.has_joint_space else "joint space of images and texts"
        raise UserError(
            f"{model.id} ({model.family}) has no {lacks}, so that no text can be compared with its "
            "images. Search by an image (--image FILE), or take a CLIP or SigLIP."
        )


def check_query(model: VisionModel, query: str) -> None:
    """Make sure that a model's images can be searched by a text.

    Raises:
        UserError: see `check_texts`; or the text is empty or too long.
    """
    if not query.strip():
        raise UserError("The query is empty. Give a text, or a picture.")
    check_texts(model)
    count, most = model.count_tokens([query])[0], model.context_length
    if count > most:
        raise UserError(
            f"The query has {count} tokens, and {most} fit into {model.id}, start and end "
            "included. Shorten it."
        )


def read_query(path: Path, min_side: int | None = None) -> Image.Image:
    """Read the image file to search by.

    Args:
        path: the file.
        min_side: the model's, so that the query is decoded as the collection is.

    Raises:
        UserError: there is no such file, or it is no image that can be read.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such picture.")
    try:
        return decode_image(read_image_file(path), min_side)
    except ImageError as error:
        raise UserError(f"{path}: cannot be searched by ({error.reason}).") from error


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
    """Embed every picture of a source; edits that are active on the model are seen.

    Args:
        model: any; without a joint space of images and texts, images alone can be searched by, and
            what is compared is `VisionModel.image_embedding`.
        images: the pictures.
        max_images: a random sample of so many; default all.
        seed: of the sample.
        batch_images: pictures at a time.
        workers: processes that decode.
        quiet: no progress line.

    Raises:
        UserError: no picture could be read.
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
    """Rows of zeros are as far away as can be."""
    cosine = normalize(rows.float(), dim=1) @ normalize(vector.float(), dim=0)
    found: Tensor = torch.where((rows != 0).any(dim=1), cosine, -1.0)
    return found


def _inactive(latents: Sequence[int], where: str) -> str:
    some = ", ".join(map(str, latents[:8])) + (", …" if len(latents) > 8 else "")
    return f"Of the chosen latents ({some}) none is active on {where}: nothing can be compared."


def _only(code: SparseCode, kept: Tensor) -> Float[Tensor, "rows kept"]:
    """Activations of some latents, dense."""
    place = kept.cumsum(0) - 1
    hit = kept[code.indices]
    out = code.values.new_zeros(len(code), int(kept.sum()))
    return out.index_put((code.rows[hit], place[code.indices[hit]]), code.values[hit])
