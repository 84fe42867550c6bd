from __future__ import annotations

import gzip
import io
import pickle
import random
import struct
import zipfile
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from malicious_pickle import Opens
from sparsight import pickles, reading, tensor_files
from sparsight.errors import SparsightError


class Settings:
    """Stands for a configuration class of another project."""

    def __init__(self) -> None:
        self.k = 32
        self.place = Path("a") / "b"
        self.dtype = torch.float16
        self.device = torch.device("cuda:1")


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(3, 4)
        self.act = torch.nn.ReLU()
        self.register_buffer("threshold", torch.tensor(0.5))
        self.running = torch.tensor(1.5)
        self.kernel = torch.nn.functional.relu


def _state() -> dict[str, Any]:
    base = torch.arange(12.0)
    return {
        "whole": base.reshape(3, 4),
        "transposed": base.reshape(3, 4).T,
        "part": base[5:9],
        "spread": torch.ones(1).expand(7),
        "half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "flags": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "count": torch.tensor(7),
    }


def _save(value: Any, path: Path, *, zipped: bool) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_come_as_torch_saved_them(tmp_path: Path, zipped: bool) -> None:
    found = reading.read_torch(_save(_state(), tmp_path / "x.pt", zipped=zipped))
    assert set(found) == set(_state())
    for name, each in _state().items():
        assert found[name].dtype == each.dtype
        assert torch.equal(found[name], each)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
def test_objects_become_dictionaries_of_their_state(tmp_path: Path, zipped: bool) -> None:
    net = Net()
    value = {"cfg": Settings(), "net": net, "more": OrderedDict(a=defaultdict(list, b=[1]), c={2})}
    found = reading.read_torch(_save(value, tmp_path / "x.pt", zipped=zipped))
    cfg = found["cfg"]
    assert cfg[pickles.CLASS].endswith("test_reading.Settings")
    assert (cfg["k"], cfg["place"], cfg["device"]) == (32, "a/b", "cuda:1")
    assert str(cfg["dtype"]) == "torch.float16"
    assert found["more"] == {"a": {"b": [1]}, "c": {2}}
    assert found["net"]["_modules"]["act"][pickles.CLASS] == "torch.nn.modules.activation.ReLU"
    assert torch.equal(found["net"]["running"], net.running)
    tensors = pickles.tensors_of(found["net"])
    assert tensors.keys() == net.state_dict().keys()
    assert all(torch.equal(tensors[name], each) for name, each in net.state_dict().items())


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_gzipped_pickles_of_every_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    value = {"state": _state(), "array": np.arange(6.0).reshape(2, 3).T, "number": np.float32(2.5)}
    value |= {
        "whole": np.arange(4, dtype=np.int32),
        "text": "ä",
        "bytes": b"\x00\xff",
        "n": -(2**70),
    }
    path = tmp_path / "x.pkl.gz"
    with gzip.open(path, "wb") as file:
        pickle.dump(value, file, protocol=protocol)
    found = reading.read_gzipped_pickle(path)
    assert all(torch.equal(found["state"][name], each) for name, each in _state().items())
    assert np.array_equal(found["array"], value["array"])
    assert np.array_equal(found["whole"], value["whole"])
    assert (found["number"], found["text"], found["bytes"]) == (2.5, "ä", b"\x00\xff")
    assert found["n"] == -(2**70)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_does_nothing(tmp_path: Path, zipped: bool) -> None:
    made = tmp_path / "made"
    value = {"a": Opens(made), "b": torch.ones(2)}
    found = reading.read_torch(_save(value, tmp_path / "x.pt", zipped=zipped))
    assert not made.exists()
    assert found["a"][pickles.CLASS].endswith("io.open")
    assert found["a"][pickles.ARGUMENTS] == (str(made), "w")
    with gzip.open(tmp_path / "x.pkl.gz", "wb") as file:
        pickle.dump(value, file)
    reading.read_gzipped_pickle(tmp_path / "x.pkl.gz")
    assert not made.exists()


def test_modules_that_hold_themselves_are_refused() -> None:
    module: dict[str, Any] = {"_modules": {}}
    module["_modules"] = {"a": module, "b": module}
    with pytest.raises(pickles.PickleError, match="hold themselves"):
        pickles.tensors_of(module)


def _pickle(body: bytes) -> bytes:
    return b"\x80\x04" + body + b"."


_TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"


@pytest.mark.parametrize(
    "body",
    {
        "calls what it was given": b"cos\nsystem\n\x8c\x04true\x85R",
        "builds with a class in its state": b"cos\nsystem\n)R}\x8c\x09__class__\x8c\x01xsb",
        "an old-style instance": b"(\x8c\x04trueios\nsystem\n",
        "an extension": b"\x82\x01",
        "data out of band": b"\x97",
        "something from outside": b"\x8c\x01xQ",
        "nothing on the stack": b"R",
        "no mark": b"u",
        "a key of tuples without end": b"})" + b"\x85" * 10_000 + b"Ns",
        "lists without end": b"]" * 10_000 + b"a" * 9_999,
        "a tensor of nothing": _TENSOR + b"(NK\x00)) \x89Nt".replace(b" ", b"") + b"R",
        "a memo far away": b"Nr\xff\xff\xff\xff",
        "a number of a gigabyte": b"\x8b\xff\xff\xff\x7f",
        "text of exabytes": b"\x8d\xff\xff\xff\xff\xff\xff\xff\x0f",
        "an odd encoding": b"c_codecs\nencode\n\x8c\x01x\x8c\x05utf-7\x86R",
        "values set on a number": b"K\x01K\x02K\x03s",
        "a storage within itself": b"ctorch.storage\n_load_from_bytes\n" + b"C\x01x\x85R",
    }.items(),
    ids=lambda each: each[0],
)
def test_a_pickle_made_by_hand_ends_or_is_refused(tmp_path: Path, body: tuple[str, bytes]) -> None:
    path = tmp_path / "x.pkl.gz"
    path.write_bytes(gzip.compress(_pickle(body[1])))
    try:
        reading.read_gzipped_pickle(path)
    except SparsightError as error:
        assert str(path) in str(error)


def test_copies_of_copies_are_refused(tmp_path: Path) -> None:
    # A list of 30,000, copied a thousand times by a file of 100 kB.
    body = b"(" + b"N" * 30_000 + b"l\x94]\x94" + b"cbuiltins\nlist\nh\x00\x85Ra" * 1_000
    path = tmp_path / "x.pkl.gz"
    path.write_bytes(gzip.compress(_pickle(body)))
    with pytest.raises(SparsightError, match="again and again"):
        reading.read_gzipped_pickle(path)


_MANY = b"(" + b"N" * 30_000 + b"l\x94"
_LONG = b"X" + struct.pack("<I", 30_000) + b"a" * 30_000 + b"\x94"
_STATE = b"}\x94(" + b"".join(b"J" + struct.pack("<i", i) + b"N" for i in range(30_000)) + b"u"


@pytest.mark.parametrize(
    "body",
    {
        "names": _LONG + b"h\x00h\x00\x93",
        "lists with a class": _MANY + b"ccopyreg\n_reconstructor\n(cx\nY\nNh\x00tR",
        "arguments": _MANY.replace(b"l\x94", b"t\x94") + b"ccopyreg\n__newobj__\nh\x00R",
        "states": _STATE + b"cx\nY\n)Rh\x00b",
        "arrays": b"B" + struct.pack("<I", 30_000) + b"0" * 30_000 + b"\x94"
        b"cnumpy.core.multiarray\n_reconstruct\n)R(K\x01J0u\x00\x00\x85"
        b"cnumpy\ndtype\n\x8c\x02u1\x85R\x89h\x00tb",
        "pickles within": b"B" + struct.pack("<I", 30_000) + b"0" * 30_000 + b"\x94"
        b"ctorch.storage\n_load_from_bytes\nh\x00\x85R",
    }.items(),
    ids=lambda each: each[0],
)
def test_what_lies_in_a_pickle_once_is_not_copied_without_end(body: tuple[str, bytes]) -> None:
    reader = pickles.Reader(budget=pickles.Budget(20_000))
    with pytest.raises(pickles.PickleError, match="again and again"):
        reader.load(io.BytesIO(_pickle(body[1])))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_storage_has_a_plain_name(tmp_path: Path, zipped: bool) -> None:
    # The hash of tuples within tuples would end the process.
    body = b"(\x8c\x07storagectorch\nFloatStorage\n)" + b"\x85" * 200_000 + b"\x8c\x03cpuK\x01tQ"
    path = tmp_path / "x.pt"
    if zipped:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", _pickle(body))
    else:
        magic, rest = pickle.dumps(pickles.LEGACY_MAGIC, 2), pickle.dumps(1001, 2)
        path.write_bytes(magic + rest + rest + _pickle(body))
    with pytest.raises(SparsightError, match=r"a storage.s name|a name is tuple"):
        reading.read_torch(path)


def test_numbers_that_share_a_hash_are_not_keys() -> None:
    with pytest.raises(pickles.PickleError, match="61 bits"):
        pickles.Reader().load(io.BytesIO(pickle.dumps({2**61 - 1 + 2**70: None})))


def test_values_of_a_pickle_are_cut_in_messages() -> None:
    value: Any = "x"
    for _ in range(60):
        value = [value, value]
    assert len(pickles.shown(value)) < 10_000
    assert pickles.text_of(value) == ""


@pytest.mark.parametrize(
    ("size", "stride", "offset"),
    [((9,), (1,), 0), ((2,), (1,), 7), ((2,), (-1,), 1), ((2**40,), (0,), 0), ((2, 2), (1,), 0)],
)
def test_a_tensor_beyond_its_storage_is_refused(
    size: tuple[int, ...], stride: tuple[int, ...], offset: int
) -> None:
    storage = pickles.Storage(torch.zeros(8))
    with pytest.raises(pickles.PickleError, match="tensor"):
        pickles.Reader()._tensor(storage, offset, size, stride)


def test_a_header_of_ten_gigabytes_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 10 * 2**30) + b"{" * 100)
    for read in (tensor_files.read_safetensors, tensor_files.safetensors_keys):
        with pytest.raises(SparsightError, match=r"x\.safetensors.*10,737,418,240"):
            read(path)


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 2**24)
    with pytest.raises(SparsightError, match="compressed"):
        reading.read_torch(path)


def test_entries_that_overlap_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    _save({"w": torch.ones(1000)}, path, zipped=True)
    data = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        entry = next(each for each in archive.infolist() if each.filename.endswith("data/0"))
    # The directory's size of the storage, twice the file.
    at = data.rindex(entry.filename.encode()) - 46 + 20
    path.write_bytes(data[:at] + struct.pack("<II", 2**16, 2**16) + data[at + 8 :])
    with pytest.raises(SparsightError, match="damaged"):
        reading.read_torch(path)


def test_gzip_that_unfolds_without_end_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pkl.gz"
    path.write_bytes(gzip.compress(b"\0" * 2**22))
    with pytest.raises(SparsightError, match="unfolds to more than 1,000,000 bytes"):
        reading.read_gzipped_pickle(path, limit=1_000_000)


@pytest.mark.parametrize("kind", ["zip", "legacy", "gzip", "safetensors"])
def test_damage_at_any_place_is_an_error_or_harmless(tmp_path: Path, kind: str) -> None:
    """Cut off anywhere, any bit turned: a `SparsightError`, or tensors with other numbers."""
    names = {"zip": "x.pt", "legacy": "x.pt", "gzip": "x.pkl.gz", "safetensors": "x.safetensors"}
    path = tmp_path / names[kind]
    value = {"w": torch.randn(4, 3), "b": torch.zeros(4), "net": Net(), "k": 3}
    if kind == "safetensors":
        save_file({"w": value["w"], "b": value["b"]}, path)
    elif kind == "gzip":
        path.write_bytes(gzip.compress(pickle.dumps(value)))
    else:
        _save({**value, "net": 0}, path, zipped=kind == "zip")
    read = {"gzip": reading.read_gzipped_pickle, "safetensors": tensor_files.read_safetensors}
    data, chance = path.read_bytes(), random.Random(0)
    damaged = [data[: chance.randrange(len(data))] for _ in range(60)]
    for _ in range(200):
        at = chance.randrange(len(data))
        damaged.append(data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :])
    refused = 0
    for each in damaged:
        path.write_bytes(each)
        try:
            read.get(kind, reading.read_torch)(path)
        except SparsightError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused >= 60


def test_a_stream_begins_at_the_position_of_the_file(tmp_path: Path) -> None:
    for zipped in (True, False):
        body = io.BytesIO()
        torch.save({"w": torch.ones(3)}, body, _use_new_zipfile_serialization=zipped)
        path = tmp_path / "x.pt"
        path.write_bytes(b'{"header": 1}\n' + body.getvalue())
        with path.open("rb") as file:
            file.readline()
            found = reading.read_torch_stream(file, len(body.getvalue()), path)
        assert torch.equal(found["w"], torch.ones(3))


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"a": ' * 100_000, "\xff"])
def test_an_invalid_configuration_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "cfg.json"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(SparsightError, match=r"cfg\.json"):
        reading.read_config(path)


@pytest.mark.parametrize("name", ["x.pt", "x.pkl.gz", "x.safetensors", "x.json"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    kinds = {".pt": reading.read_torch, ".gz": reading.read_gzipped_pickle}
    kinds |= {".safetensors": tensor_files.read_safetensors, ".json": reading.read_config}
    with pytest.raises(SparsightError, match=name):
        kinds[Path(name).suffix](tmp_path / name)
