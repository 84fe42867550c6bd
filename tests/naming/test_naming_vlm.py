from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from latent_parts import TensorActivations, make_sae
from naming_parts import planted_colours
from sparsight.calibration.symbols import COLOUR_VALUES, COLOURS
from sparsight.cli import main
from sparsight.errors import SparsightError, UserError
from sparsight.latents import LatentIndex, build_index
from sparsight.naming import name_latents
from sparsight.naming.names_file import NameTable
from sparsight.naming.vlm import (
    CELL,
    FAILURES_IN_A_ROW,
    Answers,
    ask_about_latents,
    grid_places,
    image_grid,
    shown_places,
)
from sparsight.naming.vlm_answers import NONE, PHRASE, AnswerFile, parse_answer
from sparsight.naming.vlm_client import KEY_VARIABLE, AskFailure, VlmClient, VlmSettings
from sparsight.sae import SparseAutoencoder
from sparsight.vision import VisionModel
from sparsight.vision.passes import PassSettings
from vlm_server import Question, Reply, VlmServer, says, vlm_server

N_IMAGES, N_LATENTS = 160, 320
PLANTED = ("purple", "green", "teal", "yellow")
KEY = "sk-very-secret-17"


@dataclasses.dataclass
class Parts:
    model: VisionModel
    activations: TensorActivations
    sae: SparseAutoencoder
    run: Path


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Parts:
    """An untrained SAE with four latents that see the colour of the background."""
    model, _, activations, sae = planted_colours(N_IMAGES, N_LATENTS, PLANTED)
    run = tmp_path_factory.mktemp("run")
    sae.save_pretrained(run)
    build_index(sae, activations, out=run / "index", quiet=True)
    return Parts(model, activations, sae, run)


@pytest.fixture
def index(parts: Parts, tmp_path: Path) -> LatentIndex:
    """The index in a run folder that has no answers yet."""
    import shutil

    shutil.copytree(parts.run, tmp_path / "run")
    return LatentIndex.open(tmp_path / "run")


def settings(server: VlmServer, **options: object) -> VlmSettings:
    return VlmSettings(server.url, "see-7b", **{"pause": 0.01, "timeout": 20, **options})  # type: ignore[arg-type]


def sees_background(question: Question, number: int) -> Reply:
    """Answer with the colour that fills most of the first grid; look at its images for it."""
    first, second = question.grids
    assert first.width == second.width > 3 * CELL
    pixels = np.asarray(first.convert("RGB"), dtype=np.float32).reshape(-1, 3)
    other = np.asarray(second.convert("RGB"), dtype=np.float32).reshape(-1, 3)
    names = list(COLOURS)
    centres = np.array([_rgb(name) for name in names], dtype=np.float32)

    def shares(points: np.ndarray) -> np.ndarray:
        nearest = ((points[::37, None] - centres) ** 2).sum(axis=2).argmin(axis=1)
        return np.bincount(nearest, minlength=len(names)) / len(nearest)

    return says(f"{names[int((shares(pixels) - shares(other)).argmax())]} background")


def _rgb(name: str) -> tuple[int, ...]:
    value = COLOUR_VALUES[name]
    return tuple(int(each) for each in value)


def test_phrases_from_images_become_names_where_they_hold_on_images_not_shown(
    parts: Parts, index: LatentIndex
) -> None:
    with vlm_server(sees_background) as server:
        result = name_latents(
            index, parts.sae, parts.activations, by=["vlm"], model=parts.model, false_names=0.1,
            vlm=settings(server, latents=60), settings=PassSettings(32, 0),
        )  # fmt: skip
    rows = NameTable.of(result.index).rows.to_pylist()
    assert [row["name"] for row in rows[:4]] == [f"{colour} background" for colour in PLANTED]
    assert sum(row["accepted"] for row in rows[:4]) >= 3
    assert np.mean([row["accepted"] for row in rows[4:]]) < 0.2
    assert result.null is not None and result.null.measured < 0.2
    assert result.answers is not None and len(result.answers.answers) == len(server.questions)
    about = NameTable.of(result.index).about["vlm"]
    assert about["vocabulary"]["name"] == "vlm:see-7b"
    assert about["vocabulary"]["n_words"] == len(result.answers.phrases)
    assert "none" in result.answers.notes()[0]


def test_the_grids_show_the_strongest_images_of_one_half_and_some_without_the_latent(
    index: LatentIndex,
) -> None:
    shown = shown_places(index, 3)
    assert shown.sum() == N_IMAGES // 2
    for latent in (0, 40):
        firing, silent = grid_places(index, shown, latent, 3)
        places, values = index.firing(latent)
        strength = dict(zip(places.tolist(), values.tolist(), strict=True))
        own = sorted((-strength[p], p) for p in strength if shown[p])
        assert [strength[int(place)] for place in firing] == [-each[0] for each in own[:9]]
        assert len(silent) == 9 and shown[silent].all() and not set(silent) & set(strength)
        again = grid_places(index, shown, latent, 3)
        assert np.array_equal(silent, again[1])


def test_a_grid_keeps_each_image_whole() -> None:
    images = [Image.new("RGB", (400, 100), "red"), Image.new("L", (20, 40), 0)]
    grid = image_grid(images)
    red, black = (
        (np.abs(np.asarray(grid, dtype=int) - colour).sum(axis=2) < 30).sum()
        for colour in ((255, 0, 0), (0, 0, 0))
    )
    assert red == pytest.approx(CELL * CELL / 4, rel=0.03)
    assert black == pytest.approx(CELL * CELL / 2, rel=0.03)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yellow flower centre", (PHRASE, "yellow flower centre")),
        (' "Hedgehog  spines." \n', (PHRASE, "Hedgehog spines")),
        ("the word “pen”", (PHRASE, "the word “pen”")),
        ("None.", (NONE, None)),
        ("", ("empty", None)),
        ("...", ("empty", None)),
        ("a\nb", ("several lines", None)),
        ("<html>no</html>", ("markup", None)),
        ("**wheels**", ("markup", None)),
        ("I'm sorry, I can’t help with that", ("a refusal", None)),
        ("I’m sorry", ("a refusal", None)),
        ("a\x00b", ("not printable", None)),
        ("one two three four five six seven eight nine",
         ("longer than 8 words or 100 characters", None)),
        ("x" * 101, ("longer than 8 words or 100 characters", None)),
    ],
)  # fmt: skip
def test_an_answer_is_one_short_line_or_says_why_it_is_no_phrase(
    text: str, expected: tuple[str, str | None]
) -> None:
    assert parse_answer(text) == expected


def test_useless_answers_and_failures_are_counted_by_kind(index: LatentIndex) -> None:
    replies = [
        says("red fin"), says("two\nlines"), says(""), says(None), says("none"), says("Red fin"),
        Reply(b"<html>hello</html>"), Reply(b'{"choices": []}'), says([1]), Reply(closes=True),
        says("blue fin"), Reply(late=0.6), Reply(b'{"error": {"message": "no such"}}', 404),
    ]  # fmt: skip
    with vlm_server(lambda question, number: replies[number]) as server:
        found = ask_about_latents(
            index, settings(server, latents=len(replies), tries=1, timeout=0.4), quiet=True
        )
    assert found.phrases in (["red fin", "blue fin"], ["blue fin", "red fin"],
                             ["Red fin", "blue fin"], ["blue fin", "Red fin"])  # fmt: skip
    assert len(found.without_name) == 1
    assert found.notes()[1] == "vlm: 3 answers were not a phrase: 2 empty, 1 several lines"
    assert found.failures == {
        "the response was not JSON": 1,
        "the response had no choices[0].message.content": 1,
        "the response had no text in choices[0].message.content": 1,
        "the connection broke off": 1,
        "no answer within 0.4 s": 1,
        "HTTP 404": 1,
    }
    assert found.notes()[2].startswith("vlm: 6 questions got no answer: 1 HTTP 404, ")


def test_a_rerun_asks_only_what_was_not_answered_even_after_a_kill(index: LatentIndex) -> None:
    path = index.folder.parent / "naming-answers.jsonl"

    def killed_at_the_fourth(question: Question, number: int) -> Reply:
        return says("long\nstory") if number == 1 else says(f"thing {number}")

    with vlm_server(killed_at_the_fourth) as server:
        ask_about_latents(index, settings(server, latents=4), quiet=True)
        assert len(server.questions) == 4
    whole = path.read_bytes()
    path.write_bytes(whole[:-9])  # the last answer was cut off
    assert len(AnswerFile(path).read()) == 3
    with vlm_server(lambda question, number: says("thing 3")) as server:
        found = ask_about_latents(index, settings(server, latents=4), quiet=True)
        assert len(server.questions) == found.asked == 1
        assert path.read_bytes() == whole
        ask_about_latents(index, settings(server, latents=4), quiet=True)
        assert len(server.questions) == 1
        other = dataclasses.replace(settings(server, latents=4), model="see-8b")
        ask_about_latents(index, other, quiet=True)
        assert len(server.questions) == 5
        more = ask_about_latents(index, settings(server, latents=6), quiet=True)
        assert more.asked == 2 and len(more.answers) == 6


def test_a_damaged_line_of_answers_is_named(index: LatentIndex) -> None:
    path = index.folder.parent / "naming-answers.jsonl"
    path.write_text('{"latent": 3}\n')
    with pytest.raises(SparsightError, match=r"naming-answers.jsonl, line 1: is no answer"):
        AnswerFile(path).read()


def test_a_busy_address_is_asked_again_and_a_dead_one_given_up(
    index: LatentIndex, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)

    def busy(question: Question, number: int) -> Reply:
        if number % 3 == 2:
            return says("red fin")
        return Reply(closes=True) if number % 3 else Reply(status=500)

    with vlm_server(busy) as server:
        found = ask_about_latents(index, settings(server, latents=2), quiet=True)
        assert found.phrases == ["red fin"] and len(server.questions) == 6
    denied = Reply(f'{{"error": {{"message": "bad key {KEY}"}}}}'.encode(), 401)
    with vlm_server(lambda question, number: denied) as server:
        with pytest.raises(UserError) as refused:
            ask_about_latents(index, settings(server, latents=9), seed=1, quiet=True)
        assert len(server.questions) == FAILURES_IN_A_ROW
    message = str(refused.value)
    assert server.url in message and "HTTP 401 (bad key ***)" in message and KEY not in message
    with pytest.raises(UserError, match=r"no connection \(.*[Rr]efused"):
        ask_about_latents(index, settings(server, latents=9), seed=1, quiet=True)


def test_a_redirect_takes_neither_images_nor_key_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with vlm_server(lambda question, number: says("x")) as other:
        moved = Reply(status=307, headers={"Location": f"{other.url}/chat/completions"})
        with vlm_server(lambda question, number: moved) as server:
            with pytest.raises(AskFailure, match="HTTP 307"):
                VlmClient(settings(server)).ask([{"type": "text", "text": "?"}])
            assert server.questions[0].authorization == f"Bearer {KEY}"
        assert not other.questions


def test_the_key_is_in_no_file_and_no_message(
    parts: Parts,
    index: LatentIndex,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    run = index.folder.parent

    def repeats(question: Question, number: int) -> Reply:
        assert question.authorization == f"Bearer {KEY}"
        return says(f"key {KEY}") if number == 0 else says(f"{PLANTED[number % 4]} background")

    with vlm_server(repeats) as server:
        assert KEY not in repr(settings(server))
        arguments = f"name {run} --by vlm --vlm-url {server.url} --vlm-model see-7b --vlm-latents 6"
        code = main([*arguments.split(), "--false-names", "0.1", "--device", "cpu"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "asked about 6 latents" in said.out and "1 repeating the key" in said.out
    assert "vlm: " in said.out and KEY not in said.out + said.err
    for path in run.rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("file:///etc/passwd", "is no http or https address"),
        ("localhost:8000/v1", "is no http or https address"),
        ("http://user:pw@localhost/v1", "must not contain a user name"),
        ("http://[::1/v1", "is no address"),
        ("http://localhost/v1?x=1", "give the plain address"),
        ("http://example.org/v1", "is not encrypted"),
    ],
)
def test_addresses_that_are_none_or_would_show_the_key_are_refused(
    url: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with pytest.raises(UserError, match=words) as refused:
        VlmSettings(url, "m")
    assert KEY not in str(refused.value) and "pw" not in str(refused.value).split("passwd")[0]
    assert VlmSettings("https://example.org/v1", "m").key == KEY
    assert VlmSettings("http://[::1]:8000/v1", "m").is_local
    monkeypatch.delenv(KEY_VARIABLE)
    assert VlmSettings("http://example.org/v1", "m").key is None


def test_what_is_missing_is_said_before_anything_is_asked(
    parts: Parts, index: LatentIndex, capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(index.folder.parent)
    assert main(["name", run, "--by", "vlm"]) == 2
    assert "need --vlm-url" in capsys.readouterr().err
    assert main(["name", run, "--vlm-model", "m"]) == 2
    assert "--vlm-model is for names `--by vlm`" in capsys.readouterr().err
    with vlm_server(lambda question, number: says("x")) as server:
        with pytest.raises(UserError, match="has a text tower; give --text-model"):
            name_latents(index, parts.sae, parts.activations, by=["vlm"], vlm=settings(server))
        assert not server.questions


def test_no_phrase_at_all_is_one_clear_line(index: LatentIndex) -> None:
    with (
        vlm_server(lambda question, number: says("none")) as server,
        pytest.raises(UserError, match=r"has proposed no phrase. .*7 times none"),
    ):
        ask_about_latents(index, settings(server, latents=7), quiet=True)


def test_a_latent_without_anything_in_common_gets_no_name(parts: Parts, index: LatentIndex) -> None:
    from naming_parts import space_of
    from sparsight.naming.scores import LatentActivations
    from sparsight.naming.vlm import VlmCorrelation
    from sparsight.naming.vlm_answers import Answer

    shown = shown_places(index, 0)
    said = [Answer("s", "i", 0, 2, "m", 1, NONE), Answer("s", "i", 0, 1, "m", 1, PHRASE, "sun")]
    answers = Answers("m", tuple(said), {}, 2, shown)
    space = space_of(N_IMAGES)
    method = VlmCorrelation(space, ["sun"], torch.eye(6)[:1], torch.zeros(6), answers, parts.sae)
    assert set(method.space.places) == set(np.nonzero(~shown)[0])
    rows = LatentActivations(parts.sae, np.arange(N_LATENTS), index.by_latent)
    assert method.candidates(rows).word[:4, 0].tolist() == [0, 0, -1, 0]
    other = LatentActivations(make_sae(192, N_LATENTS), np.arange(N_LATENTS), index.by_latent)
    assert method.candidates(other).word[2, 0] == 0
