"""Compile the kernels, once per instruction set, next to their source.

This needs only the standard library, because it runs before the package is installed;
`python -m sparsight.kernels.native.build` runs it afterwards.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
SOURCES = ("kernels.c", "blocks.c", "pool.c")
COMMON = [
    "-O3",
    "-std=c11",
    "-ffp-contract=fast",
    "-fPIC",
    "-shared",
    "-fvisibility=hidden",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
]
_AVX512 = ["-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"]
VARIANTS = {
    "amx": [*_AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"],
    "avx512": [*_AVX512, "-mavx512bf16"],
    "avx512-vnni": _AVX512,
    "avx2": ["-march=x86-64-v3"],
    "portable": [],
}
"""Compiler flags by variant, the fastest first."""


def library(variant: str) -> Path:
    """Return the path of a compiled variant."""
    return FOLDER / f"kernels-{variant}.so"


def fingerprint() -> str:
    """Hash the sources; a library that was compiled from other sources is not loaded."""
    digest = hashlib.sha256()
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in (".c", ".h", ".inc"):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def build() -> str:
    """Compile all variants for this processor's family.

    Returns:
        One line that says what was done, or why nothing was.
    """
    compiler = _compiler()
    if sys.platform == "win32" or compiler is None:
        return "sparsight: no C compiler, native kernels are left out (plain torch is used)"
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    built, problems = [], []
    for variant, flags in VARIANTS.items():
        if flags and not x86:
            continue
        problem = _compile(compiler, variant, flags)
        if problem is None:
            built.append(variant)
        else:
            problems.append(f"{variant}: {problem}")
    said = f"sparsight: native kernels: {', '.join(built) or 'none'}"
    return f"{said} (not built: {'; '.join(problems)})" if problems else said


def _compile(compiler: list[str], variant: str, flags: list[str]) -> str | None:
    """Write the library, whole or not at all; return the first line of what went wrong."""
    target = library(variant)
    target.unlink(missing_ok=True)
    partial = target.with_suffix(f".{os.getpid()}.tmp")
    sources = [str(FOLDER / name) for name in SOURCES]
    named = f'-DSOURCES="{fingerprint()}"'
    command = [*compiler, *COMMON, named, *flags, *sources, "-o", str(partial), "-lm"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode != 0:
        partial.unlink(missing_ok=True)
        said = [line for line in done.stderr.splitlines() if "error" in line]
        return (said or done.stderr.splitlines() or ["the compiler failed"])[0]
    partial.replace(target)
    return None


def _compiler() -> list[str] | None:
    stated = shlex.split(os.environ.get("CC", ""))
    for command in (stated, ["cc"], ["gcc"], ["clang"]):
        if command and shutil.which(command[0]):
            return command
    return None


if __name__ == "__main__":
    print(build())
