"""The index on disk: its file, its lists, and the manifest that names their hashes.

An index and its manifest change at one moment. The new files wait beside the old ones until the manifest is written;
it is the manifest that counts. FAISS trusts what it reads, so nothing is read before its hash was compared.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import faiss

from retro.errors import DamagedFile, MissingArtifact, require_match
from retro.search.factory import ivf_of
from retro.storage.files import atomic_write, sha256_of_file
from retro.storage.manifests import Fields, read_manifest, require_positive, write_manifest

MANIFEST_FILE, INDEX_FILE, LISTS_FILE = "retro.index.json", "retro.index", "retro.ivfdata"
FILES = {LISTS_FILE: "lists_sha256", INDEX_FILE: "index_sha256"}  # and their hashes in the manifest
NEW = ".new"  # how the names of files end that wait for their manifest
# An index is mapped from its file; lists on disk are opened beside it, and nowhere else.
MAPPED = faiss.IO_FLAG_MMAP_IFC | faiss.IO_FLAG_ONDISK_SAME_DIR
LISTS_BESIDE = faiss.IO_FLAG_READ_ONLY | faiss.IO_FLAG_ONDISK_SAME_DIR
MANIFEST_FIELDS: Fields = {
    "chunk_len": int,
    "index": str,
    "index_wanted": str,
    "note": str,
    "n_chunks": int,
    "n_probe": int,
    "d_emb": int,
    "trim": bool,
    "precision": ("fp32", "bf16"),
    "embedder": str,
    "embedder_sha256": str,
    "corpus_sha256": str,
    "database_sha256": str,
    "index_sha256": str,
    "lists_sha256": str,
    "recall": dict,
    "seed": int,
    "search": float,
    "n_train_wanted": int,
    "additions": list,
    "removed": dict,
}


def read_database_manifest(data_path: str | Path) -> dict[str, Any]:
    """The manifest of the database in a folder. Raises if it is missing or damaged."""
    path = Path(data_path) / MANIFEST_FILE
    manifest = read_manifest(path, MANIFEST_FIELDS)
    require_positive(path, manifest, "chunk_len", "n_probe", "d_emb")
    return manifest


def write_database(index: faiss.Index, data_path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Put an index and its manifest, completed by the hashes of the index's files, in the place of the old ones."""
    manifest = {**manifest, **write_index(index, data_path)}
    write_manifest(data_path / MANIFEST_FILE, manifest)
    promote_new_index(data_path, manifest)
    if not manifest["lists_sha256"]:
        (data_path / LISTS_FILE).unlink(missing_ok=True)
    return manifest


def write_faiss(index: faiss.Index, path: Path) -> None:
    """`faiss.write_index`, which reports a full disk as `RuntimeError`: here it is `OSError`."""
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(str(error).rpartition("write error")[2] or str(error)) from error


def write_index(index: faiss.Index, data_path: Path) -> dict[str, str]:
    """Write an index, and its lists if they are on disk, beside those of a data folder; returns their hashes."""
    ivf = ivf_of(index)
    lists = faiss.downcast_InvertedLists(ivf.invlists) if ivf is not None else None
    hashes = {"index_sha256": "", "lists_sha256": ""}
    if isinstance(lists, faiss.OnDiskInvertedLists):
        source = Path(lists.filename)
        hashes["lists_sha256"] = sha256_of_file(source)
        lists.filename = LISTS_FILE  # found beside the index, wherever that is moved
        with open(source, "rb") as file:
            os.fsync(file.fileno())
        os.replace(source, data_path / f"{LISTS_FILE}{NEW}")
    with atomic_write(data_path / f"{INDEX_FILE}{NEW}") as temporary:
        write_faiss(index, temporary)
        hashes["index_sha256"] = sha256_of_file(temporary)
    _TRUSTED.add(hashes["index_sha256"])
    return hashes


def promote_new_index(data_path: Path, manifest: Mapping[str, Any]) -> None:
    """Put new files, if they are those that the manifest speaks of, in the place of the old ones.

    Killed before the manifest is written, there is the old index; killed after it, the new one, which the next
    command puts in its place.
    """
    for name, key in FILES.items():
        new = data_path / f"{name}{NEW}"
        with contextlib.suppress(FileNotFoundError):  # another process did it
            if new.exists() and sha256_of_file(new) == manifest[key]:
                os.replace(new, data_path / name)


_TRUSTED: set[str] = set()  # hashes of index files that this process wrote, or that a trial has read

# What a trial does with an index: read it and search it, in a process of its own that may well crash.
_TRIAL = """
import resource, sys
import faiss, numpy as np
path, flags, most = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
try:
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
except (ValueError, OSError):
    pass  # not every system has the limit
index = faiss.read_index(path, flags)
index.search(np.zeros((1, index.d), dtype=np.float32), 4)
"""


def read_index(data_path: Path, manifest: Mapping[str, Any], writable: bool = False) -> faiss.Index:
    """The index of a data folder, mapped from its file; in memory if it is to be `writable`.

    A crafted file crashes FAISS. So the hash is compared first, and an index that is new to this process is first read
    by another. Raises `DamagedFile` for a file that cannot be read, `StaleArtifact` for one that holds other keys than
    its manifest says.
    """
    path = data_path / INDEX_FILE
    verify_index(data_path, manifest)
    sha256, flags = str(manifest["index_sha256"]), LISTS_BESIDE if manifest["lists_sha256"] else MAPPED
    if sha256 not in _TRUSTED:
        most = 3 * sum(f.stat().st_size for f in (path, data_path / LISTS_FILE) if f.exists()) + (8 << 30)
        trial = [sys.executable, "-P", "-c", _TRIAL, str(path), str(flags), str(most)]
        environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        if (result := subprocess.run(trial, capture_output=True, env=environment)).returncode:
            said = result.stderr.decode(errors="replace").strip().splitlines() or [f"status {result.returncode}"]
            raise DamagedFile(path, f"cannot be read: FAISS failed on it ({said[-1][:160]})")
        _TRUSTED.add(sha256)
    try:
        index = faiss.read_index(str(path), faiss.IO_FLAG_ONDISK_SAME_DIR if writable else flags)
    except RuntimeError as error:
        raise DamagedFile(path, f"cannot be read ({str(error)[-160:]})") from None
    wanted = {name: manifest[name] for name in ("d_emb", "n_chunks")}
    require_match(path, {"d_emb": index.d, "n_chunks": index.ntotal}, wanted)
    return index


def verify_index(data_path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise if a file of the index is missing, or has not the bytes that its manifest speaks of."""
    promote_new_index(data_path, manifest)
    for name, key in FILES.items():
        path = data_path / name
        if manifest[key] or name == INDEX_FILE:
            if not path.exists():
                raise MissingArtifact(path)
            if (found := sha256_of_file(path)) != manifest[key]:
                raise DamagedFile(path, f"has sha256 {found}, but its manifest says {manifest[key]}")
