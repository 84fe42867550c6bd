from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from exchange import D, K, N, trained_like, vectors
from malicious_pickle import Opens
from sparsight.errors import SparsightError, UserError
from sparsight.formats import FORMATS, find, read
from sparsight.formats.base import Candidate, Format
from sparsight.sae import SAEConfig, SparseAutoencoder, TopK
from sparsight.sae.files import save

WRITTEN = [each.name for each in FORMATS if each.can_save]
PLAIN = ["dictionary_learning", "overcomplete", "saelens", "sparsify", "visaebench"]
"""Formats with a configuration in JSON, and tensors at the top of a file."""


def _sae(name: str) -> SparseAutoencoder:
    """One that the format can hold: not all have both biases, or drop negative values."""
    signed = name in ("clipscope", "saev")
    sae = trained_like(SAEConfig(N, sparsity=TopK(K, rectify=not signed), normaliser="none"), 0)
    if name == "overcomplete":
        sae.b_dec.zero_()
    if name == "clipscope":
        sae.b_enc.zero_()
    return sae


def _write(name: str, folder: Path) -> Path:
    return find(name).save(_sae(name), folder)


def _recognises(format: Format, folder: Path) -> bool:
    try:
        return format.recognises(Candidate(folder))
    except SparsightError:
        return False  # a file that begins in its own way is damaged to the others


@pytest.mark.parametrize("name", WRITTEN)
def test_a_format_alone_recognises_its_own(name: str, tmp_path: Path) -> None:
    _write(name, tmp_path)
    assert [each.name for each in FORMATS if _recognises(each, tmp_path)] == [name]


@pytest.mark.parametrize("name", WRITTEN)
def test_one_call_reads_every_format_and_reports_what_it_read(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write(name, tmp_path)
    with caplog.at_level(logging.INFO, logger="sparsight"):
        sae = SparseAutoencoder.from_pretrained(tmp_path)
    (told,) = (each for each in caplog.messages if "read as" in each)
    assert f"read as {name}: 64 latents of width 16, TopK" in told
    assert sae.metadata["source"]["format"] == name
    assert not sae.training and not any(each.requires_grad for each in sae.parameters())
    again = SparseAutoencoder.from_pretrained(sae.save_pretrained(tmp_path / "ours"))
    assert torch.equal(again(vectors()).x_hat, sae(vectors()).x_hat)
    assert again.metadata == sae.metadata


def test_a_file_can_be_named_and_strange_keys_are_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = _write("sparsify", tmp_path / "a") / "cfg.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"wings": 2}))
    (tmp_path / "a" / "other.pt").write_bytes(b"nothing")
    sae = SparseAutoencoder.from_pretrained(tmp_path, subfolder="a", filename="sae.safetensors")
    assert sae.n_latents == N
    assert "not understood, and not used: wings" in caplog.text
    with pytest.raises(SparsightError, match=r"other\.pt.*damaged"):
        SparseAutoencoder.from_pretrained(tmp_path / "a" / "other.pt")


def test_what_is_in_an_unknown_file_is_listed(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Found no file with tensors; there is: nothing"):
        SparseAutoencoder.from_pretrained(tmp_path)
    save_file({"wings": torch.ones(1), "beak": torch.ones(1)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"SAELens.*x\.safetensors has beak, wings"):
        SparseAutoencoder.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="is not a format; there are"):
        find("wings")


def test_hostile_pickles_are_read_as_data_and_named(tmp_path: Path) -> None:
    made = tmp_path / "made"
    folder = tmp_path / "run"
    folder.mkdir()
    torch.save({"cfg": Opens(made), "wings": torch.ones(1)}, folder / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt has cfg, wings"):
        SparseAutoencoder.from_pretrained(folder)
    assert not made.exists()


@pytest.mark.parametrize("name", WRITTEN)
def test_numbers_that_are_not_finite_are_named(name: str, tmp_path: Path) -> None:
    sae = _sae(name)
    sae.W_dec[3, 5] = torch.nan
    find(name).save(sae, tmp_path)
    with pytest.raises(SparsightError, match="holds values that are not finite"):
        SparseAutoencoder.from_pretrained(tmp_path)


def _odd(config: dict) -> Iterator[dict]:
    """Copies, each with one value replaced or left out."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from ({**config, key: each} for each in _odd(value))
        for odd in (None, -1, 3, 1e300, "x", [], {"a": 1}, True):
            yield {**config, key: odd}
        yield {each: kept for each, kept in config.items() if each != key}


@pytest.mark.parametrize("name", PLAIN)
def test_odd_configurations_are_errors_or_harmless(name: str, tmp_path: Path) -> None:
    folder = _write(name, tmp_path)
    (path,) = folder.glob("*.json")
    for config in _odd(json.loads(path.read_text())):
        path.write_text(json.dumps(config))
        try:
            read(folder).build()
        except SparsightError as error:
            assert str(folder) in str(error), config


@pytest.mark.parametrize("name", WRITTEN)
def test_damaged_checkpoints_are_errors_or_harmless(name: str, tmp_path: Path) -> None:
    folder, chance = _write(name, tmp_path), random.Random(1)
    for path in list(folder.iterdir()):
        data = path.read_bytes()
        for turn in range(40):
            at = chance.randrange(len(data)) if turn % 2 else chance.randrange(min(1500, len(data)))
            turned = bytes([data[at] ^ 1 << chance.randrange(8)])
            path.write_bytes(data[:at] + (turned + data[at + 1 :] if turn % 4 else b""))
            try:
                read(folder).build()
            except SparsightError as error:
                assert "\n" not in str(error)
        path.write_bytes(data)


@pytest.mark.parametrize("name", PLAIN)
def test_tensors_of_other_shapes_are_errors(name: str, tmp_path: Path) -> None:
    folder = _write(name, tmp_path)
    found = Candidate(folder)
    (file,) = found.weights
    tensors = dict(found.tensors(file))
    for key, each in tensors.items():
        for odd in (each[None], each.flatten()[:1], torch.zeros(0), each.int(), torch.ones(3, 3)):
            changed = {**tensors, key: odd.contiguous()}
            if file.endswith(".safetensors"):
                save_file(changed, folder / file)
            else:
                torch.save(changed, folder / file)
            try:
                sae = read(folder).build()
            except SparsightError:
                continue
            assert sae(vectors()).x_hat.shape == (len(vectors()), D)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.bool])
@pytest.mark.parametrize("name", PLAIN)
def test_weights_that_are_not_real_numbers_are_refused(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = _write(name, tmp_path)
    file = Candidate(folder).weights[0]
    tensors = {
        key: each.to(dtype) if each.ndim == 2 else each
        for key, each in Candidate(folder).tensors(file).items()
    }
    if file.endswith(".safetensors"):
        save_file(tensors, folder / file)
    else:
        torch.save(tensors, folder / file)
    with pytest.raises(SparsightError, match=r"expected real numbers|are not supported"):
        read(folder)


def test_of_several_saes_in_a_folder_one_must_be_named(tmp_path: Path) -> None:
    folder = _write("dictionary_learning", tmp_path)
    (folder / "ae.pt").rename(folder / "ae_1.pt")
    (folder / "ae_2.pt").write_bytes((folder / "ae_1.pt").read_bytes())
    with pytest.raises(UserError, match=r"Name one: ae_1\.pt, ae_2\.pt"):
        SparseAutoencoder.from_pretrained(folder)
    assert SparseAutoencoder.from_pretrained(folder / "ae_2.pt").n_latents == N


@pytest.mark.parametrize("name", ["sparsify", "own"])
def test_the_only_sae_below_a_folder_is_found(name: str, tmp_path: Path) -> None:
    inside = tmp_path / "layers.3"
    if name == "own":
        save(_sae("sparsify"), inside)
    else:
        _write(name, inside)
    assert SparseAutoencoder.from_pretrained(tmp_path).n_latents == N


@pytest.mark.parametrize(
    ("key", "value"), [("d_in", 10**18), ("d_in", 10**30), ("n_latents", 10**15)]
)
def test_an_own_configuration_of_any_size_is_an_error(key: str, value: int, tmp_path: Path) -> None:
    save(_sae("sparsify"), tmp_path)
    description = json.loads((tmp_path / "config.json").read_text())
    (description if key in description else description["config"])[key] = value
    (tmp_path / "config.json").write_text(json.dumps(description))
    with pytest.raises(SparsightError, match=r"cannot be made|must be below 2\^31"):
        SparseAutoencoder.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, " " * (2**24 + 1)])
def test_an_own_configuration_that_is_deep_or_long_is_an_error(text: str, tmp_path: Path) -> None:
    save(_sae("sparsify"), tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(SparsightError, match=r"config\.json"):
        SparseAutoencoder.from_pretrained(tmp_path)
