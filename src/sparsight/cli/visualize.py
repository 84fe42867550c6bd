"""`sparsight visualize`: make images that activate latents, and compare them with real ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from sparsight.cli.help import Help
from sparsight.cli.opening import open_index, open_saes
from sparsight.cli.options import parse
from sparsight.cli.printing import print_notes, print_table
from sparsight.cli.subject import SubjectOptions, Subjects
from sparsight.editing.latent_search import find_latents
from sparsight.errors import UserError
from sparsight.figures import rounded
from sparsight.files import check_folder
from sparsight.visualisation import Transforms, Visualisation, VisualisationSettings, visualize
from sparsight.visualisation.settings import Pool, Recipe

HELP = Help(
    examples=("runs/b32-l9 12 40", "runs/b32-l9 anchor --n 4 --recipe pixels"),
    needed=("run", "latents"),
    common=("recipe", "n", "steps", "pool", "press", "seed", "out", "images", "index"),
)


@dataclass(frozen=True)
class VisualizeOptions(SubjectOptions):
    """Make images that activate latents of an SAE, by gradient ascent through the model.

    The activation on each image, also after changes that optimising never saw, is printed beside
    that on the best real image.
    """

    run: tyro.conf.Positional[Path | None] = None
    """Run folder of the SAE. Required."""

    latents: tyro.conf.Positional[tuple[str, ...]] = ()
    """Latents, by number or by words from their names in the index. Required."""

    recipe: Recipe = VisualisationSettings.recipe
    """What is optimised. maco: the phases of an image that has the mean spectrum of the run's
    images; pixels; fourier: coefficients; network: the weights of an untrained network."""

    n: int = VisualisationSettings.n
    """Images per latent."""

    steps: int = VisualisationSettings.steps
    """Steps of the optimiser."""

    views: int = VisualisationSettings.views
    """Transformed copies of each image that the model sees in each step."""

    pool: Pool = VisualisationSettings.pool
    """What is raised. max: the strongest pre-activation among the tokens; softmax: their mean
    weighted towards the strongest; mean: the mean over patches, for textures; cls: that of CLS."""

    lr: float | None = None
    """Learning rate; default: the recipe's own."""

    tv: float | None = None
    """Weight of the total variation, which makes images smooth; default: the recipe's own."""

    diversity: float = VisualisationSettings.diversity
    """Weight of the similarity between the images of one latent, if there are several."""

    press: float = VisualisationSettings.press
    """Weight of the other latents' activations, which are pressed down; costs activation."""

    seed: int = VisualisationSettings.seed
    """Seed; the same seed gives the same images on the same machine."""

    transforms: Transforms = field(default_factory=Transforms)
    """Random changes of the image before each step."""

    index: Path | None = None
    """Latent index for names, real images and spectrum; default: index/ in the run, if it
    exists."""

    out: Path | None = None
    """Folder with one sub-folder per latent; default: visualisations/ in the run."""

    check: bool = True
    """Refuse an SAE that was trained on a model with other weights."""


def main(arguments: Sequence[str]) -> None:
    """Parse, make the images, print a table, write the files."""
    options = parse(VisualizeOptions, "visualize", arguments, helped=HELP)
    if options.run is None:
        raise UserError("No SAE is given; name a run folder.")
    if not options.latents:
        raise UserError("No latent is given; name at least one: `sparsight visualize RUN 12`.")
    if options.store is not None:
        raise UserError("visualize runs the model: it needs no --store.")
    settings = VisualisationSettings(
        **{name: getattr(options, name) for name in VisualisationSettings.__dataclass_fields__}
    )
    saes = open_saes([options.run], options.device)
    if len(saes) > 1:
        listed = ", ".join(map(str, saes))
        raise UserError(f"{options.run} holds {len(saes)} SAEs; name one run: {listed}.")
    (folder, sae), = saes.items()  # fmt: skip
    index = open_index(options.index, folder, sae)
    found = find_latents(options.latents, sae.n_latents, index)
    out = check_folder(options.out or folder / "visualisations")
    subjects = Subjects(options)
    results = visualize(
        subjects.model(folder, sae),
        sae,
        list(found),
        index=index,
        images=None if options.images is None else subjects.images(folder, sae),
        settings=settings,
        check=options.check,
        out=out,
        workers=options.workers,
        quiet=False,
    )
    print_notes(dict.fromkeys(note for result in results for note in result.notes))
    head = ["latent", "activation", "held-out", "real", "real held-out", "ratio", "rank"]
    print_table([head, *(_row(result, found[result.latent]) for result in results)])
    print(f"{out} · one folder per latent")


def _row(result: Visualisation, name: str | None) -> list[str]:
    real, ratio = result.real, result.held_out_ratio
    return [
        f"{result.latent}" + (f" {name}" if name else ""),
        rounded(result.best.plain),
        rounded(result.best.mean_held_out),
        "–" if real is None else rounded(real.best),
        "–" if real is None else rounded(real.best_held_out),
        "–" if ratio is None else rounded(ratio),
        f"{result.best.rank:,}",
    ]
