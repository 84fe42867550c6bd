"""Open vision transformers with sparse autoencoders: from images to latents with a meaning.

The public API is available from here and imported on first use: `import sparsight as sp`, then
`sp.load_model`, `sp.open_images`, `sp.extract`, `sp.train`, `sp.evaluate`, `sp.build_index`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparsight.activations import (
        ActivationSource,
        ActivationStore,
        HeldOut,
        LiveActivations,
        VectorStream,
        extract,
    )
    from sparsight.attacks import find_text_salient, make_pairs, measure_attack
    from sparsight.demo import run_demo
    from sparsight.editing import (
        DirectionAblation,
        LatentEdit,
        NeuronEdit,
        embed_collection,
        fold,
        intervene,
        steer,
    )
    from sparsight.errors import MissingExtra, SparsightError, UserError
    from sparsight.evaluation import EvaluationReport, SweepMeasures, evaluate
    from sparsight.finetuning import FinetuneConfig, FinetuneRun, finetune
    from sparsight.images import ImageInfo, ImageSource, load_batches, open_images
    from sparsight.latents import (
        CodeStore,
        LatentIndex,
        build_index,
        compare,
        encode,
        image_latents,
        show_latent,
        write_report,
    )
    from sparsight.publishing import push_to_hub
    from sparsight.sae import (
        AbsTopK,
        Archetypal,
        BatchTopK,
        Gated,
        GroupMax,
        JumpReLU,
        MatchingPursuit,
        Matryoshka,
        MatryoshkaK,
        MultiTopK,
        ReLU,
        SAEConfig,
        SparseAutoencoder,
        SparseCode,
        TopK,
    )
    from sparsight.sae.remedies import AuxK, GhostGradients, Resampling
    from sparsight.training import Run, Sweep, SweepConfig, TrainConfig, sweep, train
    from sparsight.vision import VisionModel, load_model, zero_shot
    from sparsight.vision.saving import save_model
    from sparsight.visualisation import Visualisation, VisualisationSettings, visualize

__version__ = "0.2.0"

_HOMES = {
    "sparsight.activations": (
        "ActivationSource",
        "ActivationStore",
        "HeldOut",
        "LiveActivations",
        "VectorStream",
        "extract",
    ),
    "sparsight.demo": ("run_demo",),
    "sparsight.editing": (
        "DirectionAblation",
        "LatentEdit",
        "NeuronEdit",
        "embed_collection",
        "fold",
        "intervene",
        "steer",
    ),
    "sparsight.attacks": ("find_text_salient", "make_pairs", "measure_attack"),
    "sparsight.finetuning": ("FinetuneConfig", "FinetuneRun", "finetune"),
    "sparsight.errors": ("MissingExtra", "SparsightError", "UserError"),
    "sparsight.evaluation": ("EvaluationReport", "SweepMeasures", "evaluate"),
    "sparsight.images": ("ImageInfo", "ImageSource", "load_batches", "open_images"),
    "sparsight.latents": (
        "CodeStore",
        "LatentIndex",
        "build_index",
        "compare",
        "encode",
        "image_latents",
        "show_latent",
        "write_report",
    ),
    "sparsight.publishing": ("push_to_hub",),
    "sparsight.sae": (
        "AbsTopK",
        "Archetypal",
        "BatchTopK",
        "Gated",
        "GroupMax",
        "JumpReLU",
        "MatchingPursuit",
        "Matryoshka",
        "MatryoshkaK",
        "MultiTopK",
        "ReLU",
        "SAEConfig",
        "SparseAutoencoder",
        "SparseCode",
        "TopK",
    ),
    "sparsight.sae.remedies": ("AuxK", "GhostGradients", "Resampling"),
    "sparsight.training": ("Run", "Sweep", "SweepConfig", "TrainConfig", "sweep", "train"),
    "sparsight.vision": ("VisionModel", "load_model", "zero_shot"),
    "sparsight.vision.saving": ("save_model",),
    "sparsight.visualisation": ("Visualisation", "VisualisationSettings", "visualize"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AbsTopK",
    "ActivationSource",
    "ActivationStore",
    "Archetypal",
    "AuxK",
    "BatchTopK",
    "CodeStore",
    "DirectionAblation",
    "EvaluationReport",
    "FinetuneConfig",
    "FinetuneRun",
    "Gated",
    "GhostGradients",
    "GroupMax",
    "HeldOut",
    "ImageInfo",
    "ImageSource",
    "JumpReLU",
    "LatentEdit",
    "LatentIndex",
    "LiveActivations",
    "MatchingPursuit",
    "Matryoshka",
    "MatryoshkaK",
    "MissingExtra",
    "MultiTopK",
    "NeuronEdit",
    "ReLU",
    "Resampling",
    "Run",
    "SAEConfig",
    "SparseAutoencoder",
    "SparseCode",
    "SparsightError",
    "Sweep",
    "SweepConfig",
    "SweepMeasures",
    "TopK",
    "TrainConfig",
    "UserError",
    "VectorStream",
    "VisionModel",
    "Visualisation",
    "VisualisationSettings",
    "build_index",
    "compare",
    "embed_collection",
    "encode",
    "evaluate",
    "extract",
    "find_text_salient",
    "finetune",
    "fold",
    "image_latents",
    "intervene",
    "load_batches",
    "load_model",
    "make_pairs",
    "measure_attack",
    "open_images",
    "push_to_hub",
    "run_demo",
    "save_model",
    "show_latent",
    "steer",
    "sweep",
    "train",
    "visualize",
    "write_report",
    "zero_shot",
]


def __getattr__(name: str) -> Any:
    """Import a public name from its package on first use; torch takes seconds to load."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
