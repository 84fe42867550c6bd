"""Queries of images and patches: against dense evaluation, on planted cases, with typos."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from latent_parts import TensorActivations
from sparsight.errors import UserError
from sparsight.latents import LatentIndex, LatentName, build_index, set_names
from sparsight.latents.expressions import COMPARISONS, And, Condition, Not, Or, Text, parse
from sparsight.latents.image_sets import AllOf, AnyOf, Collection, Fires, Labelled, Without
from sparsight.latents.postings import Postings
from sparsight.latents.query import query_patches
from sparsight.sae import SparseAutoencoder

N_LATENTS, N_PLACES = 12, 400
LABELS = ("star", "anchor", "sun")


@pytest.fixture(scope="module")
def index(
    tmp_path_factory: pytest.TempPathFactory,
    sae: SparseAutoencoder,
    activations: TensorActivations,
) -> LatentIndex:
    folder = tmp_path_factory.mktemp("queried")
    index = build_index(sae, activations, out=folder, quiet=True)
    names = {3: "Anchor", 5: "star", 7: "star"}
    return set_names(index, {key: LatentName(name, 0.9, "test") for key, name in names.items()})


@pytest.fixture(scope="module")
def dense(sae: SparseAutoencoder, activations: TensorActivations) -> torch.Tensor:
    """The strongest activation of every latent in every image."""
    code = sae.encode(activations.x.flatten(0, 1)).dense()
    return code.view(*activations.x.shape[:2], -1).amax(1)


def collection(seed: int) -> tuple[Collection, np.ndarray, np.ndarray]:
    """Random posting lists from empty to full, with unread images and images without a label."""
    random = np.random.default_rng(seed)
    read = np.sort(random.permutation(N_PLACES)[: N_PLACES - 30])
    values = random.normal(0.5, 1, (N_LATENTS, N_PLACES)).astype(np.float32)
    shares = np.array([0, 0.001, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.8, 0.99, 1])
    fires = random.random((N_LATENTS, N_PLACES)) < shares[:, None]
    unread = np.setdiff1d(np.arange(N_PLACES), read)
    fires[:, unread] = False
    dense = np.where(fires, values, np.float32(0))
    counts = fires.sum(1)
    latents, places = np.nonzero(fires)
    postings = Postings(
        np.concatenate([[0], counts.cumsum()]).astype(np.int64),
        places.astype(np.int32),
        dense[latents, places],
        None,
        N_PLACES,
    )
    labels = [random.choice([*LABELS, None]) for _ in read]
    numbers = np.full(N_PLACES, "", dtype=object)
    numbers[read] = [label or "" for label in labels]
    return (
        Collection(postings, read, pa.chunked_array([pa.array(labels, pa.string())])),
        dense,
        (numbers),
    )


numbers = st.sampled_from([-1.0, -0.2, 0.0, 0.3, 0.5, 1.5, 9.0])
conditions = st.one_of(
    st.integers(0, N_LATENTS - 1).map(str),
    st.tuples(st.integers(0, N_LATENTS - 1), st.sampled_from(sorted(COMPARISONS)), numbers).map(
        lambda parts: f"{parts[0]} {parts[1]} {parts[2]}"
    ),
    st.sampled_from(LABELS).map(lambda label: f'label == "{label}"'),
    st.sampled_from(LABELS).map(lambda label: f"label != '{label}'"),
    st.just('label in ("sun", "star")'),
)
queries = st.recursive(
    conditions,
    lambda inner: st.one_of(
        inner.map(lambda term: f"not ({term})"),
        st.tuples(inner, st.sampled_from(["and", "OR", "and not"]), inner).map(
            lambda parts: f"({parts[0]}) {parts[1]} ({parts[2]})"
        ),
    ),
    max_leaves=8,
)


def asked(tree, names):  # the words of a query without an index
    match tree:
        case Not(term):
            return Without(asked(term, names))
        case And(terms):
            return AllOf(tuple(asked(term, names) for term in terms))
        case Or(terms):
            return AnyOf(tuple(asked(term, names) for term in terms))
        case Condition(subject, comparison, values) if subject.kind == "number":
            value = values[0].value if values else 0.0
            return Fires(int(subject.written), comparison, value)
        case Condition(_, comparison, values):
            labels = Labelled(tuple(names.index(value.value) for value in values))
            return Without(labels) if comparison == "!=" else labels


def by_dense(tree, dense, labels):
    """Evaluate a query for every place of the source, one condition at a time."""
    match tree:
        case Not(term):
            return ~by_dense(term, dense, labels)
        case And(terms):
            return np.all([by_dense(term, dense, labels) for term in terms], axis=0)
        case Or(terms):
            return np.any([by_dense(term, dense, labels) for term in terms], axis=0)
        case Condition(subject, comparison, values) if subject.kind == "number":
            row = dense[int(subject.written)]
            if comparison is None:
                return row != 0
            return COMPARISONS[comparison](row, np.float32(values[0].value))
        case Condition(_, comparison, values):
            found = np.isin(labels, [value.value for value in values])
            return ~found if comparison == "!=" else found


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(queries, st.integers(0, 2))
def test_a_query_finds_what_dense_evaluation_finds(text: str, seed: int) -> None:
    images, dense, labels = collection(seed)
    tree = parse(Text(text, "Query"), "a latent")
    found = asked(tree, images.label_names).images(images).within(images)
    wanted = np.intersect1d(np.flatnonzero(by_dense(tree, dense, labels)), images.read)
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("long", [1, 32, 10_000])
def test_activations_are_the_same_by_search_and_by_table(
    long: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sparsight.latents.image_sets.LONG", long)
    images, dense, _ = collection(3)
    for places in ([], [0], [399], list(range(0, 400, 7)), list(range(400))):
        for latent in range(N_LATENTS):
            found = images.values_at(latent, np.array(places, dtype=np.int32))
            np.testing.assert_array_equal(found, dense[latent, places])


def test_an_index_finds_images_with_activations_and_label_shares(
    index: LatentIndex, dense: torch.Tensor
) -> None:
    counts = index.by_latent.counts
    one, other = int(np.argmax(counts)), int(np.argmin(np.abs(counts - 15)))
    level = round(float(dense[:, one].median()), 3)
    found = index.query(f"{one} > {level} AND not {other}")
    wanted = (dense[:, one] > level) & (dense[:, other] == 0)
    assert found.places.tolist() == wanted.nonzero().flatten().tolist() and len(found)
    assert found.latents == (one, other)
    np.testing.assert_array_equal(found.activations, dense[wanted][:, [one, other]].numpy())
    labels = [info.label for info in found.infos()]
    for share in found.labels:
        assert share.n == labels.count(share.label)
        assert share.share == pytest.approx(share.n / len(found))
        assert share.base_share == pytest.approx(12 / 36)
        assert share.lift == pytest.approx(share.share / share.base_share)
    assert sum(share.n for share in found.labels) == len(found)
    frame = found.to_pandas()
    assert frame["image"].tolist() == found.places.tolist()
    assert frame[f"latent_{one}"].tolist() == found.activations[:, 0].tolist()
    assert f"{len(found)} of 36 images" in repr(found)
    page = found._repr_html_()
    assert "<script>" not in page and "&lt;script&gt;" in page


def test_names_stand_for_their_latents_and_labels_for_their_images(index: LatentIndex) -> None:
    assert index.query('"anchor"').places.tolist() == index.query("3").places.tolist()
    cats = index.query("label == 'cat'").places
    assert [index.info(place).label for place in cats.tolist()] == ["cat"] * 12
    assert len(index.query("not label in ('cat', 'dog')")) == 12
    assert index.query("not 4").places.tolist() == [
        place for place in range(36) if place not in index.firing(4)[0]
    ]


def test_a_query_that_finds_nothing_is_whole(index: LatentIndex) -> None:
    found = index.query("4 and not 4")
    assert (len(found), found.labels, found.infos()) == (0, [], [])
    assert found.activations.shape == (0, 1) and len(found.to_pandas()) == 0
    assert "0 of 36 images" in repr(found) and "0 of 36" in found._repr_html_()


@pytest.mark.parametrize(
    ("text", "place", "words"),
    [
        ("", 1, "expected a latent"),
        ("12 > ", 6, "expected a value after `>`, found the end"),
        ("12 >> 5", 5, "found `>`"),
        ("12 > .5 an 97", 9, "expected `and`, `or` or the end, found `an`"),
        ("12 97", 4, "expected a comparison, `and`"),
        ("12 = 3", 4, "write `==`"),
        ("12 && 4", 4, "write `and`"),
        ("(12", 4, "or `)`, found the end"),
        ("12)", 3, "found `)`"),
        ("12 > 'a", 6, "no closing quote"),
        ("12 > 1e999", 6, "finite number"),
        ("12 > x", 6, "an activation after `>`"),
        ("12 in (3)", 8, "for labels"),
        ("12.5 > 3", 1, "whole number"),
        ("-3", 1, "whole number"),
        ("4 or 96", 6, "no latent 96; the index has 0 to 95"),
        ("4 §", 3, "`§` is neither"),
        ("foo > 3", 1, "expected a latent"),
        ('"stra" > 1', 1, "no latent is named 'stra'. Did you mean 'star'?"),
        ('4 and "star"', 7, "2 latents are named 'star' (5, 7); give a number"),
        ("label", 1, "compare a label by"),
        ("label > 'cat'", 9, "compare a label by"),
        ("label == cat", 10, "expected a label in quotes"),
        ("label == 'cta'", 10, "no image has the label 'cta'. Did you mean 'cat'?"),
        ("label in ()", 11, "expected a value"),
        ("(" * 70 + "4", 65, "more than 64 levels"),
    ],
)
def test_a_typo_gives_one_line_with_its_place(
    index: LatentIndex, text: str, place: int, words: str
) -> None:
    with pytest.raises(UserError) as caught:
        index.query(text)
    message = str(caught.value)
    assert message.startswith(f"Query, character {place}: ") and words in message
    assert "\n" not in message and len(message) < 300
    before, _, after = message.split(" In: ")[1].partition("^")
    assert text.endswith(after.removesuffix("…")) or "…" in after
    assert text[: place - 1].split() == before.split() or before.startswith("…")


def test_a_long_query_is_quoted_around_its_typo_only(index: LatentIndex) -> None:
    with pytest.raises(UserError) as caught:
        index.query(" and ".join(["1 > .5"] * 500) + " and 2 >> 3")
    assert len(str(caught.value)) < 200


def test_patches_of_an_image_are_those_where_the_query_holds(
    index: LatentIndex, sae: SparseAutoencoder, activations: TensorActivations
) -> None:
    gridded = replace(index, manifest=index.manifest | {"model": {"patch_grid": [4, 4]}})
    code = sae.encode(activations.x[5])
    values = code.dense()
    first, second = values.amax(0).argsort(descending=True)[:2].tolist()
    level = round(float(values[:, first].max()) / 2, 3)
    found = query_patches(gridded, f"{first} > {level} or ({second} and not {first})", code)
    wanted = (values[:, first] > level) | ((values[:, second] > 0) & (values[:, first] == 0))
    assert found.positions.tolist() == wanted.tolist() and 0 < wanted.sum() < len(wanted)
    assert found.grid is not None and found.grid.flatten().tolist() == wanted[1:].tolist()
    assert found.cells == [divmod(place, 4) for place in wanted[1:].nonzero().flatten().tolist()]
    np.testing.assert_array_equal(found.activations, values[:, [first, second]].numpy())
    with pytest.raises(UserError, match="patches have no labels"):
        index.query_patches("label == 'cat'", code)
    with pytest.raises(UserError, match="The code has 95 latents"):
        index.query_patches("1", replace(code, n_latents=95))


def test_patches_are_unknown_for_an_index_of_single_vectors(
    index: LatentIndex, sae: SparseAutoencoder, activations: TensorActivations
) -> None:
    manifest = index.manifest | {"tokens": "cls", "model": {"patch_grid": [4, 4]}}
    found = query_patches(replace(index, manifest=manifest), "1", sae.encode(activations.x[5, :1]))
    assert found.grid is None and found.cells == [] and len(found.positions) == 1


def test_a_filter_keeps_the_rows_for_which_it_holds(index: LatentIndex) -> None:
    rows = index.table.to_pylist()

    def kept(condition: str) -> list[int]:
        return index.where(condition)["latent"].to_pylist()

    middle = float(np.median(index.table["density"].to_numpy()))
    assert kept(f"density < {middle!r} and not name") == [
        row["latent"] for row in rows if row["density"] < middle and row["name"] is None
    ]
    assert kept("name in ('star', 'Anchor')") == [3, 5, 7]
    assert kept("name == 'star' or latent == 1") == [1, 5, 7]
    assert kept("top_label != 'cat'") == [
        row["latent"] for row in rows if row["top_label"] not in ("cat", None)
    ]
    assert kept("q50 <= max_activation") == [r["latent"] for r in rows if r["q50"] is not None]
    alive = next(row for row in rows if row["q50"] is not None)
    assert alive["latent"] in kept(f"q50 >= {alive['q50']:.7g}") or alive["latent"] in kept(
        f"q50 <= {alive['q50']:.7g}"
    )
    known = [row["latent"] for row in rows if row["moran"] is not None and row["moran"] > 0.1]
    assert kept("moran > .1") == known and len(kept("not moran > .1")) == 96 - len(known)


@pytest.mark.parametrize(
    ("condition", "place", "words"),
    [
        ("densty < 3", 1, "no column densty. Did you mean 'density'? Columns: latent, density"),
        ("density <", 10, "expected a value"),
        ("3 > density", 1, "expected a column"),
        ("density > 'a'", 11, "expected a number"),
        ("top_label == 3", 14, "expected a text in quotes"),
        ("top_label < 'a'", 13, "by `==`, `!=` or `in`"),
        ("density > top_label", 11, "expected a number"),
        ("histogram > 3", 1, "one list per latent"),
    ],
)
def test_a_filter_with_a_typo_gives_one_line_with_its_place(
    index: LatentIndex, condition: str, place: int, words: str
) -> None:
    with pytest.raises(UserError) as caught:
        index.where(condition)
    message = str(caught.value)
    assert message.startswith(f"Filter, character {place}: ") and words in message
    assert "\n" not in message


def test_an_index_of_version_1_names_the_command_that_upgrades_it(index: LatentIndex) -> None:
    old = replace(index, manifest=index.manifest | {"version": 1})
    with pytest.raises(UserError, match="sparsight index RUN --upgrade"):
        old.query("4")
    assert old.where("name == 'star'").num_rows == 2
