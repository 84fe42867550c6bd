"""The front door: help, mistakes, exit codes; each message once, and no traceback."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sparsight.activations import ActivationStore, extract
from sparsight.cli import main
from sparsight.cli.main import VERBS
from sparsight.cli.options import parse
from sparsight.cli.train import TrainOptions
from sparsight.errors import UserError
from sparsight.images import open_images
from sparsight.interruption import Terminated
from sparsight.sae import SAEConfig, SparseAutoencoder, TopK
from sparsight.vision import load_model

SITE = "blocks.3.resid_post"
SHORT = ("--n-vectors", "512", "--batch-size", "128", "--sae.n-latents", "256")
SOURCE = Path(__file__).parents[2] / "src"


def sparsight(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run a real process, as a shell would start it."""
    return subprocess.run(
        [sys.executable, "-m", "sparsight", *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        stdin=subprocess.DEVNULL,
    )


@pytest.fixture
def fails(capsys):
    """Run a command that must exit with a code; return its message, which must be a single one."""

    def check(*arguments: str, code: int = 2) -> str:
        assert main(list(map(str, arguments))) == code
        message = capsys.readouterr().err
        assert "Traceback" not in message
        assert message.count("sparsight: ") == 1, message
        return message

    return check


@pytest.fixture
def store(tmp_path):
    """Return a small store of the calibration model that a test may damage."""
    model, images = load_model("calibration"), open_images("calibration:48:5")
    return extract(model, images, sites=[SITE], out=tmp_path / "kept", workers=0, quiet=True).path


@pytest.mark.alone
def test_help_lists_every_verb_in_less_than_a_second():
    started = time.monotonic()
    done = sparsight("--help")
    assert done.returncode == 0
    assert all(verb in done.stdout for verb in VERBS)
    assert time.monotonic() - started < 1


EVERY_VERB = [*(verb for verb in VERBS if verb != "attack")]
EVERY_VERB += [f"attack {verb}" for verb in ("measure", "find", "curate")]


@pytest.mark.parametrize("verb", EVERY_VERB)
def test_the_help_of_a_verb_is_one_screen_that_begins_with_examples(verb, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert main([*verb.split(), "--help"]) == 0
    shown = capsys.readouterr().out
    assert f"usage: sparsight {verb}" in shown
    assert f"examples:\n  sparsight {verb}" in shown
    leaves_nothing = ("pretrained", "push", "latents", "image", "name")
    assert "--out" in shown or verb in leaves_nothing
    assert len(shown.splitlines()) <= 60
    assert "None" not in shown.split("options:")[0]


@pytest.mark.parametrize("verb", EVERY_VERB)
def test_help_all_lists_every_option(verb, capsys):
    assert main(["help", *verb.split(), "--help-all"]) == 0
    shown = capsys.readouterr().out
    assert "--config" in shown and "--help-all` shows" not in shown


@pytest.mark.parametrize("verb", EVERY_VERB)
def test_the_examples_of_the_help_are_understood(verb, monkeypatch):
    module = importlib.import_module(f"sparsight.cli.{verb.replace(' ', '.')}")

    class Understood(Exception):
        """Raised instead of doing the work."""

    def understood(*arguments, **options):
        assert options["helped"].examples
        parse(*arguments, **options)
        raise Understood

    monkeypatch.setattr(module, "parse", understood)
    for example in module.HELP.examples:
        with pytest.raises(Understood):
            module.main(shlex.split(example))


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("extract", "extract: missing --model, --images and --out."),
        ("extract --model m --images i --out o --batch-size x", "--batch-size"),
        ("extract --model m --images i --out o --tokens no", "'all', 'patches', 'cls', 'mean'"),
        ("extract --model m --images i --out o --dtype", "'--dtype'"),
        ("steer run --latents 1 --strengths x", "expected a number, not ['x']"),
        ("train --lr x", "expected a number, not ['x']"),
        ("extract --model m --images i --out=", "--out is empty"),
        (f"extract --model m --images calibration:{'9' * 5000} --out o", "expected"),
        (f"extract --model m --images calibration:9[{'9' * 5000}] --out o", "not a selection"),
        ("train --bach-size 3", "unknown option --bach-size; did you mean --batch-size?"),
        ("train more words", "train: unknown arguments more and words."),
    ],
)
def test_a_wrong_option_gives_one_line(command, message, fails):
    told = fails(*command.split())
    assert message in told
    assert len(told.splitlines()) == 1 and "│" not in told


def test_an_unknown_verb_exits_with_2_and_suggests_one():
    done = sparsight("trian")
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "sparsight: Unknown verb 'trian'. Did you mean 'train'? `sparsight --help` lists all verbs."
    )


def test_no_verb_at_all_prints_the_help_and_exits_with_2(capsys):
    assert main([]) == 2
    assert "usage: sparsight VERB" in capsys.readouterr().out


def test_the_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("sparsight 0.")


@pytest.mark.parametrize("verb", VERBS)
def test_an_unknown_flag_exits_with_2(verb, capsys):
    assert main([verb, "--no-such-flag", "3"]) == 2
    message = capsys.readouterr().err
    assert "no-such-flag" in message
    assert "Traceback" not in message


def test_an_unknown_key_of_a_config_file_is_named_with_its_file(tmp_path, fails):
    path = tmp_path / "mine.toml"
    path.write_text("latnets = 3\n")
    message = fails("report", "runs/", "--config", path)
    assert "mine.toml" in message and "'latnets'" in message and "'latents'" in message


def test_a_wrong_value_in_a_config_file_is_named_with_its_file(tmp_path, fails):
    path = tmp_path / "mine.toml"
    path.write_text('latents = "many"\n')
    message = fails("report", "runs/", f"--config={path}")
    assert "mine.toml" in message and "latents" in message and "'many'" in message


def test_a_missing_config_file_exits_with_2(tmp_path, fails):
    assert "gone.toml" in fails("train", "--config", tmp_path / "gone.toml")


def test_the_command_line_takes_precedence_over_the_config_file(tmp_path):
    from sparsight.cli.options import parse
    from sparsight.cli.report import ReportOptions

    path = tmp_path / "mine.toml"
    path.write_text('latents = 3\nseed = 5\nruns = ["a"]\n')
    options = parse(ReportOptions, "report", ["--config", str(path), "--latents", "7"])
    assert (options.latents, options.seed, options.runs) == (7, 5, (Path("a"),))


@pytest.mark.parametrize("verb", ["report", "evaluate", "encode", "index"])
def test_a_missing_run_folder_exits_with_2(verb, tmp_path, fails):
    assert "no-such-run" in fails(verb, tmp_path / "no-such-run")


def test_a_demo_with_a_negative_seed_leaves_nothing_behind(tmp_path, capsys):
    assert main(["demo", "--out", str(tmp_path / "demo"), "--seed", "-1"]) == 2
    assert "seed is -1" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    "flags",
    [("--seed", "-1"), ("--betas", "2", "0.9"), ("--eps", "0"), ("--warmup", "nan")],
)
def test_a_training_setting_out_of_range_exits_with_2(flags, tmp_path, capsys):
    name, *values = flags
    assert main(["train", "--store", str(tmp_path / "gone"), *flags]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert name.removeprefix("--") in message and values[0] in message


def test_a_missing_store_exits_with_2(tmp_path, fails):
    message = fails("train", "--store", tmp_path / "no-store", "--out", tmp_path / "run")
    assert "no-store" in message
    assert not (tmp_path / "run" / "sae.safetensors").exists()


def test_a_missing_folder_of_images_exits_with_2(tmp_path, fails):
    message = fails(
        "extract", "--model", "calibration", "--images", tmp_path / "gone", "--out", tmp_path / "a"
    )
    assert "gone" in message


def test_ctrl_c_exits_with_130_and_says_how_to_continue(monkeypatch, capsys):
    import sparsight.cli.report as verb

    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(verb, "main", interrupted)
    assert main(["report", "runs/"]) == 130
    assert "same command" in capsys.readouterr().err


def test_a_stop_that_a_library_turned_into_an_error_is_reported_as_a_stop(monkeypatch, capsys):
    import sparsight.cli.report as verb

    def swallowed(arguments):
        try:
            raise Terminated
        except:  # noqa: E722, as libraries do that look for others
            raise ModuleNotFoundError("No module named 'version'")  # noqa: B904

    monkeypatch.setattr(verb, "main", swallowed)
    assert main(["report", "runs/"]) == 143
    assert capsys.readouterr().err == "sparsight: Terminated. Run the same command again.\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_after_a_reported_stop_ends_the_process_without_a_traceback(number):
    """A user may press Ctrl-C again while the process ends."""
    code = (
        "import atexit, os, sys, sparsight.cli.report as verb\n"
        "from sparsight.cli import main\n"
        f"verb.main = lambda arguments: os.kill(os.getpid(), {int(number)})\n"
        f"atexit.register(os.kill, os.getpid(), {int(number)})\n"
        "sys.argv = ['sparsight', 'report', 'runs/']\n"
        "main()"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert found.returncode == -number
    assert found.stderr.endswith("Run the same command again.\n")
    assert found.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("stop", "code", "message"),
    [
        (KeyboardInterrupt(), 130, "sparsight: Interrupted. Kept 3 of 5 images; go on.\n"),
        (Terminated(), 143, "sparsight: Terminated. Kept 3 of 5 images; go on.\n"),
    ],
)
def test_a_stop_says_what_is_kept(stop, code, message, monkeypatch, capsys):
    import sparsight.cli.report as verb

    def stopped(arguments):
        stop.add_note("Kept 3 of 5 images; go on.")
        raise stop

    monkeypatch.setattr(verb, "main", stopped)
    assert main(["report", "runs/"]) == code
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried\nmore"),
    ],
)
def test_short_memory_is_one_message_and_exit_code_1(error, monkeypatch, fails):
    import sparsight.cli.report as verb

    def short(arguments):
        raise error

    monkeypatch.setattr(verb, "main", short)
    message = fails("report", "runs/", code=1)
    assert "Memory ran out" in message and message.count("\n") == 1


def test_a_developer_can_request_the_traceback(tmp_path):
    done = sparsight("report", str(tmp_path / "gone"), "--traceback")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "gone" in done.stderr


def test_an_altered_shard_is_named_before_training_begins(store, fails, tmp_path):
    shard = store / SITE / "shard-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    message = fails("train", "--store", store, "--out", tmp_path / "run", *SHORT, code=1)
    assert "shard-00000.safetensors" in message and "altered" in message
    assert not (tmp_path / "run").exists()


def test_a_store_of_all_positions_works_for_runs_on_some_of_them(store, capsys, tmp_path):
    run = tmp_path / "run"
    command = ["train", "--store", store, "--tokens", "cls", "--out", run, *SHORT]
    assert main(list(map(str, command))) == 0
    assert 'tokens = "cls"' in (run / "config.toml").read_text()
    assert main(["evaluate", str(run), "--no-baselines", "--no-downstream"]) == 0
    assert '"tokens": "cls"' in (run / "metrics.json").read_text()


def test_training_on_a_store_uses_what_it_holds_and_says_what_is_ignored(store, capsys, tmp_path):
    command = ["train", "--store", store, "--model", "other/clip", "--out", tmp_path / "run"]
    command += ["--sites", "blocks.-1.resid_post", *SHORT]
    assert main(list(map(str, command))) == 0
    assert "model other/clip is not used" in capsys.readouterr().err
    (config,) = tmp_path.rglob("config.toml")
    assert f'store = "{store.resolve()}"' in config.read_text()


def test_a_sweep_from_a_file_leaves_runs_that_other_verbs_accept(
    store, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "sweep.toml"
    path.write_text(
        f'store = "{store}"\n[train]\nn_vectors = 512\nbatch_size = 128\n'
        "[train.sae]\nn_latents = 64\n[grid]\nk = [4, 8]\nseed = [0, 1]\n"
    )
    command = ["sweep", "--config", str(path), "--out", "swept"]
    assert main(command) == 0
    done = capsys.readouterr()
    shown = [line.split() for line in done.out.splitlines()]
    names = [f"k{k}-seed{seed}" for k in (4, 8) for seed in (0, 1)]
    assert [line[0] for line in shown] == ["in", *names]
    assert shown[0] == ["in", "swept", "site", "FVU", "L0", "dead", "accuracy", "vectors/s"]
    assert "| 4 | 64 | 2 |" in (tmp_path / "swept" / "table.md").read_text()
    assert len((tmp_path / "swept" / "table.csv").read_text().splitlines()) == 5
    for name in ("fvu-l0", "accuracy-l0"):
        assert (tmp_path / "swept" / "plots" / f"{name}.svg").exists()
    assert main([*command, "--vary", "seed=0", "n-latents=32,64", "lr=1e-3"]) == 2
    assert "unknown key 'n-latents'. Did you mean 'n_latents'" in capsys.readouterr().err
    assert main([*command, "--vary", "seed=0,1,2", "--no-evaluate"]) == 0
    done = capsys.readouterr()
    assert "4 of 6 autoencoders are done, 2 are missing." in done.err
    assert "k8-seed2" in done.out
    assert main(["evaluate", "swept", "--no-baselines", "--no-downstream"]) == 0
    assert main(["index", "swept/k4-seed1"]) == 0
    assert main(["report", "swept", "--out", "report.html", "--latents", "2"]) == 0
    assert "k8-seed2" in (tmp_path / "report.html").read_text()
    assert main(["sweep", "--config", "swept/sweep.toml"]) == 0  # the sweep repeats itself


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ((), "grid is empty"),
        (("k",), "--vary k: expected NAME=VALUE,VALUE"),
        (("k=",), "k is an empty list"),
        (("k=4", "k=8"), "--vary k is given twice"),
        (("log_every=1,2",), "log_every cannot vary within a sweep"),
        (("k=four",), "sae.sparsity.k is 'four'; expected an int"),
    ],
)
def test_an_invalid_grid_exits_with_2(vary, message, fails, tmp_path):
    given = ("--vary", *vary) if vary else ()
    out = tmp_path / "out"
    assert message in fails("sweep", "--store", tmp_path / "gone", "--out", out, *given)
    assert not out.exists()


def test_a_model_in_bfloat16_works_with_all_verbs(tmp_path, capsys, fails, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = ("--images", "calibration:48:5")
    model = ("--model", "calibration", "--model-dtype", "bfloat16")
    verbs = (
        ("extract", *model, *images, "--sites", SITE, "--out", "store"),
        ("train", "--store", "store", "--out", "run", *SHORT),
        ("evaluate", "run", *images, "--no-baselines"),
        ("encode", "run", *images),
        ("index", "run", "--codes", "run/codes"),
        ("report", "run", "--out", "report.html", "--latents", "2"),
    )
    for verb in verbs:
        assert main(list(verb)) == 0, capsys.readouterr().err
    assert "weights differ" not in (tmp_path / "report.html").read_text()
    for verb in ("evaluate", "index", "report"):
        assert "seed is -1" in fails(verb, "run", "--seed", "-1")


def test_a_run_is_evaluated_on_its_store_from_any_folder(store, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(store.parent)
    assert main(["train", "--store", store.name, "--out", str(tmp_path / "run"), *SHORT]) == 0
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert main(["evaluate", "run", "--no-baselines", "--no-downstream"]) == 0
    assert "is gone" not in capsys.readouterr().err


def test_codes_are_computed_once_and_indexed_without_the_model(store, tmp_path, capsys, fails):
    run, codes = tmp_path / "run", tmp_path / "codes"
    assert main(["train", "--store", str(store), "--out", str(run), *SHORT]) == 0
    capsys.readouterr()
    for _ in range(2):
        assert main(["encode", str(run), "--out", str(codes), "--dtype", "float16"]) == 0
        assert f"{codes} · " in capsys.readouterr().out
    assert "dtype differs" in fails("encode", run, "--out", codes)
    assert "already names" in fails("index", run, "--codes", codes, "--store", store)
    assert main(["index", str(run), "--codes", str(codes)]) == 0
    shard = codes / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert "shard-00000" in fails("index", run, "--codes", codes, code=1)


def test_a_system_error_gives_one_message_and_exit_code_1(monkeypatch, fails):
    import sparsight.cli.report as verb

    def refused(arguments):
        Path("/proc/no/such/file").read_bytes()

    monkeypatch.setattr(verb, "main", refused)
    message = fails("report", "runs/", code=1)
    assert message == "sparsight: /proc/no/such/file: No such file or directory.\n"
    with pytest.raises(FileNotFoundError):
        main(["report", "runs/", "--traceback"])


def test_broken_photos_beyond_max_failed_stop_a_live_run_and_the_option_lets_it_continue(
    tmp_path, fails, capsys
):
    photos = tmp_path / "photos"
    photos.mkdir()
    images = open_images("calibration:20:5")
    for number in range(20):
        images.load(number).save(photos / f"{number:02d}.png")
    (photos / "07.png").write_bytes(b"no picture")
    command = ["train", "--model", "calibration", "--images", str(photos), "--sites", SITE]
    command += ["--out", str(tmp_path / "run"), "--workers", "0", *SHORT]
    assert "max_failed" in fails(*command, code=1)
    assert main([*command, "--max-failed", "0.1"]) == 0
    assert "07.png: could not be read" in capsys.readouterr().err
    assert "max_failed" in fails("evaluate", tmp_path / "run", "--workers", "0", code=1)
    assert main(["evaluate", str(tmp_path / "run"), "--workers", "0", "--max-failed", "0.1"]) == 0


def test_kinds_of_parts_are_chosen_by_name_and_have_their_own_flags(capsys) -> None:
    assert main(["train", "--sparsity", "jumprelu", "--remedy", "resampling", "--help-all"]) == 0
    shown = capsys.readouterr().out
    assert "--sae.sparsity.bandwidth" in shown and "--remedy.times" in shown
    assert "--remedy.alpha" not in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "jumprel"], "choose one of topk, batchtopk"),
        (["--sparsity"], "--sparsity needs a value"),
        (["--remedy", "prayer"], "choose one of auxk, ghost"),
    ],
)
def test_the_message_about_an_unknown_kind_lists_the_known_ones(
    arguments: list[str], message: str, capsys
) -> None:
    assert main(["train", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_convert_writes_another_projects_format_and_reads_it_back(tmp_path: Path, capsys) -> None:
    sae = SparseAutoencoder(8, SAEConfig(32, sparsity=TopK(4)))
    sae.save_pretrained(tmp_path / "ours")
    there, back = str(tmp_path / "theirs"), str(tmp_path / "back")
    assert main(["convert", str(tmp_path / "ours"), "--to", "saelens", "--out", there]) == 0
    assert main(["convert", there, "--out", back]) == 0
    assert "saelens → sparsight" in capsys.readouterr().out
    assert main(["convert", there, "--out", back]) == 2
    assert "not empty" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "nothing"), "--out", str(tmp_path / "x")]) == 2


def test_whole_numbers_may_be_written_with_an_exponent_or_a_letter(tmp_path: Path) -> None:
    options = parse(TrainOptions, "train", ["--n-vectors", "1e6", "--batch-size", "4k"])
    assert (options.train.n_vectors, options.train.batch_size) == (1_000_000, 4000)
    assert parse(TrainOptions, "train", ["--n-vectors", "None"]).train.n_vectors is None
    for wrong in (["--n-vectors", "1.5"], ["--batch-size", "many"]):
        with pytest.raises(UserError, match=rf"{wrong[0]}.*'{wrong[1]}' is not a whole number"):
            parse(TrainOptions, "train", wrong)


def test_evaluate_uses_held_out_images_and_a_sweep_accepts_a_share_or_a_store(
    store, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--store", str(store), "--out", "run", "--held-out", "0.25", *SHORT]) == 0
    assert main(["evaluate", "run", "--no-downstream", "--no-baselines"]) == 0
    told = capsys.readouterr().err
    n = ActivationStore(store).n_images
    assert f"measured on the {round(n / 4)} images that were held out of training" in told
    assert json.loads(Path("run/metrics.json").read_text())["n_images"] == round(n / 4)
    for given in ("0.25", str(store)):
        swept = ["sweep", "--store", str(store), "--out", f"sweep{len(given)}", "--vary", "seed=0",
                 "--held-out", given, "--accuracy-images", "0", *SHORT]  # fmt: skip
        assert main(swept) == 0
    assert "held_out = 0.25" in Path("sweep4/sweep.toml").read_text()
    counts = [
        json.loads(Path(folder, "table.json").read_text())["members"][0]["n_vectors"]
        for folder in ("sweep4", f"sweep{len(str(store))}")
    ]
    assert counts[0] * n == counts[1] * round(n / 4)


def test_an_empty_path_does_not_mean_the_working_folder(fails):
    assert "--out is empty" in fails("report", "run", "--out", "")
    assert "is empty" in fails("evaluate", "")
    assert "No model is named" in fails(
        "extract", "--model", "", "--images", "calibration:2", "--out", "o"
    )


@pytest.fixture
def run(store, tmp_path):
    """Train a small run on the store."""
    folder = tmp_path / "run"
    assert main(["train", "--store", str(store), "--out", str(folder), *SHORT]) == 0
    return folder


def test_foreign_files_are_never_overwritten(store, run, tmp_path, fails, monkeypatch):
    before = {path: path.read_bytes() for path in store.rglob("*") if path.is_file()}
    assert "which an index would overwrite" in fails("index", run, "--out", store)
    assert "holds manifest.json of something other than a run" in fails(
        "train", "--store", store, "--out", store
    )
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "clip"}')
    assert "holds config.json of something" in fails("train", "--store", store, "--out", model)
    os.mkfifo(tmp_path / "pipe")
    assert "is a device or pipe" in fails("evaluate", run, "--out", tmp_path / "pipe")
    assert {path: path.read_bytes() for path in store.rglob("*") if path.is_file()} == before
    assert (model / "config.json").read_text() == '{"model_type": "clip"}'


def test_an_impossible_task_is_refused_before_any_work(run, tmp_path, fails):
    (tmp_path / "file").touch()
    missing = f"{tmp_path}/nowhere"
    told = fails("evaluate", run, "--out", tmp_path / "file" / "x.json")
    assert "is a file" in told and "images" not in told
    asked = ("--images", missing, "--store", run)
    assert "either --store or --images" in fails("evaluate", run, *asked)
    search = ("search", "x", "--model", "calibration", "--images", missing)
    assert "top is 0" in fails(*search, "--top", "0")
    assert "must be a finite number" in fails(*search, "--activation", "nan")
    assert "tokens, but calibration only takes 32" in fails("search", "x" * 99, *search[2:])
    assert "latents is -1" in fails("demo", "--latents", "-1", "--out", tmp_path / "demo")


@pytest.mark.parametrize(
    "text",
    [f"batch_size = {'9' * 5000}", f"max_failed = {'9' * 400}", 'out = ""', 'out = "a\\u0000b"'],
)
def test_impossible_numbers_and_paths_are_reported_with_their_file(text, tmp_path, fails):
    (tmp_path / "c.toml").write_text(text)
    arguments = ("extract", "--model", "m", "--images", "i", "--config", tmp_path / "c.toml")
    assert "c.toml: " in fails(*arguments)
