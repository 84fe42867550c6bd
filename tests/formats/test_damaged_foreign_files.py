"""Files that nobody vouches for: cut, altered, of wrong shapes, hostile."""

from __future__ import annotations

import io
import json
import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from foreign_files import (
    CASES,
    PRISMA,
    D,
    N,
    known_as,
    llamascopium_folder,
    llamascopium_state,
    msae_state,
    prisma_state,
)
from malicious_pickle import Opens
from sparsight.errors import SparsightError
from sparsight.formats import read
from sparsight.formats.calibration import Calibration
from sparsight.reading import read_torch, read_torch_stream
from sparsight.sae import BatchTopK, MatchingPursuit, SAEConfig, SparseAutoencoder, TopK


def files(folder: Path) -> list[Path]:
    return sorted(
        each for each in folder.rglob("*") if each.is_file() and "sparsity" not in each.name
    )


def tried(path: Path) -> None:
    """Read and build; whatever is wrong must be one of our errors."""
    try:
        read(path).build()
    except SparsightError as error:
        assert str(error)


@pytest.mark.parametrize("name", CASES)
def test_a_file_that_is_cut_off_anywhere_is_a_clear_error(name, tmp_path):
    path, _ = CASES[name](tmp_path)
    for file in files(tmp_path):
        whole = file.read_bytes()
        for share in (0, 0.01, 0.3, 0.6, 0.9, 0.999):
            file.write_bytes(whole[: int(len(whole) * share)])
            if file.suffix in (".json",) or file.name == "sae.pt":
                tried(path)
            else:
                with pytest.raises(SparsightError):
                    read(path).build()
        file.write_bytes(whole)


@pytest.mark.parametrize("name", CASES)
def test_flipped_bits_are_a_clear_error_or_harmless(name, tmp_path):
    path, _ = CASES[name](tmp_path)
    generator = torch.Generator().manual_seed(5)
    for file in files(tmp_path):
        whole = file.read_bytes()
        places = torch.randint(len(whole), (16,), generator=generator).tolist()
        for place in [*range(0, 40, 9), *places]:
            altered = bytearray(whole)
            altered[place % len(whole)] ^= 1 << (place % 8)
            file.write_bytes(altered)
            tried(path)
        file.write_bytes(whole)


def wrong(tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor[:-1], tensor[None], tensor.new_zeros(0), torch.full_like(tensor, float("nan"))]


@pytest.mark.parametrize("name", [name for name in CASES if name != "prisma_gzipped"])
def test_wrong_shapes_and_nan_are_clear_errors(name, tmp_path):
    path, _ = CASES[name](tmp_path)
    (file,) = (each for each in files(tmp_path) if each.suffix in (".pt", ".pth", ".safetensors"))
    for key, replace in _tensors(file):
        if (name, key) == ("prisma_gated", "b_enc"):  # is there, and not used
            continue
        for index in range(4):
            if (name, index) == ("dncbm", 1):  # an axis of one component, which is allowed
                continue
            replace(key, index)
            with pytest.raises(SparsightError):
                read(path).build()
        replace(key, None)
    read(path).build()


def _tensors(file: Path):
    """Names of the tensors that the function of x needs, and a way to put wrong ones there."""
    needed = {"W_enc", "b_enc", "W_dec", "b_dec", "pre_b", "enc", "dec", "encoder", "latent_bias"}
    needed |= {"pre_bias", "decoder", "encoder.weight", "decoder.weight", "W_E", "b_E", "W_D"}
    needed |= {"b_D", "encoder._weight", "encoder._bias", "decoder._weight", "tied_bias"}
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file, save_file

        state = load_file(file)

        def replace(key, index):
            new = state[key] if index is None else wrong(state[key])[index]
            save_file({**state, key: new.contiguous()}, file)
    else:
        header = b""
        with file.open("rb") as opened:
            if opened.read(1) == b"{":
                opened.seek(0)
                header = opened.readline()
                whole = read_torch_stream(opened, file.stat().st_size - len(header), file)
            else:
                whole = read_torch(file)
        if isinstance(whole.get("cfg"), dict):
            whole["cfg"] = {key: each for key, each in whole["cfg"].items() if key != "dtype"}
            whole["cfg"].pop("device", None)
        state = whole
        while not any(isinstance(each, torch.Tensor) for each in state.values()):
            inner = ("state_dict", "model_state_dict", "model", "autoencoder")
            state = next(state[key] for key in inner if key in state)
        if "model" in whole:
            state = whole["model"]
        elif "model_state_dict" in whole:
            state = whole["model_state_dict"]
        kept = dict(state)

        def replace(key, index):
            state[key] = kept[key] if index is None else wrong(kept[key])[index]
            buffer = io.BytesIO()
            torch.save(whole, buffer)
            file.write_bytes(header + buffer.getvalue())

    return [(key, replace) for key in sorted(needed & set(state))]


@pytest.mark.parametrize("key", ["cfg", "config", "state_dict", "model", "activation"])
def test_code_in_a_pickle_is_not_run(key, tmp_path):
    mark = tmp_path / "ran"
    payload = {"cfg": {"layer_subtype": "x"}, "state_dict": prisma_state(), "model": msae_state()}
    payload[key] = Opens(mark)
    for write in ("zip", "legacy", "pickle"):
        path = tmp_path / f"{write}.pt"
        if write == "pickle":
            path.write_bytes(pickle.dumps(payload))
        else:
            torch.save(payload, path, _use_new_zipfile_serialization=write == "zip")
        tried(path)
    header = json.dumps({"d_vit": D, "d_sae": N}).encode() + b"\n"
    (tmp_path / "sae.pt").write_bytes(header + pickle.dumps(payload))
    tried(tmp_path / "sae.pt")
    assert not mark.exists()


def test_a_configuration_that_runs_code_when_it_is_unpickled_stays_plain_data(tmp_path):
    mark = tmp_path / "ran"
    with known_as("vit_prisma.sae.config.VisionModelSAERunnerConfig") as cls:
        made = cls()
        made.__dict__.update({"layer_subtype": "hook_resid_post", "model_name": Opens(mark)})
        torch.save({"cfg": made, "state_dict": prisma_state()}, tmp_path / "weights.pt")
    tried(tmp_path / "weights.pt")
    assert not mark.exists()


def odd(config: dict) -> Iterator[dict]:
    """Copies, each with one value replaced or left out."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from ({**config, key: each} for each in odd(value))
        for strange in (None, -1, 0, 1e300, "x", [], {}, {"a": 1}, True):
            yield {**config, key: strange}
        yield {each: kept for each, kept in config.items() if each != key}


@pytest.mark.parametrize("name", ["saev_schema_5", "saev_without_schema", "saev_batch_topk"])
def test_odd_headers_are_errors_or_harmless(name, tmp_path):
    CASES[name](tmp_path)
    path = tmp_path / "sae.pt"
    header, _, rest = path.read_bytes().partition(b"\n")
    for config in odd(json.loads(header)):
        path.write_bytes(json.dumps(config).encode() + b"\n" + rest)
        tried(path)


@pytest.mark.parametrize(
    "name", ["prisma_layer_norm_topk", "prisma_transcoder", "llamascopium_transcoder"]
)
def test_odd_configurations_are_errors_or_harmless(name, tmp_path):
    CASES[name](tmp_path)
    path = tmp_path / "config.json"
    for config in odd(json.loads(path.read_text())):
        path.write_text(json.dumps(config))
        tried(tmp_path)


@pytest.mark.parametrize("name", ["clipscope", "openai_topk", "msae_of_newer_files", "patchsae"])
def test_odd_values_beside_the_tensors_are_errors_or_harmless(name, tmp_path):
    path, _ = CASES[name](tmp_path)
    whole = read_torch(path)
    for changed in odd(whole):
        torch.save(_plain(changed), path)
        tried(path)


def _plain(value):
    """Without what cannot be pickled again: names of classes and dtypes."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    return (
        value if isinstance(value, torch.Tensor | str | int | float | list | None) else str(value)
    )


def test_a_header_line_without_an_end_is_refused_early(tmp_path):
    path = tmp_path / "sae.pt"
    path.write_bytes(b'{"d_vit": ' + b" " * (2 << 20))
    with pytest.raises(SparsightError, match="line does not end"):
        read(path)


def test_a_zip_bomb_behind_a_header_is_refused(tmp_path):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (64 << 20))
    header = json.dumps({"d_vit": D, "d_sae": N}).encode() + b"\n"
    (tmp_path / "sae.pt").write_bytes(header + buffer.getvalue())
    with pytest.raises(SparsightError, match="compressed"):
        read(tmp_path / "sae.pt")


def test_a_damaged_calibration_stops_the_loading_of_its_checkpoint(tmp_path):
    path, _ = CASES["clipscope_calibrated"](tmp_path)
    Calibration.beside(path).write_text('{"format": "sparsight-clipscope-calibration"')
    with pytest.raises(SparsightError, match=r"calibration\.json"):
        read(path)


@pytest.mark.parametrize("key", ["W_E", "b_E", "b_D", "activation_function.log_jumprelu_threshold"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_float8_weights_are_refused_by_name(key, dtype, tmp_path):
    log = "activation_function.log_jumprelu_threshold"
    state = llamascopium_state(**{log: torch.zeros(N)})
    state[key] = state[key].to(dtype)
    path = llamascopium_folder(tmp_path, state, act_fn="jumprelu", norm_activation="inference")
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(SparsightError, match=rf"{key} is of {kind}.*Quantised") as told:
        read(path).build()
    assert told.value.exit_code == 1


def test_pickled_float8_weights_are_refused(tmp_path):
    state = {key: each.to(torch.float8_e4m3fn) for key, each in prisma_state().items()}
    torch.save({"cfg": PRISMA, "state_dict": state}, tmp_path / "weights.pt")
    with pytest.raises(SparsightError, match="float8"):
        read(tmp_path)


WRITTEN = {
    "saelens": MatchingPursuit(3),
    "sparsify": TopK(3),
    "visaebench": BatchTopK(3),
    "dictionary_learning": BatchTopK(3),
    "overcomplete": TopK(3),
    "prisma": TopK(3),
}
WRONG = (None, -1, 1.5, "x", [[1]], {}, 10**30, float("nan"), [0] * 2000, [[[[[[[[1]]]]]]]])


def _told(folder: Path) -> str | None:
    """The one line that reading a folder ends with; None if it holds an SAE."""
    try:
        SparseAutoencoder.from_pretrained(folder)
    except SparsightError as error:
        told = str(error)
        assert "\n" not in told and len(told) < 700
        return told
    return None


def _fields(config: dict[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    for key, value in list(config.items()):
        yield config, key
        if isinstance(value, dict):
            yield from _fields(value)


@pytest.mark.parametrize("format", [None, *WRITTEN])
def test_a_field_of_a_configuration_that_is_of_another_type_is_named(
    format: str | None, tmp_path: Path
) -> None:
    sparsity = WRITTEN.get(str(format), TopK(3))
    sae = SparseAutoencoder(6, SAEConfig(18, sparsity=sparsity, normaliser="none"))
    sae.save_pretrained(tmp_path, format=format)
    file = next(tmp_path.glob("*.json"))
    config = json.loads(file.read_text())
    for holder, key in _fields(config):
        right = holder[key]
        for wrong in WRONG:
            holder[key] = wrong
            file.write_text(json.dumps(config))
            told = _told(tmp_path)
            named = told is None or key in told or "in a format that Sparsight" in told
            # The message about a value that decides on the tensors may name them instead.
            assert named or "tensors" in told or "is missing; there is" in told, (key, wrong, told)
        holder[key] = right


@pytest.mark.parametrize("format", [None, "saelens", "sparsify", "visaebench"])
def test_tensors_of_too_many_axes_and_invalid_headers_are_one_line(
    format: str | None, tmp_path: Path
) -> None:
    sae = SparseAutoencoder(6, SAEConfig(18, sparsity=TopK(3), normaliser="none"))
    sae.save_pretrained(tmp_path, format=format)
    file = next(tmp_path.glob("*.safetensors"))
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(key for key in header if "bias" in key or "b_" in key)
    header[name]["shape"] += [1] * 100_000
    many = json.dumps(header).encode()
    for text, wanted in {
        many: f"'{name}' has 100,001 axes",
        b"{{": "damaged",
        b'{"a":' * 40_000: "damaged",
        b"\xff\xfe{}": "damaged",
        b'{"__metadata__":{"a":1}}': "damaged",
        b"{}": "",
    }.items():
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
        told = _told(tmp_path)
        assert told is not None and wanted in told and str(tmp_path) in told
    config = next(tmp_path.glob("*.json"))
    file.write_bytes(data)
    for text in ("[" * 100_000, '{"a":' * 100_000, "", "null", '{"a":' * 400 + "1" + "}" * 400):
        config.write_text(text)
        told = _told(tmp_path)
        assert told is not None and str(tmp_path) in told
