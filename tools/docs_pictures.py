"""Make the pictures of the docs and of the README: `make pictures`.

    python -m tools.docs_pictures --demo demo/                            # rendered scenes alone
    python -m tools.docs_pictures --demo demo/ --photos-run runs/dino-l8 --sweep runs/sweep \
        --samples samples/ --clip-with-text tutorial/                     # the tutorials' as well

The first line needs nothing but the demo's folder, which it makes where it is missing. The second
needs the runs of the tutorial on photos, and a folder of photos that may be shown. Pictures of
pixels are WebP, plots are SVG, twice: for light and for dark pages. The same runs give the same
bytes; the screenshots, which need Chromium, also depend on its version.
"""

from __future__ import annotations

import io
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

import sparsight as sp
from sparsight.editing import Off
from sparsight.files import read_json, write_bytes, write_text
from sparsight.latents import overlay, patch_heatmaps, seen_pictures
from sparsight.latents.comparison import draw_pareto
from sparsight.pages.plots import density_histogram, training_curves
from sparsight.pages.style import PALETTE, figure, plot_style, to_svg
from sparsight.training.run import METRICS, read_metrics
from sparsight.vision import classifier_weights, classify
from tools import clip_pictures

OUT = Path(__file__).parent.parent / "docs" / "pictures"
MOST_BYTES = 60_000
"""The size of one image."""

PANEL, INK, FAINT = (17, 20, 25), (236, 233, 228), (155, 161, 168)
GOOD, BAD = (134, 184, 92), (222, 118, 92)
EDGE, GAP = 28, 12
"""Pixels around a panel, and between its tiles."""

KINDS = ("symbol", "symbol", "word", "object_colour", "background")
"""Kinds of ground truth, one per column; a kind named twice shows its two best attributes."""

INCH = 112
"""Pixels on a page for an inch of a plot: nine-point text is as large as the page's."""

SCHEMES = {
    "light": {"--ink": "#1d2329", "--muted": "#5f6b76", "--line": "#dfe3e6"},
    "dark": {"--ink": "#e8e6e2", "--muted": "#a9b0b8", "--line": "#3a4047"},
}
BRIGHTER = {
    "#ffffff": "#1e2129",
    "#a63d40": "#d9777a",
    "#5f6b76": "#9aa5b0",
    "#2f6f8f": "#6fb3d2",
    "#d1793a": "#e39a62",
    "#6d8f3c": "#9dc167",
    "#8a5a9e": "#bd92d0",
}
"""Colours of series that a dark page would swallow, and of empty markers."""


@dataclass(frozen=True)
class Options:
    """Make the pictures of the docs."""

    demo: Path = Path("demo")
    """Folder of `sparsight demo`; made where it is missing."""

    photos_run: Path | None = None
    """Run of the tutorial on photos."""

    sweep: Path | None = None
    """Its sweep."""

    samples: Path | None = None
    """Folder of photos that may be shown, on which the run's latents are drawn."""

    clip_with_text: Path | None = None
    """Folder in which the commands of the tutorial on CLIP with text were run."""

    out: Path = OUT
    """Folder of the pictures."""

    chromium: str = "chromium"
    """Browser for the screenshots of the report."""


def main(options: Options) -> None:
    """Make every picture that can be made; say which cannot, and why."""
    sp.run_demo(options.demo)
    early, late = sorted(path.parent for path in (options.demo / "runs").glob("*/sae.safetensors"))
    made = [
        save_pixels(strip(late), options.out / "latents.webp"),
        *save_plot(lambda: detection(late), options.out / "detection"),
        save_pixels(attack(early), options.out / "attack.webp"),
        *screenshots(options.demo / "report.html", options),
    ]
    if options.photos_run is not None:
        made += photo_plots(options.photos_run, options.out)
        if options.samples is not None:
            drawn = photo_latents(options.photos_run, options.samples)
            made.append(save_pixels(drawn, options.out / "photo-latents.webp"))
    if options.sweep is not None:
        made += sweep_plot(options.sweep, options.out)
    if options.clip_with_text is not None:
        made += clip_pictures.make(options.clip_with_text, options.out)
    for path in made:
        print(f"{path}: {path.stat().st_size:,} bytes")
    whole = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"{options.out}: {whole:,} bytes together")


# Rendered scenes


def strip(run: Path, rows: int = 3, tile: int = 192) -> Image.Image:
    """For each of `KINDS`, the best detector's top-activating images, lit where it is active.

    Args:
        run: of the demo, with its index.
        rows: images per latent.
        tile: side of an image, in pixels.
    """
    index = sp.LatentIndex.open(run / "index")
    sae, model = sp.SparseAutoencoder.from_pretrained(run), sp.load_model("calibration")
    panel, draw = _panel(len(KINDS), rows, tile, head=64, foot=40)
    for x, latent in enumerate(_best_of_kinds(run, index, rows)):
        left, row = EDGE + x * (tile + GAP), index.row(latent)
        places = [example.image for example in index.top(latent)[:rows]]
        pixels = torch.stack([model.transform(index.picture(place)) for place in places])
        heat = patch_heatmaps(sae, model, pixels, [latent])[:, 0]
        for y, (picture, grid) in enumerate(zip(seen_pictures(model, pixels), heat, strict=True)):
            lit = overlay(picture, grid, look="spotlight", peak=float(heat.max()), min_size=tile)
            panel.paste(lit, (left, EDGE + 64 + y * (tile + GAP)), _mask(tile))
        for line, words in enumerate(_in_two(str(row["name"]))):
            place = (left + tile / 2, EDGE + 8 + 28 * line)
            draw.text(place, words, INK, _font(23, bold=True), anchor="mm")
        foot = f"latent {latent} · F1 {row['name_score']:.2f}"
        below = EDGE + 64 + rows * (tile + GAP) + 14
        draw.text((left + tile / 2, below), foot, FAINT, _font(17), anchor="mm")
    return panel


def _best_of_kinds(run: Path, index: sp.LatentIndex, least_images: int) -> list[int]:
    """For each of `KINDS` the latent that detects an attribute of that kind best."""
    names = read_json(run / "metrics.json")["latent_names"]
    best: dict[str, tuple[float, int]] = {}
    for key, about in names.items():
        if index.row(int(key))["n_active_images"] >= least_images:
            attribute = about["attribute"]
            best[attribute] = max(best.get(attribute, (0.0, 0)), (about["f1"], -int(key)))
    chosen = []
    for kind in KINDS:
        attribute = max((key for key in best if key.startswith(f"{kind}/")), key=best.__getitem__)
        chosen.append(-best.pop(attribute)[1])
    return chosen


def _in_two(name: str) -> tuple[str, str]:
    """ "the word “sun”" → its two lines; a single word stands on the second."""
    head, _, last = name.rpartition(" ")
    return head, last


def detection(run: Path) -> Figure:
    """How well the best single latent detects each symbol, beside the baselines' best."""
    metrics = read_json(run / "metrics.json")
    baselines = metrics["baselines"]
    rows = [
        ("sparse autoencoder", metrics, PALETTE[1]),
        ("untrained autoencoder", baselines["untrained"], PALETTE[0]),
        ("PCA", baselines["pca"], PALETTE[0]),
        ("neurons", baselines["neurons"], PALETTE[0]),
    ]
    with plot_style():
        drawn = figure(2.2, 6.4)
        ax = drawn.subplots()
        shift = np.random.default_rng(0)
        for y, (_, block, colour) in enumerate(rows):
            values = [
                one["auc"] for key, one in block["truth"].items() if key.startswith("symbol/")
            ]
            up = y + shift.uniform(-0.22, 0.22, len(values))
            ax.scatter(values, up, 14, color=colour, alpha=0.55, linewidths=0)
            mean = float(np.mean(values))
            ax.plot([mean, mean], [y - 0.34, y + 0.34], color=colour, linewidth=2.5)
            ax.annotate(f"{mean:.2f}", (mean, y - 0.38), ha="center", va="bottom", fontsize=8)
        ax.set_yticks(range(len(rows)), [name for name, *_ in rows])
        ax.set_ylim(len(rows) - 0.5, -0.72)
        ax.set_xlabel("AUC of the best single latent, component or neuron for each symbol")
        ax.grid(axis="y", visible=False)
        return drawn


def attack(run: Path, tile: int = 256) -> Image.Image:
    """A scene, the same with a word on it, and that with the latents off that see words.

    The first scene is shown on which the model is right, then fooled, then right again.
    """
    sae, model = sp.SparseAutoencoder.from_pretrained(run), sp.load_model("calibration")
    pairs = sp.make_pairs(sp.open_images("calibration:800:5:single"))
    search, rest = pairs.halves()
    found = sp.find_text_salient(model, search, sae, contrast="attack")
    off = sp.LatentEdit(sae, found.selective, Off())
    names = list(rest.class_names.values())
    weights = classifier_weights(model, names)

    def opinion(picture: Image.Image) -> torch.Tensor:
        embedding = model.embed_images(model.transform(picture)[None])
        return classify(embedding, weights, model.logit_scale).softmax(-1)[0]

    for place in range(len(rest)):
        right = names.index(rest.class_names[rest.labels[place]])
        word = names.index(rest.class_names[rest.words[place]])
        clean, attacked = rest.clean.load(place), rest.attacked.load(place)
        said = [opinion(clean), opinion(attacked)]
        with sp.intervene(model, off):
            said.append(opinion(attacked))
        if [int(each.argmax()) for each in said] == [right, word, right]:
            break
    else:
        raise SystemExit("No scene is seen rightly, then wrongly, then rightly again.")
    panel, draw = _panel(3, 1, tile, head=62, foot=92)
    heads = ("a scene", "a word on it", f"{len(found.selective)} latents off")
    for x, (head, picture) in enumerate(zip(heads, (clean, attacked, attacked), strict=True)):
        left, top = EDGE + x * (tile + GAP), EDGE + 62
        large = picture.convert("RGB").resize((tile, tile), Image.Resampling.NEAREST)
        panel.paste(large, (left, top), _mask(tile))
        draw.text((left + tile / 2, EDGE + 18), head, INK, _font(26, bold=True), anchor="mm")
        for line, (place, colour) in enumerate(((right, GOOD), (word, BAD))):
            share, y = float(said[x][place]), top + tile + 22 + 48 * line
            draw.text((left, y), names[place], INK, _font(19), anchor="lm")
            draw.text((left + tile, y), f"{share:.0%}", INK, _font(19, bold=True), anchor="rm")
            draw.rounded_rectangle((left, y + 15, left + tile, y + 21), 3, (45, 50, 56))
            wide = max(6, round(tile * share))
            draw.rounded_rectangle((left, y + 15, left + wide, y + 21), 3, colour)
    return panel


def screenshots(report: Path, options: Options) -> list[Path]:
    """The demo's report as it opens, light and dark; none without Chromium."""
    browser = shutil.which(options.chromium)
    if browser is None:
        print(f"note: no {options.chromium} here: the pictures of the report stay as they are")
        return []
    return [
        save_pixels(_screenshot(browser, report, dark=dark), options.out / f"report-{name}.webp")
        for name, dark in (("light", False), ("dark", True))
    ]


def _screenshot(browser: str, page: Path, *, dark: bool) -> Image.Image:
    """The top of the page, as it opens."""
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        command = [
            browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", "--hide-scrollbars", f"--user-data-dir={folder}/profile",
            "--window-size=1180,920", f"--screenshot={shot}",
            *(["--blink-settings=preferredColorScheme=0"] if dark else []),
            page.absolute().as_uri(),
        ]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True)
        picture = Image.open(shot).convert("RGB")
    picture.thumbnail((1000, 1000), Image.Resampling.LANCZOS)
    return picture


# Photos


def photo_plots(run: Path, out: Path) -> list[Path]:
    """Training and density of the tutorial's run, as its report draws them."""
    log = read_metrics(run / METRICS)
    density = sp.LatentIndex.open(run / "index").table["density"].to_numpy()
    never = int((density == 0).sum())
    return [
        *save_plot(lambda: training_curves(log), out / "photo-training"),
        *save_plot(lambda: density_histogram(density, never), out / "photo-density"),
    ]


def sweep_plot(sweep: Path, out: Path) -> list[Path]:
    """FVU over L0 of the tutorial's sweep, as the sweep draws it."""
    table = read_json(sweep / "table.json")

    def draw() -> Figure:
        drawn = draw_pareto(table, "fvu")
        assert drawn is not None, "the sweep was not measured"
        return drawn

    return save_plot(draw, out / "photo-sweep")


def photo_latents(run: Path, samples: Path, tile: int = 190) -> Image.Image:
    """Photos that training never saw, and beside each where one latent is active.

    Of the latents that are active on 8 patches or more, the one with the largest product of two
    shares is shown: of its largest activation that it reaches on the photo, and of its
    top-activating images that carry one of their two most frequent labels.
    """
    index = sp.LatentIndex.open(run / "index")
    sae = sp.SparseAutoencoder.from_pretrained(run)
    model, source = sp.load_model(index.manifest["model"]["id"]), sp.open_images(samples)
    pixels = torch.stack([model.transform(source.load(i)) for i in range(len(source))])
    heat = patch_heatmaps(sae, model, pixels, range(sae.n_latents))
    labels = [_two_labels(index, latent) for latent in range(sae.n_latents)]
    reached = heat.amax((2, 3)) / torch.from_numpy(index.table["max_activation"].to_numpy().copy())
    score = reached * torch.tensor([share for _, share in labels])
    score[(heat > 0).sum((2, 3)) < 8] = 0
    rows, caption = -(-len(source) // 2), 84
    panel, draw = _panel(4, 1, tile, head=0, foot=(rows - 1) * (tile + caption) + caption - GAP)
    for i, picture in enumerate(seen_pictures(model, pixels)):
        latent = int(score[i].argmax())
        left, top = EDGE + i % 2 * 2 * (tile + GAP), EDGE + i // 2 * (tile + caption)
        lit = overlay(picture, heat[i, latent])
        for x, shown in enumerate((picture, lit)):
            fitted = shown.resize((tile, tile), Image.Resampling.LANCZOS)
            panel.paste(fitted, (left + x * (tile + GAP), top), _mask(tile))
        middle = left + tile + GAP / 2
        name = " · ".join(labels[latent][0]).replace("_", " ")
        draw.text((middle, top + tile + 22), name, INK, _font(24, bold=True), anchor="mm")
        foot = f"latent {latent} at {float(reached[i, latent]):.0%}"
        draw.text((middle, top + tile + 52), foot, FAINT, _font(19), anchor="mm")
    return panel


def _two_labels(index: sp.LatentIndex, latent: int) -> tuple[list[str], float]:
    """The two most frequent labels of its top-activating images, and their share of these."""
    labels = [index.info(example.image).label or "" for example in index.top(latent)]
    common = Counter(labels).most_common(2)
    return [name for name, _ in common], sum(n for _, n in common) / max(16, len(labels))


# Files


def save_pixels(picture: Image.Image, path: Path) -> Path:
    """Write a WebP, as good as `MOST_BYTES` allow."""
    for quality in range(92, 20, -4):
        out = io.BytesIO()
        picture.save(out, "WEBP", quality=quality, method=6)
        if out.tell() <= MOST_BYTES:
            break
    write_bytes(path, out.getvalue())
    return path


def save_plot(draw: Callable[[], Figure], path: Path) -> list[Path]:
    """Write a plot for light pages and for dark ones."""
    drawn = draw()
    wide, high = (round(INCH * side) for side in drawn.get_size_inches())
    frame = f'<svg width="{wide}" height="{high}" font-family="system-ui, sans-serif" '
    text = to_svg(drawn, path.name, path.name).replace("<svg ", frame, 1)
    text = re.sub(r"\d+\.\d{3,}", lambda number: f"{float(number[0]):.2f}", text)
    written = []
    for scheme, colours in SCHEMES.items():
        own = text
        for variable, colour in colours.items():
            own = own.replace(f"var({variable})", colour)
        for dull, bright in BRIGHTER.items() if scheme == "dark" else ():
            own = own.replace(dull, bright)
        written.append(path.with_name(f"{path.name}-{scheme}.svg"))
        write_text(written[-1], own + "\n")
    return written


def _panel(
    columns: int, rows: int, tile: int, head: int, foot: int
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """A dark sheet with round corners, which suits light pages and dark ones."""
    size = (
        2 * EDGE + columns * (tile + GAP) - GAP,
        2 * EDGE + head + rows * (tile + GAP) - GAP + foot,
    )
    panel = Image.new("RGBA", size)
    ImageDraw.Draw(panel).rounded_rectangle((0, 0, size[0] - 1, size[1] - 1), 26, PANEL)
    return panel, ImageDraw.Draw(panel)


def _mask(side: int) -> Image.Image:
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).rounded_rectangle((0, 0, side - 1, side - 1), 10, 255)
    return mask


def _font(size: int, *, bold: bool = False) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(str(folder / f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size)


if __name__ == "__main__":
    main(tyro.cli(Options))
