from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from latent_parts import SITE, TensorActivations, make_sae, save_pictures
from sparsight.activations import ActivationStore, LiveActivations, extract
from sparsight.errors import SparsightError, UserError
from sparsight.files import sha256_file
from sparsight.images import ImageSource, open_images
from sparsight.latents import CodeBatch, CodeStore, build_index, encode
from sparsight.latents.code_manifest import CodeManifest
from sparsight.latents.encoding import encoded
from sparsight.sae import AbsTopK, SparseAutoencoder, SparseCode, TopK
from sparsight.vision import VisionModel

SMALL = {"batch_images": 5, "shard_bytes": 5000, "quiet": True}
"""Bytes per shard: the 36 images make four shards of two batches each."""


@pytest.fixture(scope="module")
def store(
    model: VisionModel, source: ImageSource, tmp_path_factory: pytest.TempPathFactory
) -> ActivationStore:
    out = tmp_path_factory.mktemp("store") / "acts"
    return extract(model, source, sites=[SITE], out=out, workers=0, quiet=True)


@pytest.fixture(scope="module")
def made(
    sae: SparseAutoencoder, store: ActivationStore, tmp_path_factory: pytest.TempPathFactory
) -> CodeStore:
    return encode(sae, store, out=tmp_path_factory.mktemp("codes") / "codes", **SMALL)


@pytest.fixture
def codes(made: CodeStore, tmp_path: Path) -> CodeStore:
    """A copy on disk that a test may damage."""
    shutil.copytree(made.path, tmp_path / "codes")
    return CodeStore.open(tmp_path / "codes")


def digests(folder: Path) -> dict[str, str]:
    return {path.name: sha256_file(path) for path in folder.iterdir()}


def dense(batches: list[CodeBatch]) -> Tensor:
    return CodeBatch.joined(batches).code.dense()


def test_codes_on_disk_are_the_codes_of_the_autoencoder(
    made: CodeStore, sae: SparseAutoencoder, store: ActivationStore
) -> None:
    expected = CodeBatch.joined(list(encoded(sae, store, SITE, 5)))
    found = CodeBatch.joined(list(made.ordered(7)))
    assert len(made.manifest.shards) == 4
    for part in ("indices", "values", "offsets"):
        assert torch.equal(getattr(found.code, part), getattr(expected.code, part))
    assert found.image_indices.tolist() == made.image_indices.tolist() == list(range(36))
    assert (made.n_images, made.n_tokens, made.n_vectors) == (36, 17, 36 * 17)
    assert made.n_active == len(found.code.values)
    assert found.code.values.dtype == torch.float32
    assert made.model_info == store.model_info


@pytest.mark.parametrize("batch_images", [1, 4, 36, 100])
def test_batches_of_any_size_are_the_same_codes(made: CodeStore, batch_images: int) -> None:
    batches = list(made.ordered(batch_images))
    assert torch.equal(dense(batches), dense(list(made.ordered(9))))
    assert {len(batch.code) for batch in batches[:-1]} <= {batch_images * 17}


def test_one_image_can_be_read_alone(made: CodeStore) -> None:
    whole = dense(list(made.ordered())).view(36, 17, -1)
    for image in (0, 9, 10, 35):
        assert torch.equal(made.image(image).dense(), whole[image])
    with pytest.raises(UserError, match="no code of image 36"):
        made.image(36)


def test_densities_are_those_of_the_codes(made: CodeStore) -> None:
    expected = (dense(list(made.ordered())) > 0).double().mean(dim=0)
    assert torch.allclose(made.density(), expected, rtol=1e-15)


def test_an_index_of_codes_is_that_of_the_activations(
    sae: SparseAutoencoder, store: ActivationStore, tmp_path: Path
) -> None:
    codes = encode(sae, store, out=tmp_path / "codes", quiet=True)
    build_index(sae, store, out=tmp_path / "one", embeddings="codes", quiet=True)
    build_index(sae, codes, out=tmp_path / "other", quiet=True)
    assert digests(tmp_path / "one") == digests(tmp_path / "other")


def test_an_index_counts_the_same_in_groups_of_any_size(
    made: CodeStore, sae: SparseAutoencoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = build_index(sae, made, out=tmp_path / "one", quiet=True)
    monkeypatch.setattr("sparsight.latents.build.VECTORS_AT_ONCE", 1)
    other = build_index(sae, made, out=tmp_path / "other", batch_images=3, quiet=True)
    for column in ("n_active", "n_active_images", "max_activation"):
        assert one.table[column].equals(other.table[column])
    assert torch.equal(one.examples.image, other.examples.image)
    assert torch.equal(one.quantiles.activation, other.quantiles.activation)


class Killed(BaseException):
    pass


@contextmanager
def killed_at_rename(number: int) -> Iterator[list[Path]]:
    """Stop before the file of this number is renamed into place; yield the earlier ones."""
    import sparsight.files as files

    renamed: list[Path] = []
    rename = files.Path.replace

    def stop(path: Path, target: Path) -> Path:
        if len(renamed) == number:
            raise Killed
        renamed.append(target)
        return rename(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files.Path, "replace", stop)
        yield renamed


@pytest.fixture
def live(model: VisionModel, tmp_path: Path) -> LiveActivations:
    """Live activations; the last image of a batch of five, and a whole batch, cannot be read."""
    source = open_images(save_pictures(tmp_path / "pictures"))
    for image in (4, 15, 16, 17, 18, 19):
        path = Path(source.info(image).uri)
        path.write_bytes(path.read_bytes()[:60])
    source = open_images(tmp_path / "pictures")
    return LiveActivations(model, source, [SITE], workers=0, max_failed=1.0)


@pytest.mark.parametrize("kind", ["store", "live"])
def test_an_encoding_cut_off_anywhere_ends_in_the_same_bytes(
    kind: str, sae: SparseAutoencoder, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(kind)
    with killed_at_rename(-1) as renamed:
        whole = encode(sae, source, out=tmp_path / "whole", **SMALL)
    n_renames = len(renamed)
    assert n_renames == 2 * len(whole.manifest.shards) + 2
    for number in range(n_renames):
        out = tmp_path / f"cut {number}"
        with killed_at_rename(number), pytest.raises(Killed):
            encode(sae, source, out=out, **SMALL)
        if number:
            (out / ".shard.killed.tmp").write_bytes(b"half")
            with pytest.raises(UserError, match="unfinished"):
                CodeStore(out)
        # A run continues with the batch and shard sizes that it was begun with.
        encode(sae, source, out=out, **(SMALL if number == 0 else {"quiet": True}))
        assert digests(out) == digests(tmp_path / "whole")
    if kind == "live":
        assert whole.n_images == 30
        assert not {4, 15, 19} & set(whole.image_indices.tolist())


@pytest.mark.parametrize("kind", ["store", "live"])
def test_encoded_images_are_not_encoded_again(
    kind: str,
    sae: SparseAutoencoder,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = request.getfixturevalue(kind)
    with killed_at_rename(5), pytest.raises(Killed):
        encode(sae, source, out=tmp_path / "codes", **SMALL)
    n_done = CodeManifest.read(tmp_path / "codes").n_images
    assert n_done >= 18
    rows = []
    whole = SparseAutoencoder.encode

    def counted(self: SparseAutoencoder, x: Tensor) -> SparseCode:
        rows.append(len(x))
        return whole(self, x)

    monkeypatch.setattr(SparseAutoencoder, "encode", counted)
    codes = encode(sae, source, out=tmp_path / "codes", quiet=True)
    assert sum(rows) == (codes.n_images - n_done) * 17


def stopped_at(sae: SparseAutoencoder, source: ActivationStore, out: Path, n: int) -> None:
    """Encode until Ctrl-C comes in the middle of the nth batch."""
    encode_batch, seen = SparseAutoencoder.encode, []

    def interrupted(self: SparseAutoencoder, x: Tensor) -> SparseCode:
        seen.append(len(x))
        if len(seen) == n:
            os.kill(os.getpid(), signal.SIGINT)
        return encode_batch(self, x)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(SparseAutoencoder, "encode", interrupted)
            with pytest.raises(KeyboardInterrupt) as caught:
                encode(sae, source, out=out, **SMALL)
    finally:
        signal.signal(signal.SIGINT, before)
    n_kept = CodeManifest.read(out).n_images
    assert caught.value.__notes__ == [
        f"Kept {n_kept} of {source.n_images} images in {out}; the same command goes on."
    ]


@pytest.mark.skipif(os.name == "nt", reason="signals work otherwise on Windows")
@pytest.mark.parametrize("kind", ["store", "live"])
def test_an_encoding_that_stops_keeps_its_batches_and_ends_in_the_same_bytes(
    kind: str, sae: SparseAutoencoder, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source = request.getfixturevalue(kind)
    encode(sae, source, out=tmp_path / "whole", **SMALL)
    kept = [0]
    for n in (2, 3, 2):
        stopped_at(sae, source, tmp_path / "codes", n)
        kept.append(CodeManifest.read(tmp_path / "codes").n_images)
        assert kept[-1] > kept[-2]
    assert len(list((tmp_path / "codes").glob("shard-*"))) == len(
        CodeManifest.read(tmp_path / "codes").shards
    )
    encode(sae, source, out=tmp_path / "codes", **SMALL)
    assert digests(tmp_path / "codes") == digests(tmp_path / "whole")


def test_codes_are_written_by_time(
    sae: SparseAutoencoder, store: ActivationStore, tmp_path: Path
) -> None:
    whole = encode(sae, store, out=tmp_path / "whole", batch_images=5, quiet=True)
    for number in (4, 7):
        out = tmp_path / f"{number}"
        with killed_at_rename(number), pytest.raises(Killed):
            encode(sae, store, out=out, batch_images=5, flush_seconds=1e-9, quiet=True)
        assert CodeManifest.read(out).n_images == 5 * ((number - 1) // 2)
        encode(sae, store, out=out, quiet=True)
        assert digests(out) == digests(whole.path)


@pytest.mark.parametrize("seed", range(8))
def test_a_flipped_byte_of_codes_is_reported_or_harmless(
    sae: SparseAutoencoder, store: ActivationStore, made: CodeStore, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    if seed % 2:
        shutil.copytree(made.path, tmp_path / "codes")
    else:
        with killed_at_rename(6), pytest.raises(Killed):
            encode(sae, store, out=tmp_path / "codes", flush_seconds=1e-9, **SMALL)
    named = [path for path in sorted((tmp_path / "codes").iterdir()) if path.name[0] != "."]
    path = rng.choice(named)
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= rng.randrange(1, 256)
    path.write_bytes(data)
    try:
        codes = encode(sae, store, out=tmp_path / "codes", **SMALL)
        found = dense(list(codes.ordered()))
    except SparsightError as error:
        assert path.name in str(error)
    else:
        assert torch.equal(found, dense(list(made.ordered())))
        assert codes.manifest.identity() == made.manifest.identity()


def test_codes_of_the_first_version_are_opened(codes: CodeStore) -> None:
    path = codes.path / "manifest.json"
    values = json.loads(path.read_text()) | {"format_version": 1}
    del values["checksum"]
    path.write_text(json.dumps(values))
    assert CodeStore(codes.path, verify=True).manifest == codes.manifest


def test_finished_codes_are_returned_unchanged(
    codes: CodeStore, sae: SparseAutoencoder, store: ActivationStore
) -> None:
    before = {path.name: path.stat().st_mtime_ns for path in codes.path.iterdir()}
    again = encode(sae, store, out=codes.path, quiet=True)
    assert again.n_images == 36
    assert {path.name: path.stat().st_mtime_ns for path in codes.path.iterdir()} == before


def test_codes_of_another_encoding_are_never_overwritten(
    codes: CodeStore, sae: SparseAutoencoder, store: ActivationStore, tmp_path: Path
) -> None:
    other = make_sae()
    with torch.no_grad():
        other.b_enc[0] += 1
    with pytest.raises(UserError, match=r"sae\.hash differs"):
        encode(other, store, out=codes.path)
    with pytest.raises(UserError, match="dtype differs"):
        encode(sae, store, out=codes.path, dtype="float16")
    with pytest.raises(UserError, match="activations differs"):
        encode(sae, store.select([1, 2]), out=codes.path)
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        encode(sae, store, out=tmp_path)
    with pytest.raises(UserError, match="is a file"):
        encode(sae, store, out=tmp_path / "note.txt")
    with pytest.raises(UserError, match="another SAE"):
        build_index(other, codes, out=tmp_path / "index")
    with pytest.raises(UserError, match=r"codes are from blocks\.1\.resid_post"):
        build_index(sae, codes, out=tmp_path / "index", site="blocks.0.resid_post")
    assert build_index(sae, codes, out=tmp_path / "i", site="blocks.-2.resid_post", quiet=True)


def cut(data: bytes) -> bytes:
    return data[:-1]


def changed_header(data: bytes) -> bytes:
    return data.replace(b"U16", b"I16")


@pytest.mark.parametrize("harm", [cut, changed_header])
def test_a_damaged_shard_is_named(codes: CodeStore, harm: Callable[[bytes], bytes]) -> None:
    path = codes.path / "shard-00001.safetensors"
    path.write_bytes(harm(path.read_bytes()))
    with pytest.raises(SparsightError, match=r"shard-00001.*(cut off|altered).*encode again"):
        list(CodeStore(codes.path).ordered())


def test_a_missing_shard_is_named(
    codes: CodeStore, sae: SparseAutoencoder, store: ActivationStore
) -> None:
    (codes.path / "shard-00002.safetensors").unlink()
    with pytest.raises(SparsightError, match=r"shard-00002.*missing"):
        CodeStore(codes.path)
    unfinished = dataclasses.replace(codes.manifest, state="incomplete")
    unfinished.write(codes.path)
    with pytest.raises(SparsightError, match=r"shard-00002.*missing"):
        encode(sae, store, out=codes.path, quiet=True)


@pytest.mark.parametrize(
    ("there", "flipped", "told"),
    [('"checksum"', '"chEcksum"', "unknown key 'chEcksum'"), (":", "z", "cannot be read as JSON")],
)
def test_a_damaged_manifest_is_named_with_what_to_do(
    codes: CodeStore, there: str, flipped: str, told: str
) -> None:
    path = codes.path / "manifest.json"
    path.write_text(path.read_text().replace(there, flipped, 1))
    with pytest.raises(SparsightError, match=rf"manifest\.json: {told}.*encode again\."):
        CodeStore(codes.path)


def test_a_flipped_bit_is_noticed_on_request_and_when_it_is_read(codes: CodeStore) -> None:
    path = codes.path / "shard-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    CodeStore(codes.path)
    with pytest.raises(SparsightError, match=r"shard-00003.*checksum"):
        CodeStore.open(codes.path, verify=True)
    with pytest.raises(SparsightError, match=r"shard-00003.*checksum.*encode again"):
        list(CodeStore(codes.path).ordered())


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("format_version", 99, "format_version is 99"),
        ("format", "sparsight latent index", "not a manifest of codes"),
        ("state", "perhaps", "state is 'perhaps'"),
        ("dtype", "float8", "dtype is 'float8'"),
        ("images", {"spec": "x"}, "images must have"),
        ("shards", [[]], "shards"),
    ],
)
def test_a_manifest_that_is_wrong_says_where(
    codes: CodeStore, key: str, value: object, message: str
) -> None:
    path = codes.path / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=message):
        CodeStore(codes.path)


def test_a_folder_without_codes_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no codes"):
        CodeStore(tmp_path)


def test_float16_keeps_active_latents_active(
    made: CodeStore, sae: SparseAutoencoder, activations: TensorActivations, tmp_path: Path
) -> None:
    small = encode(sae, activations, out=tmp_path / "half", dtype="float16", **SMALL)
    exact = dense(list(encoded(sae, activations, SITE, 5)))
    found = dense(list(small.ordered()))
    assert torch.equal(found > 0, exact > 0)
    assert torch.allclose(found, exact, rtol=2**-11, atol=2**-24)
    weak = TensorActivations(activations.x * 1e-9, activations.images, activations.model)
    kept = encode(sae, weak, out=tmp_path / "weak", dtype="float16", quiet=True)
    assert all(bool((batch.code.values > 0).all()) for batch in kept.ordered())
    strong = TensorActivations(activations.x * 1e6, activations.images, activations.model)
    with pytest.raises(SparsightError, match=r"do not fit float16, .* \(images 0 to 4\)"):
        encode(sae, strong, out=tmp_path / "strong", dtype="float16", **SMALL)


@pytest.mark.parametrize("sparsity", [AbsTopK(4), TopK(4, rectify=False)])
def test_float16_keeps_the_signs_of_activations(
    sparsity: AbsTopK | TopK, activations: TensorActivations, tmp_path: Path
) -> None:
    sae = make_sae()
    sae.config = dataclasses.replace(sae.config, sparsity=sparsity)
    with torch.no_grad():
        sae.b_enc.sub_(5 * sae.W_enc.norm(dim=1))
    for scale in (1.0, 1e-9):
        given = TensorActivations(activations.x * scale, activations.images, activations.model)
        if scale < 1:
            sae.b_enc.data.mul_(scale)
        exact = dense(list(encoded(sae, given, SITE, 5)))
        small = encode(sae, given, out=tmp_path / str(scale), dtype="float16", quiet=True)
        found = dense(list(small.ordered()))
        assert bool((exact < 0).any()) and torch.equal(found.sign(), exact.sign())
        assert torch.allclose(found, exact, rtol=2**-11, atol=2**-24)
    sae.b_enc.data.fill_(-1e6)
    with pytest.raises(SparsightError, match=r"up to -1e\+06 do not fit float16"):
        encode(sae, activations, out=tmp_path / "low", dtype="float16", quiet=True)


@pytest.mark.parametrize(("n_latents", "dtype"), [(65_536, "U16"), (65_537, "I32")])
def test_indices_take_the_smallest_type_that_holds_them(
    activations: TensorActivations, tmp_path: Path, n_latents: int, dtype: str
) -> None:
    sae = make_sae(n_latents=n_latents)
    with torch.no_grad():
        sae.b_enc[-1] += 100.0  # the last latent is active on every vector
    codes = encode(sae, activations, out=tmp_path / "codes", dtype="float16", quiet=True)
    data = (codes.path / "shard-00000.safetensors").read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    assert header["indices"]["dtype"] == dtype
    assert int(codes.image(3).indices.max()) == n_latents - 1
    assert float(codes.density()[-1]) == 1.0


def test_shards_open_with_safetensors_alone(made: CodeStore) -> None:
    from safetensors.torch import load_file

    found = load_file(made.path / "shard-00001.safetensors")
    assert set(found) == {"offsets", "image_indices", "n_active", "values", "indices"}
    first = int(found["image_indices"][0])
    row = slice(*found["offsets"][:2].tolist())
    code = made.image(first)
    stop = int(code.offsets[1])
    assert torch.equal(found["indices"][row].long(), code.indices[:stop])
    assert torch.equal(found["values"][row], code.values[:stop])


def test_a_model_and_images_can_be_encoded(
    sae: SparseAutoencoder, model: VisionModel, source: ImageSource, tmp_path: Path
) -> None:
    codes = encode(sae, model, source, out=tmp_path / "codes", workers=0, quiet=True)
    assert codes.n_images == 36
    assert codes.source().fingerprint() == source.fingerprint()
    with pytest.raises(UserError, match="leave `images` out"):
        encode(sae, codes.source, source, out=tmp_path / "x")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="leave `images` out"):
        build_index(sae, codes, source, out=tmp_path / "x")
    with pytest.raises(UserError, match="needs images"):
        encode(sae, model, out=tmp_path / "x")


def test_codes_and_an_index_of_a_store_need_no_images(model: VisionModel, tmp_path: Path) -> None:
    photos = open_images(save_pictures(tmp_path / "photos", 12))
    acts = extract(model, photos, sites=[SITE], out=tmp_path / "acts", workers=0, quiet=True)
    sae = make_sae()
    expected = build_index(sae, acts, out=tmp_path / "before", quiet=True)
    (tmp_path / "photos").rename(tmp_path / "elsewhere")
    acts = ActivationStore(tmp_path / "acts")
    codes = encode(sae, acts, out=tmp_path / "codes", quiet=True)
    for name, given in {"store": acts, "codes": CodeStore(codes.path)}.items():
        index = build_index(sae, given, out=tmp_path / f"index of {name}", quiet=True)
        assert index.table.equals(expected.table) and index.images.equals(expected.images)
        assert index.manifest["images"] == expected.manifest["images"]
        assert "96 latents" in repr(index) and len(repr(index)) < 300
        assert "<tr><th>latents</th><td>96, " in index._repr_html_()
        assert len(index.to_pandas()) == 96 and index.to_pandas()["top_label"].notna().any()
    assert "<tr><th>latents</th><td>96</td></tr>" in codes._repr_html_()
    for folder in (acts.path, codes.path):  # their files share the names of an index
        with pytest.raises(UserError, match=r"holds activations or codes.*another folder"):
            build_index(sae, acts, out=folder, quiet=True)
    path = codes.path / "images.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(SparsightError, match=r"images\.parquet: .*checksum differs.*encode again"):
        build_index(sae, CodeStore(codes.path), out=tmp_path / "damaged", quiet=True)
    for opened in (acts.source, codes.source, index.source):
        with pytest.raises(
            UserError,
            match=r"images (that|from which) it was .*photos: no such.*(Bring|Put) them back",
        ):
            opened()


def test_activations_that_are_not_finite_stop_the_encoding(
    sae: SparseAutoencoder, activations: TensorActivations, tmp_path: Path
) -> None:
    x = activations.x.clone()
    x[20, 3, 5] = torch.inf
    bad = TensorActivations(x, activations.images, activations.model)
    with pytest.raises(SparsightError, match="images 20 to 24"):
        encode(sae, bad, out=tmp_path / "codes", **SMALL)
    assert CodeManifest.read(tmp_path / "codes").n_images == 20


def test_numbers_below_1_are_refused(
    sae: SparseAutoencoder, store: ActivationStore, tmp_path: Path, made: CodeStore
) -> None:
    for setting in ("batch_images", "shard_bytes"):
        with pytest.raises(UserError, match=f"{setting} is 0"):
            encode(sae, store, out=tmp_path / "codes", **{setting: 0})
    with pytest.raises(UserError, match="dtype is 'int8'"):
        encode(sae, store, out=tmp_path / "codes", dtype="int8")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="batch_images is 0"):
        made.ordered(0)
