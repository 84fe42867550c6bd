from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from picture_files import encoded, picture, write_picture
from PIL import Image

from sparsight.errors import SparsightError, UserError
from sparsight.images import ImageError, ImageSource, load_batches, open_images

N = 23
BROKEN = {4: "the file is empty", 9: "known format"}


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image.resize((8, 8)))).float()


def fail_on_tall(image: Image.Image) -> torch.Tensor:
    if image.height > image.width:
        raise ZeroDivisionError("tall")
    return to_tensor(image)


def refuse_tall(image: Image.Image) -> torch.Tensor:
    if image.height > image.width:
        raise ImageError("too tall")
    return to_tensor(image)


def user_error(image: Image.Image) -> torch.Tensor:
    raise UserError("the transform is misused")


def keep_size(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image))


def kill_on_tall(image: Image.Image) -> torch.Tensor:
    if image.height > image.width:
        os.kill(os.getpid(), signal.SIGKILL)
    return to_tensor(image)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> ImageSource:
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(N):
        write_picture(folder / f"{i:02d}.png", seed=i, width=20 + i, height=24)
    (folder / "04.png").write_bytes(b"")
    (folder / "09.png").write_text("text")
    return open_images(folder)


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_order_with_failures_recorded(source: ImageSource, workers: int) -> None:
    batches = list(load_batches(source, to_tensor, 5, workers=workers))
    assert len(batches) == 5
    assert [i for batch in batches for i in batch.indices] == [
        i for i in range(N) if i not in BROKEN
    ]
    failures = [failure for batch in batches for failure in batch.failures]
    assert [index for index, _ in failures] == list(BROKEN)
    assert all(part in reason for part, (_, reason) in zip(BROKEN.values(), failures, strict=True))
    for batch in batches:
        assert batch.sizes == [(20 + i, 24) for i in batch.indices]
        expected = torch.stack([to_tensor(source.load(i)) for i in batch.indices])
        assert torch.equal(batch.pixels, expected)


def test_spawned_workers_give_the_same_as_this_process(source: ImageSource) -> None:
    spawned = load_batches(source, to_tensor, 12, workers=1, start_method="spawn")
    here = load_batches(source, to_tensor, 12, workers=0)
    for one, other in zip(spawned, here, strict=True):
        assert torch.equal(one.pixels, other.pixels)
        assert (one.indices, one.failures) == (other.indices, other.failures)


def test_indices_choose_images_and_their_order(source: ImageSource) -> None:
    batches = list(load_batches(source, to_tensor, 2, indices=[7, 4, 1], workers=0))
    assert [batch.indices for batch in batches] == [[7], [1]]
    assert batches[0].failures == [(4, "the file is empty")]


def test_a_batch_with_no_image_left_is_empty(source: ImageSource) -> None:
    (batch,) = load_batches(source, to_tensor, 2, indices=[4, 9], workers=0)
    assert batch.indices == [] and len(batch.pixels) == 0 and len(batch.failures) == 2


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_the_transform_fails_on_is_a_failure_of_that_image(
    source: ImageSource, workers: int
) -> None:
    batch = next(iter(load_batches(source, fail_on_tall, 6, workers=workers)))
    assert batch.indices == [5]
    assert dict(batch.failures) == {
        **dict.fromkeys(range(4), "the transform failed (ZeroDivisionError: tall)"),
        4: "the file is empty",
    }


@pytest.mark.parametrize("workers", [0, 1])
def test_a_transform_may_refuse_an_image(source: ImageSource, workers: int) -> None:
    batch = next(iter(load_batches(source, refuse_tall, 6, workers=workers)))
    assert batch.indices == [5]
    assert [reason for index, reason in batch.failures if index != 4] == ["too tall"] * 4


@pytest.mark.parametrize("workers", [0, 1])
def test_a_users_mistake_stays_one_on_its_way_out_of_a_worker(
    source: ImageSource, workers: int
) -> None:
    with pytest.raises(UserError, match="misused"):
        list(load_batches(source, user_error, 2, workers=workers))


def test_images_of_different_shapes_are_a_fault(source: ImageSource) -> None:
    with pytest.raises(SparsightError, match=r"one shape and type.*24, 20, 3.*24, 21, 3"):
        list(load_batches(source, keep_size, 2, workers=0))


def test_a_worker_that_is_killed_is_an_error_not_a_hang(source: ImageSource) -> None:
    start = time.monotonic()
    batches = load_batches(source, kill_on_tall, 2, indices=[10, 11, 0, 1], workers=1, prefetch=1)
    assert next(batches).indices == [10, 11]
    with pytest.raises(
        SparsightError, match=r"processes that load images failed .*exited unexpectedly.*workers=0"
    ):
        list(batches)
    assert time.monotonic() - start < 20


def test_stopping_early_leaves_no_process_behind(source: ImageSource) -> None:
    import torch.multiprocessing as multiprocessing

    batches = load_batches(source, to_tensor, 1, workers=2)
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    batches.close()
    assert multiprocessing.active_children() == []


def test_few_images_start_no_process_unless_asked_to(source: ImageSource) -> None:
    import torch.multiprocessing as multiprocessing

    for _ in load_batches(source, to_tensor, 5):
        assert multiprocessing.active_children() == []


def test_an_interrupt_ends_the_run_and_its_workers(tmp_path: Path, source: ImageSource) -> None:
    program = tmp_path / "endless.py"
    program.write_text(
        "import signal, sys, torch\n"
        # A parent in the background may ignore interrupts, and its children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from sparsight.images import load_batches, open_images\n"
        "source = open_images(sys.argv[1])\n"
        "def transform(image): return torch.zeros(3)\n"
        "for batch in load_batches(source, transform, 1, indices=[0] * 10**6, workers=2):\n"
        "    print('going', flush=True)\n"
    )
    command = [sys.executable, str(program), source.spec]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "going\n"
        os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does: to the workers too
        _, errors = process.communicate(timeout=20)
    assert errors.count("KeyboardInterrupt") == 1
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="processes are found in /proc")
@pytest.mark.parametrize(
    ("start_method", "number"),
    [
        ("fork", signal.SIGKILL),
        pytest.param("fork", signal.SIGTERM, marks=pytest.mark.slow),
        pytest.param("spawn", signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_workers_end_within_a_second_of_their_parent(
    tmp_path: Path, source: ImageSource, start_method: str, number: int
) -> None:
    program = tmp_path / "endless.py"
    program.write_text(
        "import sys, time, torch\n"
        "from sparsight.images import load_batches, open_images\n"
        "def transform(image): time.sleep(0.3); return torch.zeros(3)\n"
        "if __name__ == '__main__':\n"
        "    source = open_images(sys.argv[1])\n"
        "    settings = {'indices': [0] * 10**6, 'workers': 2, 'start_method': sys.argv[2]}\n"
        "    for batch in load_batches(source, transform, 1, **settings):\n"
        "        print('going', flush=True)\n"
    )
    command = [sys.executable, str(program), source.spec, start_method]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for _ in range(2):  # a batch of each worker: both are there
            assert process.stdout.readline() == b"going\n"
        workers = _children(process.pid)
        os.kill(process.pid, number)  # the parent alone
        process.wait()
        deadline = time.monotonic() + 1
        while any(map(_is_alive, workers)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert len(workers) >= 2 and not any(map(_is_alive, workers))


def _children(pid: int) -> list[int]:
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for each in lists for child in each.split()]


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_loading_in_this_process_leaves_the_number_of_torch_threads(source: ImageSource) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for _ in load_batches(source, to_tensor, 5, workers=0):
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"prefetch": 0}, "prefetch is 0"),
        ({"indices": [N]}, f"no image {N}; it has {N}"),
    ],
)
def test_numbers_out_of_range_are_refused_at_once(
    source: ImageSource, options: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        load_batches(source, to_tensor, **({"batch_size": 2} | options))


@pytest.mark.parametrize("kind", ["tar", "parquet", "hf"])
def test_workers_read_one_open_file_without_disturbing_each_other(
    tmp_path: Path, kind: str
) -> None:
    cells = [encoded(picture(i), "PNG") for i in range(40)]
    if kind == "tar":
        with tarfile.open(tmp_path / "x.tar", "w") as archive:
            for i, data in enumerate(cells):
                header = tarfile.TarInfo(f"{i:02d}.png")
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
        source = open_images(tmp_path / "x.tar")
    elif kind == "parquet":
        table = pa.table({"image": cells, "label": ["a"] * 40})
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=3)
        source = open_images(tmp_path / "x.parquet")
    else:
        datasets = pytest.importorskip("datasets")
        rows = {"image": [{"bytes": data, "path": None} for data in cells]}
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
        source = open_images(f"hf:{tmp_path}/saved")
    assert source.info(0).id and source.load(0).size  # the file is open when the workers start
    batches = list(load_batches(source, to_tensor, 2, workers=2))
    assert not any(batch.failures for batch in batches)
    found = torch.cat([batch.pixels for batch in batches])
    assert torch.equal(found, torch.stack([to_tensor(picture(i)) for i in range(40)]))
