"""Words on pictures: where and how they were asked for, and the same every time."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from picture_files import pixels, write_picture
from PIL import Image

from sparsight.errors import UserError
from sparsight.images import (
    ImageError,
    ImageSource,
    TextStyle,
    WorldBand,
    WrittenImages,
    WrittenScenes,
    load_batches,
    open_images,
    write_on_image,
    written,
)
from sparsight.images.writing import KINDS

GREY = Image.new("RGB", (200, 120), (128, 128, 128))


def touched(image: Image.Image, plain: Image.Image = GREY) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what differs."""
    rows, columns = np.nonzero((pixels(image) != pixels(plain)).any(axis=-1))
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1


@pytest.fixture
def photos(tmp_path: Path) -> ImageSource:
    for label in ("cat", "hot_dog", "zebra"):
        for number in range(4):
            write_picture(tmp_path / label / f"{number}.png", 10 * len(label) + number, 160, 120)
    (tmp_path / "captions.csv").write_text("file,caption\ncat/0.png,a cat that sits\n")
    return open_images(tmp_path)


@pytest.mark.parametrize(
    "place, where",
    [
        ("top-left", (0.0, 0.0)),
        ("top", (0.5, 0.0)),
        ("right", (1.0, 0.5)),
        ("centre", (0.5, 0.5)),
        ("bottom-right", (1.0, 1.0)),
    ],
)
def test_a_word_stands_where_it_is_put(place: str, where: tuple[float, float]) -> None:
    left, top, right, bottom = touched(write_on_image(GREY, "word", TextStyle(place=place)))
    width, height = right - left, bottom - top
    assert abs(left - where[0] * (GREY.width - width)) <= 6
    assert abs(top - where[1] * (GREY.height - height)) <= 6


def test_an_explicit_place_is_the_middle_of_the_word_and_stays_inside() -> None:
    left, top, right, bottom = touched(write_on_image(GREY, "word", TextStyle(place="0.3,0.6")))
    assert abs((left + right) / 2 - 60) <= 3 and abs((top + bottom) / 2 - 72) <= 4
    left, top, *_ = touched(write_on_image(GREY, "word", TextStyle(place="0,0")))
    assert left <= 4 and top <= 6


def test_size_is_a_share_of_the_shorter_side() -> None:
    def height(size: float, picture: Image.Image) -> int:
        _, top, _, bottom = touched(write_on_image(picture, "H", TextStyle(size=size)), picture)
        return bottom - top

    assert height(0.4, GREY) / height(0.2, GREY) == pytest.approx(2, rel=0.1)
    large = GREY.resize((600, 360))
    assert height(0.2, large) / height(0.2, GREY) == pytest.approx(3, rel=0.1)


def test_colour_band_and_opacity_are_what_is_seen() -> None:
    style = TextStyle(colour="red", band="#0000ff", size=0.3)
    seen = {tuple(row) for row in pixels(write_on_image(GREY, "I", style)).reshape(-1, 3).tolist()}
    assert {(255, 0, 0), (0, 0, 255)} <= seen
    half = write_on_image(GREY, "I", TextStyle(colour="red", opacity=0.5, size=0.3))
    assert [192, 64, 64] in (pixels(half).reshape(-1, 3) // 2 * 2).tolist()


def test_an_outline_runs_round_the_letters_alone() -> None:
    plain = pixels(write_on_image(GREY, "word", TextStyle(colour="white", size=0.3)))
    edged = pixels(
        write_on_image(GREY, "word", TextStyle(colour="white", outline="auto", size=0.3))
    )
    inside = (plain == 255).all(axis=-1)
    assert (edged[inside] >= 250).all()
    around = (edged == 0).all(axis=-1)
    assert 0 < around.sum() < 4 * inside.sum() and not (around & inside).any()


def test_letters_stand_out_from_what_is_under_them_by_themselves() -> None:
    for ground, letters in ((20, 255), (230, 0)):
        picture = Image.new("RGB", (200, 120), (ground,) * 3)
        found = pixels(write_on_image(picture, "word", TextStyle()))
        assert letters in found and 255 - letters not in found
        banded = pixels(write_on_image(picture, "word", TextStyle(band="auto")))
        assert 0 in banded and 255 in banded


def test_a_turned_word_is_as_high_as_it_was_wide() -> None:
    left, top, right, bottom = touched(write_on_image(GREY, "words", TextStyle()))
    turned = touched(write_on_image(GREY, "words", TextStyle(rotation=90)))
    assert (turned[3] - turned[1], turned[2] - turned[0]) == (right - left, bottom - top)


def test_a_word_that_is_too_wide_is_written_smaller_or_refused() -> None:
    long = "supercalifragilistic"
    left, _, right, _ = touched(write_on_image(GREY, long, TextStyle(size=0.3)))
    assert left >= 0 and right <= GREY.width and right - left > 0.8 * GREY.width
    with pytest.raises(ImageError, match=r"'supercali.*' does not fit 200 × 120 .* at size 36 px$"):
        write_on_image(GREY, long, TextStyle(size=0.3, fit="refuse"))
    with pytest.raises(ImageError, match="nor down to 6 px"):
        write_on_image(GREY, long * 9, TextStyle())


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"size": 0.0}, "size is 0.0; it must be above 0"),
        ({"opacity": 1.5}, "opacity is 1.5"),
        ({"place": "middle"}, "place is 'middle'; expected random, top-left, .* or X,Y"),
        ({"place": "1.2,0"}, "between 0 and 1"),
        ({"colour": "reddish"}, "colour is 'reddish'; expected auto, a colour name or #rrggbb"),
        ({"band": "chequered"}, "band is 'chequered'; expected auto, none"),
        ({"font": "comic"}, "font is 'comic'; expected 'sans'"),
        ({"tilt": -3.0}, "tilt is -3.0"),
    ],
)
@pytest.mark.unchecked
def test_a_style_that_cannot_be_drawn_is_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TextStyle(**wrong)


def test_a_text_of_no_letters_or_several_lines_is_refused() -> None:
    for text in ("", "  ", "two\nlines"):
        with pytest.raises(UserError, match="cannot be written"):
            write_on_image(GREY, text, TextStyle())


def test_pairs_have_the_words_of_other_classes_of_their_own_and_of_none(
    photos: ImageSource,
) -> None:
    kinds = {kind: written(photos, kind) for kind in KINDS}
    names = {"cat", "hot dog", "zebra"}
    for i in range(len(photos)):
        own = (photos.info(i).label or "").replace("_", " ")
        assert kinds["clean"].text(i) is None
        assert kinds["same"].text(i) == own
        word, nonsense = kinds["attacked"].text(i), kinds["control"].text(i)
        assert word in names - {own}
        assert nonsense is not None and word is not None
        assert [len(part) for part in nonsense.split(" ")] == [len(p) for p in word.split(" ")]
        assert nonsense.replace(" ", "") not in {name.replace(" ", "") for name in names}
        assert set(nonsense) <= set("cathotdogzebra ")
        for kind, source in kinds.items():
            assert source.info(i) == photos.info(i)
            same = (pixels(source.load(i)) == pixels(photos.load(i))).all()
            assert same == (kind == "clean")
    assert kinds["attacked"].info(0).caption == "a cat that sits"


def test_kinds_differ_in_the_letters_alone(photos: ImageSource) -> None:
    style = TextStyle(font="mono", band="yellow", size=0.1)
    attacked, control = (written(photos, kind, style) for kind in ("attacked", "control"))
    for i in range(len(photos)):
        boxes = [touched(each.load(i), photos.load(i)) for each in (attacked, control)]
        assert np.abs(np.subtract(*boxes)).max() <= 2


def test_an_anagram_has_the_letters_of_the_word(photos: ImageSource) -> None:
    attacked, control = (
        written(photos, kind, nonsense="anagram") for kind in ("attacked", "control")
    )
    for i in range(len(photos)):
        word, other = attacked.text(i), control.text(i)
        assert word != other and sorted(word or "") == sorted(other or "")


def test_the_same_seed_writes_the_same_in_any_process_and_another_does_not(
    photos: ImageSource,
) -> None:
    one, again = written(photos, "attacked", seed=3), written(photos, "attacked", seed=3)
    other = written(photos, "attacked", seed=4)
    copy = pickle.loads(pickle.dumps(one))
    texts = [one.text(i) for i in range(12)]
    assert texts == [again.text(i) for i in range(12)] == [copy.text(i) for i in range(12)]
    assert texts != [other.text(i) for i in range(12)]
    assert (pixels(one.load(5)) == pixels(copy.load(5))).all()
    assert one.fingerprint() == again.fingerprint() == copy.fingerprint() != other.fingerprint()


def test_what_is_written_on_an_image_does_not_depend_on_its_neighbours(photos: ImageSource) -> None:
    whole, part = written(photos, "attacked"), written(photos.select([7, 2]), "attacked")
    whole_of = {whole.info(i).id: whole.text(i) for i in range(len(whole))}
    for i in range(2):
        # The labels of a selection are fewer: these two classes alone.
        assert part.text(i) in {"cat", "hot dog"}
    names = {"cat": "cat", "hot_dog": "hot dog", "zebra": "zebra"}
    part = written(photos.select([7, 2]), "attacked", class_names=names)
    assert [part.text(i) for i in range(2)] == [whole_of[part.info(i).id] for i in range(2)]


@pytest.mark.parametrize(
    "style",
    [None, TextStyle(), TextStyle(place="0.2,0.8", colour="#12ab34", tilt=20.0, font="serif")],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_spec_opens_the_same_images_again(photos: ImageSource, kind: str, style: object) -> None:
    names = {"cat": "tom & jerry = 2", "zebra": "stripy horse"}
    source = written(photos, kind, style, seed=5, n=6, nonsense="anagram", class_names=names)
    again = open_images(source.spec)
    assert (again.spec, again.fingerprint()) == (source.spec, source.fingerprint())
    assert [again.info(i) for i in range(6)] == [source.info(i) for i in range(6)]
    assert (pixels(again.load(3)) == pixels(source.load(3))).all()
    view = open_images(source.select([4, 1]).spec)
    assert view.info(0) == source.info(4)


def test_a_fingerprint_tells_kinds_styles_and_names_apart(photos: ImageSource) -> None:
    made = [
        *(written(photos, kind) for kind in KINDS),
        written(photos, "attacked", TextStyle(size=0.2)),
        written(photos, "attacked", class_names={"cat": "cat", "zebra": "pony"}),
    ]
    assert len({each.fingerprint() for each in made}) == len(made)


def test_images_without_a_class_are_left_out_and_counted(tmp_path: Path) -> None:
    write_picture(tmp_path / "stray.png")
    for label in ("cat", "dog"):
        write_picture(tmp_path / label / "0.png")
    source = written(open_images(tmp_path), "attacked")
    assert [source.info(i).label for i in range(len(source))] == ["cat", "dog"]
    assert "1 of 3 images have no label among the classes" in source.notes[-1]


def test_one_class_or_no_labels_cannot_be_attacked(tmp_path: Path) -> None:
    write_picture(tmp_path / "0.png")
    with pytest.raises(UserError, match="0 classes; a word of another class needs two"):
        written(open_images(tmp_path), "attacked")
    with pytest.raises(UserError, match="none of its 1 images has a label among the 2 classes"):
        written(open_images(tmp_path), "attacked", class_names={"a": "a", "b": "b"})


def test_a_name_in_letters_that_the_font_lacks_is_refused(tmp_path: Path) -> None:
    for label in ("cat", "犬"):
        write_picture(tmp_path / label / "0.png")
    with pytest.raises(UserError, match="font sans-bold has no '犬'"):
        written(open_images(tmp_path), "attacked")
    names = {"cat": "cat", "犬": "señor dog"}
    assert len(written(open_images(tmp_path), "attacked", class_names=names)) == 2


def test_an_image_too_small_for_its_word_is_a_failure_with_its_reason(tmp_path: Path) -> None:
    for label in ("cat", "rhinoceros"):
        write_picture(tmp_path / label / "0.png", width=32, height=24)
    source = written(open_images(tmp_path), "attacked", TextStyle(size=0.4))
    (batch,) = load_batches(source, _to_tensor, 2, workers=0)
    assert [(index, reason[:34]) for index, reason in batch.failures] == [
        (0, "the text 'rhinoceros' does not fit")
    ]


def _to_tensor(image: Image.Image) -> object:
    import torch

    return torch.from_numpy(np.array(image))


def test_scenes_get_the_worlds_own_band_and_keep_their_truth() -> None:
    scenes = open_images("calibration:20:3:single")
    source = written(scenes, "attacked")
    assert isinstance(source, WrittenScenes) and isinstance(source.style, WorldBand)
    again = open_images(source.spec)
    assert isinstance(again, WrittenScenes)
    for i in range(5):
        scene, truth = source.scene(i), scenes.scene(i)
        assert scene.objects == truth.objects and truth.writing is None
        assert scene.writing is not None and scene.writing.text == source.text(i) != truth.label
        rendered = again.render(i)
        assert rendered.mask("word", str(source.text(i))).any()
        assert (pixels(source.load(i)) == np.asarray(rendered.image)).all()


def test_what_the_world_itself_wrote_gives_way() -> None:
    scenes = open_images("calibration:60:3")
    by_world = [i for i in range(60) if scenes.scene(i).writing is not None]
    clean, attacked = (written(scenes, kind) for kind in ("clean", "attacked"))
    for i in by_world:
        assert clean.scene(i).writing is None
        assert attacked.scene(i).writing.text == attacked.text(i)


def test_scenes_may_be_written_on_like_photos() -> None:
    scenes = open_images("calibration:20:3:single")
    source = written(scenes, "attacked", TextStyle(size=0.2))
    assert type(source) is WrittenImages
    assert type(open_images(source.spec)) is WrittenImages
    assert (pixels(source.load(0)) != pixels(scenes.load(0))).any()


def test_the_worlds_band_is_for_its_scenes_alone(photos: ImageSource) -> None:
    with pytest.raises(UserError, match="works on calibration scenes only"):
        written(photos, "attacked", WorldBand())


@pytest.mark.parametrize(
    "spec, message",
    [
        ("written:attacked", "expected 'written:KIND"),
        ("written:defaced?of=calibration", "KIND one of clean, attacked, same, control"),
        ("written:attacked?seed=0", "names no source"),
        ("written:attacked?of=calibration&sise=0.2", "unknown 'sise'. Known: band, colour"),
        ("written:attacked?of=calibration&size=big", "size is 'big'; expected a number"),
        ("written:attacked?of=calibration&seed=-1", "seed is -1"),
        ("written:attacked?of=calibration&n=0", "n is 0"),
        ("written:attacked?of=calibration&classes=[1]", "not a JSON object"),
        ("written:attacked?of=calibration&nonsense=noise", "expected letters or anagram"),
        ("written:attacked?of=calibration&style=world", "style is 'world'"),
        ("written:attacked?of=nowhere/at/all", "nowhere/at/all: no such folder"),
    ],
)
@pytest.mark.unchecked
def test_a_spec_that_cannot_be_written_says_why(spec: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_images(spec)
