"""`load_model`: from an id to a model."""

from __future__ import annotations

from pathlib import Path

import torch

from sparsight.devices import choose_device
from sparsight.errors import UserError
from sparsight.vision.model import VisionModel

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def load_model(
    id: str,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    revision: str | None = None,
    scale_jpegs: bool = False,
    tokenizer: str | None = None,
) -> VisionModel:
    """Load a vision transformer.

    Args:
        id: a Hugging Face Hub id or a local folder (`transformers`: CLIP, SigLIP, DINOv2, ViT and
            other models with a plain vision transformer); `open_clip:NAME/PRETRAINED`, where
            PRETRAINED is one of open_clip's tags or the path of a checkpoint, or
            `open_clip:hf-hub:OWNER/NAME` (extra `open-clip`); a file of CLIP weights with the
            names of OpenAI's code (`.safetensors`, `.pt`), also in the geometric parametrisation
            or with Long-CLIP's positions; or `calibration`, the small CLIP that comes with
            Sparsight.
        device: "cpu", "cuda", "cuda:1", "xpu" or "mps"; default: a CUDA or Intel GPU if there is
            one, otherwise the CPU. Apple's GPU (mps) must be named: it lacks float64, which
            training and evaluation need for their sums.
        dtype: default: float32; bfloat16 saves memory and time; "auto" is bfloat16 if the device
            can multiply in it, otherwise float32. Activations differ between dtypes.
        revision: branch, tag or commit on the Hub; for Hub ids only.
        scale_jpegs: decode JPEGs at reduced size if they are much larger than the model's input;
            see `VisionModel.scale_jpegs`. Several times faster, but the bits differ.
        tokenizer: folder or Hub id of a tokenizer, if the model comes without its own.

    Raises:
        UserError: the id names nothing, the model is not a vision transformer, or its image
            processor is missing.
        MissingExtra: it is an `open_clip:` id, and open_clip is not installed.
        SparsightError: the weights are damaged.
    """
    target = choose_device(device)
    kind = _fast_dtype(target) if dtype == "auto" else _dtype(dtype)
    model = _load(id, target, kind, revision, tokenizer)
    return model.scale_jpegs() if scale_jpegs else model


def _load(
    id: str,
    target: torch.device,
    kind: torch.dtype,
    revision: str | None,
    tokenizer: str | None,
) -> VisionModel:
    if not id.strip():
        raise UserError("No model is named. Give a Hub id, a folder, a file, or calibration.")
    if id.startswith("open_clip:"):
        return _load_open_clip(id, target, kind, revision, tokenizer)
    if id != "calibration" and (file := _single_file(id)) is not None:
        from sparsight.vision.openai_files import load_openai

        _refuse_revision(id, revision)
        # Runs and stores keep the id: a file must be found from another working folder, too.
        return load_openai(
            file, id=str(Path(id).resolve()), device=target, dtype=kind, tokenizer=tokenizer
        )
    if (Path(id) / "open_clip_config.json").is_file() and not (Path(id) / "config.json").is_file():
        name = f"open_clip:local-dir:{Path(id).resolve()}"
        return _load_open_clip(name, target, kind, revision, tokenizer)

    from sparsight.vision.transformers_files import load_transformers

    if id == "calibration":
        from sparsight.calibration import CLIP_FOLDER

        _refuse_revision(id, revision)
        return load_transformers(str(CLIP_FOLDER), id=id, device=target, dtype=kind)
    name = str(Path(id).resolve()) if Path(id).is_dir() else id
    return load_transformers(
        id, id=name, device=target, dtype=kind, revision=revision, tokenizer=tokenizer
    )


def _load_open_clip(
    id: str,
    target: torch.device,
    kind: torch.dtype,
    revision: str | None,
    tokenizer: str | None,
) -> VisionModel:
    from sparsight.vision.open_clip_models import load_open_clip

    _refuse_revision(id, revision)
    if tokenizer is not None:
        raise UserError(
            f"tokenizer={tokenizer!r}: {id} uses the tokenizer that open_clip gives it. Leave "
            "tokenizer out."
        )
    return load_open_clip(id, device=target, dtype=kind)


def _single_file(id: str) -> Path | None:
    """Return the weights file that an id means: itself, or the only one in a bare folder."""
    from sparsight.vision.openai_files import SUFFIXES

    path = Path(id)
    if path.is_file() or path.suffix in SUFFIXES:
        return path
    if not path.is_dir() or any(
        (path / name).is_file() for name in ("config.json", "open_clip_config.json")
    ):
        return None
    found = [file for file in path.iterdir() if file.suffix in SUFFIXES]
    return found[0] if len(found) == 1 else None


def _fast_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 if the device has instructions to multiply in it, otherwise float32."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # torch 2.10 or so
        found = torch.cpu.get_capabilities()
        fast = bool(found.get("avx512_bf16") or found.get("amx_bf16") or found.get("arm_bf16"))
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    if isinstance(dtype, str) and dtype in DTYPES:
        return DTYPES[dtype]
    if dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    raise UserError(f"Unknown dtype={dtype!r}. Choose one of: {', '.join(DTYPES)}, auto.")


def _refuse_revision(id: str, revision: str | None) -> None:
    if revision is not None:
        raise UserError(f"revision={revision!r}: {id} has no revisions; only Hub ids do.")
