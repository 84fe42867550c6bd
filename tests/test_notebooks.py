from __future__ import annotations

import sys

import numpy as np
import pytest

from sparsight.errors import MissingExtra
from sparsight.evaluation import EvaluationReport, LatentCounts
from sparsight.notebooks import data_frame, html_grid

NOTHING = np.zeros(0)
NO_LATENTS = LatentCounts(NOTHING, NOTHING, np.zeros(0, dtype=np.int64))
CELL = """
import time
from sparsight.progress import progress
with progress("count", 30, "things") as line:
    for i in range(30):
        time.sleep(0.02)
        line.advance(1, f"<note {i}>")
"""


def test_a_table_with_a_head_escapes_every_cell() -> None:
    page = html_grid(("", "a<b"), [("x&y", "<1>")], "a <note>")
    assert "<th>a&lt;b</th>" in page and "<tr><th>x&amp;y</th><td>&lt;1&gt;</td></tr>" in page
    assert page.endswith("<p>a &lt;note&gt;</p>")


def test_rows_become_a_data_frame_and_without_pandas_the_message_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert data_frame([{"a": 1}, {"a": 2, "b": 3}])["b"].isna().tolist() == [True, False]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(MissingExtra, match=r"pip install pandas$"):
        data_frame([{"a": 1}])


def test_a_report_shows_its_figures_beside_the_baselines() -> None:
    metrics = {
        "fvu": 0.12345, "l0": 16.0, "dead": 0.25, "omitted": {"truth": "no <scenes>"},
        "zero_shot": {"original": {"top1": 0.5}, "reconstructed": {"top1": 0.25}},
        "baselines": {"pca": {"fvu": 0.1, "zero_shot": {"reconstructed": {"top1": 0.125}}}},
    }  # fmt: skip
    report = EvaluationReport(metrics, NO_LATENTS)
    assert repr(report) == "EvaluationReport(FVU 0.123, L0 16.0, dead 25.0 %; baselines: pca)"
    page = report._repr_html_()
    assert "<tr><th>FVU</th><td>0.1235</td><td>0.1</td></tr>" in page
    assert "no &lt;scenes&gt;" in page
    frame = report.to_pandas()
    assert frame.loc["FVU", "SAE"] == 0.12345
    assert frame.loc["zero-shot top-1, reconstructed", "PCA"] == 0.125


def test_a_kernel_shows_one_bar_that_is_replaced() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)])
    nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert output.data["text/plain"].startswith("count: 30/30 things · ")
    assert '<progress value="30" max="30"' in output.data["text/html"]
    assert "&lt;note 29&gt;" in output.data["text/html"]
