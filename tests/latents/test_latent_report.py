from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latent_parts import (
    EVIL,
    LABELS,
    SITE,
    TensorActivations,
    make_run,
    make_sae,
    model_facts,
    save_clip,
)
from sparsight.activations import extract
from sparsight.errors import SparsightError, UserError
from sparsight.evaluation import evaluate
from sparsight.images import ImageSource, open_images
from sparsight.latents import (
    LatentIndex,
    build_index,
    encode,
    write_report,
)
from sparsight.latents.choosing import Understanding, choose_latents, held_out_label, various
from sparsight.latents.report import RunModels
from sparsight.latents.run_files import find_runs, read_run, run_names
from sparsight.latents.seeing import see
from sparsight.latents.stored import find_stored, needs_model
from sparsight.pages.data_uris import encode_picture
from sparsight.progress import progress
from sparsight.sae import SAEConfig, SparseAutoencoder, TopK
from sparsight.training import TrainConfig, train
from sparsight.vision import VisionModel, load_model


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.classes: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.classes += (dict(attrs).get("class") or "").split()
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside not in ("script", "style"):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    sae: SparseAutoencoder,
    activations: TensorActivations,
) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "a", sae, activations)


@pytest.fixture(scope="module")
def html(run: Path, model: VisionModel) -> str:
    page = write_report(run, run.parent / "report.html", model=model, latents=6, quiet=True)
    return page.read_text(encoding="utf-8")


def test_the_page_loads_nothing(html: str) -> None:
    page = Page(html)
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form"), tag
        for name in ("src", "href", "xlink:href", "srcset", "data", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/", "#")), f"{tag} {name}={value}"
    for address in re.findall(r"url\(([^)]*)\)", html):
        assert address.strip("'\"").startswith(("data:image/", "#")), address[:80]
    assert "@import" not in html
    outside = set(re.findall(r"https?://[^\s\"'<>)]*", html))
    assert outside <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_labels_and_names_are_escaped(html: str) -> None:
    page = Page(html)
    kinds = [attributes.get("type") for tag, attributes in page.tags if tag == "script"]
    assert kinds == ["application/json", None]
    assert EVIL in page.words
    captions = [attributes.get("data-caption") for _, attributes in page.tags]
    assert any(label in captions for label in LABELS if "script" in label)
    assert "<b>sun</b>" in page.words


def test_scores_are_next_to_their_baselines_and_gaps_are_named(html: str) -> None:
    words = Page(html).words
    assert "0.0834" in words
    assert "0.777" in words
    assert "0.912" in words
    assert "Zero-shot accuracy: not measured" in words
    assert "untrained SAE" in words


def test_there_is_one_card_per_latent_with_images_and_outlines(html: str) -> None:
    page = Page(html)
    assert page.classes.count("card") == 6
    assert page.classes.count("plot") == 4
    assert html.index('class="card"') < html.index('class="tile"')
    used = {name for name in page.classes if re.fullmatch(r"run\d+-\d+", name)}
    defined = set(re.findall(r"\.(run\d+-\d+)\{background-image:url\(data:image/webp", html))
    assert used == defined
    assert len(used) > 10
    assert page.classes.count("heat") > 10
    assert "5 latents are the easiest to understand" in page.words
    assert "1 was drawn at random (seed 0) from the" in page.words


def test_a_card_lists_the_neighbours_that_the_index_knows(html: str, run: Path) -> None:
    index = LatentIndex.open(run)
    assert "Fires in the same images" in html
    shown = [int(latent) for latent in re.findall(r'<article class="card" id="run0-l(\d+)"', html)]
    for latent in shown[:3]:
        card = html.split(f'id="run0-l{latent}"')[1].split("</article>")[0]
        for near in index.neighbours(latent, "coactivation", 4):
            assert f'data-latent="{near.latent}"' in card and f"({near.score:.2f})" in card


def test_the_page_says_what_it_is_and_what_to_do_next(html: str) -> None:
    words = Page(html).words
    assert re.search(r"What \S+ sees in pictures", words)
    assert "A sparse autoencoder took the activations of" in words and SITE in words
    verbs = set(re.findall(r"<code>sparsight (\w+) ", html))
    assert {"latents", "image", "steer"} <= verbs
    assert "no name" in words
    assert re.search(r"(cat|dog) \d+", words), "labels are counted"
    for old in ("label entropy", "dead (CLIP-Scope)", "calibration world"):
        assert old not in html


def test_data_for_the_script_is_valid_and_covers_all_latents(html: str, run: Path) -> None:
    index = LatentIndex.open(run)
    block = re.search(r'<script type="application/json"[^>]*>(.*?)</script>', html, re.S)
    assert block is not None and "<" not in block[1] and "&" not in block[1]
    data = json.loads(block[1])
    table = data["table"]
    assert sorted(table["latent"]) == list(range(index.n_latents)) and table["of"] == 96
    for row, latent in enumerate(table["latent"]):
        own = index.row(latent)
        assert table["name"][row] == own["name"]
        assert table["density"][row] == pytest.approx(own["density"], rel=1e-3)
        label = table["label"][row]
        assert (table["labels"][label] if label >= 0 else None) == own["top_label"]
    page = Page(html)
    cards = {int(a["data-latent"] or 0) for t, a in page.tags if a.get("class") == "shot"}
    for key, fires in data["fires"].items():
        place = int(key.split("-")[1])
        for latent, activation, path in fires:
            card = f'data-key="{key}" data-latent="{latent}"' in html
            assert latent in cards and (path == "" if card else path.startswith("M"))
            tops = {e.image: e.activation for e in index.top(latent) if e.token > 0}
            if place in tops:
                assert activation == pytest.approx(tops[place], rel=1e-3)


def test_two_reports_of_the_same_run_differ_only_in_the_date(
    html: str, run: Path, model: VisionModel, tmp_path: Path
) -> None:
    again = write_report(run, tmp_path, model=model, latents=6, quiet=True)
    assert again == tmp_path / "report.html"

    def undated(text: str) -> str:
        return re.sub(r"\d+ \w+ \d{4}, \d\d:\d\d UTC", "", text)

    assert undated(again.read_text(encoding="utf-8")) == undated(html)


def test_images_shrink_to_keep_the_page_small() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (192, 160, 3), dtype=np.uint8)
    large, small = (encode_picture(Image.fromarray(noise), side) for side in (192, 72))
    assert len(small) < 0.3 * len(large)
    scene = Image.fromarray(noise[:64, :64])
    assert encode_picture(scene, 192) == encode_picture(scene, 72)


def test_a_run_without_index_metrics_and_log_says_how_to_get_them(
    sae: SparseAutoencoder, tmp_path: Path
) -> None:
    sae.save_pretrained(tmp_path / "bare")
    page = write_report(tmp_path / "bare", tmp_path / "r.html", quiet=True)
    words = Page(page.read_text(encoding="utf-8")).words
    for verb in ("sparsight train", "sparsight evaluate", "sparsight index"):
        assert verb in words


def test_without_the_model_the_page_shows_plain_images_and_says_why(
    run: Path, activations: TensorActivations, tmp_path: Path
) -> None:
    own = SparseAutoencoder.from_pretrained(run)
    own.metadata["model"] = {"id": str(tmp_path / "gone")}
    moved = TensorActivations(activations.x, activations.images, activations.model)
    moved.model_info = {"id": str(tmp_path / "gone")}
    make_run(tmp_path / "run", own, moved)
    page = write_report(tmp_path / "run", tmp_path / "r.html", latents=4, quiet=True)
    found = Page(page.read_text(encoding="utf-8"))
    assert "No outlines: the model is not available." in found.words
    assert "heat" not in found.classes
    assert found.classes.count("shot") > 10


def test_another_model_is_refused(run: Path, tmp_path: Path) -> None:
    folder = save_clip(tmp_path / "clip")
    other = load_model(str(folder), device="cpu")
    with torch.no_grad():
        next(other.module.parameters()).add_(1)
    other.__dict__.pop("weights_hash", None)
    with pytest.raises(UserError, match="weights differ"):
        write_report(run, tmp_path / "r.html", model=other, quiet=True)


def test_a_missing_image_is_counted_and_the_rest_is_shown(
    sae: SparseAutoencoder,
    activations: TensorActivations,
    model: VisionModel,
    pictures: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "pictures"
    shutil.copytree(pictures, folder)
    moved = TensorActivations(activations.x, open_images(folder), model)
    run = make_run(tmp_path / "run", sae, moved)
    image = LatentIndex.open(run).top(choose_latents(LatentIndex.open(run), sae, 4, 0)[0][0][0])[0]
    gone = Path(LatentIndex.open(run).info(image.image).uri)
    gone.unlink()
    page = write_report(run, tmp_path / "r.html", model=model, latents=4, quiet=True)
    found = Page(page.read_text(encoding="utf-8"))
    assert f"{gone.name}: this image is no longer in" in found.words
    assert "gone" in found.classes


def test_a_damaged_run_is_a_fault_that_names_the_file(run: Path, tmp_path: Path) -> None:
    broken = tmp_path / "run"
    shutil.copytree(run, broken)
    path = broken / "index" / "top_examples.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SparsightError, match=r"top_examples\.safetensors"):
        write_report(broken, tmp_path / "r.html", quiet=True)
    assert not (tmp_path / "r.html").exists()


def test_a_log_with_a_damaged_name_is_a_fault_that_names_the_file(
    run: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    line = {"vectors": 10, "dead": 0.1, "revived": 2, "dead_window": 5, "vectors_qer_second": 1.0}
    (copy / "metrics.jsonl").write_text(json.dumps(line))
    with pytest.raises(SparsightError, match=r"metrics\.jsonl: .*lacks 'vectors_per_second'"):
        write_report(copy, tmp_path, quiet=True)


def test_runs_are_found_below_a_folder_but_not_in_checkpoints(
    sae: SparseAutoencoder, tmp_path: Path
) -> None:
    for name in ("x/site.a", "x/site.b", "y", "x/checkpoints"):
        sae.save_pretrained(tmp_path / name)
    expected = [tmp_path / "x/site.a", tmp_path / "x/site.b", tmp_path / "y"]
    assert find_runs(tmp_path) == expected
    assert find_runs(tmp_path / "x/site.a") == [tmp_path / "x/site.a"]
    assert run_names(expected) == ["site.a", "site.b", "y"]
    assert run_names([Path("a/s"), Path("b/s")]) == ["a/s", "b/s"]
    with pytest.raises(UserError, match="hold a trained SAE"):
        find_runs(Path(__file__).parent)
    with pytest.raises(UserError, match="does not exist"):
        find_runs(tmp_path / "nowhere")
    with pytest.raises(UserError, match="No run folder"):
        find_runs([])


def test_latents_are_the_best_understood_and_some_at_random(
    run: Path, sae: SparseAutoencoder
) -> None:
    index = LatentIndex.open(run)
    chosen, how = choose_latents(index, sae, 12, seed=3)
    best = [latent for latent, why in chosen if why == "best"]
    assert {index.row(latent)["name"] for latent in best[:2]} == {EVIL, "sun"}
    assert len({latent for latent, _ in chosen}) == 12 and len(best) == 9
    assert all(index.row(latent)["n_active"] for latent, _ in chosen)
    assert "3 were drawn at random (seed 3)" in how
    assert choose_latents(index, sae, 12, seed=3)[0] == chosen
    other = choose_latents(index, sae, 12, seed=4)[0]
    assert other != chosen and other[:9] == chosen[:9]
    everything, _ = choose_latents(index, sae, 1000, seed=0)
    assert len(everything) == sum(row["n_active"] > 0 for row in index.table.to_pylist())


def test_labels_of_half_of_the_images_are_tested_on_the_other_half(run: Path) -> None:
    index = LatentIndex.open(run)
    precision, labels = held_out_label(index)
    for latent in range(index.n_latents):
        own = [index.info(example.image).label for example in index.top(latent)]
        expected = []
        for one, other in ((own[0::2], own[1::2]), (own[1::2], own[0::2])):
            counts = Counter(one)  # in the order of first appearance: the strongest wins a tie
            if counts and other:
                expected.append(other.count(counts.most_common(1)[0][0]) / len(other))
        assert precision[latent] == pytest.approx(sum(expected) / 2)
        counts = Counter(own)
        assert labels[latent] == (counts.most_common(1)[0][0] if counts else None)


def test_chosen_latents_vary_in_kind(sae: SparseAutoencoder) -> None:
    """Eleven latents named after backgrounds score highest; at most some are taken."""
    known = Understanding(
        np.concatenate([np.full(11, 2.0), np.full(9, 1.0)]),
        [frozenset([f"colour{i}", "background"]) for i in range(11)]
        + [frozenset([f"object{i}"]) for i in range(9)],
        labels=True,
        names=True,
        spread=False,
    )
    chosen = various(known, np.arange(20), sae, 8, per_kind=2)
    assert len(chosen) == 8 and sum(latent < 11 for latent in chosen) == 2
    assert len(various(known, np.arange(11), sae, 8, per_kind=2)) == 8


def test_an_sae_of_cls_vectors_gets_images_without_heatmaps(
    model: VisionModel, activations: TensorActivations, tmp_path: Path
) -> None:
    sae = make_sae(tokens="cls", model=model_facts(model))
    cls = TensorActivations(activations.x[:, :1], activations.images, model, tokens="cls")
    make_run(tmp_path / "run", sae, cls)
    page = write_report(tmp_path / "run", tmp_path / "r.html", model=model, quiet=True)
    found = Page(page.read_text(encoding="utf-8"))
    assert "one vector per image" in found.words
    assert "heat" not in found.classes


def test_the_whole_chain_ends_in_a_page(
    model: VisionModel, source: ImageSource, tmp_path: Path
) -> None:
    """Extract, train, evaluate, index and report with the real parts, through a store on disk."""
    config = TrainConfig(
        sae=SAEConfig(n_latents=64, sparsity=TopK(k=4)), n_vectors=2048, batch_size=256
    )
    store = extract(model, source, sites=[SITE], tokens="all", out=tmp_path / "acts", quiet=True)
    run = train(store, config, out=tmp_path / "run", quiet=True)
    own = run.sae()
    evaluate(own, store, quiet=True).save(run.folder())
    index = build_index(own, store, out=run.folder() / "index", quiet=True)
    live = build_index(own, model, source, out=tmp_path / "live", workers=0, quiet=True)
    assert index.manifest["images"] == live.manifest["images"]
    # The store is float16, so activations near the k-th differ now and then.
    assert (index.examples.image[:, 0] == live.examples.image[:, 0]).float().mean() > 0.8

    page = write_report(run.folder(), tmp_path / "r.html", latents=8, quiet=True)
    found = Page(page.read_text(encoding="utf-8"))
    assert found.classes.count("card") == 8
    assert found.classes.count("heat") > 10
    assert {"Training", "Error by position", "Density"} <= set(found.text)
    assert "untrained SAE" in found.words


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")
@pytest.mark.parametrize(("width", "height"), [(390, 844), (1440, 900)])
def test_images_are_above_the_fold_and_enlarge_in_a_browser(
    html: str, width: int, height: int, tmp_path: Path
) -> None:
    """The page in a frame of this size reports what its visitors meet, unless a script fails."""
    probe = """<script>onload = () => {
        const first = document.querySelector("button.shot");
        const box = first.getBoundingClientRect();
        const fits = document.documentElement.scrollWidth <= innerWidth;
        first.focus();
        first.click();
        const light = document.getElementById("light");
        const large = light.querySelector(".frame").getBoundingClientRect();
        const opened = light.open && large.width > 1.7 * box.width && large.right <= innerWidth;
        const shown = light.querySelectorAll("li").length > 0;
        const key = () => light.querySelector(".picture").className;
        const before = key();
        light.dispatchEvent(new KeyboardEvent("keydown", {key: "ArrowRight", bubbles: true}));
        const stepped = key() !== before;
        light.querySelector(".close").click();
        const find = document.querySelector("input[type=search]");
        find.value = "sun";
        find.dispatchEvent(new Event("input"));
        const found = document.querySelectorAll(".all tbody tr").length;
        const plot = document.querySelector(".drawing[data-axes]");
        const area = plot.getBoundingClientRect();
        const dot = plot.parentElement.querySelector(".dot");
        for (let i = 0; i < 2500 && !dot.textContent; i++) {
            const at = {clientX: area.left + area.width * (i % 50) / 50,
                clientY: area.top + area.height * Math.floor(i / 50) / 50, bubbles: true};
            plot.dispatchEvent(new MouseEvent("click", at));
        }
        document.title = [Math.ceil(box.bottom), fits, opened, shown, stepped, !light.open, found,
            /^latent \\d+ · /.test(dot.textContent), innerWidth].join(" ");
    }</script>"""
    html = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    (tmp_path / "page.html").write_text(html.replace("</body>", probe + "</body>"))
    frame = (
        f'<iframe src="page.html" width="{width}" height="{height}" style="border:0"></iframe>'
        "<script>onload = () => setTimeout(() => { document.body.dataset.found = "
        "document.querySelector('iframe').contentDocument.title }, 300)</script>"
    )
    (tmp_path / "frame.html").write_text(frame)
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
            "--allow-file-access-from-files",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--virtual-time-budget=4000",
            "--dump-dom",
            (tmp_path / "frame.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.search(r'data-found="(\d+) ([^"]*)"', done.stdout)
    assert found is not None, done.stderr[-2000:]
    assert int(found[1]) < height, "the first image is above the fold"
    assert found[2] == f"true true true true true 2 true {width}"


def test_a_page_that_cannot_be_small_enough_says_so(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    large = write_report(run, tmp_path / "large.html", latents=4)
    assert "make it smaller" not in capsys.readouterr().err
    small = write_report(run, tmp_path / "small.html", latents=4, max_bytes=1000)
    assert "show fewer latents to make it smaller" in capsys.readouterr().err
    assert 1000 < small.stat().st_size <= large.stat().st_size


@pytest.mark.parametrize("kind", ["activations", "codes"])
def test_stored_heatmaps_are_read_and_the_model_does_not_run(
    kind: str, model: VisionModel, source: ImageSource, tmp_path: Path
) -> None:
    sae = make_sae(model=model_facts(model))
    out = tmp_path / ("held-out" if kind == "activations" else "far/away/store")
    store = extract(model, source, sites=[SITE], out=out, dtype="float32", workers=0, quiet=True)
    if kind == "codes":
        out = encode(sae, store, out=tmp_path / "run/codes", quiet=True).path
    index = build_index(sae, store, out=tmp_path / "run/index", quiet=True)
    sae.save_pretrained(tmp_path / "run")
    run = read_run(tmp_path / "run", "run")
    stored = find_stored(run)
    assert stored is not None and not needs_model(run, stored)
    latent = next(row["latent"] for row in index.table.to_pylist() if row["n_active_images"] > 4)
    wanted = {example.image: [latent] for example in index.top(latent)}
    with progress("test", None, "images", quiet=True) as line:
        read = see(index, sae, None, wanted, line, stored)
        made = see(index, sae, model, wanted, line)
    for place, grid in made.grids.items():
        assert torch.allclose(read.grids[place], grid, atol=1e-5)
    for image, picture in made.pictures.items():
        assert np.array_equal(np.asarray(read.pictures[image]), np.asarray(picture))
    run.sae.metadata["model"] = {"id": str(tmp_path / "gone")}
    run.sae.save_pretrained(tmp_path / "run")
    page = write_report(tmp_path / "run", tmp_path / "r.html", latents=4, quiet=True).read_text()
    assert "heat" in Page(page).classes and "No outlines" not in page
    shutil.rmtree(out)
    assert find_stored(run) is None and needs_model(run, None)


def test_figures_of_another_sae_are_not_shown(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run/metrics.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "sae": "0" * 64}))
    page = write_report(tmp_path / "run", tmp_path / "r.html", latents=0, quiet=True)
    words = Page(page.read_text(encoding="utf-8")).words
    assert "metrics.json is about another SAE" in words and "0.0834" not in words


def test_heatmaps_are_made_from_the_pixels_that_the_index_saw(
    tmp_path: Path, model: VisionModel
) -> None:
    """Large JPEGs, which a model with `scale_jpegs` decodes at a fraction of their size."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(2):
        noise = np.random.default_rng(i).integers(0, 256, (400, 400, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{i}.jpg", quality=95)
    source = open_images(folder)
    scaled = load_model(model.id, device="cpu", scale_jpegs=True)
    assert scaled.min_side is not None
    store = extract(
        scaled, source, sites=[SITE], out=tmp_path / "acts", dtype="float32", quiet=True
    )
    sae = make_sae(model=model_facts(scaled))
    sae.save_pretrained(tmp_path / "run")
    codes = encode(sae, store, out=tmp_path / "codes", quiet=True)
    for number, given in enumerate((codes, store, (scaled, source))):
        arguments = given if isinstance(given, tuple) else (given,)
        out = tmp_path / "run/index" if number == 2 else tmp_path / f"index{number}"
        index = build_index(sae, *arguments, out=out, workers=0, quiet=True)
        assert index.picture(0).tobytes() == source.load(0, scaled.min_side).tobytes()
    run = read_run(tmp_path / "run", "run")
    loaded = RunModels(None).of(run)
    assert isinstance(loaded, VisionModel) and loaded.min_side == scaled.min_side
    tops = {
        (best.image, latent): best.activation
        for latent in range(index.n_latents)
        if (best := (index.top(latent) or [None])[0]) and best.token >= model.n_prefix
    }
    wanted = {i: [latent for image, latent in tops if image == i] for i in range(2)}
    for used in (loaded, model):  # a given model need not have the option
        with progress("pictures", None, "pictures", quiet=True) as line:
            seen = see(index, sae, used, wanted, line)
        peaks = {place: float(seen.grids[place].max()) for place in tops}
        assert len(tops) > 5 and peaks == pytest.approx(tops, rel=1e-4)


def test_the_page_does_not_reveal_the_path_of_the_run(run: Path, tmp_path: Path) -> None:
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    (moved / "config.toml").write_text(f'store = "{tmp_path}/secret/acts"\n')
    page = write_report(moved, tmp_path / "r.html", latents=2, quiet=True).read_text()
    assert "acts&#34;" in page and "secret" not in page and str(tmp_path) not in page
