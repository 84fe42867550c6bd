from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from latent_parts import SITE, TensorActivations, as_version_1, make_sae
from naming_parts import planted_colours
from sparsight.cli import main
from sparsight.errors import SparsightError, UserError
from sparsight.images import ImageSource, open_images
from sparsight.latents import LatentIndex, LatentName, Postings, build_index, set_names
from sparsight.latents.names import TRUTH_SOURCE
from sparsight.naming import ImageSpace, LatentActivations, forget_names, name_latents
from sparsight.naming.causal import Causal
from sparsight.naming.names_file import NameTable
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel, load_model
from sparsight.vision.passes import PassSettings

COLOURS = ("purple", "green", "teal", "yellow")
N_IMAGES, N_LATENTS = 160, 320
SETTINGS = PassSettings(32, 0)


@dataclass
class Parts:
    model: VisionModel
    source: ImageSource
    activations: TensorActivations
    sae: SparseAutoencoder
    run: Path
    named: LatentIndex
    """Its names by text, found once."""


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """An untrained SAE with four latents that see the colour of the background."""
    model, source, activations, sae = planted_colours(N_IMAGES, N_LATENTS, COLOURS)
    run = tmp_path_factory.mktemp("run")
    sae.save_pretrained(run)
    index = build_index(sae, activations, out=run / "index", quiet=True)
    result = name_latents(
        index, sae, activations, by=["text"], model=model, false_names=0.1, settings=SETTINGS
    )
    return Parts(model, source, activations, sae, run, result.index)


@pytest.fixture
def index(parts: Parts, tmp_path: Path) -> LatentIndex:
    """A copy of the named index that a test may change."""
    shutil.copytree(parts.run, tmp_path / "run")
    return LatentIndex.open(tmp_path / "run")


def test_latents_that_see_a_background_are_named_after_it(parts: Parts) -> None:
    names = [parts.named.row(latent)["name"] for latent in range(4)]
    assert names == [f"{colour} background" for colour in COLOURS]
    rows = NameTable.of(parts.named).rows.to_pylist()
    assert [row["latent"] for row in rows] == list(range(N_LATENTS))
    for row, shown in zip(rows, parts.named.table.to_pylist(), strict=True):
        assert row["accepted"] == (row["score"] is not None and row["score"] > row["threshold"])
        assert shown["name"] == (row["name"] if row["accepted"] else None)
        assert shown["name_threshold"] == (row["threshold"] if row["accepted"] else None)
        runners_up = [each["score"] for each in row["runners_up"]]
        if row["name"] is not None:
            assert len(runners_up) == 4 and runners_up == sorted(runners_up, reverse=True)
            assert runners_up[0] <= row["score"]


def test_few_latents_with_random_weights_get_a_name_and_the_rate_is_measured(
    parts: Parts,
) -> None:
    table = NameTable.of(parts.named)
    about = table.about["text"]
    assert about["asked"] == 0.1 and 0 <= about["measured"] <= 0.2
    assert about["n_check"] >= about["n_threshold"] >= 59
    assert about["vocabulary"]["name"] == "calibration"
    random = [row["accepted"] for row in table.rows.to_pylist()][4:]
    assert np.mean(random) < 0.2


def test_naming_again_gives_the_same_bytes_and_keeps_other_methods(
    parts: Parts, index: LatentIndex
) -> None:
    before = (index.folder / "names.parquet").read_bytes()
    metrics = {"latent_names": {"7": {"attribute": "symbol/sun", "auc": 1.0, "f1": 0.9}}}
    both = name_latents(index, parts.sae, by=["truth"], metrics=metrics).index
    assert NameTable.of(both).methods() == ["truth", "text"]
    assert both.row(7)["name"] == "sun" and both.row(0)["name"] == "purple background"
    assert both.row(7)["name_source"] == TRUTH_SOURCE
    text = forget_names(both, ["truth"])
    assert (text.folder / "names.parquet").read_bytes() == before
    assert text.table.equals(parts.named.table)
    again = name_latents(
        text, parts.sae, parts.activations, by=["text"], model=parts.model, false_names=0.1,
        settings=SETTINGS,
    )  # fmt: skip
    assert (again.index.folder / "names.parquet").read_bytes() == before


def test_names_by_truth_are_shown_only_where_they_are_asked_for(
    parts: Parts, tmp_path: Path
) -> None:
    metrics = {"latent_names": {"0": {"attribute": "symbol/sun", "auc": 1.0, "f1": 0.9}}}
    index = build_index(
        parts.sae, parts.activations, out=tmp_path / "index", metrics=metrics, quiet=True
    )
    assert index.row(0)["name"] == "sun"
    result = name_latents(
        index, parts.sae, parts.activations, by=["text"], model=parts.model, false_names=0.1,
        settings=SETTINGS,
    )  # fmt: skip
    assert result.index.row(0)["name"] == "purple background"
    truth = [row for row in result.names.rows.to_pylist() if row["method"] == "truth"]
    assert truth[0]["name"] == "sun" and truth[0]["accepted"]


def test_forgetting_drops_all_names_or_those_of_a_method(index: LatentIndex) -> None:
    with pytest.raises(UserError, match=r"has no names by .labels. to forget; it has .*text"):
        forget_names(index, ["labels"])
    empty = forget_names(index)
    assert empty.table["name"].null_count == empty.table["name_threshold"].null_count == N_LATENTS
    assert NameTable.of(empty).rows.num_rows == 0


def test_joint_embeddings_of_the_index_are_not_made_again(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = build_index(
        parts.sae, parts.model, parts.source, out=tmp_path, embeddings="joint", workers=0,
        neighbours=False, quiet=True,
    )  # fmt: skip
    monkeypatch.delattr("sparsight.naming.naming.embedded")
    named = name_latents(
        index, parts.sae, parts.activations, by=["text"], model=parts.model, false_names=0.1,
        settings=SETTINGS,
    ).index  # fmt: skip
    for latent in range(len(COLOURS)):
        assert named.row(latent)["name"] == parts.named.row(latent)["name"] is not None


def test_a_name_that_a_person_has_set_outlives_those_that_methods_give(
    parts: Parts, index: LatentIndex
) -> None:
    named = set_names(index, {0: LatentName("dusk", 1.0, "by hand", 0.5)})
    metrics = {"latent_names": {"0": {"attribute": "symbol/sun", "auc": 1.0, "f1": 0.9}}}
    again = name_latents(named, parts.sae, by=["truth"], metrics=metrics).index
    assert again.row(0)["name"] == "dusk" and again.row(0)["name_threshold"] == 0.5
    assert again.row(1)["name"] == "green background"
    assert forget_names(again, ["text", "truth"]).row(0)["name"] == "dusk"
    assert forget_names(again).row(0)["name"] is None


def test_a_kill_while_names_are_written_leaves_the_old_ones(
    index: LatentIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in index.folder.iterdir() if path.is_file()}

    def killed(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sparsight.latents.index_files.write_manifest", killed)
    with pytest.raises(KeyboardInterrupt):
        forget_names(index)
    monkeypatch.undo()
    opened = LatentIndex.open(index.folder)
    assert {name: (index.folder / name).read_bytes() for name in before} == before
    assert opened.row(0)["name"] == "purple background"


def refuse(words: str, call: Callable[[], object]) -> None:
    with pytest.raises(UserError, match=words):
        call()


def test_mistakes_get_one_clear_message(parts: Parts, index: LatentIndex, tmp_path: Path) -> None:
    sae, given, model = parts.sae, parts.activations, parts.model
    refuse(
        "was built from another SAE",
        lambda: name_latents(index, make_sae(192, N_LATENTS), given, by=["text"]),
    )
    refuse(
        "No naming method 'magic'; there are labels, text",
        lambda: name_latents(index, sae, given, by=["magic"]),
    )
    for rate in (0.0, 2.0, float("nan")):  # before any pass: without activations
        refuse(
            f"--false-names is {rate}; it must lie between 0 and 1",
            lambda rate=rate: name_latents(index, sae, by=["labels"], false_names=rate),
        )
        if rate:
            refuse(
                f"--min-precision is {rate}; it must lie between 0 and 1",
                lambda rate=rate: name_latents(index, sae, by=["labels"], min_precision=rate),
            )
    refuse("codes do not suffice. Give --store", lambda: name_latents(index, sae, by=["labels"]))
    refuse("give --text-model", lambda: name_latents(index, sae, given, by=["text"]))
    refuse("measure them with `sparsight evaluate", lambda: name_latents(index, sae, by=["truth"]))
    refuse(
        "--false-names is 0",
        lambda: name_latents(index, sae, given, by=["labels"], false_names=0.0),
    )
    other = open_images(f"calibration:{N_IMAGES}:8")
    refuse(
        "which are not the 160 of",
        lambda: name_latents(index, sae, given, by=["text"], model=model, images=other),
    )
    elsewhere = TensorActivations(given.x, other, model)
    refuse("activations are of other images", lambda: name_latents(index, sae, elsewhere))
    words = tmp_path / "words.txt"
    words.write_text("sun\n\nSun\n")
    refuse(
        "words.txt",
        lambda: name_latents(index, sae, given, by=["text"], model=model, vocabulary=words),
    )
    refuse(
        "has format version 1",
        lambda: name_latents(as_version_1(index), sae, given, by=["labels"]),
    )


def test_a_model_without_texts_is_refused(parts: Parts, index: LatentIndex, tmp_path: Path) -> None:
    from latent_parts import save_clip

    blind = load_model(str(save_clip(tmp_path / "clip")), device="cpu")
    refuse(
        "has no text tower.*--text-model",
        lambda: name_latents(index, parts.sae, parts.activations, by=["text"], text_model=blind),
    )


def test_damaged_names_are_reported_and_can_be_forgotten(index: LatentIndex) -> None:
    damaged = index.with_files({"names.parquet": b"PAR1 not really"})
    with pytest.raises(SparsightError, match=r"names.parquet: is damaged .*--forget"):
        NameTable.of(damaged)
    assert forget_names(damaged).table["name"].null_count == N_LATENTS


def test_the_command_names_forgets_and_refuses(
    index: LatentIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    run = index.folder.parent
    metrics = {"latent_names": {"7": {"attribute": "symbol/sun", "auc": 1.0, "f1": 0.9}}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    assert main(["name", str(run), "--by", "truth"]) == 0
    assert "truth: 1 of" in capsys.readouterr().out
    assert LatentIndex.open(run).row(7)["name"] == "sun"
    assert main(["name", str(run), "--forget", "--by", "truth"]) == 0
    assert LatentIndex.open(run).row(7)["name"] is None
    assert main(["name", str(run), "--by", "magic"]) == 2
    assert "No naming method 'magic'" in capsys.readouterr().err


def test_the_causal_score_follows_the_embedding_when_a_latent_is_added(parts: Parts) -> None:
    model, source = parts.model, parts.source
    places = np.arange(6)
    pixels = torch.stack([model.transform(source.load(int(i))) for i in places])
    with torch.no_grad():
        plain = normalize(model.embed_images(pixels), dim=1)
        words = normalize(model.embed_texts(["a red cat", "a green background", "a sun"]), dim=1)
    space = ImageSpace(plain, places, N_IMAGES)
    method = Causal(
        space, ["cat", "green", "sun"], words, model, SITE, "patches", source, SETTINGS
    )  # fmt: skip
    rows = Postings(
        np.array([0, 2]),
        np.array([0, 3], np.int32),
        np.array([1.0, 4.0], np.float32),
        None,
        N_IMAGES,
    )
    (block,) = method.blocks(LatentActivations(parts.sae, np.array([1]), rows))

    def add(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x[:, :1], x[:, 1:] + 4 * parts.sae.W_dec[1]], dim=1)

    with torch.no_grad(), model.edit({SITE: add}):
        moved = normalize(model.embed_images(pixels), dim=1)
    shift = normalize((moved - plain).mean(dim=0), dim=0)
    expected = normalize(words - words.mean(dim=0), dim=1) @ shift
    torch.testing.assert_close(block.score[0], expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="reads 'mean', which are no positions"):
        Causal(space, ["a"], words[:1], model, SITE, "mean", source, SETTINGS)
