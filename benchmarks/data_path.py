"""Extraction, writing and streaming of activations: ours, other packages', and by hand.

Each function does one job and returns its time in seconds, without loading, and a sample of the
result if others compute the same. `turns` calls them.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from stubs import stub
from torch import Tensor

BLOCK, LAST_BLOCK = 9, 11
SITE = f"blocks.{BLOCK}.resid_post"
D_IN, N_TOKENS = 768, 50
"""Of ViT-B/32."""

WARM_UP = 5
"""Batches that are read before the clock starts."""


@dataclass(frozen=True)
class Photos:
    """What is extracted: activations of one block, all tokens, in float32."""

    images: Path
    """Folder of a folder of JPEGs, all of which are read."""
    n_images: int
    model: Path
    """A CLIP for `transformers`; some packages build their own with other weights."""
    out: Path
    """Folder for what is written."""
    peers: Path
    """Where other packages are installed."""
    open_clip: Path
    """Where open_clip and torchvision are."""
    batch_size: int = 64
    workers: int = 2


@dataclass(frozen=True)
class Vectors:
    """What is written and streamed: activations in float32, made once."""

    batches: Path
    """File of `[images, N_TOKENS, D_IN]`, which is written repeatedly."""
    repeats: int
    n_read: int
    """Number of batches to read."""
    out: Path
    peers: Path
    open_clip: Path
    batch_size: int = 4096
    """Vectors per batch."""
    workers: int = 2


@contextmanager
def _clean(folder: Path) -> Iterator[Path]:
    """Make a folder for one job."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def _timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# Extraction


def extract_ours(photos: Photos, dtype: str = "float32") -> dict[str, Any]:
    """`sparsight.extract`; `dtype` is that of the model and the store."""
    from sparsight.activations import extract
    from sparsight.images import open_images
    from sparsight.vision import load_model

    model = load_model(str(photos.model), device="cpu", dtype=dtype)
    source = open_images(str(photos.images))
    with _clean(photos.out / "ours") as out:
        seconds = _timed(
            lambda: extract(
                model, source, sites=[SITE], out=out / "store",
                dtype=dtype, batch_size=photos.batch_size, workers=photos.workers, quiet=True,
            )
        )  # fmt: skip
        from sparsight.activations import ActivationStore

        store = ActivationStore(out / "store")
        first = next(iter(store.ordered(store.sites, 1)))
        vectors = next(iter(first.activations.values())).float().reshape(-1, D_IN)
    note = "" if dtype == "float32" else f"model and store in {dtype}"
    return {"seconds": seconds, "sample": vectors[:N_TOKENS].tolist(), "note": note}


class _Pictures(torch.utils.data.Dataset[Tensor]):
    def __init__(self, photos: Photos) -> None:
        from transformers import CLIPImageProcessor

        self.paths = sorted(photos.images.rglob("*.jpg"))
        self.processor = CLIPImageProcessor.from_pretrained(photos.model)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> Tensor:
        from PIL import Image

        with Image.open(self.paths[i]) as picture:
            pixels = self.processor(picture.convert("RGB"), return_tensors="pt")["pixel_values"]
        return torch.as_tensor(pixels)[0]


def _extract_by_loader(photos: Photos, activations: Callable[[Tensor], Tensor]) -> dict[str, Any]:
    loader = torch.utils.data.DataLoader(
        _Pictures(photos), photos.batch_size, num_workers=photos.workers
    )
    with _clean(photos.out / "by-loader") as folder:
        shape = (photos.n_images, N_TOKENS, D_IN)
        out = np.lib.format.open_memmap(folder / "acts.npy", "w+", np.float32, shape)

        def work() -> None:
            done = 0
            with torch.inference_mode():
                for pixels in loader:
                    out[done : done + len(pixels)] = activations(pixels).numpy()
                    done += len(pixels)
            out.flush()

        return {"seconds": _timed(work), "sample": out[0].tolist()}


def extract_by_hand(photos: Photos) -> dict[str, Any]:
    """The obvious loop with `transformers`: hidden states into a numpy memory map."""
    from transformers import CLIPVisionModel

    model = CLIPVisionModel.from_pretrained(photos.model).eval()
    found = _extract_by_loader(
        photos,
        lambda pixels: model(pixels, output_hidden_states=True).hidden_states[BLOCK + 1],
    )
    return found | {"note": "transformers, DataLoader, numpy"}


def extract_prisma(photos: Photos) -> dict[str, Any]:
    """ViT-Prisma's `HookedViT.run_with_cache` in the same loop: it has no loop of its own."""
    _prepare(photos)
    stub("plotly", "cv2", "timm", "wandb", "torchvision", "matplotlib", "kaleido", "circuitsvis")
    from vit_prisma.configs.HookedViTConfig import HookedViTConfig
    from vit_prisma.models.base_vit import HookedViT

    model = HookedViT(
        HookedViTConfig(
            n_layers=LAST_BLOCK + 1, d_model=D_IN, d_head=64, d_mlp=4 * D_IN, n_heads=12,
            patch_size=32, image_size=224, layer_norm_pre=True,
        )
    ).eval()  # fmt: skip
    name = f"blocks.{BLOCK}.hook_resid_post"

    def activations(pixels: Tensor) -> Tensor:
        cached = model.run_with_cache(pixels, names_filter=name, stop_at_layer=BLOCK + 1)[1]
        vectors: Tensor = cached[name]
        return vectors

    found = _extract_by_loader(photos, activations)
    found.pop("sample")  # weights of its own
    return found | {"note": "HookedViT in that loop, with GELU, which is quicker"}


def extract_saev(photos: Photos) -> dict[str, Any]:
    """saev's own worker, with open_clip's ViT-B/32; the model is loaded before the clock starts."""
    _prepare(photos, with_torchvision=True)
    import open_clip
    from saev import activations, config

    model, _, transform = open_clip.create_model_and_transforms(
        "ViT-B-32-quickgelu", pretrained=None
    )

    class Clip(torch.nn.Module):  # its own asks the Hub for weights
        name = "clip"

        def __init__(self) -> None:
            super().__init__()
            model.visual.proj, model.visual.output_tokens = None, True
            self.model = model.visual.eval()

        get_residuals = activations.Clip.get_residuals
        get_patches = activations.Clip.get_patches
        forward = activations.Clip.forward

    activations.make_vit = lambda family, checkpoint: Clip()
    activations.make_img_transform = lambda family, checkpoint: transform
    with _clean(photos.out / "saev") as out:
        settings = config.Activations(
            data=config.ImageFolderDataset(root=str(photos.images)), dump_to=str(out),
            vit_batch_size=photos.batch_size, n_workers=photos.workers, d_vit=D_IN,
            vit_layers=[BLOCK], n_patches_per_img=N_TOKENS - 1, device="cpu",
            n_patches_per_shard=(photos.n_images + 1) * N_TOKENS,
        )  # fmt: skip
        seconds = _timed(lambda: activations.worker_fn(settings))
    return {"seconds": seconds, "note": "open_clip, weights of its own"}


# Writing and streaming


def write_ours(vectors: Vectors) -> dict[str, Any]:
    """A store in float32, with checksums and statistics."""
    x = torch.from_numpy(np.load(vectors.batches))
    with _clean(vectors.out / "ours") as out:
        work = partial(write_store, out / "store", x, len(x) * vectors.repeats)
        return {"seconds": _timed(work)}


def write_store(
    folder: Path, x: Float[Tensor, "images tokens d_in"], n_images: int, tokens: str = "all"
) -> None:
    """Write a store as `extract` does, without a model: shards that repeat x."""
    from sparsight.activations.manifest import Manifest
    from sparsight.activations.shard_buffer import image_row
    from sparsight.activations.writer import StoreWriter
    from sparsight.images import ImageInfo

    shard_images, n_tokens, _ = x.shape
    manifest = Manifest(
        model={},
        preprocessing={},
        images={"spec": "random", "fingerprint": "", "n_images": n_images},
        sites=(SITE,),
        tokens=tokens,
        dtype=str(x.dtype).removeprefix("torch."),
        d_in={SITE: D_IN},
        n_tokens={SITE: n_tokens},
        batch_size=shard_images,
        shard_images=shard_images,
    )
    rows = [ImageInfo(f"{i}", f"{i}") for i in range(shard_images)]
    writer = StoreWriter(folder, manifest)
    with writer:
        for first in range(0, n_images, shard_images):
            stop = min(first + shard_images, n_images)
            buffer = writer.buffer(first, stop)
            found = [image_row(first + i, rows[i], (1, 1), None) for i in range(stop - first)]
            buffer.add(found, {SITE: x[: stop - first]})
            writer.commit(buffer)
    writer.close_store()


def stream_ours(vectors: Vectors) -> dict[str, Any]:
    """`ActivationStore.stream`."""
    from sparsight.activations import ActivationStore

    x = torch.from_numpy(np.load(vectors.batches))
    with _clean(vectors.out / "ours") as out:
        write_store(out / "store", x, len(x) * vectors.repeats)
        store = ActivationStore(out / "store")
        stream = store.stream(store.sites, vectors.batch_size)
        return {"seconds": _read(vectors, lambda: next(stream))}


def _read(vectors: Vectors, next_batch: Callable[[], object]) -> float:
    """Time batches in seconds, after a warm-up for workers and memory."""
    for _ in range(WARM_UP):
        next_batch()

    def work() -> None:
        for _ in range(vectors.n_read):
            next_batch()

    return _timed(work)


def write_saev(vectors: Vectors) -> dict[str, Any]:
    """saev's `ShardWriter`, one layer."""
    activations, settings, x = _saev(vectors)
    with _clean(vectors.out / "saev"):
        return {
            "seconds": _timed(lambda: _write_saev(activations, settings, x, vectors.repeats)),
            "note": "no checksums, no statistics",
        }


def stream_saev(vectors: Vectors) -> dict[str, Any]:
    """saev's `Dataset` in a `DataLoader`, as its trainer reads it."""
    activations, settings, x = _saev(vectors)
    from saev import config

    with _clean(vectors.out / "saev"):
        root = _write_saev(activations, settings, x, vectors.repeats)
        data = activations.Dataset(
            config.DataLoad(
                shard_root=root, patches="patches", layer=BLOCK, scale_mean=False, scale_norm=False
            )
        )
        loader = torch.utils.data.DataLoader(
            data, batch_size=vectors.batch_size, num_workers=vectors.workers, shuffle=True
        )
        batches = iter(loader)
        seconds = _read(vectors, lambda: next(batches))
        del batches
    return {"seconds": seconds, "note": "a vector at a time; no CLS"}


def _saev(vectors: Vectors) -> tuple[Any, Any, Tensor]:
    _prepare(vectors, with_torchvision=True)
    from saev import activations, config

    x = torch.from_numpy(np.load(vectors.batches))
    n_images = len(x) * vectors.repeats
    pictures = vectors.out / "counted"  # it counts files
    if not pictures.exists():
        pictures.mkdir(parents=True)
        for i in range(n_images):
            (pictures / f"{i}.jpg").touch()
    settings = config.Activations(
        data=config.ImageFolderDataset(root=str(pictures)), dump_to=str(vectors.out / "saev"),
        d_vit=D_IN, vit_layers=[BLOCK], n_patches_per_img=N_TOKENS - 1,
        n_patches_per_shard=(n_images + 1) * N_TOKENS,
    )  # fmt: skip
    return activations, settings, x


def _write_saev(activations: Any, settings: Any, x: Tensor, repeats: int) -> str:
    writer = activations.ShardWriter(settings)
    for repeat in range(repeats):
        writer[repeat * len(x) : (repeat + 1) * len(x)] = x[:, None]
    writer.flush()
    root: str = writer.root
    return root


def stream_by_hand(vectors: Vectors) -> dict[str, Any]:
    """The obvious way with numpy: random rows of a memory map."""
    x = np.load(vectors.batches).reshape(-1, D_IN)
    with _clean(vectors.out / "by-hand") as folder:
        shape = (len(x) * vectors.repeats, D_IN)
        out = np.lib.format.open_memmap(folder / "acts.npy", "w+", np.float32, shape)
        for repeat in range(vectors.repeats):
            out[repeat * len(x) : (repeat + 1) * len(x)] = x
        out.flush()
        rows = np.load(folder / "acts.npy", mmap_mode="r")
        order = np.random.default_rng(0).permutation(len(rows))

        firsts = iter(range(0, len(order), vectors.batch_size))

        def next_batch() -> None:
            first = next(firsts)
            torch.from_numpy(rows[np.sort(order[first : first + vectors.batch_size])])

        seconds = _read(vectors, next_batch)
    return {
        "seconds": seconds,
        "note": "a memory map of numpy, all of it in memory; sorted in a batch",
    }


def _prepare(work: Photos | Vectors, *, with_torchvision: bool = False) -> None:
    """Put the packages on the import path."""
    sys.path[:0] = [str(work.peers)]
    if with_torchvision:
        sys.path[:0] = [str(work.open_clip)]
        sys.path.append(str(Path(__file__).parent.parent / "tests" / "vision"))
        import cpu_torchvision  # noqa: F401


EXTRACTORS = {
    "sparsight": extract_ours,
    "sparsight, bfloat16": partial(extract_ours, dtype="bfloat16"),
    "by hand": extract_by_hand,
    "vit-prisma": extract_prisma,
    "saev": extract_saev,
}
WRITERS = {"sparsight": write_ours, "saev": write_saev}
READERS = {"sparsight": stream_ours, "by hand": stream_by_hand, "saev": stream_saev}
