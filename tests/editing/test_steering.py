"""Steering: figures that agree with interventions by hand, files, names, messages."""

from __future__ import annotations

import csv
import json

import pytest
import torch

from editing_parts import belonging, make_sae
from evaluation_parts import LABELS, Pictures, save_model
from sparsight.editing import Keep, LatentEdit, Off, Set, intervene, steer
from sparsight.editing.class_codes import class_codes, matched_latents
from sparsight.editing.class_curves import default_ks
from sparsight.editing.steering_files import save_steering
from sparsight.errors import UserError
from sparsight.evaluation.recall import distinct, image_text_recall
from sparsight.sae import SAEConfig, SparseAutoencoder, TopK
from sparsight.vision import VisionModel, classifier_weights, classify, load_model

SITE = "blocks.1.resid_post"
N = 28


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> VisionModel:
    return load_model(str(save_model("clip", tmp_path_factory.mktemp("clip"))), device="cpu")


@pytest.fixture(scope="module")
def images() -> Pictures:
    return Pictures(N)


@pytest.fixture(scope="module")
def pixels(model, images) -> torch.Tensor:
    return torch.stack([model.transform(images.load(i)) for i in range(N)])


@pytest.fixture(scope="module")
def sae(model, pixels) -> SparseAutoencoder:
    x = model.read(pixels, [SITE])[SITE].flatten(0, 1)
    return make_sae(
        32, SAEConfig(40, sparsity=TopK(6)), x=x, metadata=belonging(model, SITE, "patches")
    )


@pytest.fixture(scope="module")
def report(model, images, sae):
    return steer(
        model, images, sae, [3, 7], strengths=(0.0, 2.0), ks=(1, 5, 40), batch_images=5, workers=0,
        names={3: "three"}, templates="simple",
    )  # fmt: skip


def halves(images) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    found: dict[str, list[int]] = {label: [] for label in sorted(LABELS)}
    for i in range(N):
        found[images.info(i).label].append(i)
    return tuple({k: v[start::2] for k, v in found.items()} for start in (0, 1))


def by_hand(model, pixels, images, edits_of) -> tuple[float, torch.Tensor]:
    """Accuracy and mean probabilities over the half to measure on, one image at a time."""
    classes = sorted(LABELS)
    names = [label.replace("_", " ") for label in classes]
    weights = classifier_weights(model, names)
    hits, total, n = 0, torch.zeros(len(classes)), 0
    for label, found in halves(images)[1].items():
        for i in found:
            with intervene(model, edits_of(label)), torch.no_grad():
                embedded = model.embed_images(pixels[i : i + 1])
            found_p = classify(embedded, weights, model.logit_scale).softmax(dim=1)[0]
            hits += int(found_p.argmax()) == classes.index(label)
            total += found_p
            n += 1
    return hits / n, total / n


def test_strengths_are_interventions_on_the_images_that_do_not_choose(
    model, images, pixels, sae, report
):
    chosen = [i for found in halves(images)[0].values() for i in found]
    x = model.read(pixels[chosen], [SITE], "patches")[SITE].flatten(0, 1)
    highest = sae.encode(x).dense()[:, [3, 7]].amax(dim=0)
    assert report.about["n_choose"] + report.about["n_measure"] == N
    for row, value in zip(report.latents, highest.tolist(), strict=True):
        assert row["unit"] == pytest.approx(value, rel=1e-5)
        for each in row["strengths"]:
            edit = LatentEdit(sae, [row["latent"]], Set(each["strength"] * value))
            top1, probability = by_hand(model, pixels, images, dict.fromkeys(LABELS, edit).get)
            assert each["top1"] == top1
            got = torch.tensor([each["probability"][label] for label in sorted(LABELS)])
            torch.testing.assert_close(got, probability, rtol=1e-4, atol=1e-5)
            assert sum(each["change"].values()) == pytest.approx(0, abs=1e-6)
    assert report.original["top1"] == by_hand(model, pixels, images, lambda _: [])[0]
    assert report.latents[0]["name"] == "three"


def test_curves_keep_or_drop_the_latents_of_each_images_class(model, images, pixels, sae, report):
    strongest = {}
    for label, found in halves(images)[0].items():
        x = model.read(pixels[found], [SITE], "patches")[SITE].flatten(0, 1)
        mean = sae.encode(x).dense().mean(dim=0)
        strongest[label] = mean.argsort(descending=True, stable=True)
    rows = {(r["kind"], r["latents"], r["k"]): r for r in report.curves}
    for k in (1, 5):
        for kind, action in (("on", Keep()), ("off", Off())):
            edits = {
                label: LatentEdit(sae, order[:k].tolist(), action)
                for label, order in strongest.items()
            }
            top1, _ = by_hand(model, pixels, images, edits.get)
            assert rows[kind, "class", k]["top1"] == top1
            assert rows[kind, "random", k]["n"] == rows[kind, "class", k]["n"]
    original = rows["original", None, None]["top1"]
    for chosen in ("class", "random"):
        assert rows["on", chosen, 40]["top1"] == original == report.original["top1"]
    nothing, _ = by_hand(model, pixels, images, lambda _: LatentEdit(sae, None, Off()))
    assert rows["off", "class", 40]["top1"] == rows["off", "random", 40]["top1"] == nothing


def test_curves_at_a_site_with_one_vector_per_image_and_at_one_that_is_not_the_whole_state(
    model, images, pixels
):
    for site in ("embedding", "blocks.1.mlp_out"):
        x = model.read(pixels, [site])[site].flatten(0, 1)
        some = make_sae(x.shape[1], SAEConfig(32, sparsity=TopK(4)), x=x)
        got = steer(
            model, images, some, site=site, ks=(2, 32), batch_images=7, workers=0,
            templates="simple", tokens="all",
        )  # fmt: skip
        found = class_codes(model, images, some, site, "all", halves(images)[0])
        edits = {
            label: LatentEdit(some, order[:2].tolist(), Off(), site, "all")
            for label, order in zip(found.classes, found.strongest(), strict=True)
        }
        top1, _ = by_hand(model, pixels, images, edits.get)
        rows = {(r["kind"], r["latents"], r["k"]): r for r in got.curves}
        assert rows["off", "class", 2]["top1"] == top1


def test_retrieval_ranks_an_images_own_caption(report):
    for row in (report.original, report.latents[0]["strengths"][0]):
        for key in ("image_to_text", "text_to_image"):
            assert 0 <= row[key]["recall_1"] <= row[key]["recall_5"] <= 1
    images = torch.eye(4)[[0, 1, 2, 3]]
    texts, own = distinct(["a", "b", "b", "c"])
    to_text, to_image = image_text_recall(images, torch.eye(4)[[0, 2, 1]], own)
    assert texts == ["a", "b", "c"]
    # Image 1 is far from "b", its own text; image 2 finds "b"; "c" is nearer to others.
    assert to_text.at[1] == 0.5 and to_text.n == 4
    assert to_image.at[1] == pytest.approx(2 / 3) and to_image.candidates == 4


def test_equal_cosines_do_not_count_as_found():
    same = torch.ones(3, 4)
    to_text, to_image = image_text_recall(same, same, torch.arange(3))
    assert to_text.at[1] == 0 and to_image.at[1] == 0 and to_text.median_rank == 3


def test_random_partners_have_about_the_same_density_and_are_never_the_latent_itself():
    density = torch.rand(500, generator=torch.Generator().manual_seed(0)) ** 4
    partner = matched_latents(density, seed=3)
    assert sorted(partner.tolist()) == list(range(500))
    assert (partner != torch.arange(500)).all()
    assert (density[partner] - density).abs().max() < 0.15
    assert torch.equal(partner, matched_latents(density, seed=3))
    assert matched_latents(torch.zeros(3)).tolist() != [0, 1, 2]


def test_default_ks_end_with_all_latents():
    assert default_ks(64) == [1, 2, 5, 10, 20, 50, 64]
    assert default_ks(1) == [1]


def test_files_hold_every_figure(report, tmp_path):
    paths = save_steering(report, tmp_path / "new" / "folder")
    found = json.loads(paths[0].read_text())
    assert found["latents"][1]["latent"] == 7 and len(found["curves"]) == 13
    with paths[1].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["part"] for row in rows].count("latent") == 4
    assert float(rows[0]["top1"]) == report.original["top1"]
    assert paths[2].read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert paths[3].read_text().count("<svg") == 1


def test_impossible_steering_is_refused_with_the_reason(model, images, sae):
    class Bare(Pictures):
        def info(self, index):
            from sparsight.images import ImageInfo

            return ImageInfo(str(index), str(index))

    def run(*arguments, **settings):
        return steer(model, *arguments, workers=0, templates="simple", **settings)

    for source, latents, settings, message in (
        (Bare(4), [1], {}, "neither labels nor captions"),
        (images, [40], {}, "no latent 40; it has 0 to 39"),
        (images, [], {"curves": False}, "Nothing to steer"),
        (images, [1], {"strengths": ()}, "all finite"),
        (images, [1], {"strengths": (1.0, float("nan"))}, "all finite"),
        (images, [], {"ks": (0, 3)}, "numbers from 1 to 40"),
        (images, [1], {"site": "blocks.9.mlp_out"}, "no site"),
        (images, [1], {"max_images": 1}, "no image is left to measure on"),
    ):
        with pytest.raises(UserError, match=message):
            run(source, sae, latents, **settings)
    never = make_sae(32, SAEConfig(40, sparsity=TopK(6)), metadata=belonging(model, SITE))
    with torch.no_grad():
        never.b_enc[5] = -1e6
    with pytest.raises(UserError, match="Latent 5 is not active on any"):
        run(images, never, [5])


def test_a_factor_is_not_an_activation(model, images, sae):
    got = steer(
        model, images, sae, [3], strengths=(2.0,), unit="factor", curves=False, workers=0,
        templates="simple", max_images=8,
    )  # fmt: skip
    assert got.latents[0]["strengths"][0]["activation"] is None
    absolute = steer(
        model, images, sae, [3], strengths=(2.0,), unit="absolute", curves=False, workers=0,
        templates="simple", max_images=8,
    )  # fmt: skip
    assert absolute.latents[0]["strengths"][0]["activation"] == 2


def test_without_labels_probabilities_of_given_classes_are_measured(model, images, sae):
    class Unlabelled(Pictures):
        def info(self, index):
            from sparsight.images import ImageInfo

            return ImageInfo(str(index), str(index))

    got = steer(
        model, Unlabelled(6), sae, [3], strengths=(1.0,), unit="absolute", workers=0,
        class_names=["cat", "dog"], templates="simple",
    )  # fmt: skip
    assert set(got.latents[0]["strengths"][0]["change"]) == {"cat", "dog"}
    assert set(got.omitted) == {"accuracy", "curves", "retrieval"}
    assert "top1" not in got.original
