"""The verbs `latents` and `image` on the calibration CLIP, from the shell to terminal and files."""

from __future__ import annotations

import csv
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import sparsight as sp
from latent_parts import as_version_1
from sparsight.cli import main
from sparsight.latents import LatentName, set_names
from sparsight.latents.one_image import image_latents
from sparsight.sae import Normaliser, SAEConfig, SparseAutoencoder, TopK

torch.set_num_threads(1)
N_IMAGES = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run with an untrained SAE, codes, and an index with three names."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    model = sp.load_model("calibration", device="cpu")
    images = sp.open_images(f"calibration:{N_IMAGES}:3:single")
    site = model.canonical_site("blocks.-1.resid_post")
    pixels = torch.stack([model.transform(images.load(i)) for i in range(6)])
    x = model.read(pixels, [site])[site].flatten(0, 1).double()
    sae = SparseAutoencoder(
        x.shape[1],
        SAEConfig(64, sparsity=TopK(4)),
        normaliser=Normaliser.fit("scale", x.mean(dim=0), x.square().mean(dim=0)),
        metadata={
            "model": {"id": "calibration", "weights_hash": model.weights_hash},
            "images": images.spec,
            "site": site,
            "tokens": "all",
        },
    )
    sae.save_pretrained(folder)
    codes = sp.encode(sae, model, images, out=folder / "codes", workers=0, quiet=True)
    index = sp.build_index(sae, codes, out=folder / "index", quiet=True)
    alive = [row["latent"] for row in index.table.to_pylist() if row["n_active"]]
    names = dict(zip(alive, ("anchor", "star", "star"), strict=False))
    set_names(index, {key: LatentName(name, 0.9, "test") for key, name in names.items()})
    return folder


@pytest.fixture
def index(folder):
    return sp.LatentIndex.open(folder)


@pytest.fixture
def run(capsys):
    def call(*arguments: object) -> str:
        code = main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        assert code == 0, out.err
        return out.out

    return call


@pytest.fixture
def wrong(capsys):
    """Run a command that is wrong; return its one line."""

    def call(*arguments: object) -> str:
        code = main([str(argument) for argument in arguments])
        out = capsys.readouterr()
        assert code == 2 and out.err.count("\n") == 1, out.err
        return out.err.removeprefix("sparsight: ").strip()

    return call


def numbers(printed: str) -> list[int]:
    """Return the first column of a printed table."""
    return [int(line.split()[0]) for line in printed.splitlines()[1:-1]]


def test_a_list_of_latents_is_filtered_sorted_and_cut(run, folder, index):
    rows = index.table.to_pylist()
    assert numbers(run("latents", folder, "--limit", 100)) == list(range(64))
    dense = [row for row in rows if row["density"] > 0.02]
    dense.sort(key=lambda row: -row["density"])
    out = run("latents", folder, "--where", "density > .02", "--sort", "-density", "--limit", 5)
    assert numbers(out) == [row["latent"] for row in dense[:5]]
    assert out.splitlines()[-1].startswith(f"{len(dense)} of 64 latents; --limit {len(dense)}")
    named = [row["latent"] for row in rows if row["name"] == "star"]
    assert numbers(run("latents", folder, "--name", "STA")) == named
    label = next(row["top_label"] for row in rows if row["top_label"])
    of_label = [row["latent"] for row in rows if row["top_label"] == label]
    assert numbers(run("latents", folder, "--label", label, "--limit", 64)) == of_label


def test_files_have_every_row_and_column(run, folder, index, tmp_path):
    run("latents", folder, "--name", "star", "--limit", 1, "--csv", tmp_path / "a.csv", "--json",
        tmp_path / "a.json")  # fmt: skip
    wanted = index.where("name == 'star'").to_pylist()
    assert json.loads((tmp_path / "a.json").read_text()) == wanted
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["density"]) for row in rows] == [row["density"] for row in wanted]
    assert [json.loads(row["histogram"]) for row in rows] == [row["histogram"] for row in wanted]
    assert {row["name_threshold"] for row in rows} == {""}


def test_a_latent_is_described_with_labels_images_and_the_command_that_steers_it(
    run, folder, index
):
    latent = index.where("name == 'anchor'")["latent"][0].as_py()
    out = run("latents", folder, "anchor")
    assert out == run("latents", folder, latent)
    assert out.startswith(f"latent {latent} · anchor\n  name by test: 0.900")
    row, (label, n) = index.row(latent), next(iter(index.label_counts(latent).items()))
    assert f"fires in {row['n_active_images']} of {N_IMAGES} images" in out
    assert any(line.split()[:2] == [label, str(n)] for line in out.splitlines())
    assert all(index.info(example.image).id in out for example in index.top(latent)[:8])
    assert f"sparsight steer {folder} --latents {latent}" in out
    both = run("latents", folder, latent, 0 if latent else 1)
    assert both.count("steer it") == 2


def test_a_query_lists_images_and_label_shares(run, folder, index, tmp_path):
    latent = int(index.by_latent.counts.argmax())
    found = index.query(f"{latent} > .1")
    out = run("latents", folder, "--query", f"{latent} > .1", "--limit", 3, "--csv",
              tmp_path / "images.csv")  # fmt: skip
    assert out.splitlines()[-1].startswith(f"{len(found)} of {N_IMAGES} images")
    assert found.labels[0].label in out
    with (tmp_path / "images.csv").open() as file:
        rows = list(csv.DictReader(file))
    strongest = sorted(found.activations[:, 0].tolist(), reverse=True)
    assert [float(row[f"latent_{latent}"]) for row in rows] == pytest.approx(strongest)


def test_the_index_is_exported_for_sql(run, folder, index, tmp_path):
    assert "postings.parquet" in run("latents", folder, "--export", tmp_path / "sql")
    table = pq.read_table(tmp_path / "sql" / "postings.parquet")
    assert table.num_rows == len(index.by_latent.columns)


def test_an_image_is_the_same_by_place_id_and_file(run, folder, index, tmp_path):
    index.picture(5).save(tmp_path / "mine.png")
    by_place = run("image", folder, 5, "--limit", 99)
    assert by_place == run("image", folder, index.info(5).id, "--limit", 99)
    found = image_latents(index, 5)
    assert numbers("\n".join(by_place.splitlines()[1:])) == found.latents.tolist()
    by_file = run("image", folder, tmp_path / "mine.png", "--limit", 99, "--device", "cpu")
    assert by_file.startswith("mine.png\n")
    assert by_file.splitlines()[2:] == by_place.splitlines()[2:]


def test_patches_are_a_grid_of_letters_and_a_file(run, folder, index, tmp_path):
    out = run("image", folder, 5, "--patches", "--csv", tmp_path / "patches.csv")
    rows, columns = index.manifest["model"]["patch_grid"]
    grid = [line.split() for line in out.splitlines()[1 : rows + 1]]
    code = sp.CodeStore(folder / "codes").image(5).dense()[-rows * columns :]
    strongest = code.argmax(1).view(rows, columns).tolist()
    letters: dict[str, int] = {}
    for shown, latents in zip(grid, strongest, strict=True):
        for letter, latent in zip(shown, latents, strict=True):
            assert letters.setdefault(letter, latent) == latent
    with (tmp_path / "patches.csv").open() as file:
        listed = list(csv.DictReader(file))
    assert len(listed) == int((code > 0).sum())
    first = max(listed[:4], key=lambda row: float(row["activation"]))
    assert int(first["latent"]) == strongest[0][0]


def test_only_the_latents_that_pass_a_filter_are_in_the_grid(run, folder, index):
    found = image_latents(index, 5)
    latent = int(found.latents[0])
    out = run("image", folder, 5, "--patches", "--where", f"latent == {latent}")
    rows = index.manifest["model"]["patch_grid"][0]
    assert set("".join(out.splitlines()[1 : rows + 1]).split()[0]) <= {"A", "·"}
    assert "B" not in "".join(out.splitlines()[1 : rows + 1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["latents", "{run}", "--where", "densty > 1"],
            "no column densty. Did you mean 'density'?",
        ),
        (["latents", "{run}", "--sort", "-size"], "--sort -size: no column size. Columns: latent"),
        (["latents", "{run}", "--sort", "histogram"], "one list per latent, which has no order"),
        (["latents", "{run}", "--label", "nothing"], "no image has this label"),
        (["latents", "{run}", "--query", "1 >"], "Query, character 4: expected a value"),
        (["latents", "{run}", "64"], "no latent 64; it has 0 to 63"),
        (["latents", "{run}", "1", "--query", "1"], "Give either --query or numbers of latents"),
        (["latents", "{run}", "1", "--sort", "name"], "--sort filters the list of latents"),
        (["latents", "{run}", "1", "--csv", "a.csv"], "--csv saves a list or a query"),
        (["latents", "{run}", "--limit", "0"], "limit"),
        (["latents", "{run}/none"], "does not exist"),
        (["image", "{run}", "24"], "there is no image 24"),
        (["image", "{run}", "nothing.png"], "neither an image file, nor the id of an image"),
        (["image", "{run}", 5000 * "a"], "…: is neither an image file, nor the id of an image"),
        (["latents", "{run}", "--query", f'"{5000 * "a"}"'], "…'. In: ^"),
        (["latents", "{run}", "--csv", "{run}/index/latents.parquet"], "belongs to an index"),
        (["image", "{run}", "5", "--json", "{run}/index/manifest.json"], "belongs to an index"),
        (["image", "{run}", "5", "--where", "relativ > 1"], "Did you mean 'relative'?"),
        (["image", "{run}/index", "5", "--patches"], "needs the SAE of the index"),
    ],
)
def test_bad_input_gives_one_line(wrong, folder, arguments, words, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    line = wrong(*(argument.format(run=folder) for argument in arguments))
    assert words in line and len(line) < 1000


def test_rows_that_do_not_exist_are_refused(index):
    """A negative row would otherwise be an empty one: a wrong answer without a word."""
    for postings in (index.by_latent, index.by_image):
        for row in (-1, postings.n_rows):
            with pytest.raises(IndexError, match=f"no row {row}; there are rows 0 to"):
                postings.row(row)


@pytest.mark.unchecked
def test_a_kind_of_neighbours_that_does_not_exist_is_refused(index):
    with pytest.raises(sp.UserError, match="by 'images': choose decoder or coactivation"):
        index.neighbours(1, by="images")


def test_an_index_of_another_sae_is_refused(wrong, folder, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    sae = SparseAutoencoder.from_pretrained(other)
    with torch.no_grad():
        sae.W_enc[0] += 1
    sae.save_pretrained(other)
    for verb in (["latents", other], ["image", other, 5]):
        assert "was built from another SAE" in wrong(*verb)


def test_an_index_of_version_1_lists_latents_and_reads_images_from_codes(
    run, wrong, folder, index, tmp_path
):
    old = tmp_path / "old"
    shutil.copytree(folder, old)
    as_version_1(sp.LatentIndex.open(old))
    latent = index.where("name == 'anchor'")["latent"][0].as_py()
    assert numbers(run("latents", old, "--name", "anchor")) == [latent]
    described = run("latents", old, latent)
    assert described.startswith(f"latent {latent} · anchor") and "steer it" in described
    found = image_latents(index, index.top(latent)[0].image)
    listed = run("image", old, found.image, "--limit", 99)
    assert numbers("\n".join(listed.splitlines()[1:])) == found.latents.tolist()
    for arguments in (["--query", "1"], ["--export", tmp_path / "sql"]):
        assert "--upgrade" in wrong("latents", old, *arguments)


def test_a_description_has_what_each_method_calls_the_latent(run, folder, index, tmp_path):
    named = tmp_path / "named"
    shutil.copytree(folder, named)
    rows = [
        {"latent": 3, "method": "labels", "name": "star", "score": 0.8, "accepted": True,
         "runners_up": [{"name": "sun", "score": 0.5}]},
        {"latent": 3, "method": "text", "name": None, "score": None, "accepted": False,
         "runners_up": []},
        {"latent": 4, "method": "text", "name": "cup", "score": 0.1, "accepted": False,
         "runners_up": []},
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "names.parquet")
    sp.LatentIndex.open(named).with_files({"names.parquet": tmp_path / "names.parquet"})
    out = run("latents", named, 3)
    assert "by labels: star 0.800 (accepted); then sun 0.500" in out
    assert "by text: nothing (not accepted)" in out and "cup" not in out
