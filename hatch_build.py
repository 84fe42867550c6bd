"""Compile the kernels when the package is installed from source; without a compiler, say so."""

from __future__ import annotations

import runpy
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src/sparsight/kernels/native")


class CompileKernels(BuildHookInterface):
    """Puts the compiled libraries beside their source, and into the wheel."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and mark the wheel as one for this platform if there is anything compiled."""
        folder = Path(self.root) / NATIVE
        self.app.display_info(runpy.run_path(str(folder / "build.py"))["build"]())
        libraries = sorted(folder.glob("kernels-*.so"))
        if libraries:
            platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["tag"] = f"py3-none-{platform}"
            build_data["artifacts"] += [f"/{NATIVE}/{path.name}" for path in libraries]
