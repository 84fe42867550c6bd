from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from memory_activations import sparse_mixtures
from sparsight.activations import extract, matching_sites
from sparsight.config import load, to_dict, write_toml
from sparsight.errors import UserError
from sparsight.images import open_images
from sparsight.sae import AuxK, SAEConfig, TopK
from sparsight.training import SweepConfig, TrainConfig, TrainRecipe, sweep, train
from sparsight.training.planning import with_length
from sparsight.training.sweeping import SweepRecipe
from sparsight.vision import VisionModel, load_model

RECIPES = Path(__file__).parents[2] / "recipes"

PUBLISHED = {
    1: ("blocks.-3.resid_post", "all", 1e-3, 32, 8, 10 * 50, True, None),
    2: ("blocks.-3.resid_post", "cls", 1e-2, 32, 8, 100, False, 1 / 32),
    3: ("blocks.-1.resid_post", "cls", 5e-4, 64, 4, 500, False, 1 / 32),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> VisionModel:
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        image_size=64,
        patch_size=16,
        projection_dim=32,
    )
    CLIPVisionModelWithProjection(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64).save_pretrained(folder)
    return load_model(str(folder), device="cpu")


def _recipe(number: int) -> TrainRecipe:
    return load(TrainRecipe, RECIPES / f"imagenet-mini-{number}.toml")


@pytest.mark.parametrize("number", PUBLISHED)
def test_a_recipe_matches_its_study(number: int) -> None:
    recipe = _recipe(number)
    config = recipe.train
    found = (
        *recipe.sites,
        recipe.tokens,
        config.lr,
        config.sae.sparsity.k,
        config.sae.expansion,
        config.batch_size,
        config.sae.unit_norm_decoder,
        config.remedy.alpha if isinstance(config.remedy, AuxK) else None,
    )
    assert found == PUBLISHED[number]


@pytest.mark.parametrize("number", PUBLISHED)
def test_a_recipe_trains_on_another_model_and_other_images(
    number: int, model: VisionModel, tmp_path: Path
) -> None:
    recipe = _recipe(number)
    config = dataclasses.replace(
        recipe.train, n_vectors=3 * recipe.train.batch_size, log_every=recipe.train.batch_size
    )
    run = train(
        (model, open_images("calibration:40")),
        config,
        out=tmp_path,
        sites=recipe.sites,
        tokens=recipe.tokens,
        quiet=True,
    )
    assert run.sites == (model.canonical_site(recipe.sites[0]),)
    assert run.sae().n_latents == recipe.train.sae.expansion * 32
    assert run.sae().metadata["site"] == run.sites[0]
    assert len(run.metrics()) == 3 and all(line["fvu"] < 10 for line in run.metrics())
    again = run.recipe
    assert again.train == config and again.tokens == recipe.tokens


def _read(path: Path) -> SweepRecipe:
    """Load a recipe of either kind."""
    return load(SweepRecipe, path)


def _small(recipe: SweepRecipe, model: VisionModel) -> SweepRecipe:
    """Return the same recipe for a few vectors, at sites that the model has."""
    sites = [
        site
        for site in recipe.sites
        if "blocks.-" not in site or int(site.split(".")[1]) >= -model.n_blocks
    ]
    config = dataclasses.replace(
        recipe.train, n_vectors=96, batch_size=32, log_every=32, checkpoint_every=None
    )
    grid = dict(recipe.grid)
    if "batch_size" in grid:
        grid["batch_size"] = [32, 48]
    if "n_latents" in grid:  # no smaller than k
        grid["n_latents"] = [128, 256]
    if "k" in grid:
        grid["k"] = grid["k"][:2]
    return dataclasses.replace(recipe, sites=tuple(sites), train=config, grid=grid)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_recipe_runs_on_another_model_and_other_images(
    path: Path, model: VisionModel, tmp_path: Path
) -> None:
    whole = _read(path)
    assert whole.out.name == path.stem
    recipe = _small(whole, model)
    source = (model, open_images("calibration:24"))
    options = {"sites": recipe.sites, "tokens": recipe.tokens, "quiet": True}
    if not recipe.grid:
        runs = {"": train(source, recipe.train, out=tmp_path, **options)}
    else:
        runs = sweep(source, SweepConfig(recipe.train, recipe.grid), tmp_path, **options).runs
        assert len(runs) == len(SweepConfig(recipe.train, recipe.grid).members) > 1
    for run in runs.values():
        assert run.sites == matching_sites(recipe.sites, model.sites, model.canonical_site)
        for site in run.sites:
            assert run.metrics(site)[-1]["fvu"] < 100 and run.sae(site).d_in == 32


def test_the_recipes_of_published_runs_have_their_sizes() -> None:
    fry, scope, patches = (
        _read(RECIPES / f"{name}.toml") for name in ("fry", "clip-scope", "patchsae")
    )
    assert fry.train.sae.width(1024) == scope.train.sae.width(1024) == 65_536
    assert patches.train.sae.width(768) == 49_152
    assert fry.train.n_steps == 2560 and fry.train.warmup * fry.train.n_steps == 500
    assert patches.train.n_steps == 20_480 and patches.train.warmup * patches.train.n_steps == 500
    # The mean over d entries of errors over ‖x‖, and of entries at norm √d.
    for recipe, d_in in ((fry, 1024), (patches, 768)):
        assert recipe.train.sae.sparsity.l1 == pytest.approx(8e-5 * d_in**1.5, rel=0.02)
    assert _read(RECIPES / "dn-cbm.toml").train.sae.sparsity.l1 == pytest.approx(
        3e-5 * 512, rel=0.01
    )
    assert len(scope.sites) == 8 and scope.train.sae.sparsity == TopK(k=32, rectify=False)
    assert scope.train.remedy is None
    remedies = _read(RECIPES / "sative-remedies.toml")
    members = SweepConfig(remedies.train, remedies.grid).members
    assert len(members) == 8 and "batch_size2048-remedy_none" in members
    plain = _read(RECIPES / "sative.toml")
    assert plain.train == remedies.train and plain.train.sae.width(768) == 12_288
    steps = [each.n_steps for _, each in SweepConfig(plain.train, plain.grid).members.values()]
    assert steps == [1954, 62]


def test_a_store_and_live_activations_train_alike(model: VisionModel, tmp_path: Path) -> None:
    images = open_images("calibration:40")
    config = TrainConfig(sae=SAEConfig(expansion=4), n_vectors=2000, batch_size=200, lr=1e-3)
    site = "blocks.-1.resid_post"
    store = extract(model, images, sites=[site], out=tmp_path / "acts", dtype="float32", quiet=True)
    stored = train(store, config, out=tmp_path / "stored", quiet=True)
    live = train((model, images), config, out=tmp_path / "live", sites=[site], quiet=True)
    assert stored.sites == live.sites == ("blocks.3.resid_post",)
    # The order of the vectors differs, but the result does not.
    assert stored.metrics()[-1]["fvu"] == pytest.approx(live.metrics()[-1]["fvu"], rel=0.1)
    assert stored.sae().metadata["model"]["weights_hash"] == model.weights_hash


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(),
        TrainConfig(remedy=None, grad_clip=None, ema=0.99, loggers=("tensorboard",)),
        TrainConfig(remedy=AuxK(k=3, dead_after=7), lr=1e-4, precision="bfloat16"),
    ],
)
def test_a_training_configuration_survives_a_round_trip_through_toml(
    config: TrainConfig, tmp_path: Path
) -> None:
    recipe = TrainRecipe(sites=("a", "b"), train=config)
    write_toml(tmp_path / "run.toml", recipe)
    assert load(TrainRecipe, tmp_path / "run.toml") == recipe


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"n_vectors": 10}, "less than batch_size"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"warmup": 0.6, "decay": 0.6}, "together they may be at most 1"),
        ({"ema": 1.0}, "between 0 and 1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 2**64}, "seed is a number of more than 64 bits"),
        ({"data_seed": -1}, "data_seed is -1"),
        ({"betas": (2.0, 0.9)}, r"betas are \(2\.0, 0\.9\)"),
        ({"betas": (0.9, 1.0)}, "below 1"),
        ({"betas": (0.9,)}, "a list of 2"),
        ({"eps": 0.0}, "eps is 0"),
        ({"eps": float("inf")}, "eps is inf; expected a finite number"),
        ({"warmup": float("nan")}, "warmup is nan; expected a finite number"),
        ({"grad_clip": float("inf")}, "grad_clip is inf"),
        ({"ema": float("nan")}, "ema is nan"),
        ({"n_vectors": "5"}, "n_vectors is '5'; expected an int"),
        ({"batch_size": 1.5}, "batch_size is 1.5; expected an int"),
        ({"batch_size": True}, "batch_size is True"),
        ({"log_every": 0}, "log_every is 0"),
        ({"checkpoint_every": 2.5}, "checkpoint_every is 2.5"),
        ({"loggers": ("tensorbord",)}, r"loggers\[0\] is 'tensorbord'; expected 'tensorboard' or"),
        ({"loggers": "wandb"}, "loggers is 'wandb'; expected a list"),
        ({"precision": "bf16"}, "precision is 'bf16'; expected 'auto' or 'float32' or"),
        ({"remedy": 3}, "remedy is 3"),
        ({"sae": None}, "sae is None"),
    ],
)
@pytest.mark.unchecked
def test_values_out_of_range_are_named(changes: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TrainConfig(**changes)


@pytest.mark.unchecked
@pytest.mark.parametrize(
    ("cls", "changes", "message"),
    [
        (SAEConfig, {"normaliser": "foo"}, "normaliser is 'foo'; expected 'scale' or"),
        (SAEConfig, {"b_dec_init": "x"}, "b_dec_init is 'x'; expected 'zero' or"),
        (SAEConfig, {"n_latents": 64.0}, "n_latents is 64.0; expected an int"),
        (SAEConfig, {"expansion": 0}, "expansion is 0"),
        (SAEConfig, {"unit_norm_decoder": "yes"}, "unit_norm_decoder is 'yes'"),
        (SAEConfig, {"sparsity": 32}, "sparsity is 32; expected a table"),
        (TopK, {"k": 2.5}, "sparsity.k is 2.5; expected an int"),
        (AuxK, {"alpha": float("nan")}, "remedy.alpha is nan; expected a finite number"),
        (AuxK, {"alpha": float("inf")}, "remedy.alpha is inf"),
        (AuxK, {"k": "8"}, "remedy.k is '8'; expected an int"),
        (AuxK, {"dead_after": 0}, "remedy.dead_after is 0"),
        (TrainRecipe, {"tokens": "heads"}, "tokens is 'heads'; expected 'all' or"),
        (TrainRecipe, {"sites": "embedding"}, "sites is 'embedding'; expected a list"),
    ],
)
def test_parts_of_a_recipe_refuse_unknown_values(cls: type, changes: dict, message: str) -> None:
    """In Python as in TOML, a misspelt choice must not be taken for a default."""
    with pytest.raises(UserError, match=message):
        cls(**changes)


@pytest.mark.unchecked
def test_values_of_a_related_type_are_converted_to_the_type_of_the_field() -> None:
    config = TrainConfig(warmup=0, betas=[0, 0.5], loggers=["wandb"])  # type: ignore[arg-type]
    assert config == TrainConfig(warmup=0.0, betas=(0.0, 0.5), loggers=("wandb",))
    assert hash(config.betas) and isinstance(config.warmup, float)
    assert TrainRecipe(out="runs/a").out == Path("runs/a")  # type: ignore[arg-type]


def test_a_misspelt_key_is_named_with_its_table(tmp_path: Path) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text("[train.sae]\nexpansio = 3\n")
    message = r"recipe\.toml: unknown key 'train\.sae\.expansio'\. Did you mean 'expansion'"
    with pytest.raises(UserError, match=message):
        load(TrainRecipe, path)


def test_defaults_follow_from_the_width_and_the_length_of_the_run() -> None:
    assert TrainConfig().learning_rate(2**14) == 2e-4
    assert TrainConfig().learning_rate(2**12) == pytest.approx(4e-4)
    assert TrainConfig(n_vectors=10**9).dead_after == 10_000_000
    assert to_dict(TrainConfig(remedy=None))["remedy"] == "none"


def test_a_run_without_a_length_gets_one_that_fits_its_data(tmp_path: Path) -> None:
    lengths = {n: TrainConfig().with_length(n).n_vectors for n in (100, 129_785, 10**7)}
    assert lengths == {100: 1_000_000, 129_785: 2_595_700, 10**7: 10_000_000}
    assert TrainConfig(n_vectors=5000).with_length(100).n_vectors == 5000
    data, there = sparse_mixtures(), tmp_path / "config.toml"
    assert with_length(TrainConfig(), [data], data.sites, there).n_vectors == 1_000_000
    # An existing run keeps its own length, e.g. the default of an earlier version.
    write_toml(there, TrainRecipe(train=TrainConfig(n_vectors=10_000_000)))
    assert with_length(TrainConfig(), [data], data.sites, there).n_vectors == 10_000_000
