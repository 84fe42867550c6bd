from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from activation_parts import BLOCK_0, BLOCK_1, N_IMAGES, everything
from sparsight.activations import ActivationStore, VectorStream, store
from sparsight.errors import UserError

N_VECTORS = N_IMAGES * 5
WINDOWS = {"one window": 1 << 30, "many windows": 4 * 5 * 2 * 32 * 4}
"""Bytes of a window: all images, or four images of two sites."""


@pytest.fixture(params=WINDOWS, ids=lambda name: name.replace(" ", "-"))
def windowed(
    request: pytest.FixtureRequest, kept_store: ActivationStore, monkeypatch: pytest.MonkeyPatch
) -> ActivationStore:
    monkeypatch.setattr(store, "WINDOW_BYTES", WINDOWS[request.param])
    monkeypatch.setattr(store, "BLOCK_BYTES", 3 * 5 * 32 * 4)
    return kept_store


def places(batch: Tensor, x: Tensor) -> list[int]:
    """Which vector of the whole store each row of a batch is; vectors are all different."""
    index = {row.numpy().tobytes(): n for n, row in enumerate(x.flatten(0, 1))}
    assert len(index) == N_VECTORS
    return [index[row.numpy().tobytes()] for row in batch]


def draw(stream: VectorStream, n: int) -> list[dict[str, Tensor]]:
    return [next(stream) for _ in range(n)]


def equal(one: list[dict[str, Tensor]], other: list[dict[str, Tensor]]) -> bool:
    return all(torch.equal(a[site], b[site]) for a, b in zip(one, other, strict=True) for site in a)


def test_every_vector_comes_once_per_epoch_and_batches_reach_into_the_next(
    windowed: ActivationStore,
) -> None:
    x = everything(windowed, BLOCK_1)
    stream = windowed.stream([BLOCK_1], 7)
    assert stream.vectors_per_epoch == N_VECTORS
    drawn = torch.cat([each[BLOCK_1] for each in draw(stream, -(-3 * N_VECTORS // 7))])
    assert drawn.dtype == torch.float32
    found = places(drawn, x)
    epochs = [found[n * N_VECTORS : (n + 1) * N_VECTORS] for n in range(3)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(N_VECTORS))
    assert epochs[0] != epochs[1] != epochs[2]


def test_rows_are_the_same_positions_at_every_site(windowed: ActivationStore) -> None:
    x, y = everything(windowed, BLOCK_0), everything(windowed, BLOCK_1)
    for batch in draw(windowed.stream([BLOCK_1, BLOCK_0], 40), 6):
        assert places(batch[BLOCK_0], x) == places(batch[BLOCK_1], y)


def test_the_order_follows_from_the_seed(windowed: ActivationStore) -> None:
    one, same, other = (draw(windowed.stream([BLOCK_0], 9, seed=s), 30) for s in (5, 5, 6))
    assert equal(one, same)
    assert not equal(one, other)


@pytest.mark.parametrize("batch_size", [1, 10, N_VECTORS, 2 * N_VECTORS + 3])
def test_a_restored_stream_gives_the_same_bits(windowed: ActivationStore, batch_size: int) -> None:
    n = min(30, 2 + 2 * N_VECTORS // batch_size)
    stream = windowed.stream([BLOCK_0, BLOCK_1], batch_size, seed=3)
    cursors, drawn = [], []
    for _ in range(n):
        cursors.append(json.loads(json.dumps(stream.state_dict())))
        drawn.append(next(stream))
    for at in range(0, n, 4):
        fresh = windowed.stream([BLOCK_0, BLOCK_1], batch_size, seed=3)
        fresh.load_state_dict(cursors[at])
        assert equal(draw(fresh, n - at), drawn[at:])
    # A stream that is under way goes back, too.
    stream.load_state_dict(cursors[1])
    assert equal(draw(stream, n - 1), drawn[1:])


def test_a_batch_mixes_images_beyond_its_blocks(windowed: ActivationStore) -> None:
    found = places(next(windowed.stream([BLOCK_0, BLOCK_1], 20))[BLOCK_0],
                   everything(windowed, BLOCK_0))  # fmt: skip
    images = {place // 5 for place in found}
    assert len(images) >= 4
    assert max(images) - min(images) >= 4


def test_a_foreign_or_damaged_cursor_is_refused(windowed: ActivationStore) -> None:
    stream = windowed.stream([BLOCK_0], 4)
    state = stream.state_dict()
    with pytest.raises(UserError, match="seed is 1, but here it is 0"):
        stream.load_state_dict(windowed.stream([BLOCK_0], 4, seed=1).state_dict())
    with pytest.raises(UserError, match="n_images is 5, but here it is 23"):
        stream.load_state_dict(windowed.select(range(5)).stream([BLOCK_0], 4).state_dict())
    for damage in ({"epoch": None}, {"window": "2"}, {"window": 10_000}, {"offset": -1}):
        with pytest.raises(UserError, match="damaged"):
            stream.load_state_dict(state | damage)


def test_sites_with_other_numbers_of_vectors_are_streamed_one_by_one(
    kept_store: ActivationStore,
) -> None:
    with pytest.raises(UserError, match=rf"{BLOCK_0} \(5\), embedding \(1\)"):
        kept_store.stream([BLOCK_0, "embedding"], 4)
    assert next(kept_store.stream(["embedding"], 4))["embedding"].shape == (4, 16)


def test_numbers_out_of_range_are_refused(kept_store: ActivationStore, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="batch_size is 0"):
        kept_store.stream([BLOCK_0], 0)
    with pytest.raises(UserError, match="seed is -1"):
        kept_store.stream([BLOCK_0], 4, seed=-1)
    with pytest.raises(UserError, match="Name at least one site"):
        kept_store.stream([], 4)
    with pytest.raises(UserError, match="batch_images is 0"):
        kept_store.ordered([BLOCK_0], 0)
    with pytest.raises(UserError, match="no images were read"):
        kept_store.select([]).stream([BLOCK_0], 4)
