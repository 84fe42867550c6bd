"""Where the disk is full: one message, and what lay there before stays whole.

The system refuses to let any file grow beyond a limit, which fails as a full disk does: in the
middle of a write. Extraction and checkpoints have tests of their own.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import sparsight as sp
from activation_parts import digests
from small_runs import one_thread, store, train_small
from sparsight.cli import main

__all__ = ["one_thread", "store"]


@contextmanager
def files_no_longer_than(n_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def run(store: sp.ActivationStore, tmp_path: Path) -> sp.Run:
    """A run with all its files."""
    run = train_small(store, tmp_path / "run")
    sp.evaluate(run.sae(), store, quiet=True, baselines=False).save(run.out)
    sp.build_index(run.sae(), store, out=run.out / "index", quiet=True)
    sp.write_report(run.out, run.out, latents=2, quiet=True)
    return run


@pytest.mark.parametrize("n_latents", [64, 96])
def test_an_sae_that_does_not_fit_leaves_the_one_that_is_there(run: sp.Run, n_latents: int) -> None:
    before, sae = digests(run.out), run.sae()
    other = sp.SparseAutoencoder(sae.d_in, sp.SAEConfig(n_latents=n_latents), seed=5)
    with (
        files_no_longer_than(4000),
        pytest.raises(sp.SparsightError, match=r"sae\.safetensors: could not be written") as told,
    ):
        other.save_pretrained(run.out)
    assert "\n" not in str(told.value)
    assert digests(run.out) == before
    other.save_pretrained(run.out)
    assert torch.equal(run.sae().W_dec, other.W_dec)


def test_an_sae_that_does_not_fit_leaves_no_half_of_one(run: sp.Run, tmp_path: Path) -> None:
    with files_no_longer_than(4000), pytest.raises(sp.SparsightError, match="could not be written"):
        run.sae().save_pretrained(tmp_path / "new")
    assert digests(tmp_path / "new") == {}


def test_metrics_that_do_not_fit_leave_those_that_are_there(
    run: sp.Run, store: sp.ActivationStore
) -> None:
    before = digests(run.out)
    report = sp.evaluate(run.sae(), store, quiet=True)
    with (
        files_no_longer_than(1000),
        pytest.raises(sp.SparsightError, match=r"metrics\.json: could not be written"),
    ):
        report.save(run.out)
    assert digests(run.out) == before


@pytest.mark.parametrize("n_bytes", [10, 1000, 9000])
def test_an_index_that_does_not_fit_is_not_an_index(
    run: sp.Run, store: sp.ActivationStore, tmp_path: Path, n_bytes: int
) -> None:
    with (
        files_no_longer_than(n_bytes),
        pytest.raises(sp.SparsightError, match=r"new(/.*)?: could not be written"),
    ):
        sp.build_index(run.sae(), store, out=tmp_path / "new", quiet=True)
    with pytest.raises(sp.UserError):
        sp.LatentIndex.open(tmp_path / "new")
    sp.build_index(run.sae(), store, out=tmp_path / "new", quiet=True)
    sp.LatentIndex.open(tmp_path / "new", run.sae())


def test_a_report_that_does_not_fit_leaves_the_one_that_is_there(
    run: sp.Run, capfd: pytest.CaptureFixture[str]
) -> None:
    before = digests(run.out)
    page = run.out / "report.html"
    page.write_text("what was there")
    with files_no_longer_than(20_000):
        code = main(["report", str(run.out), "--latents", "2", "--out", str(page)])
    assert code == 1
    said = capfd.readouterr().err
    assert said.count("sparsight: ") == 1 and "Traceback" not in said
    assert "report.html: could not be written (File too large)" in said
    assert page.read_text() == "what was there"
    assert digests(run.out).keys() == before.keys()


@pytest.mark.parametrize(
    "arguments",
    [
        ["export", "calibration", "--out", "{}"],
        ["export", "calibration", "--layout", "openai", "--out", "{}.safetensors"],
        ["convert", "{run}", "--to", "saelens", "--out", "{}"],
        ["push", "{run}", "--to", "a/b", "--n-shown", "0", "--dry-run", "{}"],
    ],
)  # fmt: skip
def test_what_is_new_and_does_not_fit_is_one_line_that_names_it_and_leaves_nothing(
    run: sp.Run, arguments: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new/it"
    given = [each.format(out, run=run.out) for each in arguments]
    with files_no_longer_than(10_000):
        code = main(given)
    said = capfd.readouterr().err
    assert code == 1 and "Traceback" not in said
    last = said.strip().splitlines()[-1]
    assert last.startswith(f"sparsight: {out}") and "could not be written" in last
    assert digests(tmp_path / "new") == {}


def test_memory_that_does_not_suffice_is_one_line(
    run: sp.Run, capfd: pytest.CaptureFixture[str]
) -> None:
    before = digests(run.out)
    assert main(["index", str(run.out), "--top-n", str(10**11)]) == 1
    said = capfd.readouterr().err
    assert "sparsight: Memory ran out (" in said and "Traceback" not in said
    assert digests(run.out) == before
