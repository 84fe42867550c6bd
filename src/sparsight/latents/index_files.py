"""The files of a latent index: their names, checksums, and how they are replaced."""

from __future__ import annotations

import hashlib
import io
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sparsight.activations.shards import check_size, check_sums
from sparsight.errors import SparsightError, UserError
from sparsight.files import read_json, sha256_file, sha256_json, write_bytes, write_json
from sparsight.folders import replaced

FORMAT = "sparsight latent index"
VERSION = 2
READ_VERSIONS = (1, 2)

MANIFEST = "manifest.json"
LATENTS = "latents.parquet"
EXAMPLES = "top_examples.safetensors"
IMAGES = "images.parquet"
LABELS = "labels.parquet"
LABEL_COUNTS = "label_counts.safetensors"
BY_LATENT = "by_latent.safetensors"
BY_IMAGE = "by_image.safetensors"
NAMES = "names.parquet"
NEIGHBOURS = "neighbours.safetensors"
EMBEDDINGS = "embeddings.safetensors"
NEAR_MISSES = "near_misses.safetensors"

BUILT = (LATENTS, EXAMPLES, IMAGES, LABELS, LABEL_COUNTS, BY_LATENT, BY_IMAGE)
"""Files that `build_index` writes, besides the manifest."""

NEAR = (NEIGHBOURS, EMBEDDINGS, NEAR_MISSES)
"""Files that `build_index` writes by default."""

ADDED = (NAMES, *NEAR)
"""Files that an index may lack."""

FILES = (MANIFEST, *BUILT, *ADDED)

AGAIN = "Build it again with `sparsight index`."


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read and check the manifest.

    Raises:
        UserError: the folder holds no index, or one of a format that this version does not read.
        SparsightError: the manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.exists():
        raise UserError(f"{folder}: holds no latent index (there is no {MANIFEST}). {AGAIN}")
    try:
        manifest = read_json(path)
    except UserError as error:
        raise SparsightError(f"{error} {AGAIN}") from error
    if manifest.get("format") == FORMAT and manifest.get("version") not in READ_VERSIONS:
        raise UserError(
            f"{path}: has format version {manifest.get('version')}; this Sparsight reads "
            f"{' and '.join(map(str, READ_VERSIONS))}. {AGAIN}"
        )
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("format") != FORMAT or manifest.get("sha256") != sha256_json(content):
        raise SparsightError(f"{path}: is damaged, or not the manifest of a latent index. {AGAIN}")
    return manifest


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest with its own checksum."""
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    write_json(folder / MANIFEST, {**content, "sha256": sha256_json(content)})


def described(path: Path) -> dict[str, Any]:
    """Return the entry of a file in the manifest."""
    return {"sha256": sha256_file(path), "n_bytes": path.stat().st_size}


def read_file(folder: Path, name: str, manifest: Mapping[str, Any]) -> bytes:
    """Read a small file whole, and compare it with its checksum.

    Raises:
        SparsightError: it is missing, cut off or altered.
    """
    path = folder / name
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SparsightError(f"{path}: cannot be read ({error.strerror}). {AGAIN}") from error
    if hashlib.sha256(data).hexdigest() not in _checksums(manifest, name):
        raise SparsightError(
            f"{path}: is cut off or altered (its SHA-256 is not the one in {MANIFEST}). {AGAIN}"
        )
    return data


def checked_file(folder: Path, name: str, manifest: Mapping[str, Any]) -> Path | None:
    """Return the path of a file that will be memory-mapped; its checksum is checked once per
    process.

    Returns:
        The path; None if the index has no such file.

    Raises:
        SparsightError: it is missing, cut off or altered.
    """
    if name not in manifest["files"]:
        return None
    about = manifest["files"][name]
    path = folder / name
    check_size(path, about["n_bytes"], AGAIN)
    check_sums([(path, about["sha256"])], AGAIN)
    return path


def replace_files(
    folder: Path, expected: Mapping[str, Any], contents: Mapping[str, bytes | Path]
) -> dict[str, Any]:
    """Replace or add files of an index, all together.

    Args:
        folder: folder of the index.
        expected: the manifest that the caller read; another index must not have been written since.
        contents: new contents by name; a file given as a path is moved.

    Returns:
        The new manifest.

    Raises:
        UserError: another index was written there in the meantime, or other contents.
        SparsightError: the disk is full or the folder cannot be written.
    """
    with replaced(folder, (MANIFEST, *contents)) as staged:
        manifest = read_manifest(folder)
        check_same_build(folder, expected, manifest)
        for name in contents:
            if manifest["files"].get(name) != expected["files"].get(name):
                raise UserError(
                    f"{folder / name}: another process has changed it in the meantime. Do the same "
                    "again; what it has written is kept."
                )
        files = dict(manifest["files"])
        for name, content in contents.items():
            if isinstance(content, bytes):
                write_bytes(staged / name, content)
            else:
                shutil.move(content, staged / name)
            about = described(staged / name)
            files[name] = about if manifest["version"] > 1 else [about["sha256"]]
        manifest = {**manifest, "files": files}
        write_manifest(staged, manifest)
    return read_manifest(folder)


def check_same_build(folder: Path, one: Mapping[str, Any], other: Mapping[str, Any]) -> None:
    """Raise a `UserError` unless two manifests belong to one index, before and after changes."""
    names = {name for name in BUILT if name != LATENTS}
    if any(one["files"].get(name) != other["files"].get(name) for name in names):
        raise UserError(
            f"{folder}: another index was written here since this one was opened. Open it again."
        )


def parquet(table: pa.Table) -> bytes:
    """Return a table as the contents of a Parquet file."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def table_of(data: bytes) -> pa.Table:
    """Return the table in the contents of a Parquet file.

    No thread of Arrow takes part: one that still let go of `data` while Python exits would end the
    process with an abort.

    Raises:
        pyarrow.ArrowException: the contents are damaged.
    """
    return pq.read_table(pa.BufferReader(data), use_threads=False, pre_buffer=False)


def _checksums(manifest: Mapping[str, Any], name: str) -> list[str]:
    """Return the accepted checksums of a file; version 1 wrote a list."""
    about = manifest["files"].get(name, [])
    return list(about) if isinstance(about, list) else [about["sha256"]]
