from __future__ import annotations

from sparsight.latents.dead_latents import dead_latents_table
from sparsight.sae.remedies import AuxK, Remedy, Resampling

LOG = [
    {"vectors": 100, "dead": 0.0, "revived": 0, "resampled": 0, "vectors_per_second": 50.0},
    {"vectors": 200, "dead": 0.4, "revived": 3, "resampled": 20, "vectors_per_second": 40.0},
    {"vectors": 300, "dead": 0.1, "revived": 9, "resampled": 0, "vectors_per_second": 40.0},
]


def _rows(remedies: list[type[Remedy]]) -> dict[str, str]:
    table = dead_latents_table([{**line, "dead_window": 100} for line in LOG], remedies, 2.5)
    assert table is not None
    return {row.name: row.cells[0] for row in table.rows}


def test_the_report_says_how_many_latents_fired_again_and_at_what_cost() -> None:
    rows = _rows([AuxK, Resampling])
    assert rows["remedy"] == "AuxK, resampling"
    assert rows["dead at the end, in the last 100 vectors"] == "10.0 %"
    assert rows["highest share of dead latents"] == "40.0 %"
    assert rows["dead latents that fired again"] == "12"
    assert rows["resampled"] == "20"
    assert rows["speed once latents can be dead, relative to before"] == "80.0 %"
    assert rows["distance of the mean from 0, in spreads"] == "2.50"


def test_a_run_without_a_remedy_shows_no_cost() -> None:
    rows = _rows([])
    assert rows["remedy"] == "none" and "resampled" not in rows
    assert not any("speed" in name for name in rows)


def test_older_logs_without_these_figures_make_no_table() -> None:
    assert dead_latents_table([{"vectors": 100, "dead": 0.1}], [], None) is None
