from __future__ import annotations

import pytest
from transformers import CLIPModel

from sparsight.cli.main import main
from sparsight.vision import load_model


def test_an_exported_clip_loads_back_unchanged(tmp_path, capsys):
    assert main(["export", "calibration", "--out", str(tmp_path / "hf")]) == 0
    told = capsys.readouterr().out
    assert "calibration → huggingface" in told
    assert "embeddings differ by 0.0e+00" in told
    assert CLIPModel.from_pretrained(tmp_path / "hf").config.text_config.eos_token_id == 1
    file = str(tmp_path / "gmp.safetensors")
    assert main(["export", str(tmp_path / "hf"), "--layout", "openai", "--gmp", "--out", file]) == 0
    assert "4 heads in the text tower" in capsys.readouterr().err
    again = str(tmp_path / "again")
    given = ["--tokenizer", str(tmp_path / "hf"), "--dtype", "float16"]
    assert main(["export", file, "--out", again, *given]) == 0
    one, two = (load_model(name, device="cpu") for name in ("calibration", again))
    assert one.preprocessing == two.preprocessing
    assert (one.embed_texts(["a sun"]) - two.embed_texts(["a sun"])).abs().max() < 1e-4


def test_longer_texts_are_an_option(tmp_path, capsys):
    out = str(tmp_path / "long")
    assert main(["export", "calibration", "--positions", "68", "--out", out]) == 0
    assert load_model(out, device="cpu").context_length == 68
    config = tmp_path / "export.toml"
    config.write_text('model = "calibration"\npositions = 100\n')
    assert main(["export", "--config", str(config), "--out", str(tmp_path / "x")]) == 2
    assert "44, 56, 68" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "No model is given"),
        (["calibration"], "No destination is given"),
        (["calibration", "--out", "{}", "--gmp"], "only the openai layout"),
        (["calibration", "--out", "{}", "--dtype", "int8"], "int8"),
        (["calibration", "--out", "{}.pt", "--layout", "openai"], "Write .safetensors"),
        (["calibration", "--out", "{}.pt"], "only the openai layout can be a single file"),
        (["missing.pt", "--out", "{}"], "this file does not exist"),
        (["calibration", "--out", "{}", "--kept", "10"], "--kept needs --positions"),
    ],
)
def test_mistakes_give_one_message_and_exit_code_2(arguments, message, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["export", *(each.format(out) for each in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
