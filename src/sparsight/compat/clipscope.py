"""The package `clipscope` (up to 0.1.8): the same names and numbers, on today's transformers.

`forward_verbose` returns the package's results, bit for bit. Two things differ on purpose.
Activations are right for every image of a batch: the package's hook takes the first entry of what a
layer returns, which since transformers 5 is the first image. And there is a calibrated mode:
CLIP-Scope's autoencoders were trained on standardised activations, which neither the package nor
its examples use; see `TopKSAE.calibrate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from sparsight.config import check_positive
from sparsight.devices import choose_device
from sparsight.errors import UserError
from sparsight.evaluation import ReconstructionMeter
from sparsight.formats.calibration import Calibration
from sparsight.formats.clipscope import Checkpoint, unpack
from sparsight.formats.places import find
from sparsight.reading import read_torch
from sparsight.sae.precision import wide
from sparsight.vision import VisionModel, load_model

MODEL = "laion/CLIP-ViT-L-14-laion2B-s32B-b82K"
"""The model that the published autoencoders read."""

REPOSITORY = "lewington/CLIP-ViT-L-scope"
"""Their repository: `{2,5,8,11,14,17,20,22}_resid/{number of training tokens}.pt`."""

ACTIVE_FROM = 1e-3
"""A latent counts as active in a batch if its largest value exceeds this."""

ROWS_AT_A_TIME = 1024
"""Number of vectors that `report` reconstructs at once: 65,536 dense latents take 256 MiB."""

Location = tuple[int, str]
"""Number of the block, from 0, and "resid"."""


class ConfiguredViT:
    """A CLIP whose residual stream is read after some of its blocks.

    Args:
        hook_locations: pairs such as `(22, "resid")`; `locations` in old programs.
        model_name: a Hub id or a folder; `transformer_name` in old programs.
        device: by default a GPU if there is one.
        locations: see `hook_locations`.
        transformer_name: see `model_name`.

    Attributes:
        vision: the model, as the rest of Sparsight uses it.

    Raises:
        UserError: the model cannot be loaded, or has no such block.
    """

    def __init__(
        self,
        hook_locations: Sequence[Location] | None = None,
        model_name: str = MODEL,
        device: str | torch.device | None = None,
        *,
        locations: Sequence[Location] | None = None,
        transformer_name: str | None = None,
    ) -> None:
        given = hook_locations if locations is None else locations
        if given is None:
            raise UserError("ConfiguredViT takes hook_locations, for example [(22, 'resid')].")
        places = [_location(each) for each in given]
        if not places:
            raise UserError("hook_locations is empty; give at least one, e.g. (22, 'resid').")
        self.vision: VisionModel = load_model(transformer_name or model_name, device=device)
        self._sites = {
            place: self.vision.canonical_site(f"blocks.{place[0]}.resid_post") for place in places
        }

    @property
    def model(self) -> nn.Module:
        """The underlying module of transformers."""
        return self.vision.module

    def all_activations(
        self, batch: Image.Image | Sequence[Image.Image]
    ) -> dict[Location, Float[Tensor, "batch tokens d_in"]]:
        """Return the activations of every position, CLS first, of one image or several.

        Only the vision tower runs, and only up to the last of the locations.
        """
        images = [batch] if isinstance(batch, Image.Image) else list(batch)
        if not images:
            raise UserError("The batch holds no images.")
        pixels = torch.stack([self.vision.transform(image.convert("RGB")) for image in images])
        found = self.vision.read(pixels, tuple(self._sites.values()))
        return {place: found[site] for place, site in self._sites.items()}

    def cls_activations(
        self, batch: Image.Image | Sequence[Image.Image]
    ) -> dict[Location, Float[Tensor, "batch d_in"]]:
        """Return the activations of only the CLS position."""
        return {place: x[:, 0] for place, x in self.all_activations(batch).items()}

    def batches(
        self, pictures: Iterable[Image.Image], location: Location, batch_size: int = 32
    ) -> Iterator[Tensor]:
        """Give activations `[batch, tokens, d_in]` at one location, as `TopKSAE.calibrate` takes
        them.

        Raises:
            UserError: the location is not one of `hook_locations`.
        """
        place = _location(location)
        if place not in self._sites:
            raise UserError(f"{location} is not read here; the locations are {[*self._sites]}.")
        check_positive(batch_size=batch_size)
        waiting: list[Image.Image] = []
        for image in pictures:
            waiting.append(image)
            if len(waiting) == batch_size:
                yield self.all_activations(waiting)[place]
                waiting = []
        if waiting:
            yield self.all_activations(waiting)[place]

    def to(self, device: str | torch.device) -> Self:
        """Move the model."""
        self.vision.to(device)
        return self


class TopKSAE(nn.Module):
    """CLIP-Scope's autoencoder: TopK without a ReLU; its only bias is subtracted from the input.

    With `pre = (x − pre_b) enc`, the code is the k largest entries of `pre`, whatever their sign,
    and the reconstruction is `code dec + pre_b`.

    Args:
        k: number of active latents per vector.
        n_features: number of latents.
        d_in: width of the activations.
        device: by default a GPU if there is one.

    Attributes:
        calibration: mean and standard deviation of the activations; None until they are known.
        path: the file of the checkpoint; None if there is none.
    """

    def __init__(
        self, k: int, n_features: int, d_in: int, device: str | torch.device | None = None
    ) -> None:
        super().__init__()
        if not 1 <= k <= n_features:
            raise UserError(f"k is {k}; it must be from 1 to n_features, which is {n_features}.")
        target = choose_device(device)
        self.k = k
        self.pre_b = nn.Parameter(torch.randn(d_in, device=target) * 0.01)
        self.enc = nn.Parameter(torch.randn(d_in, n_features, device=target) / (2 * d_in) ** 0.5)
        self.dec = nn.Parameter(self.enc.detach().mT.clone())
        self.calibration: Calibration | None = None
        self.path: Path | None = None

    @classmethod
    def from_pretrained(
        cls,
        checkpoint: str | Path | None = None,
        repo_id: str = REPOSITORY,
        device: str | torch.device | None = None,
        *,
        filename: str | Path | None = None,
    ) -> TopKSAE:
        """Load a checkpoint, and the calibration beside it if there is one.

        Args:
            checkpoint: a file of the repository, such as "22_resid/1200013184.pt", or on disk.
            repo_id: the repository on the Hub.
            device: by default a GPU if there is one.
            filename: the same as `checkpoint`, in old programs.

        Raises:
            UserError: the file does not exist, or is not a checkpoint of CLIP-Scope.
            SparsightError: the file, or the calibration beside it, is damaged.
        """
        name = checkpoint if checkpoint is not None else filename
        if name is None:
            raise UserError("from_pretrained takes a checkpoint: '22_resid/1200013184.pt'.")
        path = Path(name) if Path(name).is_file() else find(repo_id, filename=str(name))
        found = _read(path)
        d_in, n_features = found.enc.shape
        sae = cls(found.k, n_features, d_in, device)
        sae.load_state_dict({"pre_b": found.pre_b, "enc": found.enc, "dec": found.dec})
        sae.path = path
        sae.calibration = Calibration.of(path, d_in)
        return sae

    def forward_verbose(self, x: Float[Tensor, "batch d_in"]) -> dict[str, Any]:
        """Encode and decode activations as they are, without standardising them.

        The computation runs in float32, or in float64 if the parameters are float64.

        Returns:
            `reconstruction [batch, d_in]`, `latent [batch, n_features]` (dense), `active_latents
            [n_features]` (bool: above 0.001 somewhere in the batch), and `experts_chosen`,
            `expert_prop`, `expert_weighting`, which are None.

        Raises:
            UserError: the activations are not a matrix, or have another width.
        """
        x = self._vectors(x)
        pre_b, enc, dec = wide(self.pre_b), wide(self.enc), wide(self.dec)
        top = torch.topk((x - pre_b) @ enc, k=self.k, dim=-1)
        latent = torch.zeros(len(x), len(dec), dtype=dec.dtype, device=dec.device)
        latent.scatter_(dim=-1, index=top.indices, src=top.values)
        return {
            "reconstruction": latent @ dec + pre_b,
            "latent": latent,
            "experts_chosen": None,
            "expert_prop": None,
            "expert_weighting": None,
            "active_latents": latent.max(dim=0).values > ACTIVE_FROM,
        }

    def forward(self, x: Float[Tensor, "batch d_in"]) -> dict[str, Any]:
        """See `forward_verbose`."""
        return self.forward_verbose(x)

    def calibrate(
        self,
        batches: Iterable[Tensor],
        *,
        about: dict[str, Any] | None = None,
        save: bool = True,
    ) -> Calibration:
        """Estimate mean and standard deviation of the activations, and save them with the
        checkpoint.

        A few thousand images are plenty. Use all positions, not only CLS: the autoencoders were
        trained on all of them.

        Args:
            batches: activations `[…, d_in]`, as from `ConfiguredViT.batches`.
            about: a description of model, site and images; kept with the figures.
            save: write them beside the checkpoint, where the next `from_pretrained` finds them; an
                autoencoder that was not loaded from a file keeps them only in memory.

        Raises:
            UserError: there are too few activations, or they have another width.
            SparsightError: they are not finite, or the file cannot be written.
        """
        calibration = Calibration.estimate(batches, about)
        if len(calibration.mean) != len(self.pre_b):
            raise UserError(
                f"The activations are {len(calibration.mean)} wide; the autoencoder's are "
                f"{len(self.pre_b)}."
            )
        if save and self.path is not None:
            calibration.save(Calibration.beside(self.path))
        self.calibration = calibration
        return calibration

    def forward_calibrated(self, x: Float[Tensor, "batch d_in"]) -> dict[str, Any]:
        """Run `forward_verbose` in the space of training; the reconstruction is in the units of x.

        Raises:
            UserError: there is no calibration, or the activations have another shape.
        """
        x = self._vectors(x)
        calibration = self._calibration()
        found = self.forward_verbose(calibration.standardise(x))
        return {**found, "reconstruction": calibration.restore(found["reconstruction"])}

    @torch.no_grad()
    def report(self, batches: Iterable[Tensor]) -> dict[str, dict[str, float | None]]:
        """Measure CLIP-Scope's two figures and FVU on the same activations, used in three ways.

        `raw`: the activations as they are, as in the package's examples. `calibrated`: through
        `forward_calibrated`, with errors in the model's units. `standardised`: the same, with
        errors in the space of training, which compare with the published figures.

        Args:
            batches: activations `[batch, tokens, d_in]`.

        Returns:
            For each of the three: `clipscope_mse`, `clipscope_ev`, `fvu`; None if a figure is not
            defined. Only `raw` without a calibration.

        Raises:
            UserError: there are no vectors, or the activations have another shape.
            SparsightError: activations or reconstructions are not finite.
        """
        meters: dict[str, ReconstructionMeter] = {}
        for x in batches:
            x = x.to(wide(self.pre_b))
            for name, (own, own_hat) in self._ways(x).items():
                if name not in meters:
                    meters[name] = ReconstructionMeter(x.shape[1], x.shape[2], x.device, name)
                meters[name].add(own, own_hat)
        if not meters:
            raise UserError("There are no activations to report on.")
        figures = {name: meter.result() for name, meter in meters.items()}
        keys = ("clipscope_mse", "clipscope_ev", "fvu")
        return {name: {key: each[key] for key in keys} for name, each in figures.items()}

    def _ways(self, x: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
        """Return activations and reconstructions, as they are and standardised."""
        found = {"raw": (x, self._reconstruct(x))}
        if self.calibration is not None:
            x_n = self.calibration.standardise(x)
            hat = self._reconstruct(x_n)
            found["calibrated"] = (x, self.calibration.restore(hat))
            found["standardised"] = (x_n, hat)
        return found

    def _reconstruct(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, 1).split(ROWS_AT_A_TIME)
        found = [self.forward_verbose(part)["reconstruction"] for part in rows]
        return torch.cat(found).view_as(x)

    def _calibration(self) -> Calibration:
        if self.calibration is None:
            raise UserError(
                "This autoencoder was trained on standardised activations, and there is no "
                "calibration yet. Make one: sae.calibrate(vit.batches(images, location))."
            )
        return self.calibration

    def _vectors(self, x: Tensor) -> Tensor:
        """Return the activations in the dtype of the computation, after checking their shape."""
        if x.ndim != 2 or x.shape[1] != len(self.pre_b):
            raise UserError(
                f"The autoencoder takes [batch, {len(self.pre_b)}]; got {list(x.shape)}. Positions "
                "of several images go in as x.flatten(0, 1)."
            )
        return x.to(torch.promote_types(self.pre_b.dtype, torch.float32))


def _location(given: Any) -> Location:
    plain = isinstance(given, tuple | list) and len(given) == 2
    if not plain or not isinstance(given[0], int) or given[1] != "resid":
        raise UserError(f"A location is (number of a block, 'resid'); got {given!r}.")
    return (given[0], given[1])


def _read(path: Path) -> Checkpoint:
    found = unpack(read_torch(path), path)
    if found is None:
        raise UserError(f"{path}: is no checkpoint of CLIP-Scope (pre_b, enc and dec, with k).")
    return found
