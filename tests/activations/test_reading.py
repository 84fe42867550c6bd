from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from sparsight.activations import ActivationSource, ActivationStore, LiveActivations, extract
from sparsight.activations import store as store_module
from sparsight.errors import SparsightError, UserError
from sparsight.images import ImageSource
from sparsight.vision import VisionModel

SITES = ["blocks.0.resid_post", "blocks.2.resid_post"]
LAST = SITES[1]
SHARD = "shard-00002.safetensors"


@pytest.fixture(scope="module")
def whole(
    model: VisionModel, images: ImageSource, tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    out = tmp_path_factory.mktemp("whole") / "store"
    return extract(
        model, images, sites=SITES, out=out, batch_size=4, shard_images=8, max_failed=1, quiet=True
    )


@pytest.fixture
def copy(whole: ActivationStore, tmp_path: Path) -> Path:
    shutil.copytree(whole.path, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several windows and blocks, although the store is small."""
    monkeypatch.setattr(store_module, "WINDOW_BYTES", 40_000)
    monkeypatch.setattr(store_module, "BLOCK_BYTES", 3_000)


def _live(model: VisionModel, images: ImageSource) -> LiveActivations:
    return LiveActivations(
        model, images, SITES, batch_size=4, workers=0, window_vectors=170, max_failed=1
    )


@pytest.fixture(params=["stored", "live"])
def activations(
    request: pytest.FixtureRequest,
    whole: ActivationStore,
    model: VisionModel,
    images: ImageSource,
) -> ActivationSource:
    return whole if request.param == "stored" else _live(model, images)


def test_a_store_and_live_activations_are_activation_sources(
    activations: ActivationSource,
) -> None:
    assert isinstance(activations, ActivationSource)
    assert activations.d_in(LAST) == 32 and activations.n_tokens[LAST] == 17
    assert activations.source().info(3).label == "cat"


def _sorted(x: torch.Tensor) -> torch.Tensor:
    return x[np.lexsort(x.T.numpy())]


def test_each_vector_comes_once_an_epoch_in_another_order(activations: ActivationSource) -> None:
    stream = activations.stream(SITES, 49, seed=1)
    epochs = [[next(stream) for _ in range(17)] for _ in range(2)]
    ordered = list(activations.ordered(SITES))
    for site in SITES:
        all_of = torch.cat([batch.activations[site] for batch in ordered]).flatten(0, 1)
        assert len(all_of) == 49 * 17
        found = [torch.cat([batch[site] for batch in epoch]) for epoch in epochs]
        assert not torch.equal(found[0], found[1]) and not torch.equal(found[0], all_of)
        for epoch in found:
            torch.testing.assert_close(_sorted(epoch), _sorted(all_of), rtol=1e-4, atol=1e-4)


def test_all_sites_of_a_batch_are_of_the_same_positions(whole: ActivationStore) -> None:
    where = {}
    for batch in whole.ordered(SITES):
        first, second = (batch.activations[site].flatten(0, 1) for site in SITES)
        where |= {row.numpy().tobytes(): other for row, other in zip(first, second, strict=True)}
    batch = next(whole.stream(SITES, 100))
    for row, other in zip(batch[SITES[0]], batch[LAST], strict=True):
        assert torch.equal(where[row.numpy().tobytes()], other)


def test_the_order_follows_from_the_seed(activations: ActivationSource) -> None:
    first, same, other = (next(activations.stream([LAST], 64, seed=s))[LAST] for s in (3, 3, 4))
    assert torch.equal(first, same) and not torch.equal(first, other)


@pytest.mark.parametrize("taken", [0, 1, 5, 23])
def test_a_restored_stream_gives_the_same_bits(activations: ActivationSource, taken: int) -> None:
    stream = activations.stream([LAST], 50, seed=2)
    for _ in range(taken):
        next(stream)
    cursor = json.loads(json.dumps(stream.state_dict()))
    rest = [next(stream)[LAST] for _ in range(20)]
    restored = activations.stream([LAST], 50, seed=2)
    restored.load_state_dict(cursor)
    assert all(torch.equal(next(restored)[LAST], batch) for batch in rest)


def test_a_position_in_other_data_is_refused(whole: ActivationStore) -> None:
    cursor = whole.stream([LAST], 50, seed=2).state_dict()
    with pytest.raises(UserError, match="seed is 2, here 3"):
        whole.stream([LAST], 50, seed=3).load_state_dict(cursor)


def test_live_statistics_are_those_of_the_store(
    whole: ActivationStore, model: VisionModel, images: ImageSource
) -> None:
    live = _live(model, images).stats(LAST)
    assert live.count == whole.stats(LAST).count
    torch.testing.assert_close(live.mean, whole.stats(LAST).mean, rtol=1e-2, atol=1e-3)


def test_live_activations_count_what_fails(model: VisionModel, images: ImageSource) -> None:
    live = LiveActivations(model, images, SITES, workers=0, max_failed=0.01)
    with pytest.raises(SparsightError, match="1 of 50 images could not be read"):
        list(live.ordered(SITES))


def test_a_selection_is_a_source_of_its_own(whole: ActivationStore) -> None:
    part = whole.select(range(0, 50, 3))
    wanted = [index for index in range(0, 50, 3) if index != 7]
    assert part.image_indices.tolist() == wanted and part.n_images == len(wanted)
    x = torch.cat([batch.activations[LAST] for batch in part.ordered([LAST], 4)]).flatten(0, 1)
    torch.testing.assert_close(part.stats(LAST).mean, x.double().mean(0))
    found = torch.cat([next(part.stream([LAST], 17))[LAST] for _ in range(1)])
    rows = {row.numpy().tobytes() for row in x}
    assert all(row.numpy().tobytes() in rows for row in found)
    with pytest.raises(UserError, match="no activations of image 7"):
        whole.select([7])


def test_sites_with_unequal_positions_are_not_streamed_together(
    model: VisionModel, images: ImageSource, tmp_path: Path
) -> None:
    store = extract(
        model, images.subset(10, 20), sites=[LAST, "embedding"], out=tmp_path / "s", quiet=True
    )
    with pytest.raises(UserError, match="different numbers of vectors"):
        store.stream([LAST, "embedding"], 4)
    assert next(store.stream(["embedding"], 4))["embedding"].shape == (4, store.d_in("embedding"))


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _flip_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[12] ^= 0xFF
    path.write_bytes(data)


def _remove(path: Path) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [_cut, _flip_header, _remove])
def test_a_damaged_shard_is_named_when_the_store_is_opened(
    copy: Path, damage: Callable[[Path], None]
) -> None:
    damage(copy / LAST / SHARD)
    with pytest.raises(SparsightError, match=rf"{LAST}/{SHARD}"):
        ActivationStore(copy)


def test_a_flipped_bit_is_found_by_verifying(copy: Path) -> None:
    path = copy / LAST / SHARD
    data = bytearray(path.read_bytes())
    data[-1000] ^= 1
    path.write_bytes(data)
    store = ActivationStore(copy)
    with pytest.raises(SparsightError, match=rf"{LAST}/{SHARD}.*checksum"):
        store.verify()


def test_a_value_that_is_not_finite_names_its_shard(copy: Path) -> None:
    path = copy / LAST / SHARD
    data = bytearray(path.read_bytes())
    data[-2:] = np.float16("nan").tobytes()
    path.write_bytes(data)
    store = ActivationStore(copy)
    with pytest.raises(SparsightError, match=rf"NaN or infinite in .*{SHARD}"):
        list(store.ordered([LAST]))
    stream = store.stream([LAST], 64)
    with pytest.raises(SparsightError, match=rf"NaN or infinite in .*{SHARD}"):
        for _ in range(20):
            next(stream)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 7}, "format_version is 7"),
        ({"colour": "red"}, "unknown key 'colour'"),
        ({"dtype": "float8"}, "dtype is 'float8'"),
    ],
)
def test_a_strange_manifest_is_named(copy: Path, change: dict, message: str) -> None:
    path = copy / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        ActivationStore(copy)


def test_a_folder_without_a_store_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no activation store"):
        ActivationStore(tmp_path)


def test_an_unknown_site_is_named(whole: ActivationStore) -> None:
    with pytest.raises(UserError, match=r"no site 'blocks\.1\.resid_post', only"):
        whole.stats("blocks.1.resid_post")


def test_images_that_changed_are_refused(copy: Path, photos: Path) -> None:
    path = copy / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["images"]["fingerprint"] = "other"
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="images have changed"):
        ActivationStore(copy).source()
