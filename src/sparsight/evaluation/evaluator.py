"""`evaluate`: every number about an SAE and its baselines, on the same data, with the same code."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

import sparsight
from sparsight.activations.sampling import sampled
from sparsight.config import check_seed
from sparsight.errors import SparsightError, UserError
from sparsight.evaluation.baselines import (
    INIT_SAMPLE,
    PCA,
    Decomposition,
    Features,
    Moments,
    Neurons,
    untrained,
)
from sparsight.evaluation.choosing import choose_features
from sparsight.evaluation.data import (
    Passes,
    find_site,
    find_target,
    held_out,
    trained_on,
)
from sparsight.evaluation.downstream import Replacement, downstream, why_not
from sparsight.evaluation.localising import HeatCollector
from sparsight.evaluation.pooling import PooledFeatures
from sparsight.evaluation.reconstruction import ReconstructionMeter
from sparsight.evaluation.report import EvaluationReport, finite
from sparsight.evaluation.scenes import TruthSource
from sparsight.evaluation.sparsity import SparsityMeter, low_density_cluster
from sparsight.evaluation.truth import MAX_SCENES, MIN_SCENES, TruthTable, ask, finish, scenes_of
from sparsight.images import ImageSource, open_images
from sparsight.progress import progress
from sparsight.sae import SparseAutoencoder, SparseCode
from sparsight.vision import VisionModel, resolve_templates

if TYPE_CHECKING:
    from sparsight.activations import ActivationSource

FORMAT_VERSION = 1

KEPT_ENTRIES = 16 << 20
"""Entries of sparse codes that are kept for the second pass; 192 MiB."""


@torch.no_grad()
def evaluate(
    sae: SparseAutoencoder,
    activations: ActivationSource,
    *,
    model: VisionModel | None = None,
    images: ImageSource | str | Path | None = None,
    site: str | None = None,
    class_names: Sequence[str] | Mapping[str, str] | None = None,
    templates: str | Sequence[str] = "simple",
    baselines: bool = True,
    max_images: int | None = None,
    batch_images: int = 64,
    dead_window: int | None = None,
    workers: int | None = None,
    seed: int = 0,
    quiet: bool = False,
) -> EvaluationReport:
    """Measure an SAE; figures that cannot be measured are left out, with the reason in `omitted`.

    Reconstruction and sparsity need only activations. Zero-shot accuracy needs a model with a text
    tower and labelled images, contrastive loss needs captions, the truth table calibration images.

    Args:
        sae: the SAE.
        activations: a store, or live activations.
        model: the model that computed them; default: that of live activations.
        images: images for the downstream figures; default: those of the activations.
        site: the site to measure; default: the one that the SAE was trained on.
        class_names: labels, or a mapping from label to class name; default: the images' labels.
        templates: sentences for zero-shot classification: `simple`, `openai80` or a list.
        baselines: measure an untrained SAE, PCA and raw neurons as well.
        max_images: size of a random sample of images; default: all images.
        batch_images: images per batch.
        dead_window: N of `dead`, in vectors; default 10,000,000, or all vectors if there are fewer.
        workers: processes that decode images.
        seed: seed of the sample, the untrained SAE, the halves of the truth table and the
            bootstrap.
        quiet: show no progress bars.

    Raises:
        UserError: SAE, activations and model do not match, or an option is invalid.
        SparsightError: an activation or a reconstruction is not finite.
    """
    if dead_window is not None and dead_window < 1:
        raise UserError(f"dead_window is {dead_window}; it must be 1 vector or more.")
    check_seed(seed)
    resolve_templates(templates)  # a wrong name fails now, not after the whole evaluation
    site = find_site(sae, activations, site)
    model = model or getattr(activations, "model", None)
    _check_model(model, activations)
    activations = sampled(activations, max_images, seed)
    passes = Passes(
        activations,
        site,
        target=find_target(sae, activations),
        max_images=max_images,
        seed=seed,
        batch_images=batch_images,
        device=sae.W_enc.device,
    )
    evaluation = _Evaluation(sae, passes, seed, dead_window, quiet)
    own, no_images = _own_images(activations)
    downstream_images = open_images(images) if isinstance(images, str | Path) else images or own

    evaluation.measure({"sae": sae}, "evaluate")
    if baselines:
        evaluation.measure(evaluation.baselines(), "baselines")
    evaluation.tell_truth(own, no_images)
    if images is None and own is not None and len(evaluation.images) < len(own):
        downstream_images = own.select(evaluation.images)  # those that the other figures are from
    evaluation.go_downstream(
        model,
        downstream_images,
        no_images,
        class_names=class_names,
        templates=templates,
        limit=max_images,
        seed=seed,
        batch_images=batch_images,
        workers=workers,
    )
    return evaluation.report()


@dataclass
class _Measured:
    """The meters of one decomposition: the SAE or a baseline."""

    decomposition: Decomposition
    raw: ReconstructionMeter
    normalised: ReconstructionMeter
    sparsity: SparsityMeter | None
    pooled: PooledFeatures
    codes: list[SparseCode] = field(default_factory=list)
    """Codes of the first batches, as many as fit: heatmaps need them again."""
    room: int = KEPT_ENTRIES

    def keep(self, code: SparseCode) -> None:
        """Keep a batch's code if it still fits."""
        self.room -= len(code.indices)
        if self.room >= 0:
            self.codes.append(code)

    def features(self, number: int, x: Tensor) -> Features:
        """Return the features of a batch, from its number and vectors."""
        return self.codes[number] if number < len(self.codes) else self.decomposition(x)[1]


class _Evaluation:
    """The results so far; each step adds to them."""

    def __init__(
        self,
        sae: SparseAutoencoder,
        passes: Passes,
        seed: int,
        dead_window: int | None,
        quiet: bool,
    ) -> None:
        self.sae, self.passes, self.seed = sae, passes, seed
        self.dead_window, self.quiet = dead_window, quiet
        self.fit = Moments(passes.d_in, passes.device)
        self.images: list[int] = []
        self.measured: dict[str, _Measured] = {}
        self.truth: dict[str, TruthTable] = {}
        self.blocks: dict[str, dict[str, Any]] = {}
        self.omitted: dict[str, str] = {}
        self.downstream_images: str | None = None

    def measure(self, decompositions: Mapping[str, Decomposition], title: str) -> None:
        """Measure decompositions in one pass over the activations."""
        passes, layout = self.passes, self.passes.layout
        first = not self.images
        fresh = {name: self._meters(name, each) for name, each in decompositions.items()}
        n_seen = 0
        with progress(title, passes.n_images, "images", quiet=self.quiet) as line:
            for batch in passes:
                x, y = batch.x.flatten(0, 1), batch.y.flatten(0, 1)
                normaliser = self.sae.target_normaliser or self.sae.normaliser
                frame = self.sae.normaliser.frame(x)
                z = normaliser(y, frame)
                for each in fresh.values():
                    y_hat, features = each.decomposition(x)
                    each.raw.add(batch.y, y_hat.view_as(batch.y))
                    z_hat = normaliser(y_hat, frame)
                    each.normalised.add(z.view_as(batch.y), z_hat.view_as(batch.y))
                    each.pooled.add(features)
                    if isinstance(features, SparseCode):
                        each.sparsity = each.sparsity or SparsityMeter(
                            features.n_latents, layout.n_tokens, passes.device
                        )
                        each.sparsity.add(features)
                        each.keep(features)
                if first:
                    self.images += batch.images.tolist()
                    # PCA is fitted to every other image.
                    self.fit.add(batch.x[n_seen % 2 :: 2].flatten(0, 1))
                n_seen += len(batch.x)
                line.advance(len(batch.x))
        if not n_seen:
            raise UserError(
                "No images to evaluate on: the source is empty, or none of its images loads."
            )
        for each in fresh.values():
            each.raw.check_finite()
        self.measured |= fresh

    def baselines(self) -> dict[str, Decomposition]:
        """Fit the baselines, at the SAE's own mean L0."""
        sparsity = self.measured["sae"].sparsity
        assert sparsity is not None
        k = min(max(1, round(sparsity.l0())), self.sae.d_in)
        sample = self.passes.first_vectors(INIT_SAMPLE)
        fresh = untrained(self.sae, sample, self.seed, k)
        if self.sae.is_transcoder:  # the other baselines reconstruct their input
            return {"untrained": fresh}
        mean = self.measured["sae"].raw.mean.float()
        return {
            "untrained": fresh,
            "pca": PCA.fit(self.fit, k),
            "neurons": Neurons(mean, k),
        }

    def tell_truth(self, images: ImageSource | None, no_images: str) -> None:
        """Make the truth table of the SAE and its baselines, if the images have a ground truth."""
        if images is None:
            self.omitted["truth"] = no_images
            return
        if not isinstance(images, TruthSource):
            self.omitted["truth"] = "The images are not from the calibration world."
            return
        layout = self.passes.layout
        if len(self.images) < MIN_SCENES:
            self.omitted["truth"] = (
                f"It needs {MIN_SCENES} scenes, but there are only {len(self.images)}."
            )
            return
        if not layout.grid:
            self.omitted["truth.iou"] = "One vector per image gives no heatmap."
        question = ask(cast(TruthSource, images), self.images, layout, self.seed)
        choices = {
            name: choose_features(question, each.pooled) for name, each in self.measured.items()
        }
        heats = {name: HeatCollector(question, choice, layout) for name, choice in choices.items()}
        if layout.grid:
            n_scenes = min(len(self.images), MAX_SCENES)
            with progress("heatmaps", n_scenes, "images", quiet=self.quiet) as line:
                for number, batch in enumerate(scenes_of(self.passes, n_scenes)):
                    x = batch.x.flatten(0, 1)
                    for name, each in self.measured.items():
                        heats[name].add(each.features(number, x))
                    line.advance(len(batch.x))
        self.truth = {
            name: finish(question, each.pooled, choices[name], heats[name], self.seed)
            for name, each in self.measured.items()
        }

    def go_downstream(
        self,
        model: VisionModel | None,
        images: ImageSource | None,
        no_images: str,
        **options: Any,
    ) -> None:
        """Measure zero-shot accuracy and contrastive loss with the site replaced."""
        passes, tokens = self.passes, self.passes.source.tokens
        reason = why_not(model, images, tokens)
        if self.sae.is_transcoder:
            reason = "A transcoder's output belongs to another site than its input."
        if reason is not None or model is None or images is None:
            reason = no_images if images is None and no_images and model else reason
            self.omitted |= {"zero_shot": str(reason), "contrastive": str(reason)}
            return
        mean = self.measured["sae"].raw.mean.float()
        replacements: dict[str, Replacement] = {
            "reconstructed": self._reconstruct("sae"),
            "zero": torch.zeros_like,
            "mean": lambda x: mean.to(x.device).expand_as(x),
        }
        others = [name for name in self.measured if name != "sae"]
        replacements |= {name: self._reconstruct(name) for name in others}
        found = downstream(
            model, images, passes.site, tokens, replacements, quiet=self.quiet, **options
        )
        self.omitted |= found.omitted
        own = ("original", "reconstructed", "zero", "mean")
        for family, variants in {
            "zero_shot": found.zero_shot,
            "contrastive": found.contrastive,
        }.items():
            if not variants:
                continue
            self._block("sae")[family] = {name: variants[name] for name in own}
            self.downstream_images = images.spec
            for name in others:
                self._block(name)[family] = {"reconstructed": variants[name]}

    def report(self) -> EvaluationReport:
        """Return the whole report."""
        sae, passes = self.sae, self.passes
        source = passes.source
        sparsity = self.measured["sae"].sparsity
        assert sparsity is not None
        counts = sparsity.counts()
        metrics: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "site": passes.site,
            **({"target_site": passes.target} if sae.is_transcoder else {}),
            "tokens": source.tokens,
            "space": "raw",
            "n_images": len(self.images),
            "n_vectors": sparsity.n_vectors,
            "n_tokens": passes.layout.n_tokens,
            "n_latents": sae.n_latents,
            "d_in": sae.d_in,
            **self._figures("sae"),
            "low_density": low_density_cluster(counts, sae.W_enc),
        }
        if "sae" in self.truth:
            table = self.truth["sae"]
            metrics["truth_skipped"] = table.skipped
            metrics["truth_scenes"] = table.n_scenes
            metrics["latent_names"] = {
                str(latent): name for latent, name in table.names.items() if name["f1"] >= 0.5
            }
        if len(self.measured) > 1:
            metrics["baselines"] = {
                name: self._about(name) | self._figures(name)
                for name in self.measured
                if name != "sae"
            }
        metrics |= {
            "omitted": self.omitted,
            "model": {
                key: source.model_info.get(key) for key in ("id", "revision", "weights_hash")
            },
            "images": source.model_info.get("images"),
            "downstream_images": self.downstream_images,
            "trained_on_these": trained_on(self.sae, source),
            "held_out": held_out(self.sae, source),
            "sae": sae.fingerprint(),
            "fvu_batch_images": passes.batch_images,
            "seed": self.seed,
            "versions": {"sparsight": sparsight.__version__, "torch": torch.__version__},
        }
        gaps: dict[str, str] = {}
        metrics = finite(metrics, "", gaps)
        metrics["omitted"] |= gaps
        return EvaluationReport(metrics, counts)

    def _figures(self, name: str) -> dict[str, Any]:
        """Return one block of `metrics.json`: the SAE's own, or a baseline's."""
        each, layout = self.measured[name], self.passes.layout
        figures = each.raw.result(layout.n_prefix, layout.has_cls)
        if each.sparsity is not None:
            figures |= each.sparsity.result(layout.n_prefix, layout.has_cls, self.dead_window)
        figures["normalised"] = each.normalised.result(layout.n_prefix, layout.has_cls)
        figures |= self._block(name)
        if name in self.truth:
            figures["truth"] = self.truth[name].entries
            figures["truth_summary"] = self.truth[name].summary
        return figures

    def _about(self, name: str) -> dict[str, Any]:
        """Return what a baseline is, for `metrics.json`."""
        each = self.measured[name].decomposition
        if isinstance(each, PCA):
            error = self.measured["sae"].raw.result()["fvu"]
            return {
                "l0": each.k,
                "fitted_to": "every other image",
                "components_of_equal_fvu": each.components_for(error),
                "fvu_at_equal_width": each.fvu_of(min(self.sae.n_latents, self.sae.d_in)),
            }
        if isinstance(each, Neurons):
            return {"l0": each.k}
        return {"seed": self.seed}

    def _block(self, name: str) -> dict[str, Any]:
        return self.blocks.setdefault(name, {})

    def _meters(self, name: str, decomposition: Decomposition) -> _Measured:
        passes, layout = self.passes, self.passes.layout
        what = f"{passes.site}, {'SAE' if name == 'sae' else name}"
        raw, normalised = (
            ReconstructionMeter(layout.n_tokens, passes.d_out, passes.device, what)
            for _ in range(2)
        )
        return _Measured(decomposition, raw, normalised, None, PooledFeatures(layout, MAX_SCENES))

    def _reconstruct(self, name: str) -> Callable[[Tensor], Tensor]:
        decomposition, device = self.measured[name].decomposition, self.passes.device

        def reconstruct(x: Tensor) -> Tensor:
            return decomposition(x.to(device))[0].to(x.device)

        return reconstruct


def _check_model(model: VisionModel | None, activations: ActivationSource) -> None:
    expected = activations.model_info.get("weights_hash")
    if model is not None and expected and model.weights_hash != expected:
        raise UserError(
            f"The activations are from {activations.model_info.get('id')}, but the model is "
            f"{model.id}, whose weights differ."
        )


def _own_images(activations: ActivationSource) -> tuple[ImageSource | None, str]:
    """Return the images of the activations; or None, and why they are missing."""
    try:
        return activations.source(), ""
    except (SparsightError, OSError) as error:
        return None, str(error)
