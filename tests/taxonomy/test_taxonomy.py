"""Kinds of latents: planted ones, those of calibration scenes, and links between layers."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sparsight.activations import ActivationStore, extract
from sparsight.cli import main
from sparsight.errors import UserError
from sparsight.images import open_images
from sparsight.latents import build_index
from sparsight.latents.coactivation import Coactivation
from sparsight.latents.code_shards import CodeBatch
from sparsight.naming import NameTable
from sparsight.naming.vocabulary import CATEGORIES
from sparsight.sae import SAEConfig, SparseAutoencoder, SparseCode, TopK
from sparsight.taxonomy import KINDS, Evidence, Rule, classify, follow, write_taxonomy
from sparsight.taxonomy.deciding import decide
from sparsight.taxonomy.evidence import CATEGORY_KINDS, kinds_by_name
from sparsight.taxonomy.following import ActivityLists
from sparsight.taxonomy.looks import Looks, looks_of
from sparsight.taxonomy.measuring import Measures, Measuring
from sparsight.vision import load_model

GRID, N_IMAGES = (8, 8), 60
SITES = ("blocks.1.resid_post", "blocks.3.resid_post")


def sparse(dense: torch.Tensor) -> SparseCode:
    rows, columns = dense.nonzero(as_tuple=True)
    offsets = torch.cat([torch.zeros(1).long(), (dense != 0).sum(dim=1).cumsum(0)])
    return SparseCode(columns, dense[rows, columns], offsets, dense.shape[1])


def measured(dense: torch.Tensor, looks: Looks | None, batch: int = 7) -> Measures:
    """Measure activations [images, 1 + patches, latents] in batches."""
    n, tokens, n_latents = dense.shape
    measuring = Measuring(n_latents, tokens, GRID)
    for places in torch.arange(n).split(batch):
        own = looks and Looks(looks.colour[places], looks.texture[places])
        code = sparse(dense[places].flatten(0, 1))
        measuring.add(CodeBatch(places, code, tokens), own)
    return measuring.result()


@pytest.fixture(scope="module")
def store(one_thread: None, tmp_path_factory: pytest.TempPathFactory) -> ActivationStore:
    out = tmp_path_factory.mktemp("taxonomy") / "store"
    images = open_images(f"calibration:{N_IMAGES}")
    return extract(load_model("calibration"), images, sites=SITES, out=out, workers=0, quiet=True)


def sae_of(store: ActivationStore, site: str) -> SparseAutoencoder:
    about = {"site": site, "tokens": "all", "model": dict(store.model_info),
             "images": store.model_info["images"]}  # fmt: skip
    config = SAEConfig(n_latents=256, sparsity=TopK(k=8))
    return SparseAutoencoder(192, config, seed=0, metadata=about).requires_grad_(False)


def test_shares_of_variance_and_morans_i_are_those_of_the_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(40, 65, 3, generator=generator)
    dense[dense < 0.6] = 0
    looks = Looks(
        torch.randint(0, 5, (40, 64), generator=generator),
        torch.randint(0, 4, (40, 64), generator=generator),
    )
    found = measured(dense, looks)
    weights = np.zeros((64, 64))
    for i in range(64):
        for j in range(64):
            weights[i, j] = abs(i // 8 - j // 8) + abs(i % 8 - j % 8) == 1
    for latent in range(3):
        a = dense[:, 1:, latent].double().numpy()
        for name, groups in (
            ("colour", looks.colour.numpy()),
            ("texture", looks.texture.numpy()),
            ("position", np.arange(64)[None].repeat(40, 0)),
            ("image", np.arange(40)[:, None].repeat(64, 1)),
        ):
            means = np.array([a[groups == g].mean() for g in range(groups.max() + 1)])
            eta = means[groups].var() / a.var()
            n, k = a.size, groups.max() + 1
            expected = 1 - (1 - eta) * (n - 1) / (n - k)
            assert getattr(found, name)[latent] == pytest.approx(expected, abs=1e-9), name
        centred = a - a.mean(axis=1, keepdims=True)
        moran = [64 / weights.sum() * (c @ weights @ c) / (c @ c) for c in centred]
        assert found.moran[latent] == pytest.approx(np.mean(moran), abs=1e-9)
        peak = dense[:, :, latent].amax(dim=1).double().numpy()
        evenness = peak.sum() ** 2 / (len(peak) * (peak**2).sum())
        assert found.evenness[latent] == pytest.approx(evenness)
        assert found.area[latent] == pytest.approx((a > 0).mean(axis=1).mean())


def test_measures_do_not_depend_on_the_batches() -> None:
    dense = torch.rand(20, 65, 4, generator=torch.Generator().manual_seed(1))
    dense[dense < 0.7] = 0
    one, other = measured(dense, None, 20), measured(dense, None, 3)
    for name, values in vars(one).items():
        np.testing.assert_allclose(values, getattr(other, name), rtol=1e-9, err_msg=name)


def test_flat_striped_and_differently_oriented_patches_fall_into_different_bins() -> None:
    image = np.full((64, 64, 3), 128, np.uint8)
    image[:, 16:32] = np.where(np.arange(16)[None, :, None] % 4 < 2, 255, 0)
    image[32:48, 32:] = np.where(np.arange(16)[:, None, None] % 4 < 2, 255, 0)
    texture = looks_of(torch.from_numpy(image)[None], GRID).texture.view(GRID)
    assert texture[0, 0] == 0
    assert len({int(texture[0, 0]), int(texture[0, 2]), int(texture[4, 5])}) == 3
    assert texture[0, 2] == texture[1, 3]


def test_planted_latents_get_their_kind() -> None:
    """Latents that follow colour, texture, place, a compact spot, a band or most of an image."""
    generator = torch.Generator().manual_seed(3)
    n = 200
    looks = Looks(
        torch.randint(0, 6, (n, 64), generator=generator),
        torch.randint(0, 6, (n, 64), generator=generator),
    )
    dense = torch.zeros(n, 65, 6)
    dense[:, 1:, 0] = (looks.colour == 2).float()
    dense[:, 1:, 1] = (looks.texture == 3).float()
    dense[:, 1 + 63, 2] = 1.0
    shown = torch.rand(n, generator=generator) < 0.2
    for image in shown.nonzero()[:, 0].tolist():
        row, column = torch.randint(0, 6, (2,), generator=generator).tolist()
        spot = torch.zeros(8, 8)
        spot[row : row + 3, column : column + 3] = 1
        band = torch.zeros(8, 8)
        band[row, max(0, column - 2) : column + 4] = 1
        large = torch.ones(8, 8)
        large[row] = 0
        dense[image, 1:, 3], dense[image, 1:, 4], dense[image, 1:, 5] = (
            each.flatten() for each in (spot, band, large)
        )
    kinds = decide(measured(dense, looks), threshold=-1e9)
    assert kinds.tolist() == ["colour", "texture", "position", "object", "text", "scene"]


def test_latents_on_fewer_than_ten_images_have_no_kind() -> None:
    dense = torch.zeros(50, 65, 1)
    dense[:9, 1:20, 0] = 1.0
    assert decide(measured(dense, None), threshold=-1e9).tolist() == ["none"]


def test_few_untrained_latents_get_a_kind_and_truth_comes_before_the_rule(
    store: ActivationStore,
) -> None:
    layers = {site: (sae_of(store, site), store) for site in SITES}
    found = classify(layers, quiet=True)
    again = classify(layers, quiet=True)
    for layer, other in zip(found, again, strict=True):
        assert layer.null_share <= 0.15
        assert layer.kind.tolist() == other.kind.tolist()
        assert set(np.flatnonzero(layer.source == "truth")) == set(layer.truth)
    blind = classify(layers, truth=False, quiet=True)
    for layer, other in zip(found, blind, strict=True):
        assert not other.truth
        assert other.kind.tolist() == other.by_rule.tolist() == layer.by_rule.tolist()


def test_names_decide_before_labels_and_labels_before_the_rule(store: ActivationStore) -> None:
    layers = {"last": (sae_of(store, SITES[1]), store)}
    evidence = Evidence({7: "scene"}, frozenset({7, 8}))
    (layer,) = classify(layers, truth=False, evidence={"last": evidence}, quiet=True)
    assert (layer.kind[7], layer.source[7]) == ("scene", "name")
    rule = layer.by_rule[8]
    expected = (rule, "spatial") if rule in ("text", "position") else ("object", "label")
    assert (layer.kind[8], layer.source[8]) == expected
    assert layer.source[9] == "spatial"
    with pytest.raises(UserError, match="no latent 256"):
        wrong = Evidence({256: "scene"})
        classify(layers, truth=False, evidence={"last": wrong}, quiet=True)


def test_accepted_names_give_the_kind_of_their_category() -> None:
    def row(latent: int, method: str, name: str, accepted: bool = True) -> dict[str, object]:
        return {"latent": latent, "method": method, "name": name, "score": 1.0,
                "threshold": 0.5, "accepted": accepted, "runners_up": [],
                "figures": []}  # fmt: skip

    about = {"vocabulary": {"name": "calibration"}}
    texts = [row(0, "text", "red object"), row(1, "text", "anchor", accepted=False),
             row(2, "text", "the word “anchor”")]  # fmt: skip
    table = NameTable.of_nothing().with_method("text", texts, about)
    table = table.with_method("truth", [row(0, "truth", "anchor")], {})
    table = table.with_method("centroid", [row(1, "centroid", "anchor")], about)
    assert kinds_by_name(table, truth=True) == {0: "object", 2: "text"}
    assert kinds_by_name(table, truth=False) == {0: "colour", 2: "text"}
    assert set(CATEGORY_KINDS) <= set(CATEGORIES) and set(CATEGORY_KINDS.values()) <= set(KINDS)


def test_an_index_of_version_1_is_refused_in_one_line(
    store: ActivationStore, tmp_path: Path
) -> None:
    sae = sae_of(store, SITES[1])
    index = build_index(sae, store, out=tmp_path / "index", quiet=True)
    assert Evidence.of(index, sae).names == {}
    old = dataclasses.replace(index, manifest={**index.manifest, "version": 1})
    with pytest.raises(UserError, match=r"format version 1.*--upgrade") as caught:
        Evidence.of(old, sae)
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="another SAE"):
        Evidence.of(index, SparseAutoencoder(192, sae.config, seed=1))


def test_correlations_across_layers_are_those_of_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(50, n, generator=generator) for n in (5, 7))
    one[one < 0.5], other[other < 0.5] = 0, 0
    other[:, 4] = 2 * one[:, 1]
    lists = [ActivityLists.of(x.to_sparse()) for x in (one, other)]
    table = Coactivation(*lists).table(n=2)
    expected = np.corrcoef(one.numpy().T, other.numpy().T)[:5, 5:]
    np.testing.assert_allclose(table.score[:, 0], expected.max(axis=1), atol=1e-5)
    assert table.latent[:, 0].tolist() == expected.argmax(axis=1).tolist()
    assert table.latent[1, 0] == 4


def test_the_command_writes_tables_plots_and_edges(
    store: ActivationStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = []
    for number, site in enumerate(SITES):
        sae_of(store, site).save_pretrained(tmp_path / f"l{number}")
        runs.append(str(tmp_path / f"l{number}"))
    out = tmp_path / "out"
    assert main(["taxonomy", *runs, "--store", str(store.path), "--out", str(out)]) == 0
    assert "l0" in capsys.readouterr().out
    table = pq.read_table(out / "taxonomy.parquet")
    assert table.num_rows == 512
    summary = json.loads((out / "taxonomy.json").read_text())
    for entry in summary:
        assert sum(kind["n"] for kind in entry["kinds"].values()) == entry["n_active"]
        for kind in entry["kinds"].values():
            assert kind["interval"][0] <= kind["share"] <= kind["interval"][1]
    edges = json.loads((out / "edges.json").read_text())["edges"]
    assert edges and all(edge["correlation"] >= 0.3 for edge in edges)
    assert (out / "layers.svg").stat().st_size and (out / "edges.svg").stat().st_size


def test_runs_of_different_images_are_refused(store: ActivationStore, tmp_path: Path) -> None:
    images = open_images("calibration:30:5")
    other = extract(
        load_model("calibration"), images, sites=[SITES[0]], out=tmp_path / "other", workers=0,
        quiet=True,
    )  # fmt: skip
    layers = {"one": (sae_of(store, SITES[0]), store), "two": (sae_of(other, SITES[0]), other)}
    with pytest.raises(UserError, match="one and two are of different images"):
        classify(layers, quiet=True)


def test_too_few_images_and_wrong_settings_are_refused(store: ActivationStore) -> None:
    layers = {"one": (sae_of(store, SITES[0]), store)}
    with pytest.raises(UserError, match="Use more images"):
        classify(layers, max_images=5, quiet=True)
    with pytest.raises(UserError, match="false_kinds is 1"):
        Rule(false_kinds=1.0)
    with pytest.raises(UserError, match="No SAE given"):
        classify({}, quiet=True)


def test_one_run_has_kinds_but_no_edges(store: ActivationStore, tmp_path: Path) -> None:
    layers = classify({"one": (sae_of(store, SITES[0]), store)}, quiet=True)
    assert follow(layers) == []
    write_taxonomy(layers, [], tmp_path / "out")
    assert not (tmp_path / "out" / "edges.svg").exists()
    write_taxonomy(layers, [], tmp_path / "out")
    assert pq.read_table(tmp_path / "out" / "taxonomy.parquet").num_rows == 256
