"""A stop keeps what is in memory, and a continued extraction ends in the same bytes."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from activation_parts import BLOCK_0, BLOCK_1, N_IMAGES, digests, everything, save_photos
from sparsight.activations import ActivationStore, LiveActivations, extract, shards
from sparsight.activations.manifest import Manifest
from sparsight.errors import SparsightError, UserError
from sparsight.images import ImageSource, open_images
from sparsight.interruption import STOPS, Terminated
from sparsight.vision import VisionModel

SETTINGS: dict[str, Any] = {
    "sites": [BLOCK_0, BLOCK_1],
    "batch_size": 3,
    "shard_images": 9,
    "max_failed": 0.1,
    "workers": 0,
    "quiet": True,
}

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals work otherwise on Windows")


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """A parent in the background may ignore interrupts, and its children inherit that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    return open_images(str(save_photos(tmp_path_factory.mktemp("photos"), broken=(7,))))


@pytest.fixture(scope="module")
def whole(
    model: VisionModel, images: ImageSource, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Every file of a store that nothing stopped."""
    out = tmp_path_factory.mktemp("whole") / "store"
    return digests(extract(model, images, out=out, **SETTINGS).path)


def stopped(
    model: VisionModel,
    images: ImageSource,
    out: Path,
    n_batches: int,
    what: int | BaseException = signal.SIGINT,
    **settings: Any,
) -> BaseException:
    """Extract until `n_batches` went through the model; the signal comes in the middle of the last.

    Gives what ended it.
    """
    read, seen = type(model).read, []

    def interrupted(self: VisionModel, *arguments: Any, **options: Any) -> Any:
        found = read(self, *arguments, **options)
        seen.append(len(arguments[0]))
        if len(seen) == n_batches and isinstance(what, int):
            os.kill(os.getpid(), what)
        elif len(seen) == n_batches + 1:
            assert not isinstance(what, int), "the batch after the signal was read, too"
            raise what
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "read", interrupted)
        with pytest.raises((*STOPS, Exception, Killed)) as caught:
            extract(model, images, out=out, **SETTINGS | settings)
    return caught.value


class Killed(BaseException):
    """Nothing is flushed, as nothing is where a process is killed."""


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)]
)
@pytest.mark.parametrize("n_batches", [1, 3, 5])
def test_a_signal_keeps_every_batch_and_says_how_many_images_that_is(
    model: VisionModel,
    images: ImageSource,
    whole: dict[str, str],
    tmp_path: Path,
    number: int,
    kind: type[BaseException],
    n_batches: int,
) -> None:
    stop = stopped(model, images, tmp_path / "s", n_batches, number)
    n_kept = 3 * n_batches
    assert isinstance(stop, kind)
    assert stop.__notes__ == [
        f"Kept {n_kept} of {N_IMAGES} images in {tmp_path / 's'}; the same command goes on."
    ]
    assert Manifest.read(tmp_path / "s").done == n_kept
    with pytest.raises(UserError, match=rf"unfinished \({n_kept} of {N_IMAGES} images\)"):
        ActivationStore(tmp_path / "s")
    store = extract(model, images, out=tmp_path / "s", **SETTINGS)
    assert digests(store.path) == whole
    assert store.summary is not None
    assert store.summary.images == N_IMAGES - n_kept - 1


def test_an_extraction_stopped_at_every_batch_ends_in_the_same_bytes(
    model: VisionModel, images: ImageSource, whole: dict[str, str], tmp_path: Path
) -> None:
    for kept in range(3, N_IMAGES, 3):
        stopped(model, images, tmp_path / "s", 1)
        assert Manifest.read(tmp_path / "s").done == kept
        shard = Manifest.read(tmp_path / "s").shards[-1]
        assert shard.unfinished == (kept % 9 != 0)
        assert len(list((tmp_path / "s" / BLOCK_0).iterdir())) == -(-kept // 9)
    extract(model, images, out=tmp_path / "s", **SETTINGS)
    assert digests(tmp_path / "s") == whole


@pytest.mark.parametrize("error", [SparsightError("a worker died"), MemoryError()])
def test_an_error_keeps_every_batch(
    model: VisionModel,
    images: ImageSource,
    whole: dict[str, str],
    tmp_path: Path,
    error: BaseException,
) -> None:
    ended = stopped(model, images, tmp_path / "s", 5, error)
    assert Manifest.read(tmp_path / "s").done == 15
    if isinstance(error, MemoryError):
        assert isinstance(ended, SparsightError) and "Memory ran out" in str(ended)
    extract(model, images, out=tmp_path / "s", **SETTINGS)
    assert digests(tmp_path / "s") == whole


def test_what_is_in_memory_is_written_by_time(
    model: VisionModel,
    images: ImageSource,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read, seen, deadline = type(model).read, [], time.monotonic() + 20

    def killed(self: VisionModel, *arguments: Any, **options: Any) -> Any:
        seen.append(Manifest.read(tmp_path / "s").done)
        if len(seen) == 3:
            while seen[-1] == 0 and time.monotonic() < deadline:  # it is written in the background
                seen.append(Manifest.read(tmp_path / "s").done)
            raise Killed
        return read(self, *arguments, **options)

    monkeypatch.setattr(type(model), "read", killed)
    with pytest.raises(Killed):
        extract(model, images, out=tmp_path / "s", flush_seconds=1e-9, **SETTINGS)
    monkeypatch.undo()
    assert seen[-1] in (3, 6)
    extract(model, images, out=tmp_path / "s", **SETTINGS)
    assert digests(tmp_path / "s") == whole


def test_a_second_signal_during_the_flush_stops_at_once_and_leaves_the_store_whole(
    model: VisionModel,
    images: ImageSource,
    whole: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sparsight.activations import writer

    write = writer.write_tensors

    def slow(path: Path, *arguments: Any) -> str:
        if "until" in path.name:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
        return write(path, *arguments)

    monkeypatch.setattr(writer, "write_tensors", slow)
    stop = stopped(model, images, tmp_path / "s", 5)
    assert isinstance(stop, KeyboardInterrupt)
    assert f"Kept 9 of {N_IMAGES}" in stop.__notes__[0]
    assert Manifest.read(tmp_path / "s").done == 9
    monkeypatch.undo()
    extract(model, images, out=tmp_path / "s", **SETTINGS)
    assert digests(tmp_path / "s") == whole


def test_a_stopped_extraction_goes_on_in_other_batches_and_shards(
    model: VisionModel, images: ImageSource, tmp_path: Path
) -> None:
    for n, settings in enumerate(
        [{"batch_size": 4}, {"shard_images": 3}, {"batch_size": 5, "shard_images": 4}]
    ):
        stopped(model, images, tmp_path / f"{n}", 5)
        store = extract(model, images, out=tmp_path / f"{n}", **SETTINGS | settings)
        store.verify()
        assert store.n_images == N_IMAGES - 1
        assert store.images["index"].to_pylist() == list(range(N_IMAGES))
        x = everything(store, BLOCK_1).flatten(0, 1).double()
        assert store.stats(BLOCK_1).count == len(x)
        torch.testing.assert_close(store.stats(BLOCK_1).mean, x.mean(0), rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize(
    ("name", "code", "workers"), [("SIGINT", 130, 0), ("SIGINT", 130, 2), ("SIGTERM", 143, 2)]
)
def test_signals_at_random_moments_lose_nothing(
    clip_folder: Path, tmp_path: Path, name: str, code: int, workers: int
) -> None:
    photos = save_photos(tmp_path / "photos", 60, broken=(7,))
    here = Path(__file__).parent
    program = [here / "stopped_extractions.py", clip_folder, photos, tmp_path, "10", name, workers]
    done = subprocess.run(
        [sys.executable, *map(str, program)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["bytes_differ"] == 0
    before = 0
    for stop in found["stops"]:
        assert stop["code"] in (0, code), stop
        assert "Traceback" not in stop["told"] and "Error" not in stop["told"], stop
        assert stop["workers_are_gone"], stop
        kept = re.search(r"Kept ([\d,]+) of 60 images", stop["told"])
        assert kept is None or int(kept[1]) == stop["on_disk"], stop
        assert stop["on_disk"] >= before, stop
        before = stop["on_disk"] % 60


def test_an_unfinished_store_of_the_first_version_is_continued(
    model: VisionModel, images: ImageSource, whole: dict[str, str], tmp_path: Path
) -> None:
    stopped(model, images, tmp_path / "s", 5, Killed())
    path = tmp_path / "s" / "manifest.json"
    values = json.loads(path.read_text()) | {"format_version": 1}
    del values["checksum"]
    for shard in values["shards"]:
        del shard["journal"]
    path.write_text(json.dumps(values))
    extract(model, images, out=tmp_path / "s", **SETTINGS)
    assert digests(tmp_path / "s") == whole


def test_a_finished_store_of_the_first_version_is_opened(
    kept_store: ActivationStore, own_store: Path
) -> None:
    path = own_store / "manifest.json"
    values = json.loads(path.read_text()) | {"format_version": 1}
    del values["checksum"]
    path.write_text(json.dumps(values))
    store = ActivationStore(own_store, verify=True)
    assert store.fingerprint == kept_store.fingerprint


def test_a_damaged_shard_is_named_before_a_continued_store_is_complete(
    model: VisionModel, images: ImageSource, tmp_path: Path
) -> None:
    stopped(model, images, tmp_path / "s", 5)
    for name in ("shard-00000", "shard-00001-until-00000015"):
        out = Path(shutil.copytree(tmp_path / "s", tmp_path / name))
        flip(out / BLOCK_1 / f"{name}.safetensors", -1, 4)
        with pytest.raises(SparsightError, match=rf"{name}\.safetensors: .*altered.*extract again"):
            extract(model, images, out=out, **SETTINGS)
        assert Manifest.read(out).state == "incomplete"


def flip(path: Path, at: int, bits: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= bits
    path.write_bytes(data)


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_byte_of_an_unfinished_store_is_named_or_does_no_harm(
    model: VisionModel, images: ImageSource, whole: dict[str, str], tmp_path: Path, seed: int
) -> None:
    stopped(model, images, tmp_path / "s", 5)
    rng = random.Random(seed)
    files = sorted(path for path in (tmp_path / "s").rglob("*") if path.is_file())
    path = files[seed % len(files)]
    flip(path, rng.randrange(path.stat().st_size), rng.randrange(1, 256))
    try:
        extract(model, images, out=tmp_path / "s", **SETTINGS)
    except SparsightError as error:
        assert path.name in str(error) and "\n" not in str(error)
    else:
        assert digests(tmp_path / "s") == whole


@pytest.mark.parametrize("name", [f"{BLOCK_1}/shard-00001.safetensors", "images.parquet"])
def test_a_flipped_bit_of_a_finished_store_is_named_when_it_is_read(
    own_store: Path, name: str
) -> None:
    flip(own_store / name, (own_store / name).stat().st_size // 2, 1)
    message = rf"{re.escape(name)}: .*altered.*extract again"
    with pytest.raises(SparsightError, match=message):
        everything(ActivationStore(own_store), BLOCK_1)
    if name != "images.parquet":
        everything(ActivationStore(own_store), BLOCK_0)
        with pytest.raises(SparsightError, match=message):
            next(ActivationStore(own_store).stream([BLOCK_1], 4))


def test_flipped_statistics_and_manifests_are_named(own_store: Path) -> None:
    stats = own_store / BLOCK_0 / "stats.safetensors"
    flip(stats, -1, 64)
    with pytest.raises(SparsightError, match=r"stats\.safetensors: .*altered"):
        ActivationStore(own_store).stats(BLOCK_0)
    path = own_store / "manifest.json"
    whole = path.read_text()
    for damaged, told in [
        (whole.replace('"family": "clip"', '"family": "clap"'), "has been altered"),
        (whole.replace('"checksum"', '"chEcksum"'), "unknown key 'chEcksum'"),
        (whole.replace(":", "z", 1), "cannot be read as JSON"),
        (whole.replace('"format_version": 2', '"format_version": 3'), "format_version is 3"),
    ]:
        path.write_text(damaged)
        with pytest.raises(SparsightError, match=rf"manifest\.json: {told}.*extract again\."):
            ActivationStore(own_store)


def test_a_shard_is_compared_with_its_checksum_once(
    own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    sha256_file = shards.sha256_file

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(shards, "sha256_file", counted)
    for _ in range(2):
        everything(ActivationStore(own_store), BLOCK_1)
        ActivationStore(own_store).with_tokens("cls").stats(BLOCK_1)
    assert sorted(hashed) == ["images.parquet", *(f"shard-0000{n}.safetensors" for n in range(3))]


def test_a_store_of_other_images_is_refused_in_words(model: VisionModel, tmp_path: Path) -> None:
    folder = save_photos(tmp_path / "photos", n=6)
    store = extract(model, open_images(folder), out=tmp_path / "s", **SETTINGS)
    stopped(model, open_images(folder), tmp_path / "part", 1)

    def refused(out: Path) -> str:
        with pytest.raises(UserError) as told:
            extract(model, open_images(folder), out=out, **SETTINGS)
        assert not re.search(r"[0-9a-f]{32}", str(told.value))
        return str(told.value)

    (folder / "even/002.jpg").rename(folder / "even/003.jpg")
    for out in (tmp_path / "s", tmp_path / "part"):
        assert "image 1 was 'even/002.jpg' then and is 'even/003.jpg' now" in refused(out)
    with pytest.raises(UserError, match=r"changed since .*: image 1 was 'even/002\.jpg'"):
        store.source()
    (folder / "even/003.jpg").unlink()
    assert "6 images then, 5 now" in refused(tmp_path / "s")


def test_patches_of_a_site_with_one_position_are_refused(
    model: VisionModel, images: ImageSource, tmp_path: Path
) -> None:
    settings = SETTINGS | {"sites": ["embedding"], "tokens": "patches"}
    with pytest.raises(UserError, match="embedding: has one position per image and no patches"):
        extract(model, images, out=tmp_path / "s", **settings)
    with pytest.raises(UserError, match="embedding: has one position per image and no patches"):
        LiveActivations(model, images, ["embedding"], "patches")
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize("flush_seconds", [0.0, -1.0, float("nan")])
def test_an_invalid_span_is_refused(
    model: VisionModel, images: ImageSource, tmp_path: Path, flush_seconds: float
) -> None:
    with pytest.raises(UserError, match=r"flush_seconds is .*above 0"):
        extract(model, images, out=tmp_path / "s", flush_seconds=flush_seconds, **SETTINGS)
