from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from activation_parts import BLOCK_0, BLOCK_1, save_photos
from sparsight.activations import ActivationStore

N_IMAGES = 12

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")


@pytest.fixture
def stores(tmp_path: Path) -> Iterator[Path]:
    """In memory where there is such a folder: flushing to a disk thousands of times takes long."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        yield Path(folder)


def test_an_extraction_cut_off_anywhere_ends_in_the_same_bytes(
    clip_folder: Path, tmp_path: Path, stores: Path
) -> None:
    """SIGKILL at every rename, ends inside files, one after another; then the same call again."""
    photos = save_photos(tmp_path / "photos", N_IMAGES, broken=(4,))
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, here / "cut_extractions.py", clip_folder, photos, stores],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    whole = found.pop("whole")["files"]
    # 2 shards of 2 sites, each with sums, rows and a manifest; before and after that, a manifest;
    # statistics of 2 sites, and the images.
    n_renames = 2 * (2 + 2 + 1) + 2 + 2 + 1
    ends = {name: set(each["signals"]) for name, each in found.items()}
    assert ends["before 1"] == ends[f"before {n_renames}"] == {signal.SIGKILL}
    assert ends[f"before {n_renames + 1}"] == {0}
    assert ends["file 3 byte 1000"] == {signal.SIGXFSZ}
    assert ends["again and again"] == ends["with workers"] == {signal.SIGKILL}
    assert [name for name, each in found.items() if each["files"] != whole] == []
    store = ActivationStore(stores / "again and again", verify=True)
    assert store.n_images == N_IMAGES - 1
    assert store.images["index"].to_pylist() == list(range(N_IMAGES))
    assert whole.keys() == {
        "manifest.json",
        "images.parquet",
        *(f"{site}/shard-{n:05d}.safetensors" for site in (BLOCK_0, BLOCK_1) for n in range(2)),
        *(f"{site}/stats.safetensors" for site in (BLOCK_0, BLOCK_1)),
    }
