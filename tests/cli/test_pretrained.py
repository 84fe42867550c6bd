"""The table of published autoencoders, and the verb that prints it."""

from __future__ import annotations

import json
import re

import pytest

from sparsight.cli import main
from sparsight.formats import FORMATS
from sparsight.formats.pretrained import OTHER, published


def rows(capsys, *filters: str) -> list[dict]:
    assert main(["pretrained", "--json", *filters]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_row_names_its_source_and_a_known_format():
    known = {each.name for each in FORMATS} | {OTHER}
    ids = [row.id for row in published()]
    assert len(ids) == len(set(ids)) > 60
    for row in published():
        assert row.source and row.model, row.id
        assert row.format in known, row.id
        assert re.match(r"^[\w.-]+/[\w.-]+(/.+)?$", row.id), row.id
        assert row.tokens in (None, "all", "cls", "patches"), row.id
        site = r"^(embedding|blocks\.(\d+|\{[\d,]+\})\.(resid_post|mlp_out))$"
        assert row.site is None or re.match(site, row.site), row.id


def test_filters_narrow_the_table(capsys):
    everything = rows(capsys)
    assert [row["id"] for row in everything] == [row.id for row in published()]
    scope = rows(capsys, "--model", "clip-vit-l-14-LAION")
    assert {row["format"] for row in scope} == {"clipscope"} and len(scope) == 8
    assert scope[-1]["id"] == "lewington/CLIP-ViT-L-scope/22_resid/1200013184.pt"
    assert scope[-1]["licence"] == "cc-by-4.0" and scope[-1]["k"] == 32
    embedding = rows(capsys, "--site", "embedding", "--format", "msae")
    assert [row["id"] for row in embedding] == ["WolodjaZ/MSAE"]


def test_the_table_is_printed_by_model_with_ids_that_can_be_copied(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    assert main(["pretrained", "--format", "prisma"]) == 0
    shown = capsys.readouterr().out
    lines = [line.strip() for line in shown.splitlines()]
    assert lines[0] == "open_clip:hf-hub:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K"
    ids = [row.id for row in published() if row.format == "prisma"]
    assert [line for line in lines if line.startswith("Prisma-Multimodal/")] == ids
    assert f"{len(ids)} entries." in shown


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (("--model", "resnet"), "No published SAE has the model 'resnet'; there is laion/"),
        (("--format", "SAEV"), "the format 'SAEV'; there is clipscope, prisma"),
        (("--model", "laion", "--site", "embedding"), "the site 'embedding'; there is blocks.2."),
    ],
)
def test_the_message_about_a_filter_without_matches_lists_what_exists(filters, message, capsys):
    assert main(["pretrained", *filters]) == 2
    assert message in capsys.readouterr().err
