"""Formats, image sources and verbs of other packages: installed, broken, in each other's way."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sparsight import plugins
from sparsight.activations import ActivationStore
from sparsight.cli import main
from sparsight.cli.main import VERBS
from sparsight.errors import SparsightError, UserError
from sparsight.formats import FORMATS, find, formats
from sparsight.images import ImageSource, open_images
from sparsight.images.opening import OPENERS
from sparsight.sae import SAEConfig, SparseAutoencoder, TopK

TESTS = Path(__file__).parent
SITE = "blocks.3.resid_post"
Register = Callable[..., None]


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which pip has installed `outside_package`."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    shutil.copytree(TESTS / "outside_package", source, dirs_exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*pip, *offline, "--target", target, source], check=True, stdin=subprocess.DEVNULL
    )
    return target


@pytest.fixture
def fresh() -> Iterator[None]:
    """What is installed is looked up again, before the test and after it."""
    caches = (plugins.all_plugins, plugins.warn_once)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.fixture
def menagerie(installed: Path, fresh: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The outside package can be imported in this test."""
    monkeypatch.syspath_prepend(installed)
    return installed


@pytest.fixture
def register(tmp_path: Path, fresh: None, monkeypatch: pytest.MonkeyPatch) -> Register:
    """Register entry points as an installed package would: by its metadata on the path."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(package: str, entry_points: str, modules: dict[str, str] | None = None) -> None:
        folder = tmp_path / f"{package}-2.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 2.0\n")
        (folder / "entry_points.txt").write_text(entry_points)
        for name, text in (modules or {}).items():
            (tmp_path / f"{name}.py").write_text(text)

    return write


def small_sae() -> SparseAutoencoder:
    return SparseAutoencoder(8, SAEConfig(n_latents=24, sparsity=TopK(4)), seed=3).eval()


def test_the_built_in_ones_stand_in_the_same_groups():
    groups = tomllib.loads((TESTS.parent / "pyproject.toml").read_text())["project"]["entry-points"]
    formats = {each.name: f"{type(each).__module__}:{type(each).__name__}" for each in FORMATS}
    openers = {kind: f"{each.__module__}:{each.__qualname__}" for kind, each in OPENERS.items()}
    verbs = {verb: f"sparsight.cli.{verb}:main" for verb in VERBS}
    assert groups == {
        plugins.FORMAT_PLUGINS: formats,
        plugins.SOURCE_PLUGINS: openers,
        plugins.VERB_PLUGINS: verbs,
    }


def test_a_format_of_another_package_is_written_and_recognised(menagerie, tmp_path):
    sae = small_sae()
    sae.save_pretrained(tmp_path, format="menagerie")
    assert {path.name for path in tmp_path.iterdir()} == {"menagerie.json", "menagerie.safetensors"}
    again = SparseAutoencoder.from_pretrained(tmp_path)
    assert again.metadata["source"]["format"] == "menagerie"
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(x).x_hat, sae(x).x_hat)
    assert formats()[:-1] == FORMATS and formats()[-1].name == "menagerie"


def test_the_command_line_converts_to_a_format_of_another_package_and_back(
    menagerie, tmp_path, capsys
):
    small_sae().save_pretrained(tmp_path / "ours")
    for source, to in (("ours", "menagerie"), ("menagerie", "sparsight")):
        given = ["convert", str(tmp_path / source), "--to", to, "--out", str(tmp_path / to)]
        assert main(given) == 0, capsys.readouterr().err
    assert "menagerie → sparsight" in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "ours"), "--to", "x", "--out", str(tmp_path / "x")]) == 2
    assert "clipscope" in (told := capsys.readouterr().err) and "menagerie" in told


def test_a_source_of_another_package_opens_with_selections_and_samples(menagerie):
    source = open_images("stripes:9[1:5]")
    assert [source.info(index).label for index in range(4)] == [f"{n} wide" for n in range(2, 6)]
    assert open_images(source.spec).fingerprint() == source.fingerprint()
    assert len(open_images("stripes:9?sample=3&seed=1")) == 3
    with pytest.raises(UserError, match=r"expected stripes:N"):
        open_images("stripes:none")
    with pytest.raises(UserError, match=r"of other packages 'stripes:…'"):
        open_images("strips:9")


def test_a_folder_that_is_there_comes_before_a_source_of_its_name(menagerie, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("stripes:9").mkdir()
    open_images("stripes:3").load(0).save("stripes:9/image.png")
    assert len(open_images("stripes:9")) == 1


def test_a_verb_of_another_package_works_on_the_command_line(menagerie, capsys):
    assert main(["brightness", "--images", "stripes:2"]) == 0
    assert capsys.readouterr().out == "1\t0.500\n2\t0.500\n"
    assert main(["brightness", "--help"]) == 0
    assert "examples:\n  sparsight brightness --images" in capsys.readouterr().out
    assert main(["brightnes"]) == 2
    assert "Did you mean 'brightness'?" in capsys.readouterr().err


def test_a_verb_of_sparsights_own_takes_a_source_of_another_package(menagerie, tmp_path):
    extract = ["extract", "--model", "calibration", "--images", "stripes:3", "--sites", SITE]
    assert main([*extract, "--out", str(tmp_path / "acts"), "--workers", "0"]) == 0
    assert ActivationStore(tmp_path / "acts").source().labels() == ["1 wide", "2 wide", "3 wide"]


def test_help_lists_the_verbs_of_an_installed_package(installed):
    path = os.pathsep.join([str(installed), str(TESTS.parent / "src")])
    done = subprocess.run(
        [sys.executable, "-m", "sparsight", "--help"],
        capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    about = "A format, an image source and a verb for Sparsight"
    line = f"  brightness  sparsight-menagerie 1.5: {about}\n"
    assert f"\nverbs of other packages:\n{line}\n" in done.stdout


BROKEN = """
[sparsight.formats]
broken = broken_parts:Missing
[sparsight.sources]
broken = not_installed_anywhere
[sparsight.verbs]
broken = broken_parts:fails
"""


def test_a_broken_package_is_named_and_breaks_nothing_else(
    register, menagerie, tmp_path, capsys, caplog
):
    parts = "def fails(arguments):\n    raise KeyError('k')"
    register("broken-parts", BROKEN, {"broken_parts": parts})
    assert main(["--help"]) == 0
    assert "  broken  broken-parts 2.0: \n  brightness  sparsight-men" in capsys.readouterr().out
    assert main(["broken"]) == 1
    told = capsys.readouterr().err
    assert "'broken' of the package broken-parts 2.0 failed (KeyError: 'k'; `--traceback`" in told
    with pytest.raises(
        SparsightError, match=r"broken-parts 2.0 cannot be loaded.*not_installed_any"
    ):
        open_images("broken:3")
    with pytest.raises(SparsightError, match=r"broken-parts 2.0 cannot be loaded.*Missing"):
        find("broken")
    small_sae().save_pretrained(tmp_path / "sae", format="menagerie")
    for _ in range(2):
        SparseAutoencoder.from_pretrained(tmp_path / "sae")
    assert caplog.text.count("package broken-parts 2.0 cannot be loaded") == 1


def test_what_a_package_registers_must_be_of_the_right_kind(register, tmp_path, capsys):
    entry_points = (
        "[sparsight.formats]\nodd = odd_parts:odd\n[sparsight.sources]\nodd = odd_parts:odd\n"
    )
    entry_points += "[sparsight.verbs]\nodd = odd_parts:number\n"
    register("odd-parts", entry_points, {"odd_parts": "def odd(spec): return []\nnumber = 3\n"})
    with pytest.raises(SparsightError, match=r"gave list, which is no ImageSource"):
        open_images("odd:3")
    with pytest.raises(SparsightError, match=r"is no sparsight.formats.Format"):
        find("odd")
    assert main(["odd"]) == 1
    assert "'int' object is not callable" in capsys.readouterr().err


def test_no_package_takes_a_name_of_sparsights_own(register, tmp_path, capsys, caplog):
    entry_points = "[sparsight.formats]\nsaev = taking:Own\n[sparsight.sources]\nhf = taking:own\n"
    register("taking-names", entry_points + "[sparsight.verbs]\ntrain = taking:main\n")
    assert formats() == FORMATS
    assert "'saev' of the package taking-names 2.0 is left out: Sparsight itself has" in caplog.text
    assert type(find("saev")).__module__ == "sparsight.formats.saev"
    assert main(["train", "--help"]) == 0
    assert "usage: sparsight train" in capsys.readouterr().out
    assert main([]) == 2
    listing = "  train  taking-names 2.0: left out: Sparsight itself has one of that name"
    assert listing in capsys.readouterr().out


def test_of_two_packages_with_the_same_name_neither_is_chosen(register, capsys, caplog):
    for package in ("one-zoo", "two-zoo"):
        register(
            package, "[sparsight.formats]\nzoo = zoo:Zoo\n[sparsight.sources]\nzoo = zoo:zoo\n"
        )
    for use in (lambda: find("zoo"), lambda: open_images("zoo:1")):
        with pytest.raises(
            UserError, match=r"several packages register 'zoo' .*: one-zoo 2.0 and two-zoo 2.0"
        ):
            use()
    assert formats() == FORMATS
    assert "one-zoo 2.0 is left out: two-zoo 2.0 registers that name, too" in caplog.text


def test_damaged_metadata_of_one_package_do_not_hide_the_others(
    register, menagerie, tmp_path, caplog
):
    register("damaged-zoo", "[sparsight.sources]\nno equals sign\n")
    assert isinstance(open_images("stripes:2"), ImageSource)
    assert str(tmp_path / "damaged-zoo-2.0.dist-info") in caplog.text
