from __future__ import annotations

import xml.etree.ElementTree as ET

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from sparsight.pages import plots
from sparsight.pages.style import to_svg

LOG = [
    {"vectors": 1000 * i, "fvu": 1 / (1 + i), "l0": 32.0, "dead": 0.01 * i, "loss": 1.0}
    for i in range(20)
]


def labels(figure: Figure) -> str:
    return " ".join(
        text
        for ax in figure.axes
        for text in (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(loc="left"))
    )


def test_training_curves_show_what_was_logged() -> None:
    figure = plots.training_curves(LOG)
    assert len(figure.axes) == 2
    for words in ("FVU", "dead latents (%)", "vectors seen"):
        assert words in labels(figure)
    assert "L0" not in labels(figure), "an L0 that never changes has no curve"
    varied = plots.training_curves([*LOG, {"vectors": 30_000, "l0": 33.0}])
    assert len(varied.axes) == 3 and "L0" in labels(varied)
    x, y = figure.axes[1].lines[0].get_data()
    assert list(x) == [row["vectors"] for row in LOG]
    assert y[-1] == pytest.approx(19)
    assert len(plots.training_curves([{"vectors": 1, "fvu": 0.5, "l0": None}]).axes) == 1


def test_the_density_histogram_counts_every_latent_once() -> None:
    density = np.array([0, 0, 1e-6, 1e-3, 0.011, 0.5, 1.0])
    figure = plots.density_histogram(density, 2)
    heights = [patch.get_height() for patch in figure.axes[0].patches]
    assert sum(heights) == 7
    assert "share of vectors" in labels(figure)


def test_the_scatter_shows_only_active_latents() -> None:
    density = np.array([0, 0.1, 0.2, 0.3])
    mean = np.array([np.nan, 1.0, 2.0, 90.0])
    share = np.array([np.nan, np.nan, 0.5, 1.0])
    figure = plots.density_scatter(density, mean, share)
    points = [len(dots.get_offsets()) for dots in figure.axes[0].collections]
    assert points == [1, 2]
    assert "share of the most frequent label" in labels(figure)


def test_the_place_of_the_axes_leads_from_a_dot_to_the_data() -> None:
    """A page computes the pixel of a dot from it, so it must agree with matplotlib's own."""
    density, mean = np.array([1e-4, 0.01, 0.2]), np.array([1.0, 5.0, 90.0])
    figure = plots.density_scatter(density, mean, np.full(3, 0.5))
    to_svg(figure, "scatter", "a scatter plot")
    place = plots.axes_place(figure)
    assert place["log"] == [True, True]
    (left, top, width, height), (x0, x1), (y0, y1) = place["box"], place["x"], place["y"]
    size = figure.get_size_inches() * figure.dpi
    for x, y in zip(density, mean, strict=True):
        right = left + width * np.log(x / x0) / np.log(x1 / x0)
        down = top + height * (1 - np.log(y / y0) / np.log(y1 / y0))
        pixel = figure.axes[0].transData.transform((x, y)) / size
        assert (right, 1 - down) == pytest.approx(tuple(pixel), abs=1e-4)


def test_cls_does_not_set_the_colours_of_the_error_map() -> None:
    fvu = np.concatenate([[7.0], np.linspace(0.1, 0.2, 12)])
    figure = plots.error_by_position(fvu, (3, 4), 1)
    assert figure.axes[1].images[0].get_clim() == pytest.approx((0.1, 0.2))
    assert figure.axes[0].get_yticklabels()[0].get_text() == "CLS\n7"


def test_error_by_position_puts_patches_on_their_grid_and_cls_next_to_it() -> None:
    fvu = np.arange(13, dtype=float)
    figure = plots.error_by_position(fvu, (3, 4), 1)
    cls, grid = (ax.images[0].get_array() for ax in figure.axes[:2])
    assert np.array_equal(np.asarray(grid), fvu[1:].reshape(3, 4))
    assert np.array_equal(np.asarray(cls), [[0.0]])
    assert "patch row" in labels(figure)
    line = plots.error_by_position(fvu, None, 0)
    assert np.array_equal(line.axes[0].lines[0].get_ydata(), fvu)


@pytest.mark.parametrize(
    "figure",
    [
        plots.training_curves([]),
        plots.density_histogram(np.zeros(3), 3),
        plots.density_scatter(np.zeros(2), np.full(2, np.nan), np.full(2, np.nan)),
        plots.error_by_position(np.full(16, 0.5), (4, 4), 0),
    ],
)
def test_plots_without_data_can_be_drawn(figure: Figure) -> None:
    assert to_svg(figure, "x", "nothing").startswith("<svg")


def test_svg_is_small_deterministic_well_formed_and_follows_the_page() -> None:
    random = np.random.default_rng(0)
    density = 10 ** random.uniform(-5, -1, 20_000)

    def draw(name: str) -> str:
        figure = plots.density_scatter(density, density, np.full(20_000, 0.3))
        return to_svg(figure, name, 'a "label" <b>')

    svg = draw("a")
    assert svg == draw("a")
    assert len(svg) < 300_000
    root = ET.fromstring(svg)
    assert root.get("aria-label") == 'a "label" <b>'
    assert "var(--muted)" in svg
    assert "<script" not in svg
    ids = {element.get("id") for element in root.iter() if element.get("id")}
    other = {element.get("id") for element in ET.fromstring(draw("b")).iter() if element.get("id")}
    referred = {part.split(")")[0] for part in svg.split("url(#")[1:]}
    assert referred <= ids
    assert not referred & other


def test_plotting_leaves_matplotlib_as_it_was() -> None:
    before = dict(matplotlib.rcParams)
    to_svg(plots.training_curves(LOG), "a", "a")
    assert dict(matplotlib.rcParams) == before
