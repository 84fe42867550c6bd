"""The loop on a tiny CLIP: resume, faults, accumulation, what does not change."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal

import pytest
import torch
from transformers import CLIPModel

import sparsight as sp
from finetuning_samples import NoisePictures, Pairs, tiny_clip
from sparsight import pace
from sparsight.errors import SparsightError, UserError
from sparsight.finetuning import (
    FinetuneConfig,
    FinetuneRun,
    NeuronScaling,
    Rates,
    captioned,
    finetune,
    losses,
)
from sparsight.finetuning.batches import BatchLoader
from sparsight.finetuning.loop import FinetuneLoop
from sparsight.finetuning.sampling import Pair
from sparsight.images import ImageError
from sparsight.interruption import Terminated
from sparsight.runs import checkpoint_files

CAPTIONS = [
    ("a photo of the cat", "the cat"),
    ("a photo of the dog",),
    ("the sun",),
    ("a red anchor",),
    ("blue drawing",),
]
DATA = NoisePictures(20, CAPTIONS)
ATTACK = NoisePictures(9, CAPTIONS)
CONFIG = FinetuneConfig(steps=4, batch_size=6, lr=1e-3, log_every=1, checkpoint_every=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """A complete run, with every option on."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return tune(model, out, EVERYTHING)


EVERYTHING = dataclasses.replace(
    CONFIG, accumulation=2, optimiser="adabelief", scaling=NeuronScaling(5.0, top=3, until=0.6)
)


def tune(model, out, config=CONFIG, attack=None, **options):
    attack = attack or Pairs(ATTACK, ATTACK)
    return finetune(model, DATA, config, out, attack=attack, workers=0, quiet=True, **options)


def weights(run):
    return run.model("cpu").module.state_dict()


def test_the_given_model_does_not_change(model, whole):
    plain = tiny_clip(whole.out.parent / "again").module.state_dict()
    assert all(torch.equal(value, plain[name]) for name, value in model.module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.module.parameters())
    same = {name for name, value in weights(whole).items() if torch.equal(value, plain[name])}
    assert all(name.endswith("k_proj.bias") for name in same)  # softmax cancels these


def test_the_result_is_a_plain_clip_of_transformers(whole):
    theirs = CLIPModel.from_pretrained(whole.folder).state_dict()
    ours = weights(whole)
    assert set(theirs) == set(ours)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 3])
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    model, whole, tmp_path, monkeypatch, after
):
    real = FinetuneLoop.take_step

    def killed(self, batches):
        if self.step == after:
            raise Killed
        return real(self, batches)

    monkeypatch.setattr(FinetuneLoop, "take_step", killed)
    with pytest.raises(Killed):
        tune(model, tmp_path / "run", EVERYTHING)
    monkeypatch.undo()
    resumed = tune(model, tmp_path / "run", EVERYTHING)
    before, now = weights(whole), weights(resumed)
    assert all(torch.equal(before[name], now[name]) for name in before)
    assert told(resumed) == told(whole)


def told(run):
    """Return the log without times."""
    return [
        {key: value for key, value in line.items() if key != "seconds_per_step"}
        for line in run.metrics()
    ]


def test_a_finished_run_is_returned_and_another_run_in_its_folder_refused(model, whole):
    before = (whole.folder / "model.safetensors").stat().st_mtime_ns
    assert tune(model, whole.out, EVERYTHING).is_finished
    assert (whole.folder / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(UserError, match=r"differs in 'train\.lr'"):
        tune(model, whole.out, dataclasses.replace(EVERYTHING, lr=1e-4))
    with pytest.raises(UserError, match="differs in 'attack_fingerprint'"):
        tune(model, whole.out, EVERYTHING, attack=NoisePictures(7, CAPTIONS))
    with pytest.raises(UserError, match="already holds a run"):
        tune(model, whole.out, EVERYTHING, resume=False)


def test_the_log_has_every_part_of_the_loss_rates_in_their_ratio_and_norms_by_layer(whole):
    lines = whole.metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert line["loss"] == pytest.approx(
            line["contrastive"] + 10 * line["distillation"] + 10 * line["pull"], rel=1e-6
        )
        assert line["lr"]["text_blocks"] == pytest.approx(0.1 * line["lr"]["visual_blocks"])
        assert {"visual.0", "visual.2", "text.1", "rest"} <= set(line["gradient_norms"])
        squares = sum(norm**2 for norm in line["gradient_norms"].values())
        assert line["gradient_norm"] == pytest.approx(squares**0.5, rel=1e-5)
    assert [line["scaling"] for line in lines] == [5.0, 5.0, 5.0, 1.0]
    assert lines[-1]["lr_factor"] < 0.4


def test_the_schedule_counts_optimiser_steps_not_batches(model, tmp_path):
    """20 images, 3 per batch: 7 batches, 4 steps, the last with a single batch."""
    config = dataclasses.replace(
        CONFIG, steps=None, epochs=1.0, accumulation=2, schedule="one_cycle"
    )
    lines = tune(model, tmp_path / "run", config).metrics()
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[-1]["lr_factor"] == pytest.approx(1 / 250_000)
    for line in lines:  # `OneCycleLR` with one maximum for all groups would make them equal
        assert line["lr"]["text_blocks"] == pytest.approx(0.1 * line["lr"]["visual_blocks"])
        assert line["lr"]["rest"] == pytest.approx(0.033 * line["lr"]["visual_blocks"])
    assert lines[-1]["epoch"] == pytest.approx(21 / 20)


def gradients(model, tmp_path, monkeypatch, config, keep=1):
    """Return the gradients of the first step, as the optimiser gets them."""
    found = []

    def caught(self, batches):
        norms = real(self, batches)
        found.append({m.name: m.parameter.grad.clone() for m in self.trained})
        return norms

    real = FinetuneLoop.take_step
    monkeypatch.setattr(FinetuneLoop, "take_step", caught)
    tune(model, tmp_path, dataclasses.replace(config, steps=keep))
    monkeypatch.undo()
    return found


def test_accumulated_batches_give_the_mean_of_their_gradients(model, tmp_path, monkeypatch):
    config = dataclasses.replace(CONFIG, grad_clip=None, lr=1e-12, scaling=NeuronScaling())
    single = gradients(model, tmp_path / "a", monkeypatch, config, keep=2)
    both = gradients(
        model, tmp_path / "b", monkeypatch, dataclasses.replace(config, accumulation=2)
    )
    for name, gradient in both[0].items():
        mean = (single[0][name] + single[1][name]) / 2
        torch.testing.assert_close(gradient, mean, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_are_clipped_as_a_whole_and_start_from_zero_at_each_step(
    model, tmp_path, monkeypatch, accumulation
):
    free = dataclasses.replace(
        CONFIG, grad_clip=None, lr=1e-12, optimiser="adamw", accumulation=accumulation
    )
    plain = gradients(model, tmp_path / "a", monkeypatch, free, keep=2)
    clipped = gradients(
        model, tmp_path / "b", monkeypatch, dataclasses.replace(free, grad_clip=0.01), keep=2
    )
    for step in range(2):
        norm = torch.stack([g.norm() for g in plain[step].values()]).norm()
        assert norm > 0.01
        for name, gradient in clipped[step].items():
            wanted = plain[step][name] * 0.01 / norm
            torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("bad", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_stops_the_run_at_a_named_step_and_keeps_the_checkpoint(
    model, tmp_path, monkeypatch, bad
):
    real, batches = losses.info_nce, []

    def broken(images, *others):
        batches.append(images)
        loss = real(images, *others)
        if len(batches) < 3:
            return loss
        # A NaN loss, or a finite loss with a NaN gradient.
        zero = (images * 0).sum()
        return loss + (float("nan") if bad == "loss" else zero.sqrt())

    monkeypatch.setattr(losses, "info_nce", broken)
    with pytest.raises(SparsightError, match=rf"{bad} is nan at step 3 of 4.*checkpoint is.*2\."):
        tune(model, tmp_path / "run")
    monkeypatch.undo()
    assert not (tmp_path / "run" / "model").exists()
    assert tune(model, tmp_path / "run").is_finished


def test_weights_that_are_not_finite_are_neither_saved_nor_exported(model, tmp_path, monkeypatch):
    real = FinetuneLoop.take_step

    def broken(self, batches):
        norms = real(self, batches)
        if self.step == 2:
            next(self.model.module.parameters()).data.fill_(float("nan"))
        return norms

    monkeypatch.setattr(FinetuneLoop, "take_step", broken)
    with pytest.raises(SparsightError, match=r"sum of .* is nan at step 3 of 4.*000000002"):
        tune(model, tmp_path / "run")
    last = dataclasses.replace(CONFIG, steps=3)
    with pytest.raises(SparsightError, match=r"is nan at step 3 of 3"):
        tune(model, tmp_path / "last", last)
    assert not (tmp_path / "last" / "model").exists()
    monkeypatch.undo()
    assert tune(model, tmp_path / "run").is_finished


def test_the_exported_model_is_from_the_last_step_and_no_file_of_a_run_is_a_pickle(
    model, tmp_path, monkeypatch
):
    """zer0int's second script loads the checkpoint of an epoch that his first never reaches."""
    states, kinds = [], set()
    real = FinetuneLoop.take_step

    def watched(self, batches):
        kinds.update(path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file())
        norms = real(self, batches)
        states.append({k: v.clone() for k, v in self.model.module.state_dict().items()})
        return norms

    monkeypatch.setattr(FinetuneLoop, "take_step", watched)
    run = tune(model, tmp_path / "run")
    assert len(states) == 4
    found = weights(run)
    assert all(torch.equal(found[name], value) for name, value in states[-1].items())
    assert any(not torch.equal(found[name], value) for name, value in states[-2].items())
    kinds.update(path.suffix for path in run.out.rglob("*") if path.is_file())
    assert ".safetensors" in kinds
    assert not kinds & {".pt", ".pth", ".bin", ".pkl", ".ckpt"}


def test_the_targets_of_attacked_images_belong_to_the_run(model, whole, tmp_path):
    with pytest.raises(UserError, match="differs in 'clean_fingerprint'"):
        tune(model, whole.out, EVERYTHING, attack=Pairs(ATTACK, NoisePictures(9, CAPTIONS[:2])))


def test_a_finished_run_in_another_layout_names_the_command_that_exports_it(model, whole):
    with pytest.raises(UserError, match=r"layout huggingface.*sparsight export.*layout openai"):
        tune(model, whole.out, EVERYTHING, layout="openai")


def test_a_damaged_checkpoint_is_skipped_with_a_warning(model, tmp_path, monkeypatch):
    def broken(self, layout):
        raise Killed

    monkeypatch.setattr(FinetuneLoop, "export", broken)
    with pytest.raises(Killed):
        tune(model, tmp_path / "run")
    monkeypatch.undo()
    newest = tmp_path / "run" / "checkpoints" / "000000003" / "training.safetensors"
    newest.write_bytes(newest.read_bytes()[:-10])
    with pytest.warns(UserWarning, match="damaged checkpoint.*000000003"):
        assert tune(model, tmp_path / "run").is_finished


def test_similarity_of_similarities_leaves_the_logit_scale_alone(model, tmp_path):
    for name in ("info_nce", "similarity_of_similarities"):
        config = dataclasses.replace(CONFIG, loss=name, smoothing=0.1, entropy=0.02)
        run = tune(model, tmp_path / name, config)
        same = run.metrics()[-1]["logit_scale"] == pytest.approx(model.logit_scale, rel=1e-4)
        assert same == (name != "info_nce")


def test_the_logit_scale_is_learned_up_to_a_hundred(model, tmp_path):
    config = dataclasses.replace(CONFIG, lr=1e-5, rates=Rates(logit_scale=1e6), grad_clip=None)
    scales = [line["logit_scale"] for line in tune(model, tmp_path / "run", config).metrics()]
    assert max(scales) <= 100.0001


def test_scaled_neurons_change_what_a_run_learns(model, tmp_path):
    runs = [
        tune(
            model,
            tmp_path / f"{factor}",
            dataclasses.replace(CONFIG, steps=1, scaling=NeuronScaling(factor, top=3, until=1.0)),
        )
        for factor in (1.0, 20.0)
    ]
    first, second = (run.metrics()[0] for run in runs)
    assert first["contrastive"] != second["contrastive"]
    assert first["gradient_norms"]["visual.2"] != pytest.approx(
        second["gradient_norms"]["visual.2"], rel=0.01
    )


def test_bfloat16_trains_weights_that_stay_float32(model, tmp_path):
    run = tune(model, tmp_path / "run", dataclasses.replace(CONFIG, precision="bfloat16", steps=2))
    assert all(value.dtype == torch.float32 for value in weights(run).values())
    assert all(line["loss"] < 20 for line in run.metrics())


def test_frozen_parts_keep_their_bits(model, tmp_path):
    config = dataclasses.replace(
        CONFIG, steps=2, first_block=2, rates=Rates(text_blocks=0, token_embedding=0)
    )
    now, before = weights(tune(model, tmp_path / "run", config)), model.module.state_dict()
    same = {name for name in before if torch.equal(before[name], now[name])}
    assert "text_model.encoder.layers.0.mlp.fc1.weight" in same
    assert "vision_model.encoder.layers.1.mlp.fc1.weight" in same
    assert "vision_model.encoder.layers.2.mlp.fc1.weight" not in same


def test_a_model_without_a_text_tower_is_refused(tmp_path):
    import tiny_models

    blind = sp.load_model(str(tiny_models.build("dinov2", tmp_path / "dino")), device="cpu")
    with pytest.raises(UserError, match="no text tower"):
        tune(blind, tmp_path / "run")


def test_no_run_begins_if_captions_are_too_long(model, tmp_path):
    long = NoisePictures(20, [(" ".join(["cat"] * 20),), ("a dog",)])
    with pytest.raises(UserError, match="1 of 2 captions are longer"):
        finetune(model, long, CONFIG, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()
    config = dataclasses.replace(CONFIG, truncate_captions=True, steps=1)
    assert finetune(model, long, config, tmp_path / "run", workers=0, quiet=True).is_finished


class Broken(NoisePictures):
    """Images of which every `each`-th cannot be read."""

    each = 5

    def load(self, index, min_side=None):
        if index % self.each == 4:
            raise ImageError("cannot be decoded")
        return super().load(index, min_side)


def test_broken_images_are_left_out_of_their_batch_and_counted(model, tmp_path):
    loader = BatchLoader(model, Broken(20, CAPTIONS), None, None, max_failed=0.3, workers=0)
    pairs = [Pair(place, f"caption {place}", False) for place in (3, 4, 5, 6)]
    (batch,) = loader.load([pairs])
    assert batch.captions == ["caption 3", "caption 5", "caption 6"]
    torch.testing.assert_close(batch.pixels[1], model.transform(DATA.load(5)))
    assert loader.failures == {4: "cannot be decoded"}


def test_an_image_that_failed_once_and_loads_again_has_its_own_row(model):
    loader = BatchLoader(model, DATA, None, None, max_failed=1, workers=0)
    loader.failures = {4: "the network was away"}
    (batch,) = loader.load([[Pair(place, f"caption {place}", False) for place in (3, 4, 5)]])
    assert batch.captions == ["caption 3", "caption 4", "caption 5"]
    for row, place in enumerate((3, 4, 5)):
        torch.testing.assert_close(batch.pixels[row], model.transform(DATA.load(place)))


def test_an_attack_is_left_out_if_its_clean_image_is_broken(model):
    loader = BatchLoader(model, DATA, ATTACK, Broken(9, CAPTIONS), max_failed=1, workers=0)
    pairs = [Pair(1, "a", False), Pair(4, "b", True), Pair(2, "c", True), Pair(2, "d", True)]
    (batch,) = loader.load([pairs])
    assert batch.captions == ["a", "c", "d"]
    assert batch.attack.tolist() == [False, True, True]
    torch.testing.assert_close(batch.clean, torch.stack([model.transform(ATTACK.load(2))] * 2))


def test_too_many_broken_images_stop_the_run(model, tmp_path):
    with pytest.raises(SparsightError, match=r"of 20 images are broken.*the first is 4"):
        finetune(model, Broken(20, CAPTIONS), CONFIG, tmp_path / "run", workers=0, quiet=True)


def test_a_checkpoint_of_another_version_is_refused(model, tmp_path, monkeypatch):
    monkeypatch.setattr(FinetuneLoop, "export", lambda self, layout: None)
    run = tune(model, tmp_path / "run")
    monkeypatch.undo()
    state = run.checkpoints / "000000003" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "format_version": 9}))
    with pytest.raises(UserError, match="format_version is 9"):
        tune(model, tmp_path / "run")
    shutil.rmtree(run.out)


def test_captioned_images_are_used_as_they_are(model, tmp_path):
    pairs = captioned(DATA)
    run = finetune(
        model, pairs, dataclasses.replace(CONFIG, steps=1), tmp_path / "run", workers=0, quiet=True
    )
    assert run.recipe.data_fingerprint == pairs.fingerprint
    assert run.recipe.attack is None


def stop_in(monkeypatch, step, number=signal.SIGINT):
    """Send a signal in the middle of a step."""
    real = FinetuneLoop.take_step

    def stopped(self, batches):
        if self.step == step:
            os.kill(os.getpid(), number)
        return real(self, batches)

    monkeypatch.setattr(FinetuneLoop, "take_step", stopped)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_says_what_is_kept_and_ends_bit_for_bit_the_same(
    model, whole, tmp_path, monkeypatch, number
):
    sparse = dataclasses.replace(EVERYTHING, checkpoint_every=4, log_every=4)
    told_whole = told(tune(model, tmp_path / "whole", sparse))
    for step in (0, 2):
        stop_in(monkeypatch, step, number)
        with pytest.raises((KeyboardInterrupt, Terminated)) as stopped:
            tune(model, tmp_path / "run", sparse)
        monkeypatch.undo()
        said = f"Kept {step + 1} of 4 steps; the same command goes on."
        assert stopped.value.__notes__ == [said]
    resumed = tune(model, tmp_path / "run", sparse)
    before, now = weights(whole), weights(resumed)
    assert all(torch.equal(before[name], now[name]) for name in before)
    assert told(resumed) == told_whole  # means over steps before and after the stops


def test_a_stop_while_the_model_is_written_leaves_it_complete(model, tmp_path, monkeypatch):
    real = FinetuneLoop.export

    def stopped(self, layout):
        os.kill(os.getpid(), signal.SIGINT)
        real(self, layout)

    monkeypatch.setattr(FinetuneLoop, "export", stopped)
    with pytest.raises(KeyboardInterrupt) as stop:
        tune(model, tmp_path / "run")
    assert "Fine-tuning had already finished" in stop.value.__notes__[0]
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert weights(FinetuneRun(tmp_path / "run"))


def test_checkpoints_by_time_are_not_part_of_a_runs_identity(model, whole, tmp_path, monkeypatch):
    kept, real = [], checkpoint_files.write
    monkeypatch.setattr(
        checkpoint_files, "write", lambda *given: kept.append(given[1]) or real(*given)
    )
    monkeypatch.setattr(pace, "LARGEST_SHARE", 1e9)
    rare = dataclasses.replace(EVERYTHING, checkpoint_every=4)
    run = tune(model, tmp_path / "run", rare, checkpoint_seconds=1e-9)
    assert kept == [1, 2, 3]
    assert all(torch.equal(weights(whole)[name], value) for name, value in weights(run).items())
    assert tune(model, tmp_path / "run", rare, checkpoint_seconds=None).is_finished


def test_the_next_call_clears_what_a_killed_process_left(model, tmp_path):
    run = tune(model, tmp_path / "run")
    for name in (".lock", ".model.tmp/x", "checkpoints/000000003/state.json"):
        (run.out / name).parent.mkdir(parents=True, exist_ok=True)
        (run.out / name).write_text("half")
    tune(model, run.out)
    assert sorted(path.name for path in run.out.iterdir()) == [
        "config.toml", "metrics.jsonl", "model",
    ]  # fmt: skip


def test_no_run_begins_among_other_files(model, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds other files \(notes\.txt\) and no run"):
        tune(model, tmp_path)


@pytest.mark.parametrize(
    ("file", "text", "warned"),
    [
        ("config.toml", "batch_size = 6", r"batch_size.*counts as damaged"),
        ("metrics.jsonl", '"loss": ', r"metrics\.jsonl: is damaged or was changed"),
        ("checkpoints/000000003/state.json", '"step": 3', "damaged checkpoint: .*000000003"),
    ],
)
def test_a_changed_byte_is_noticed_and_harmless(model, tmp_path, monkeypatch, file, text, warned):
    stop_in(monkeypatch, 2)
    with pytest.raises(KeyboardInterrupt):
        tune(model, tmp_path / "run")
    monkeypatch.undo()
    path = tmp_path / "run" / file
    found = path.read_text()
    path.write_text(found.replace(text, f"{text[:-1]}7", 1))
    assert path.read_text() != found
    with pytest.warns(UserWarning, match=warned):
        run = tune(model, tmp_path / "run")
    assert [line["step"] for line in run.metrics()] == [1, 2, 3, 4]
    assert run.recipe.train.batch_size == 6
