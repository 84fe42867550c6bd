"""Search with embeddings as they are, reconstructed, filtered, steered."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch

from editing_parts import belonging, make_sae
from evaluation_parts import Pictures, save_model
from sparsight.editing import LatentEdit, Set, embed_collection, intervene, write_contact_sheet
from sparsight.editing.latent_search import find_latents
from sparsight.errors import UserError
from sparsight.sae import SAEConfig, TopK
from sparsight.vision import VisionModel, load_model

N = 30


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> VisionModel:
    return load_model(str(save_model("clip", tmp_path_factory.mktemp("clip"))), device="cpu")


@pytest.fixture(scope="module")
def collection(model):
    return embed_collection(model, Pictures(N), batch_images=7, workers=0)


@pytest.fixture(scope="module")
def sae(model, collection):
    return make_sae(
        16,
        SAEConfig(24, sparsity=TopK(3), tied=True),
        x=collection.embeddings,
        metadata=belonging(model, "embedding"),
    )


def order(rows: torch.Tensor, vector: torch.Tensor) -> list[int]:
    cosine = torch.nn.functional.cosine_similarity(rows, vector[None], dim=1)
    return cosine.argsort(descending=True, stable=True).tolist()


def test_an_image_finds_itself_first(collection):
    image = Pictures(N).load(11)
    found = collection.search(image, top=5)
    assert found.hits[0].image == 11 and found.hits[0].cosine == pytest.approx(1, abs=1e-5)
    assert [hit.rank for hit in found.hits] == [1, 2, 3, 4, 5]


def test_a_text_is_searched_by_its_own_embedding(model, collection):
    found = collection.search("a photo of a cat", top=N)
    vector = model.embed_texts(["a photo of a cat"])[0]
    assert [hit.image for hit in found.hits] == order(collection.embeddings, vector)


def test_reconstructions_are_what_is_compared(collection, sae):
    x_hat = sae(collection.embeddings).x_hat.detach()
    found = collection.search(collection.embeddings[4], "reconstructed", sae=sae, top=N)
    assert [hit.image for hit in found.hits] == order(x_hat, x_hat[4])
    text = collection.search("a photo of a dog", "reconstructed", sae=sae, top=N)
    vector = collection.model.embed_texts(["a photo of a dog"])[0]
    assert [hit.image for hit in text.hits] == order(x_hat, vector)


def test_filtered_search_sees_only_the_chosen_latents(collection, sae):
    f = sae.encode(collection.embeddings).dense()
    chosen = f[4].nonzero()[:, 0].tolist()
    rows = (f[:, chosen] @ sae.W_dec[chosen]).detach()
    found = collection.search(collection.embeddings[4], "filtered", sae=sae, latents=chosen, top=N)
    without = [hit.image for hit in found.hits if hit.cosine == -1]
    assert set(without) == {i for i in range(N) if not rows[i].any()} != set()
    cosine = torch.nn.functional.cosine_similarity(rows, rows[4][None], dim=1)
    for hit in found.hits:
        if hit.cosine > -1:
            assert hit.cosine == pytest.approx(float(cosine[hit.image]), abs=1e-5)
    own = collection.search(collection.embeddings[4], "query", sae=sae, n_query_latents=24, top=N)
    assert sorted(own.latents) == sorted(chosen)
    assert [hit.image for hit in own.hits] == [hit.image for hit in found.hits]
    assert len(collection.search("a photo of a cat", "query", sae=sae).latents) <= 8


@torch.no_grad()
def test_steered_search_is_search_under_an_intervention(model, collection, sae):
    edit = LatentEdit(sae, [2], Set(9.0))
    found = collection.search("a photo of a sun", "steered", edits=edit, top=N)
    with intervene(model, edit):
        steered = embed_collection(model, Pictures(N), workers=0)
    plain = steered.search("a photo of a sun", top=N)
    assert [hit.image for hit in found.hits] == [hit.image for hit in plain.hits]
    unsteered = collection.search("a photo of a sun", top=N)
    assert [hit.image for hit in found.hits] != [hit.image for hit in unsteered.hits]


def test_the_page_shows_every_image_that_was_found(collection, sae, tmp_path):
    results = [
        collection.search("<cat> & dog", top=6),
        collection.search("<cat> & dog", "reconstructed", sae=sae, top=6),
    ]
    page = write_contact_sheet(results, collection.images, tmp_path / "search.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 12
    assert "&lt;cat&gt; &amp; dog" in page and "<cat>" not in page
    assert results[1].to_dict()["hits"][0]["rank"] == 1


def test_a_search_without_a_needed_argument_names_it(model, collection, sae):
    other = make_sae(16, SAEConfig(24, sparsity=TopK(3)), metadata={"site": "blocks.0.mlp_out"})
    foreign = belonging(model, "embedding")
    foreign["model"] = {"id": "someone/else", "weights_hash": "0" * 64}
    stranger = make_sae(16, SAEConfig(24, sparsity=TopK(3)), metadata=foreign)
    for arguments, settings, message in (
        (("  ",), {}, "query is empty"),
        (("a", "reconstructed"), {}, "needs an SAE"),
        (("a", "filtered"), {"sae": sae}, "needs latents"),
        (("a", "filtered"), {"sae": sae, "latents": [99]}, "no latent 99"),
        (("a", "steered"), {}, "needs edits"),
        (("a", "query"), {"sae": sae, "n_query_latents": 0}, "1 or more"),
        (("a", "reconstructed"), {"sae": other}, "trained at blocks.0.mlp_out"),
        (("a", "reconstructed"), {"sae": stranger}, "trained on someone/else"),
        (("a",), {"top": 0}, "top is 0"),
        (("cat " * 200,), {}, r"has \d+ tokens, but .* only takes \d+"),
    ):
        with pytest.raises(UserError, match=message):
            collection.search(*arguments, **settings)


def test_inactive_latents_are_refused_and_not_ranked(collection, sae):
    f = sae.encode(collection.embeddings).dense()
    silent = (f[4] == 0) & (f != 0).any(dim=0)
    never = (f == 0).all(dim=0).nonzero()[:, 0].tolist()
    search = partial(collection.search, mode="filtered", sae=sae)
    with pytest.raises(
        UserError, match=r"None of the chosen latents .* is active on the query image"
    ):
        search(collection.embeddings[4], latents=silent.nonzero()[:1, 0].tolist())
    with pytest.raises(UserError, match=f"is active on any of the {N} images"):
        search("a photo of a cat", latents=never)


def test_images_that_cannot_be_read_are_counted_and_left_out(model):
    class Broken(Pictures):
        def load(self, index):
            from sparsight.images import ImageError

            if index % 3 == 0:
                raise ImageError("truncated")
            return super().load(index)

    found = embed_collection(model, Broken(7), workers=0)
    assert found.places == (1, 2, 4, 5) and [i for i, _ in found.failed] == [0, 3, 6]
    with pytest.raises(UserError, match=r"none of its 1 images.*truncated"):
        embed_collection(model, Broken(1), workers=0)


@pytest.mark.parametrize(
    ("family", "compared"), [("dinov2", "CLS after the final norm"), ("clip", "joint embedding")]
)
def test_images_are_found_by_an_image_whether_there_is_a_joint_space_or_not(
    tiny, family, compared, tmp_path
):
    images = Pictures(N)
    collection = embed_collection(tiny(family), images, workers=0)
    found = collection.search(images.load(7), top=3)
    assert found.hits[0].image == 7 and found.hits[0].cosine > 0.999
    assert compared in found.about["compared"]
    page = write_contact_sheet([found], images, tmp_path / "search.html").read_text()
    assert compared in page


def test_a_model_without_a_joint_space_says_why_it_takes_no_text(tiny):
    collection = embed_collection(tiny("dinov2"), Pictures(4), workers=0)
    with pytest.raises(UserError, match=r"no joint space of images and texts.*--image"):
        collection.search("a sun")


def test_the_page_names_no_folder_and_runs_nothing(collection, tmp_path):
    images = copy.copy(collection.images)
    images.spec = "/home/ada/my work/photos?table=/home/ada/labels.csv"
    found = collection.search("<script> /home/ada/x", top=2)
    page = write_contact_sheet([found], images, tmp_path / "search.html").read_text()
    assert "home" not in page and "ada" not in page and "images of photos" in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page
    assert "<script" not in page


def test_a_text_that_is_not_utf8_is_searched_by_its_escaped_form(model):
    same = model.embed_texts(["caf\udce9", "caf\\xe9"])
    assert (same[0] == same[1]).all()
    assert model.count_tokens(["\udce9"]) == model.count_tokens(["\\xe9"])


@pytest.mark.parametrize("word", ["", " ", "²", "9" * 5000])
def test_words_that_are_not_numbers_need_an_index_and_empty_ones_are_refused(word):
    with pytest.raises(UserError, match=r"is empty text|is not a number"):
        find_latents([word], 32)
