"""The index on disk: its file, its lists, and the manifest that names their hashes.

An index and its manifest change at one moment. The new files wait beside the old ones until the manifest is written;
it is the manifest that counts. Who writes, under the folder's lock, then renames them; who reads renames nothing, and
takes each file from where it is. FAISS trusts what it reads, so nothing is read before its hash was compared.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import faiss

from retro.errors import ArtifactError, DamagedFile, FolderInUse, MissingArtifact, require_match
from retro.search.factory import ivf_of, reason_of
from retro.storage.files import atomic_write, exclusive_lock, sha256_of_file
from retro.storage.manifests import Fields, read_manifest, require_fields, require_positive, write_manifest

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
# Fields that came later, and what older databases are taken for. `n_changed` chunks came or went since recall was
# measured.
SINCE = {"retriever": "bert", "rerank": 0, "rerank_by": "overlap", "rerank_sha256": "", "key_bits": 32, "n_changed": 0}


def read_database_manifest(data_path: str | Path) -> dict[str, Any]:
    """The manifest of the database in a folder. Raises if it is missing or damaged."""
    path = Path(data_path) / MANIFEST_FILE
    manifest = SINCE | read_manifest(path, MANIFEST_FIELDS)
    require_fields(path, manifest, {name: type(value) for name, value in SINCE.items()})
    require_fields(path, manifest, {"key_bits": (32, 16)})
    require_positive(path, manifest, "chunk_len", "n_probe", "d_emb")
    return manifest


def write_database(index: faiss.Index, data_path: Path, manifest: Mapping[str, Any]) -> dict[str, Any]:
    """Put an index and its manifest, completed by the hashes of the index's files, in the place of the old ones.

    For who holds the lock.
    """
    if any((data_path / f"{name}{NEW}").exists() for name in FILES):  # perhaps the whole of what is there
        with contextlib.suppress(ArtifactError):
            promote_new_index(data_path, read_database_manifest(data_path))
    manifest = {**manifest, **write_index(index, data_path)}
    write_manifest(data_path / MANIFEST_FILE, manifest)
    promote_new_index(data_path, manifest)
    return manifest


@contextlib.contextmanager
def _writing() -> Iterator[None]:
    """Inside, a full disk, which FAISS reports as `RuntimeError`, is an `OSError`."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error).rpartition("write error")[2] or str(error)) from error


def write_faiss(index: faiss.Index, path: Path) -> None:
    """`faiss.write_index`; a full disk is an `OSError`."""
    with _writing():
        faiss.write_index(index, str(path))


def write_lists(index: faiss.Index, path: Path) -> None:
    """Write the lists of an index alone, without the centroids, which are the same in every part of one index."""
    with _writing():
        ivf: Any = ivf_of(index)
        faiss.write_InvertedLists(ivf.invlists, faiss.FileIOWriter(str(path)))


def read_lists(path: Path, flags: int = 0) -> faiss.InvertedLists:
    """What `write_lists` wrote."""
    return faiss.read_InvertedLists(faiss.FileIOReader(str(path)), flags)


def merge_lists(index: faiss.Index, path: Path) -> None:
    """Add what `write_lists` wrote of a part of an index."""
    ivf: Any = ivf_of(index)
    ivf.invlists.merge_from(read_lists(path), 0)
    index.ntotal = ivf.ntotal = ivf.invlists.compute_ntotal()


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

    For who holds the lock. Killed before the manifest is written, there is the old index; killed after it, the new
    one, which the next command that writes puts in its place. Old lists go when the new index has none on disk.
    """
    for name, key in FILES.items():
        new = data_path / f"{name}{NEW}"
        if new.exists() and sha256_of_file(new) == manifest[key]:
            os.replace(new, data_path / name)
    if not manifest["lists_sha256"]:
        (data_path / LISTS_FILE).unlink(missing_ok=True)


def finish_writing(data_path: Path) -> None:
    """Put an index in its place whose writer was killed after its manifest, unless a process is at it."""
    if any((data_path / f"{name}{NEW}").exists() for name in FILES):
        with contextlib.suppress(FolderInUse), exclusive_lock(data_path):
            promote_new_index(data_path, read_database_manifest(data_path))


_TRUSTED: set[str] = set()  # hashes of index files that this process wrote, or that a trial has read

# What a trial does with an index: read it and search it, in a process of its own that may well crash.
_TRIAL = """
import sys
import faiss, numpy as np
index = faiss.read_index(sys.argv[1], int(sys.argv[2]))
index.search(np.zeros((1, index.d), dtype=np.float32), 4)
"""

_LIMIT = """
import resource
try:
    resource.setrlimit(resource.RLIMIT_AS, ({most_bytes}, {most_bytes}))
except (ValueError, OSError):
    pass  # not every system has the limit
"""


def failure_of(code: str, *arguments: Any, most_bytes: int, seconds: float | None = None) -> str:
    """Run Python code in a process of its own, which may well crash; what went wrong there, or nothing."""
    command = [sys.executable, "-P", "-c", _LIMIT.format(most_bytes=most_bytes) + code, *map(str, arguments)]
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    places = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]  # this package's goes first
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, places))
    try:
        result = subprocess.run(command, capture_output=True, env=environment, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"FAISS was not done with it after {seconds:g} s"
    if not result.returncode:
        return ""
    said = result.stderr.decode(errors="replace").strip().splitlines() or [f"status {result.returncode}"]
    return f"FAISS failed on it ({reason_of(said[-1].removeprefix('RuntimeError: '))})"


def read_index(data_path: Path, manifest: Mapping[str, Any], writable: bool = False) -> faiss.Index:
    """The index of a data folder, mapped from its file; in memory if it is to be `writable`.

    A crafted file crashes FAISS. So the hash is compared first, and an index that is new to this process is first read
    by another. Raises `DamagedFile` for a file that cannot be read, `StaleArtifact` for one that holds other keys than
    its manifest says.
    """
    path = data_path / INDEX_FILE
    sha256, flags = str(manifest["index_sha256"]), LISTS_BESIDE if manifest["lists_sha256"] else MAPPED
    with _side_by_side(files_of(data_path, manifest)) as folder:
        file = folder / INDEX_FILE
        if sha256 not in _TRUSTED:
            most = 3 * sum(f.stat().st_size for f in (file, folder / LISTS_FILE) if f.exists()) + (8 << 30)
            if failure := failure_of(_TRIAL, file, flags, most_bytes=most):
                raise DamagedFile(path, f"cannot be read: {failure}")
            _TRUSTED.add(sha256)
        try:
            index = faiss.read_index(str(file), faiss.IO_FLAG_ONDISK_SAME_DIR if writable else flags)
        except RuntimeError as error:
            raise DamagedFile(path, f"cannot be read ({str(error)[-160:]})") from None
    wanted = {name: manifest[name] for name in ("d_emb", "n_chunks")}
    require_match(path, {"d_emb": index.d, "n_chunks": index.ntotal}, wanted)
    return index


@contextlib.contextmanager
def _side_by_side(files: Mapping[str, Path]) -> Iterator[Path]:
    """A folder in which files have their own names, wherever they are: FAISS finds lists by name beside their index."""
    if all(path.name == name for name, path in files.items()):
        yield next(iter(files.values())).parent
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, path in files.items():
            (Path(folder) / name).symlink_to(path.resolve())
        yield Path(folder)


def files_of(data_path: Path, manifest: Mapping[str, Any]) -> dict[str, Path]:
    """Where the files of an index are that its manifest speaks of: in their place, or waiting beside it.

    Raises `MissingArtifact` or `DamagedFile`, about their place.
    """
    files = {}
    for name, key in FILES.items():
        if not manifest[key] and name != INDEX_FILE:
            continue
        path, new = data_path / name, data_path / f"{name}{NEW}"
        hashes = {file: sha256_of_file(file) for file in (new, path) if file.exists()}
        if manifest[key] in hashes.values():
            files[name] = next(file for file, found in hashes.items() if found == manifest[key])
        elif path in hashes:
            raise DamagedFile(path, f"has sha256 {hashes[path]}, but its manifest says {manifest[key]}")
        else:
            raise MissingArtifact(path)
    return files


def verify_index(data_path: Path, manifest: Mapping[str, Any]) -> None:
    """Put the files of an index in their place; raises as `files_of`. For who holds the lock."""
    promote_new_index(data_path, manifest)
    files_of(data_path, manifest)
