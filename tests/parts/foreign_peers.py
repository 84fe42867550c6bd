"""saev and clipscope in a process of their own: `foreign_peers.py PEERS-FOLDER TASK IN OUT`.

IN and OUT are files of `torch.save`; their imports never meet ours.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch


def saev_reads(given: dict[str, Any]) -> dict[str, Any]:
    from saev import nn

    sae = nn.load(given["path"])
    x_hat, codes, _ = sae(given["x"])
    return {"codes": codes, "x_hat": x_hat}


def saev_writes(given: dict[str, Any]) -> dict[str, Any]:
    from saev import config, nn

    torch.manual_seed(0)
    sae = nn.SparseAutoencoder(config.SparseAutoencoder(d_vit=given["d"], exp_factor=3))
    for name, tensor in given["state"].items():
        getattr(sae, name).data.copy_(tensor)
    nn.dump(given["path"], sae)
    return saev_reads(given)


def clipscope_encodes(given: dict[str, Any]) -> dict[str, Any]:
    from clipscope import TopKSAE

    found = {}
    for path, suffix in ((given["path"], ""), (given["written"], " written")):
        checkpoint = torch.load(path, weights_only=True)
        shape = {key: checkpoint[key] for key in ("k", "n_features", "d_in")}
        sae = TopKSAE(**shape, device="cpu")
        sae.load_state_dict(checkpoint["model_state_dict"])
        for kind in ("normal", "massive"):
            found[kind + suffix] = sae.forward_verbose(given[kind])
    return found


def clipscope_sees(given: dict[str, Any]) -> dict[str, Any]:
    from clipscope import ConfiguredViT
    from PIL import Image

    vit = ConfiguredViT(given["locations"], given["model"], device="cpu")
    vit.eval()
    pictures = [Image.open(path) for path in given["pictures"]]
    return {"activations": vit.all_activations(pictures)}


if __name__ == "__main__":
    folder, task, source, target = sys.argv[1:]
    sys.path.append(folder)
    torch.set_num_threads(1)
    with torch.no_grad():
        found = globals()[task](torch.load(source, weights_only=True))
    torch.save(found, Path(target))
