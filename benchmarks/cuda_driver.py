"""Whether NVIDIA's driver finds a GPU; needs no package, so `make gpu-check` asks it first.

python benchmarks/cuda_driver.py      # exits with 2 if there is none
"""

from __future__ import annotations

import ctypes
import sys

LIBRARIES = ("libcuda.so.1", "nvcuda.dll")
NO_DEVICE = "CUDA has no GPU here: {why}. Nothing was checked or measured."


def why_not() -> str | None:
    """Why CUDA has no device here, or None if it has one."""
    for name in LIBRARIES:
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        status = driver.cuInit(0)
        if status != 0:
            return f"NVIDIA's driver is installed, but does not start (cuInit gives {status})"
        count = ctypes.c_int(0)
        driver.cuDeviceGetCount(ctypes.byref(count))
        return None if count.value else "NVIDIA's driver finds no device"
    return "NVIDIA's driver (libcuda) is not installed"


if __name__ == "__main__":
    reason = why_not()
    if reason is not None:
        print(NO_DEVICE.format(why=reason), file=sys.stderr)
        raise SystemExit(2)
