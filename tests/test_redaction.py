"""What is shown to others names no folder of this machine, in whatever spelling."""

from __future__ import annotations

import json
from urllib.parse import quote, urlencode

import pytest

from sparsight.redaction import without_folders, without_folders_in

NESTED = urlencode({"of": "written:attack?" + urlencode({"of": "/home/ada/photos[0:9]"})})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ada/photos", "photos"),
        ("/home/ada/photos/", "photos/"),
        ("/home/ada/my work/acts", "acts"),
        ("/home/ada", "~"),
        ("/home/ada/", "~/"),
        ("The folder /home/ada is full.", "The folder ~ is full."),
        ("/Users/Ada Lovelace/run", "run"),
        ("/export/home/ada", "~"),
        ("/root/acts", "acts"),
        ("~/photos", "photos"),
        ("~ada/work/photos", "photos"),
        (r"C:\Users\ada\acts", "acts"),
        (r"C:\Users\ada", "~"),
        (r"C:\Users\Ada Lovelace\My Documents\acts", "acts"),
        ("C:/Users/ada/acts", "acts"),
        (r"C:\\Users\\ada\\acts", "acts"),
        (r"\\server\ada\acts", "acts"),
        (r"\\?\C:\Users\ada\acts", "acts"),
        ("file:///home/ada/acts", "acts"),
        ("file:///home/ada", "~"),
        ("file://localhost/home/ada/acts", "acts"),
        ("file:///C:/Users/ada/acts", "acts"),
        ("webdataset:/data/ada/{00..12}.tar", "webdataset:{00..12}.tar"),
        ("webdataset:{/home/ada/a.tar,/home/ada/b.tar}", "webdataset:{a.tar,b.tar}"),
        ("webdataset:/home/ada/{a,b}/{00..12}.tar", "webdataset:{00..12}.tar"),
        ("webdataset:{/home/ada/{a,b}.tar,/home/ada/c.tar}", "webdataset:{{a,b}.tar,c.tar}"),
        ("webdataset:/home/ada/a.tar::/home/ada/b.tar", "webdataset:a.tar::b.tar"),
        ("parquet:/home/ada/x.parquet[0:10]", "parquet:x.parquet[0:10]"),
        ("/home/ada/photos?table=/home/ada/labels.csv[0:10]", "photos[0:10]"),
        ("/home/ada/photos/?table=~/labels.csv", "photos"),
        ("(/home/ada/photos?table=/home/ada/my labels.csv) is", "(photos) is"),
        ("open_clip:ViT-B-32//home/ada/weights.pt", "open_clip:ViT-B-32/weights.pt"),
        ("open_clip:ViT-B-32/~/weights.pt", "open_clip:ViT-B-32/weights.pt"),
        ("open_clip:ViT-B-32/C:/ada/weights.pt", "open_clip:ViT-B-32/weights.pt"),
        ("open_clip:local-dir:/home/ada/clip", "open_clip:local-dir:clip"),
        ("written:attack?of=%2Fhome%2Fada%2Fphotos&seed=3", "written:attack?of=photos&seed=3"),
        ("written:attack?of=%2Fhome%2Fada&seed=3", "written:attack?of=~&seed=3"),
        (
            "written:attack?of=webdataset%3A%2Fhome%2Fada%2Fa.tar&seed=3",
            "written:attack?of=webdataset%3Aa.tar&seed=3",
        ),
        (
            "written:attack?of=%2Fhome%2Fada%2Fphotos%3Ftable%3D%2Fhome%2Fada%2Fl.csv&seed=3",
            "written:attack?of=photos&seed=3",
        ),
        (
            f"written:attack?{NESTED}",
            "written:attack?of=written%3Aattack%3Fof%3Dphotos%255B0%253A9%255D",
        ),
        (quote(quote("/home/ada/x", safe=""), safe=""), "x"),
        (r"\/home\/ada\/acts", "acts"),
        (r"one\n/home/ada/acts", r"one\nacts"),
        ("&#x2F;home&#x2F;ada&#x2F;acts &sol;home&sol;ada", "acts ~"),
        ("a;/home/ada/acts", "a;acts"),
        ("it's '/home/ada/my acts and more/x'", "it's 'x'"),
        ("“/home/ada/it's mine/x”", "“x”"),
        ("Not read: /home/ada/acts, /home/ada/more.", "Not read: acts, more."),
        ("/home/ada/acts at blocks.9/resid", "acts at blocks.9/resid"),
        ("no images (/home/ada/photos) in a/b", "no images (photos) in a/b"),
        ("/data/year=2024/a,b/x", "x"),
        ("/a/b:/c/d", "b:d"),
        ("**/home/ada/x** -/home/ada/y", "**x** -y"),
        ("hf:///home/ada/x", "hf:x"),
        ("https://a.org/b,/home/ada/x", "https://a.org/b,x"),
        ('"/home/ada/photos?table=/home/ada/my labels.csv[0:10]"', '"photos[0:10]"'),
        ('store = "/home/ada/acts"\nout = "runs/x"', 'store = "acts"\nout = "runs/x"'),
        ("see https://a.org/?at=/home/ada/x", "see https://a.org/?at=x"),
    ],
)  # fmt: skip
def test_folders_are_left_out_in_every_spelling(text: str, shown: str) -> None:
    assert without_folders(text) == shown
    assert without_folders(shown) == shown
    for spelling in (json.dumps(text), json.dumps(json.dumps(text))):
        assert "home" not in without_folders(spelling) and "ada" not in without_folders(spelling)


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/org/name/blob/main/README.md",
        "[name](https://huggingface.co/org/name)",
        "s3://bucket/folder/file",
        "openai/clip-vit-base-patch32",
        "hf:org/name:train[0:100]",
        "open_clip:ViT-B-32/laion2b_s34b_b79k",
        "open_clip:hf-hub:org/name",
        "blocks.9/resid",
        "symbol/anchor and/or word/sun",
        "1/2 of 3/4 on 2026/11/30, 12/31",
        "approximately ~5/6",
        "image/png, image/svg+xml; text/html",
        "data:image/jpeg;base64,/9j/4AAQ/SkZJRg==",
        "runs/x/blocks.9.resid_post",
        "../other/runs/x",
        "photos/**/x.jpg",
        "N / M, either / or",
        "</b></i>",
        r"photos\[0:64\] \| \`sun\`",
        "calibration:2000:1",
        "written:word?of=calibration%3A40%3A7&seed=0",
        "100 % of 5/6",
        "(x)/(y)/z",
        "/photos",
        "",
    ],
)
def test_what_is_not_a_path_of_this_machine_stays(text: str) -> None:
    assert without_folders(text) == text


def test_nested_values_are_cleaned_with_their_keys() -> None:
    found = without_folders_in({"/home/ada/a": ["~/b", 3, None], "c": {"d": ("/home/ada",)}})
    assert found == {"a": ["b", 3, None], "c": {"d": ["~"]}}
