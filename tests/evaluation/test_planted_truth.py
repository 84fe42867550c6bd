from __future__ import annotations

from types import SimpleNamespace

import torch

from sparsight.evaluation import evaluate
from sparsight.images import CalibrationImages
from sparsight.sae import SAEConfig, SparseAutoencoder, TopK

SITE = "blocks.0.resid_post"


class Planted:
    """Activations in which axis j is 1 where background colour j is visible."""

    sites, tokens, model_info = (SITE,), "patches", {"patch_grid": (8, 8), "n_prefix": 1}

    def __init__(self, n):
        self.images = CalibrationImages(n, 3)
        self.n_images, self.n_tokens = n, {SITE: 64}
        self.values = sorted({v for i in range(n) for v in self._of(i)})
        self.x = torch.zeros(n, 64, len(self.values))
        for i in range(n):
            for value in self._of(i):
                mask = torch.from_numpy(self.images.render(i).mask("background", value))
                self.x[i, mask.flatten(), self.values.index(value)] = 1

    def _of(self, i):
        return self.images.scene(i).attributes()["background"]

    def canonical_site(self, site):
        return site

    def d_in(self, site):
        return self.x.shape[2]

    def source(self):
        return self.images

    def ordered(self, sites, batch_images=64):
        for start in range(0, self.n_images, batch_images):
            x = self.x[start : start + batch_images]
            yield SimpleNamespace(
                image_indices=torch.arange(start, start + len(x)), activations={SITE: x}
            )


def test_a_planted_dictionary_is_found_exactly():
    source = Planted(300)
    d = source.d_in(SITE)
    sae = SparseAutoencoder(d, SAEConfig(n_latents=d, sparsity=TopK(1)), metadata={"site": SITE})
    with torch.no_grad():
        for p, v in ((sae.W_enc, torch.eye(d)), (sae.W_dec, torch.eye(d))):
            p.copy_(v)
    report = evaluate(sae, source, quiet=True)
    assert report.metrics["fvu"] == 0
    for j, value in enumerate(source.values):
        row = report.metrics["truth"].get(f"background/{value}")
        if row is not None:
            assert (row["latent"], row["auc"], row["iou"]) == (j, 1.0, 1.0)
            # A held-out scene may show less background than any scene that set the threshold.
            assert row["f1"] > 0.75
    assert report.metrics["truth_summary"]["background"]["n"] > 3
    for pca in (report.metrics["baselines"]["pca"], report.metrics["baselines"]["neurons"]):
        assert 0 <= pca["fvu"] < 1
