"""Names of sites in a model, other projects' and ours: `blocks.9.resid_post`."""

from __future__ import annotations

import re
from typing import Any

_PARTS = {
    "resid_pre": "resid_pre",
    "resid_post": "resid_post",
    "resid": "resid_post",
    "mlp_out": "mlp_out",
    "attn_out": "attn_out",
    "mlp": "mlp_out",
    "attn": "attn_out",
    "attention": "attn_out",
    "self_attn": "attn_out",
}

_HOOK = re.compile(r"^blocks\.(\d+)\.hook_(\w+)$")
_MODULE = re.compile(r"^(?:.*\.)?(?:layers?|h|blocks|resblocks)\.(\d+)(?:\.(\w+))?$")


def site_of_hook(name: object) -> str | None:
    """Return the site of a TransformerLens hook: `blocks.9.hook_resid_post`, say."""
    found = _HOOK.match(name) if isinstance(name, str) else None
    part = _PARTS.get(found[2]) if found else None
    return f"blocks.{int(found[1])}.{part}" if found and part else None


def site_of_module(name: object) -> str | None:
    """Return the site of a module's output: `vision_model.encoder.layers.9`, say."""
    found = _MODULE.match(name) if isinstance(name, str) else None
    if not found:
        return None
    part = _PARTS.get(found[2]) if found[2] else "resid_post"
    return f"blocks.{int(found[1])}.{part}" if part else None


def hook_of_site(site: object) -> str | None:
    """Return the TransformerLens name of a site; the inverse of `site_of_hook`."""
    found = re.match(r"^blocks\.(\d+)\.(\w+)$", site) if isinstance(site, str) else None
    return f"blocks.{found[1]}.hook_{found[2]}" if found else None


def belongs(
    *,
    model: str | None = None,
    site: str | None = None,
    target: str | None = None,
    tokens: str | None = None,
) -> dict[str, Any]:
    """Return an SAE's metadata, as far as they are known."""
    found: dict[str, Any] = {"model": {"id": model}} if model else {}
    given = {"site": site, "target": target, "tokens": tokens}
    return found | {key: value for key, value in given.items() if value is not None}
