"""Where tensors live: the default device, and checks of a device that the user names."""

from __future__ import annotations

import torch

from sparsight.errors import UserError

_WORDS = {"cpu": "CPU", "cuda": "CUDA", "mps": "MPS", "xpu": "XPU"}
"""The kinds of devices, as messages call them."""

_PREFERRED = ("cuda", "xpu", "mps")
"""Kinds of accelerators; the first one that is available and has float64 is the default."""


def choose_device(
    device: str | torch.device | None = None, *, float64: bool = False
) -> torch.device:
    """Return the named device, or the best one available.

    The default is a CUDA GPU, otherwise an Intel GPU (`xpu`), otherwise the CPU. Only a device with
    float64 becomes the default, because running sums over a data set use it: Apple's GPU (`mps`)
    does not have it and must be named.

    Args:
        device: "cpu", "cuda", "cuda:1", "xpu", "mps", or a `torch.device`; None for the default.
        float64: refuse a device without float64.

    Raises:
        UserError: it is not a device, torch finds none of its kind or number here, or it lacks
            float64 where that is needed.
    """
    if device is None:
        return _default()
    target = _parse(device)
    if target.type != "cpu":
        _check_present(target)
    elif target.index:
        raise UserError(f"device={str(device)!r}: there is one CPU device; write 'cpu'.")
    if float64 and not _has_float64(target):
        raise UserError(
            f"device={str(device)!r}: {_WORDS[target.type]} has no float64 here, which this needs "
            "for its sums. Use 'cpu'."
        )
    return target


def _default() -> torch.device:
    for kind in _PREFERRED:
        found = torch.device(kind)
        if _count(kind) and _has_float64(found):
            return found
    return torch.device("cpu")


def _parse(device: str | torch.device) -> torch.device:
    try:
        target = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        target = None
    if target is None or target.type not in _WORDS:
        raise UserError(
            f"device={str(device)!r} is not a device that Sparsight runs on. Use 'cpu', 'cuda', "
            "'cuda:1' (the second GPU), 'mps' or 'xpu'."
        )
    return target


def _check_present(target: torch.device) -> None:
    word, count = _WORDS[target.type], _count(target.type)
    if not count:
        raise UserError(
            f"device={str(target)!r}: torch {torch.__version__} finds no {word} device here. "
            f"Use {str(_default())!r}."
        )
    if target.index is not None and target.index >= count:
        names = ", ".join(repr(f"{target.type}:{i}") for i in range(min(count, 8)))
        raise UserError(
            f"device={str(target)!r}: torch finds {count} {word} device{'s' * (count > 1)} here: "
            f"{names}."
        )


def _count(kind: str) -> int:
    """Return how many devices of a kind torch can use."""
    if kind == "mps":
        return int(torch.backends.mps.is_available())
    module = torch.cuda if kind == "cuda" else torch.xpu
    return module.device_count() if module.is_available() else 0


def _has_float64(device: torch.device) -> bool:
    if device.type == "mps":
        return False
    if device.type == "xpu":
        return bool(torch.xpu.get_device_properties(device).has_fp64)
    return True
