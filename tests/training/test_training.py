from __future__ import annotations

import dataclasses
import math
import struct
from pathlib import Path
from typing import Literal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from activation_parts import BLOCK_0, BLOCK_1, save_clip, save_photos
from memory_activations import MemoryActivations, sparse_mixtures
from sparsight.activations import ActivationStore, extract
from sparsight.errors import SparsightError, UserError
from sparsight.files import sha256_file
from sparsight.images import open_images
from sparsight.kernels import Kernels, choose, selection
from sparsight.kernels.bounds import supports_int8
from sparsight.sae import AuxK, BatchTopK, SAEConfig, SparseAutoencoder, TopK
from sparsight.training import TrainConfig, train
from sparsight.training.loggers import JsonLines
from sparsight.training.schedule import learning_rate_factor
from sparsight.training.site import SiteTraining
from sparsight.vision import load_model

SAE = SAEConfig(n_latents=64, sparsity=TopK(k=4))
CONFIG = TrainConfig(sae=SAE, n_vectors=32 * 300, batch_size=32, lr=3e-3)


def _site(config: TrainConfig, data: MemoryActivations) -> SiteTraining:
    kernels, precision = choose(config.kernels, config.precision, torch.device("cpu"))
    sample = data.activations["here"].flatten(0, 1)
    return SiteTraining(
        config, data.stats("here"), sample, {}, torch.device("cpu"), kernels, precision
    )


def _fvu(sae: SparseAutoencoder, x: torch.Tensor) -> float:
    error = (x.double() - sae(x).x_hat.double()).square().sum()
    return (error / (x.double() - x.double().mean(dim=0)).square().sum()).item()


def test_training_explains_sparse_mixtures(tmp_path: Path) -> None:
    data = sparse_mixtures()
    run = train(data, CONFIG, out=tmp_path, quiet=True)
    x = data.activations["here"].flatten(0, 1)
    before = SparseAutoencoder(16, SAE, normaliser=run.sae().normaliser)
    assert _fvu(run.sae(), x) < 0.1 < 0.3 < _fvu(before, x)
    last = run.metrics()[-1]
    assert last["dead"] < 0.3 and last["dead_window"] == CONFIG.dead_after == 960
    assert last["l0"] <= 4 and last["vectors"] == 9600 and last["epoch"] == 9600 / 1024


@pytest.mark.parametrize("asked", ["auto", "torch"])
def test_an_unrequested_slower_back_end_is_reported(
    asked: Kernels, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr("sparsight.kernels.load_native", lambda: None)
    train(
        sparse_mixtures(n_images=16),
        TrainConfig(sae=SAE, n_vectors=64, batch_size=32, kernels=asked),
        out=tmp_path,
    )
    told = capsys.readouterr().err
    assert "kernels: torch-" in told
    assert ("native kernels are faster, but are not built" in told) == (asked == "auto")


def test_metrics_of_a_window_match_float64_over_its_vectors(tmp_path: Path) -> None:
    data = sparse_mixtures(n_images=16)
    # With almost no learning, one epoch is one pass of the first weights over all vectors.
    config = TrainConfig(
        sae=SAE, n_vectors=256, batch_size=32, lr=1e-30, log_every=256, remedy=AuxK(dead_after=256)
    )
    run = train(data, config, out=tmp_path, quiet=True)
    x = data.activations["here"].flatten(0, 1)
    code = run.sae().encode(x)
    (line,) = run.metrics()
    assert line["fvu"] == pytest.approx(_fvu(run.sae(), x), rel=1e-5)
    assert line["l0"] == pytest.approx(len(code.indices) / len(x))
    assert line["dead"] == pytest.approx(1 - len(code.indices.unique()) / 64)
    assert line["loss"] == pytest.approx(line["fvu"], rel=1e-5)


@pytest.mark.parametrize("auxk", [None, AuxK(alpha=0.5, k=8, dead_after=32)])
@pytest.mark.parametrize("unit_norm", [True, False])
def test_a_few_steps_match_plain_autograd_and_adam(auxk: AuxK | None, unit_norm: bool) -> None:
    data = sparse_mixtures()
    sae_config = dataclasses.replace(SAE, unit_norm_decoder=unit_norm)
    config = dataclasses.replace(CONFIG, sae=sae_config, remedy=auxk, grad_clip=0.05, ema=0.5)
    site = _site(config, data)
    reference = SparseAutoencoder(16, sae_config)
    reference.load_state_dict(site.sae.state_dict())
    average = {name: each.detach().clone() for name, each in reference.named_parameters()}
    adam = torch.optim.Adam(reference.parameters(), lr=3e-3, eps=config.eps)
    batches = data.activations["here"].flatten(0, 1).split(32)[:6]
    since = torch.zeros(64)
    variance = float(site.sae.normaliser(torch.cat(data.activations["here"].unbind())).var(0).sum())
    for step, x in enumerate(batches):
        z = (x - reference.normaliser.mean) / reference.normaliser.scale
        pre = (z - reference.b_dec) @ reference.W_enc.T + reference.b_enc
        top = pre.topk(4)
        code = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        e = z - code @ reference.W_dec - reference.b_dec
        loss = e.square().sum() / (32 * variance)
        dead = since >= config.dead_after
        if auxk is not None and dead.any():
            weak = pre.masked_fill(~dead, -math.inf).topk(min(8, int(dead.sum())))
            e_hat = torch.zeros_like(pre).scatter(1, weak.indices, weak.values.relu())
            fixed = e.detach()
            spread = (fixed - fixed.mean(dim=0)).square().sum()
            loss = loss + 0.5 * (fixed - e_hat @ reference.W_dec).square().sum() / spread
        adam.zero_grad()
        loss.backward()
        with torch.no_grad():
            if unit_norm:
                rows, grad = reference.W_dec, reference.W_dec.grad
                grad -= (grad * rows).sum(dim=1, keepdim=True) * rows
            torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
            adam.step()
            if unit_norm:
                reference.W_dec /= reference.W_dec.norm(dim=1, keepdim=True)
            since = torch.where((code > 0).any(dim=0), 0, since + 32)
            for name, each in reference.named_parameters():
                average[name].lerp_(each, 1 - min(0.5, (step + 1) / (step + 10)))
        site.step(x, step, 1.0)
        assert torch.equal(site.since_fired, since.long())
    assert auxk is None or site.sums[4] > 0
    for name, each in reference.named_parameters():
        torch.testing.assert_close(dict(site.sae.named_parameters())[name], each, rtol=0, atol=2e-5)
    finished = dict(site.finished().named_parameters())
    for name, each in average.items():
        if name != "W_dec":
            torch.testing.assert_close(finished[name], each, rtol=0, atol=2e-5)
    if unit_norm:
        torch.testing.assert_close(finished["W_dec"].norm(dim=1), torch.ones(64))


def test_auxk_trains_dead_latents_towards_the_residual_of_the_live_ones() -> None:
    data = sparse_mixtures()
    batches = data.activations["here"].flatten(0, 1).split(32)
    loss = {}
    for alpha in (1e-9, 1.0):
        # All latents below 56 are dead: eight live ones cannot explain 32 directions.
        site = _site(dataclasses.replace(CONFIG, remedy=AuxK(alpha=alpha, dead_after=32)), data)
        with torch.no_grad():
            site.sae.b_enc[:56] -= 1.0
        for step in range(60):
            site.step(batches[step % len(batches)], step, 1.0)
            if step == 40:
                site.figures(32)
        loss[alpha] = site.figures(32)
    assert loss[1.0]["aux_loss"] < 0.9 * loss[1e-9]["aux_loss"]


def test_all_kernels_train_to_the_same_result(tmp_path: Path) -> None:
    data = sparse_mixtures()
    fvus = {}
    tried = [
        ("dense", "auto"),
        ("torch", "float32"),
        ("torch", "bfloat16"),
        ("native", "int8"),
        ("native", "bfloat16"),
    ]
    if supports_int8(torch.device("cpu")):
        tried.append(("torch", "int8"))
    for kernels, precision in tried:
        config = dataclasses.replace(CONFIG, n_vectors=3200, kernels=kernels, precision=precision)
        run = train(data, config, out=tmp_path / f"{kernels}-{precision}", quiet=True)
        fvus[run.metrics()[-1]["kernels"]] = run.metrics()[-1]["fvu"]
    assert len(fvus) == len(tried)
    for fvu in fvus.values():
        assert fvu == pytest.approx(fvus["dense-float32"], rel=1e-3)


def test_a_batchtopk_sae_is_as_sparse_in_use_as_in_training(tmp_path: Path) -> None:
    data = sparse_mixtures()
    for kernels in ("native", "torch", "dense"):
        sae = dataclasses.replace(SAE, sparsity=BatchTopK(k=3))
        config = dataclasses.replace(CONFIG, sae=sae, kernels=kernels)
        run = train(data, config, out=tmp_path / kernels, quiet=True)
        x = data.activations["here"].flatten(0, 1)
        in_use = run.sae().encode(x).l0.double().mean().item()
        assert in_use == pytest.approx(run.metrics()[-1]["l0"], rel=0.1)
        assert run.sae().encode(x).l0.unique().numel() > 1


class _Fetches(TorchDispatchMode):
    """Counts the operations in this thread that would wait for a GPU."""

    OPERATIONS = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket.__name__ in self.OPERATIONS
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_nothing_is_fetched_from_the_device_between_lines_of_the_log(
    precision: Literal["float32", "bfloat16"], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The rule for equal scores, which has to wait, applies only on a CPU.
    monkeypatch.setattr(selection, "_first_of_equal", lambda scores, chosen: chosen)
    counts = []
    for n_steps in (10, 40):
        n = 32 * n_steps
        config = dataclasses.replace(
            CONFIG,
            n_vectors=n,
            log_every=n,
            checkpoint_every=n,
            remedy=None,
            ema=0.9,
            kernels="torch",  # what runs on a GPU
            precision=precision,
        )
        with _Fetches() as fetches:
            train(sparse_mixtures(), config, out=tmp_path / f"{n_steps}", quiet=True)
        counts.append(fetches.count)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize("place", [0, 700])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_infinite_or_nan_activations_stop_the_run_and_leave_no_broken_sae(
    place: int, value: float, tmp_path: Path
) -> None:
    data = sparse_mixtures()
    stream = data.stream(("here",), 32, seed=0)
    for _ in range(place // 32):
        next(stream)
    row = int(stream._order(0)[place])
    data.activations["here"].flatten(0, 1)[row, 3] = value
    config = dataclasses.replace(CONFIG, checkpoint_every=320)
    step = place // 32 + 1
    with pytest.raises(SparsightError, match=f"activations at here.* at step {step} "):
        train(data, config, out=tmp_path, quiet=True)
    assert not (tmp_path / "sae.safetensors").exists()
    checkpoints = sorted((tmp_path / "checkpoints").glob("*"))
    assert [path.name for path in checkpoints] == (["000000010", "000000020"] if place else [])
    for path in checkpoints:
        assert torch.isfinite(SparseAutoencoder.from_pretrained(path / "here").W_dec).all()


def test_one_message_names_the_shard_and_the_step_of_infinite_or_nan_activations(
    tmp_path: Path,
) -> None:
    model = load_model(str(save_clip(tmp_path / "clip")), device="cpu")
    images = open_images(save_photos(tmp_path / "photos"))
    store = extract(
        model, images, sites=[BLOCK_0, BLOCK_1], out=tmp_path / "store", dtype="float32",
        batch_size=4, shard_images=8, workers=0, quiet=True,
    ).path  # fmt: skip
    _spoil(store, store / BLOCK_1 / "shard-00001.safetensors")
    stream, step = ActivationStore(store).stream([BLOCK_0, BLOCK_1], 10), 0
    with pytest.raises(SparsightError):
        while True:
            step += 1
            next(stream)
    config = dataclasses.replace(CONFIG, n_vectors=1000, batch_size=10)
    place = r"blocks\.1\.resid_post/shard-00001\.safetensors"
    with pytest.raises(SparsightError, match=rf"NaN .*{place}.* at step {step};") as told:
        train(ActivationStore(store), config, out=tmp_path / "run", quiet=True)
    assert "\n" not in str(told.value)


def _spoil(store: Path, shard: Path) -> None:
    """Put a NaN into a shard, as an extraction might have written it."""
    before, data = sha256_file(shard), bytearray(shard.read_bytes())
    data[-400:-396] = struct.pack("<f", math.nan)
    shard.write_bytes(data)
    manifest = store / "manifest.json"
    manifest.write_text(manifest.read_text().replace(before, sha256_file(shard)))
    assert sha256_file(shard) in manifest.read_text()


@pytest.mark.parametrize("kernels", ["native", "torch", "dense"])
@pytest.mark.parametrize("sparsity", [TopK(k=4), BatchTopK(k=4)])
def test_a_loss_that_blows_up_names_the_step(
    sparsity: TopK | BatchTopK, kernels: Kernels, tmp_path: Path
) -> None:
    sae = dataclasses.replace(SAE, sparsity=sparsity)
    config = dataclasses.replace(CONFIG, sae=sae, lr=1e30, warmup=0, kernels=kernels)
    with pytest.raises(SparsightError, match=r"(loss|gradient) at here.* at step [2-9] .*lower lr"):
        train(sparse_mixtures(), config, out=tmp_path, quiet=True)
    assert not (tmp_path / "sae.safetensors").exists()


def test_too_large_a_k_and_an_unknown_site_are_refused_before_anything_is_written(
    tmp_path: Path,
) -> None:
    wide = dataclasses.replace(CONFIG, sae=SAEConfig(expansion=2, sparsity=TopK(k=33)))
    with pytest.raises(UserError, match="only 32 latents"):
        train(sparse_mixtures(), wide, out=tmp_path / "a", quiet=True)
    with pytest.raises(UserError, match="no site 'nowhere', only: here"):
        train(sparse_mixtures(), CONFIG, out=tmp_path / "a", sites=["nowhere"], quiet=True)
    assert not (tmp_path / "a").exists()


def test_the_saved_sae_records_its_origin(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, n_vectors=100)
    run = train(sparse_mixtures(), config, out=tmp_path, quiet=True)
    about = run.sae().metadata
    assert about["model"]["id"] == "made-up" and about["model"]["weights_hash"] == "0"
    assert (about["site"], about["tokens"], about["n_vectors"]) == ("here", "all", 128)
    assert "made-up" in (tmp_path / "README.md").read_text()


def test_metrics_that_cannot_be_written_are_a_fault_that_names_the_file(tmp_path: Path) -> None:
    logger = JsonLines(tmp_path, step=0)
    logger.log({"step": 1})
    logger.path.unlink()
    logger.path.mkdir()
    with pytest.raises(SparsightError, match=r"metrics\.jsonl: could not be written \(Is a dir"):
        logger.log({"step": 2})


def test_tensorboard_gets_each_curve_once_even_after_a_resume(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = dataclasses.replace(CONFIG, n_vectors=640, log_every=64, loggers=("tensorboard",))
    run = train(sparse_mixtures(), config, out=tmp_path, quiet=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    points = [(point.step, point.value) for point in events.Scalars("fvu")]
    wanted = [(line["vectors"], line["fvu"]) for line in run.metrics()]
    assert [step for step, _ in points] == [vectors for vectors, _ in wanted]
    assert [value for _, value in points] == pytest.approx([fvu for _, fvu in wanted])


def test_a_missing_logger_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "wandb", None)
    config = dataclasses.replace(CONFIG, loggers=("wandb",))
    with pytest.raises(UserError, match=r"pip install 'sparsight\[wandb\]'"):
        train(sparse_mixtures(), config, out=tmp_path, quiet=True)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    factors = [learning_rate_factor(step, 100, 0.1, 0.2) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * n for n in range(1, 11)])
    assert factors[10:80] == [1.0] * 70
    assert factors[80:] == pytest.approx([1 - 0.05 * n for n in range(20)])
    assert [learning_rate_factor(step, 3, 0, 0) for step in range(3)] == [1, 1, 1]


def test_a_soft_cap_leaves_the_threshold_of_a_batch_topk_in_the_unit_of_scores(
    tmp_path: Path,
) -> None:
    activations = sparse_mixtures(("here",))
    config = TrainConfig(
        SAEConfig(64, sparsity=BatchTopK(4), soft_cap=1.0),
        n_vectors=32 * 100,
        batch_size=32,
        lr=3e-3,
    )
    sae = train(activations, config, tmp_path, quiet=True).sae()
    x = activations.activations["here"].flatten(0, 1)
    alone, together = (len(sae.train(batch).encode(x).values) for batch in (False, True))
    assert alone == pytest.approx(together, rel=0.05)


NORMALISERS = ("none", "scale", "standardise", "layer_norm", "constant_norm")


def _refused(data: torch.Tensor, config: TrainConfig, out: Path) -> str:
    with pytest.raises(SparsightError) as refused:
        train(MemoryActivations({"here": data}), config, out=out, quiet=True)
    return str(refused.value)


@pytest.mark.parametrize("rounded", [torch.float32, torch.float16])
@pytest.mark.parametrize("kernels", ["auto", "dense"])
@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_activations_that_never_vary_are_reported(
    normaliser: str, kernels: Kernels, rounded: torch.dtype, tmp_path: Path
) -> None:
    own = torch.randn(16, generator=torch.Generator().manual_seed(0)).to(rounded).float()
    same = own.expand(39, 3, 16).contiguous()
    sae = dataclasses.replace(SAE, normaliser=normaliser)
    config = dataclasses.replace(CONFIG, sae=sae, kernels=kernels)
    told = _refused(same, config, tmp_path)
    assert told.startswith("here: the activations do not vary") and "nothing to learn" in told


@pytest.mark.parametrize("rounded", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("normaliser", ["layer_norm", "constant_norm"])
def test_vectors_that_are_multiples_of_one_another_are_reported(
    normaliser: str, rounded: torch.dtype, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(1)
    own, lengths = (
        3 + torch.randn(16, generator=generator),
        torch.rand(40, 3, 1, generator=generator),
    )
    data = ((0.1 + lengths) * own).to(rounded).float()
    config = dataclasses.replace(CONFIG, sae=dataclasses.replace(SAE, normaliser=normaliser))
    told = _refused(data, config, tmp_path)
    assert "do not vary" in told and normaliser in told and "nothing to learn" in told


@pytest.mark.parametrize("normaliser", NORMALISERS)
def test_batches_of_one_vector_train_or_name_the_batch_size(
    normaliser: str, tmp_path: Path
) -> None:
    sae = dataclasses.replace(SAE, normaliser=normaliser)
    config = dataclasses.replace(CONFIG, sae=sae, batch_size=1, n_vectors=3)
    data = sparse_mixtures(("here",))
    if normaliser in ("layer_norm", "constant_norm"):
        with pytest.raises(UserError, match=r"batch_size is 1,"):
            train(data, config, out=tmp_path, quiet=True)
    else:
        assert torch.isfinite(train(data, config, out=tmp_path, quiet=True).sae().W_enc).all()
