from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from malicious_pickle import Opens
from sparsight.calibration.symbols import SYMBOLS
from sparsight.errors import SparsightError, UserError
from sparsight.runs.folder import claimed
from tools.calibration_clip.batches import Batch
from tools.calibration_clip.train import Settings, Trainer, contrastive_loss


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Bits are promised on one thread; the order of sums is then fixed."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small(out: Path, **other: object) -> Settings:
    return Settings(**{"out": out, "steps": 3, "batch_size": 16, "held_out": 16} | other)


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {**trainer.model.state_dict(), **trainer.heads.state_dict()}


def test_a_run_that_was_cut_and_resumed_has_the_bits_of_one_that_was_not(tmp_path: Path) -> None:
    whole = Trainer(small(tmp_path / "whole"))
    whole.run()

    cut = Trainer(small(tmp_path / "cut"))
    batches = cut._batches()
    for _ in range(2):
        cut.train_step(next(batches))
    cut.save()
    cut.train_step(next(batches))  # done, but not saved: lost with the process
    batches.close()
    resumed = Trainer(small(tmp_path / "cut"))
    assert resumed.step == 2
    resumed.run()

    assert resumed.step == whole.step == 3
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


def test_a_run_leaves_a_log_a_card_and_a_model_that_transformers_loads(tmp_path: Path) -> None:
    trainer = Trainer(small(tmp_path, steps=1))
    figures = trainer.run()
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])
    assert line["step"] == 1
    assert {name: line[name] for name in figures} == figures
    folder = tmp_path / "export"
    loaded = AutoModel.from_pretrained(folder).float()
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].half(), value.half()), name
    assert AutoTokenizer.from_pretrained(folder)("a sun")["input_ids"][0] == 2
    assert "1 steps of 16 scenes" in (folder / "README.md").read_text()


def test_a_finished_run_is_not_trained_further(tmp_path: Path) -> None:
    first = Trainer(small(tmp_path, steps=1))
    first.run()
    again = Trainer(small(tmp_path, steps=1))
    again.run()
    assert again.step == 1
    for name, value in weights(first).items():
        assert torch.equal(value, weights(again)[name]), name


def test_a_further_leg_starts_from_the_weights_and_goes_on_with_new_scenes(tmp_path: Path) -> None:
    first = Trainer(small(tmp_path / "first", steps=2))
    first.run()
    options = {"steps": 2, "word_share": 0.7, "start_from": first.checkpoint}
    leg = Trainer(small(tmp_path / "leg", **options))
    assert (leg.step, leg.progress(), leg.curriculum(leg.step)) == (2, 0, 1)
    for name, value in weights(first).items():
        assert torch.equal(value, weights(leg)[name]), name
    leg.run()
    assert leg.step == 4
    card = (tmp_path / "leg/export/README.md").read_text()
    assert "the last 2 steps went on from 2 earlier ones" in card
    assert "--word-share 0.7 --start-from checkpoint.pt" in card

    # A leg that was cut keeps its own beginning.
    assert Trainer(small(tmp_path / "leg", **options)).first_step == 2


def test_a_checkpoint_that_is_cut_off_is_named(tmp_path: Path) -> None:
    trainer = Trainer(small(tmp_path, steps=1))
    trainer.save()
    trainer.checkpoint.write_bytes(trainer.checkpoint.read_bytes()[:1000])
    with pytest.raises(SparsightError, match=r"checkpoint\.pt: is damaged"):
        Trainer(small(tmp_path, steps=1))


@pytest.mark.parametrize("as_start", [False, True])
def test_code_in_a_checkpoint_is_not_run(as_start: bool, tmp_path: Path) -> None:
    path, made = tmp_path / "checkpoint.pt", tmp_path / "made"
    torch.save({"model": {}, "heads": {}, "step": Opens(made)}, path)
    settings = small(tmp_path / "leg", start_from=path) if as_start else small(tmp_path)
    with pytest.raises(SparsightError, match=r"checkpoint\.pt: .*code in it is not run") as told:
        Trainer(settings)
    assert not made.exists()
    assert "weights_only" not in str(told.value)


def test_a_written_name_takes_its_share_of_the_target(tmp_path: Path) -> None:
    trainer = Trainer(small(tmp_path))
    batch = next(trainer._batches())
    assert (batch.word != len(SYMBOLS)).any()
    images = torch.nn.functional.normalize(torch.randn(16, 128), dim=-1)
    losses = {
        share: contrastive_loss(trainer.model, trainer.prompts, images, batch, 0, share).item()
        for share in (0.0, 0.5, 0.9)
    }
    assert losses[0.5] != losses[0.0]
    half = losses[0.0] + (losses[0.9] - losses[0.0]) * 0.5 / 0.9
    assert losses[0.5] == pytest.approx(half, rel=1e-4)  # the target is linear in the share


def test_the_loss_falls(tmp_path: Path) -> None:
    trainer = Trainer(small(tmp_path, steps=1_000, lr=0.01))
    batches = trainer._batches()
    losses = [trainer.train_step(next(batches)).item() for _ in range(16)]
    batches.close()
    assert sum(losses[-3:]) < 0.93 * sum(losses[:3])


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    Trainer(small(tmp_path)).save()
    with pytest.raises(UserError, match="seed 0, not 1"):
        Trainer(small(tmp_path, seed=1))


@pytest.mark.parametrize(
    "wrong", [{"steps": 0}, {"minutes": -1.0}, {"batch_size": 0}, {"word_share": 1.0}]
)
def test_settings_that_cannot_be_are_refused(tmp_path: Path, wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        small(tmp_path, **wrong)


def test_the_command_line_names_a_wrong_setting_and_exits_with_two(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.calibration_clip.train", "--out", str(tmp_path)]
    done = subprocess.run([*command, "--minutes", "0"], capture_output=True, text=True)
    assert done.returncode == 2
    assert "minutes is 0.0" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_stopped_run_keeps_its_steps_and_says_so(tmp_path: Path) -> None:
    whole, cut = Trainer(small(tmp_path / "whole")), Trainer(small(tmp_path / "cut"))
    whole.run()
    step = cut.train_step

    def step_then_stop(batch: Batch) -> torch.Tensor:
        if cut.step == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(batch)

    cut.train_step = step_then_stop
    with pytest.raises(KeyboardInterrupt) as stopped:
        cut.run()
    assert stopped.value.__notes__ == ["Kept 2 of 3 steps; the same command goes on."]
    (tmp_path / "cut" / ".checkpoint.pt.x.tmp").write_text("half")
    resumed = Trainer(small(tmp_path / "cut"))
    resumed.run()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    assert not list((tmp_path / "cut").glob(".*"))


def test_one_process_at_a_time_trains_into_a_folder(tmp_path: Path) -> None:
    trainer = Trainer(small(tmp_path))
    with claimed(tmp_path, "training into"):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                trainer.run()
            except UserError as error:
                code = 0 if "another process is training into it" in str(error) else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
