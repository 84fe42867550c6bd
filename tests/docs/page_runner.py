"""Run the code blocks of a page, one after another, in a folder with everything that pages need.

Python runs in one namespace per page. `sparsight …` in a shell block runs in this process, which
saves importing torch for each command; any other command runs in a shell.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from code_blocks import blocks_of, name_of

from sparsight.cli import main

SHELL = set("|<>;&$`*")

SMALLER = {
    "20_000_000": "8_192",
    "1000000": "8192",
    "100000": "8192",
    "--n-vectors 500000": "--n-vectors 8192",
    "3000000": "8192",
    "n_latents=1536,6144": "n_latents=192,384",
    "n_latents=6144": "n_latents=384",
    "n-latents 6144": "n-latents 384",
    "n_latents = 6144": "n_latents = 384",
    "[1024, 2048]": "[192, 384]",
    "1024,2048": "192,384",
    "k32-n2048-seed1": "k32-n384-seed1",
    "calibration:4000": "calibration:48",
    "calibration:800:5": "calibration:48:5",
    "calibration:400:2": "calibration:48:2",
    "calibration:2000": "calibration:48",
    "calibration:1000:1": "calibration:48:1",
    "calibration:500:1": "calibration:100:1",
    "--n-vectors 400000": "--n-vectors 8192",
    "n=500": "n=36",
    "FinetuneConfig(epochs=2)": "FinetuneConfig(steps=2, batch_size=8)",
    "--batch-size 44": "--batch-size 8",
    # Such a small autoencoder has no latents that are active only on words.
    'contrast="attack")': 'contrast="attack", selectivity=0.3)',
}
"""Sizes in the pages, and the smaller ones that this test uses instead."""

FEWER_SCENES = (
    "--data calibration:32:41 --attack-on calibration:24:42:single --test calibration:12:43:single"
    " --images calibration:12:44"
)
APPENDED = {
    r"sparsight demo": "--n-images 100 --n-test 100 --n-latents 256 --k 8 --n-vectors 8192",
    r"sparsight (train|sweep) .*--config recipes/": "--n-vectors 1024 --batch-size 256",
    r"sparsight (train|sweep) .*--config recipes/(fry|clip-scope|tied)": "--sae.expansion 2",
    r"sparsight steer": "--ks 1 8",
    r"sparsight visualize": "--steps 2 --views 1 --workers 0",
    # A latent that is found by its name may be silent on the half of so few images.
    r"sparsight steer .* anchor": "--unit absolute",
    r"sparsight sweep .*--config recipes/": "--vary n_latents=64,128 k=4,8",
    r"sparsight attack (find|measure) .*(runs/|--off)": "--selectivity 0.3",
    r"sparsight finetune": "--steps 2 --max-images 16 --no-latents",
    r"sparsight finetune openai": "--batch-size 8",
    r"sparsight finetune calibration": FEWER_SCENES,
}
"""Options that make commands without sizes small."""


def smaller(text: str) -> str:
    """Return a block that takes seconds instead of minutes or hours; only sizes differ from the
    page.
    """
    for size, small in SMALLER.items():
        text = text.replace(size, small)
    return text


def run_page(page: Path, names: dict[str, Any]) -> None:
    """Run every block of a page that is not marked.

    Args:
        names: namespace of the Python blocks; it keeps what they define.
    """
    for block in blocks_of(page):
        if block.reason is not None:
            continue
        place = f"{name_of(page)}:{block.line}"
        if block.language == "python":
            lines = "\n" * (block.line - 1) + smaller(block.text)  # errors name the page's line
            exec(compile(lines, name_of(page), "exec"), names)
        elif block.language == "sh":
            for command in commands_of(block.text):
                run_command(smaller(command), place)
        elif block.language == "toml" and block.title:
            Path(block.title).write_text(smaller(block.text))
        else:
            assert block.language == "text", f"{place}: a block of '{block.language}' is not run"


def commands_of(text: str) -> list[str]:
    joined = text.replace("\\\n", " ")
    return [line for line in joined.splitlines() if shlex.split(line, comments=True)]


def run_command(command: str, place: str = "") -> None:
    words = shlex.split(command, comments=True)
    for pattern, options in APPENDED.items():
        if re.match(pattern, " ".join(words)):
            words += options.split()
    if words[0] == "sparsight" and not any(set(word) <= SHELL for word in words):
        code = main(words[1:])
    else:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        code = subprocess.run(
            ["sh", "-ec", command], env={**os.environ, "PATH": path}, check=False
        ).returncode
    assert code == 0, f"{place}: exit code {code}: {' '.join(words)}"
