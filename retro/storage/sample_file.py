"""The file of samples: JSON Lines with a header line, which holds the hash of what follows.

    {"format_version": 6, "split": "train", "n_samples": 1373, ..., "sha256": "..."}
    {"offsets": [1041], "neighbors": [[88112, 4032], ...], "distances": [[3.1, 3.4], ...]}

While it is made, its finished shards lie beside it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from retro import parallel
from retro.config import BERT, NEIGHBOR_SPAN, OVERLAP, DatasetConfig
from retro.errors import ArtifactError, DamagedFile, InvalidOption, MissingArtifact, differences, require_match
from retro.storage.files import BLOCK, atomic_write, exclusive_lock, remove_unfinished, sha256_of_file
from retro.storage.manifests import (
    FORMAT_VERSION,
    Fields,
    package_versions,
    parse_manifest,
    require_positive,
    with_checksum,
)
from retro.storage.shards import TOKENS_PER_SHARD, Shards

MAX_HEADER = 1 << 20  # bytes of the first line
MAX_SAMPLE = 1 << 30  # tokens of a sample times neighbors of a chunk
HEADER_FIELDS: Fields = {
    "split": ("train", "valid"),
    "n_samples": int,
    "n_targets": int,
    "chunk_len": int,
    "chunks_per_sample": int,
    "n_neighbors": int,
    "exclude": ("document", "sample", "span"),
    "exclude_neighbor_span": int,
    "n_probe": int,
    "corpus_sha256": str,
    "tokenizer_sha256": str,
    "index_sha256": str,
    "sha256": str,
}


class SampleFile:
    """The samples of a file, read when they are asked for: memory holds the positions of the lines.

    * `corpus` is what the samples point into

    Raises `MissingArtifact`, `StaleArtifact` or `DamagedFile`.
    """

    def __init__(self, path: Path, corpus: Any) -> None:
        self.path, self.corpus, self.n_tokens = path, corpus, (n_tokens := len(corpus.tokens))
        self.header = read_header(path)
        require_match(path, self.header, {"corpus_sha256": corpus.sha256})
        self.lines = _line_starts(path)
        if (found := len(self.lines) - 2) != self.header["n_samples"]:
            raise DamagedFile(path, f"has {found} samples, but its header says {self.header['n_samples']}")
        if (body := sha256_of_file(path, skip_line=True)) != self.header["sha256"]:
            raise DamagedFile(path, f"has sha256 {body}, but its header says {self.header['sha256']}")
        length, K = self.header["chunk_len"] * self.header["chunks_per_sample"], self.header["n_neighbors"]
        if length > n_tokens or length * K > MAX_SAMPLE:
            raise DamagedFile(
                path,
                f"has samples of {length} tokens with {K} neighbors a chunk, but the corpus has {n_tokens} tokens, and "
                f"{MAX_SAMPLE} is the most of both",
            )
        self.bytes = np.memmap(path, mode="r", dtype=np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        """What another process is sent: not the samples, which it maps itself."""
        return {name: value for name, value in self.__dict__.items() if name != "bytes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.bytes = np.memmap(self.path, mode="r", dtype=np.uint8)

    def __len__(self) -> int:
        """Number of samples."""
        return int(self.header["n_samples"])

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Sample `idx` as it is written: offsets and distances. Raises `DamagedFile` for what cannot be one."""
        text = self.bytes[self.lines[idx + 1] : self.lines[idx + 2]].tobytes()
        try:
            sample = json.loads(text)
            offsets, rows, n = sample["offsets"], sample["neighbors"], self.n_tokens
            fits = type(offsets) is list and all(type(offset) is int and 0 <= offset < n for offset in offsets)
            fits = fits and self._chunks_of(np.array(offsets)) <= self.header["chunks_per_sample"] >= len(rows)
            for row in rows if fits else ():
                fits &= type(row) is list and len(row) <= self.header["n_neighbors"]
                fits &= all(type(start) is int and 0 <= start < n for start in row)
        except (ValueError, KeyError, TypeError, RecursionError):
            fits = False
        if not fits:
            raise DamagedFile(
                self.path, f"has no sample of a corpus of {self.n_tokens} tokens in line {idx + 2}: {text[:80]!r}"
            )
        return sample

    def _chunks_of(self, offsets: np.ndarray) -> int:
        """Chunks that the stretches at `offsets` take; too many for none."""
        if not len(offsets):
            return MAX_SAMPLE
        m = self.header["chunk_len"]
        most = m * self.header["chunks_per_sample"]
        lengths = np.minimum(most, self.corpus.ends_of(offsets) - 1 - offsets)
        return int((lengths[:-1] // m + 1).sum() - lengths[-1] // -m)


def read_header(path: Path) -> dict[str, Any]:
    """The first line: what the samples were made with. Raises if it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            first = file.readline(MAX_HEADER)
    except FileNotFoundError:
        raise MissingArtifact(path) from None
    header = {"retriever": BERT} | parse_manifest(path, first, HEADER_FIELDS)  # the only one, once
    require_positive(path, header, "chunk_len", "chunks_per_sample", "n_neighbors", "n_samples")
    return header


def dataset_cache_key(database: Mapping[str, Any], corpus: Any, config: DatasetConfig, exclude: str) -> dict[str, Any]:
    """The part of a header that tells whether the samples have to be made again; `database` is a manifest."""
    return {
        "chunk_len": database["chunk_len"],
        "chunks_per_sample": config.chunks_per_sample,
        "skip_range": config.skip_range,
        "n_neighbors": config.n_neighbors,
        "exclude": exclude,
        "exclude_neighbor_span": NEIGHBOR_SPAN,
        "n_probe": database["n_probe"],
        "seed": config.seed,
        "corpus_sha256": database["corpus_sha256"],
        "tokenizer_sha256": corpus.tokenizer.sha256,
        "index_sha256": database["index_sha256"],
        "retriever": retriever_of(database),
    }


def retriever_of(database: Mapping[str, Any]) -> str:
    """What found the neighbors, in a word or two; `database` is a manifest."""
    n, by = database.get("rerank", 0), database.get("rerank_by", OVERLAP)  # which older summaries of databases lack
    if by != OVERLAP:
        by += f" ({database['rerank_sha256'][:8]})"
    keys = ", keys of 16 bits" if database.get("key_bits") == 16 else ""
    return database.get("retriever", BERT) + (f", {n} by {by}" if n else "") + keys


def write_samples(
    path: Path,
    header: dict[str, Any],
    offsets: Sequence[Sequence[int]],
    retrieve: Callable[[Sequence[Sequence[int]]], Iterable[dict[str, Any]]],
) -> dict[str, Any]:
    """Write the samples, unless the file is there already; returns the header.

    * `offsets` are where the stretches of each sample start
    * `retrieve` makes samples of some of these

    An interrupted call continues after the last shard. Raises `InvalidOption`, and writes no file, if no chunk of any
    sample has a neighbor.
    """
    header = {**header, "versions": package_versions()}
    if parallel.broadcast_from_rank_zero(partial(is_whole, path, header)):
        parallel.on_rank_zero(partial(remove_unfinished, path.parent, shards_folder(path)))
        return read_header(path)
    per_shard = max(1, TOKENS_PER_SHARD // (header["chunk_len"] * header["chunks_per_sample"]))
    groups = [offsets[i : i + per_shard] for i in range(0, len(offsets), per_shard)]
    shards = Shards(shards_folder(path), header, [""] * len(groups), ".jsonl")

    def make(number: int, _: None, temporary: Path, done: Callable[[int], Any]) -> None:
        lines = [json.dumps(sample) for sample in retrieve(groups[number])]
        temporary.write_bytes(("\n".join(lines) + "\n").encode())
        done(len(lines))

    with exclusive_lock(path.parent):
        shards.make_missing(f"Neighbors ({header['split']})", "sample", [len(group) for group in groups], make)
        parallel.on_rank_zero(partial(_join, path, header, shards))
    return read_header(path)


def _join(path: Path, header: dict[str, Any], shards: Shards) -> None:
    files, digest = [shards.path(number) for number in range(len(shards))], hashlib.sha256()
    if not any(any(json.loads(line)["neighbors"]) for file in files for line in file.read_bytes().splitlines()):
        reason = f"leaves no chunk of the {header['split']} samples a neighbor. Search more lists (--n-probe)"
        also = (
            ", or leave out less (--exclude sample)"
            if (header["split"], header["exclude"]) == ("train", "document")
            else ""
        )
        raise InvalidOption("exclude", header["exclude"], reason + also)
    for file in files:
        digest.update(file.read_bytes())
    whole = with_checksum({"format_version": FORMAT_VERSION, **header, "sha256": digest.hexdigest()})
    with atomic_write(path) as temporary, open(temporary, "wb") as out:
        out.write((json.dumps(whole) + "\n").encode())
        for file in files:
            out.write(file.read_bytes())
    shards.remove()


def is_whole(path: Path, header: dict[str, Any]) -> bool:
    """Whether the samples of this header are there, neither torn nor altered."""
    try:
        found = read_header(path)
        return not differences(found, header) and found["sha256"] == sha256_of_file(path, skip_line=True)
    except ArtifactError:
        return False


def shards_folder(path: Path) -> Path:
    """Where the finished shards of an unfinished file lie."""
    return path.with_suffix(".shards")


def _line_starts(path: Path) -> np.ndarray:
    """Positions of the lines in bytes, and of the end of the last whole one; read in blocks."""
    starts, position = [np.zeros(1, dtype=np.int64)], 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            starts.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + position + 1)
            position += len(block)
    return np.concatenate(starts)


def is_tutorials(path: Path) -> bool:
    """Whether a file is one list of samples of texts, as the tutorial writes it."""
    try:
        with open(path, "rb") as file:
            return file.read(1) == b"["
    except FileNotFoundError:
        raise MissingArtifact(path) from None


def read_tutorials(path: Path) -> list[tuple[str, str, list[list[str]]]]:
    """The tutorial's samples: a text, the text shifted by one, and texts of neighbors of each chunk."""
    try:
        samples = json.loads(path.read_text(encoding="utf-8"))
        fits = bool(samples) and all(
            len(sample) == 3
            and all(type(text) is str and text for text in sample[:2])
            and sample[2]
            and all(type(row) is list and all(type(text) is str for text in row) for row in sample[2])
            and any(text for row in sample[2] for text in row)
            for sample in samples
        )
    except (ValueError, TypeError, RecursionError):
        fits = False
    if not fits:
        raise DamagedFile(path, "holds no list of [text, text, neighbors]")
    return [(src, tgt, neighbors) for src, tgt, neighbors in samples]
