"""The file of samples: JSON Lines with a header line, which holds the hash of what follows.

    {"format_version": 6, "split": "train", "n_samples": 1373, ..., "sha256": "..."}
    {"offsets": [1041], "neighbors": [[88112, 4032], ...], "distances": [[3.1, 3.4], ...]}

While it is made, its finished shards lie beside it. Of more than `MOST_LINES` chunks there is the header alone, and the
samples are arrays (`retro.storage.sample_arrays`).
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
from retro.storage.files import BLOCK, atomic_write, exclusive_lock, mapped_array, remove_unfinished, sha256_of_file
from retro.storage.manifests import (
    FORMAT_VERSION,
    Fields,
    package_versions,
    parse_manifest,
    require_fields,
    require_positive,
    sha256_of_json,
    with_checksum,
)
from retro.storage.sample_arrays import (
    SampleArrays,
    folder_of_arrays,
    packed,
    record_of,
    samples_per_shard,
    sha256_of_arrays,
    shards_of_arrays,
)
from retro.storage.shards import Shards

MOST_LINES = 1 << 22  # chunks, of which a file of lines has some 40 bytes each
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
    """The samples of a file, or of the arrays that it speaks of, read when they are asked for.

    * `corpus` is what the samples point into

    Raises `MissingArtifact`, `StaleArtifact` or `DamagedFile`.
    """

    def __init__(self, path: Path, corpus: Any) -> None:
        self.path, self.corpus, self.n_tokens = path, corpus, (n_tokens := len(corpus.tokens))
        self.header = read_header(path)
        require_match(path, self.header, {"corpus_sha256": corpus.sha256})
        length, K = self.header["chunk_len"] * self.header["chunks_per_sample"], self.header["n_neighbors"]
        if length > n_tokens or length * K > MAX_SAMPLE:
            raise DamagedFile(
                path,
                f"has samples of {length} tokens with {K} neighbors a chunk, but the corpus has {n_tokens} tokens, and "
                f"{MAX_SAMPLE} is the most of both",
            )
        self.samples = (SampleArrays if self.header["arrays"] else SampleLines)(path, self.header)

    def __len__(self) -> int:
        """Number of samples."""
        return int(self.header["n_samples"])

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Sample `idx` as it is written: offsets and distances. Raises `DamagedFile` for what cannot be one."""
        try:
            sample = self.samples[idx]
            offsets, rows, n = sample["offsets"], sample["neighbors"], self.n_tokens
            fits = type(offsets) is list and all(type(offset) is int and 0 <= offset < n for offset in offsets)
            fits = fits and self._chunks_of(np.array(offsets)) <= self.header["chunks_per_sample"] >= len(rows)
            for row in rows if fits else ():
                fits &= type(row) is list and len(row) <= self.header["n_neighbors"]
                fits &= all(type(start) is int and 0 <= start < n for start in row)
        except (ValueError, KeyError, TypeError, RecursionError):
            fits = False
        if not fits:
            shown = self.samples.shown(idx)
            raise DamagedFile(self.path, f"has no sample of a corpus of {self.n_tokens} tokens in {shown}")
        return sample

    def _chunks_of(self, offsets: np.ndarray) -> int:
        """Chunks that the stretches at `offsets` take; too many for none."""
        if not len(offsets):
            return MAX_SAMPLE
        m = self.header["chunk_len"]
        most = m * self.header["chunks_per_sample"]
        lengths = np.minimum(most, self.corpus.ends_of(offsets) - 1 - offsets)
        return int((lengths[:-1] // m + 1).sum() - lengths[-1] // -m)


class SampleLines:
    """The lines of a file with this header, of which memory holds the positions."""

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        self.path, self.lines = path, _line_starts(path)
        if (found := len(self.lines) - 2) != header["n_samples"]:
            raise DamagedFile(path, f"has {found} samples, but its header says {header['n_samples']}")
        if (body := sha256_of_file(path, skip_line=True)) != header["sha256"]:
            raise DamagedFile(path, f"has sha256 {body}, but its header says {header['sha256']}")
        self.bytes = np.memmap(path, mode="r", dtype=np.uint8)

    def __getstate__(self) -> dict[str, Any]:
        """What another process is sent: not the samples, which it maps itself."""
        return {name: value for name, value in self.__dict__.items() if name != "bytes"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.bytes = np.memmap(self.path, mode="r", dtype=np.uint8)

    def __getitem__(self, idx: int) -> Any:
        """What stands in the line of sample `idx`. Raises `ValueError` if it is no JSON."""
        return json.loads(self._line(idx))

    def _line(self, idx: int) -> bytes:
        return self.bytes[self.lines[idx + 1] : self.lines[idx + 2]].tobytes()

    def shown(self, idx: int) -> str:
        """Where sample `idx` is, and what begins there."""
        return f"line {idx + 2}: {self._line(idx)[:80]!r}"


def read_header(path: Path) -> dict[str, Any]:
    """The first line: what the samples were made with. Raises if it is missing or damaged."""
    try:
        with open(path, "rb") as file:
            first = file.readline(MAX_HEADER)
    except FileNotFoundError:
        raise MissingArtifact(path) from None
    found = parse_manifest(path, first, HEADER_FIELDS)
    header = found | {"retriever": BERT, "arrays": ""} | found  # there was one retriever once, and no arrays
    if header["arrays"]:
        require_fields(path, header, {"arrays": str, "samples_per_shard": int})
    counts = ("chunk_len", "chunks_per_sample", "n_neighbors", "n_samples")
    require_positive(path, header, *counts, *(["samples_per_shard"] if header["arrays"] else []))
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
    """Write the samples, unless they are there already; returns the header.

    * `offsets` are where the stretches of each sample start
    * `retrieve` makes samples of some of these

    An interrupted call continues after the last shard. Raises `InvalidOption`, and writes no header, if no chunk of any
    sample has a neighbor.
    """
    header = {**header, "versions": package_versions()}
    if parallel.broadcast_from_rank_zero(partial(is_whole, path, header)):
        parallel.on_rank_zero(partial(remove_others, path))
        return read_header(path)
    per_shard = samples_per_shard(header)
    groups = [offsets[i : i + per_shard] for i in range(0, len(offsets), per_shard)]
    if as_arrays := len(offsets) * header["chunks_per_sample"] > MOST_LINES:
        shards = shards_of_arrays(path, sha256_of_json(header), len(offsets), per_shard)
    else:
        shards = Shards(shards_folder(path), header, [""] * len(groups), ".jsonl")

    def make(number: int, _: None, temporary: Path, done: Callable[[int], Any]) -> None:
        samples = [*retrieve(groups[number])]
        with open(temporary, "wb") as file:
            if as_arrays:
                np.save(file, packed(samples, record_of(header)), allow_pickle=False)
            else:
                file.writelines(map(_line_of, samples))
        done(len(samples))

    with exclusive_lock(path.parent):
        shards.make_missing(f"Neighbors ({header['split']})", "sample", [len(group) for group in groups], make)
        finish = partial(_name, samples_per_shard=per_shard) if as_arrays else _join
        parallel.on_rank_zero(partial(finish, path, header, shards))
    parallel.on_rank_zero(partial(remove_others, path))
    return read_header(path)


def _line_of(sample: Mapping[str, Any]) -> bytes:
    return (json.dumps(sample) + "\n").encode()


def _join(path: Path, header: dict[str, Any], shards: Shards) -> None:
    """Write the file of lines that are in these shards."""
    files, digest = [shards.path(number) for number in range(len(shards))], hashlib.sha256()
    _require_neighbors(header, any(any(json.loads(line)["neighbors"]) for file in files for line in _lines_of(file)))
    for file in files:
        digest.update(file.read_bytes())
    _write_file(path, {**header, "sha256": digest.hexdigest()}, (file.read_bytes() for file in files))


def _lines_of(file: Path) -> list[bytes]:
    return file.read_bytes().splitlines()


def _name(path: Path, header: dict[str, Any], shards: Shards, samples_per_shard: int) -> None:
    """Write the header of samples that are in these shards."""
    names = {"arrays": shards.manifest["arrays"], "samples_per_shard": samples_per_shard}
    _require_neighbors(header, any((mapped_array(shards.path(n))["neighbors"] >= 0).any() for n in range(len(shards))))
    _write_file(path, {**header, **names, "sha256": sha256_of_arrays(shards)})


def _write_file(path: Path, header: dict[str, Any], body: Iterable[bytes] = ()) -> None:
    with atomic_write(path) as temporary, open(temporary, "wb") as out:
        out.write(_line_of(with_checksum({"format_version": FORMAT_VERSION, **header})))
        out.writelines(body)


def _require_neighbors(header: Mapping[str, Any], has_any: bool) -> None:
    if not has_any:
        reason = f"leaves no chunk of the {header['split']} samples a neighbor. Search more lists (--n-probe)"
        also = (
            ", or leave out less (--exclude sample)"
            if (header["split"], header["exclude"]) == ("train", "document")
            else ""
        )
        raise InvalidOption("exclude", header["exclude"], reason + also)


def write_lines(samples: SampleFile, path: Path) -> None:
    """Write samples as a file of lines, whatever they are themselves, to be looked at or read elsewhere."""
    header = {name: value for name, value in samples.header.items() if name not in ("arrays", "samples_per_shard")}
    digest = hashlib.sha256()
    for idx in range(len(samples)):
        digest.update(_line_of(samples[idx]))
    body = (_line_of(samples[idx]) for idx in range(len(samples)))
    _write_file(path, {**header, "sha256": digest.hexdigest()}, body)


def is_whole(path: Path, header: dict[str, Any]) -> bool:
    """Whether the samples of this header are there, neither torn nor altered."""
    try:
        found = read_header(path)
        if differences(found, header):
            return False
        if found["arrays"]:
            SampleArrays(path, found)
            return True
        return found["sha256"] == sha256_of_file(path, skip_line=True)
    except ArtifactError:
        return False


def remove_others(path: Path) -> None:
    """Remove what is beside samples that they are not: shards that they were made of, other arrays."""
    arrays = read_header(path)["arrays"]
    others = [folder for folder in folder_of_arrays(path).glob("*") if folder.name != arrays[:8]]
    remove_unfinished(path.parent, shards_folder(path), *(others if arrays else [folder_of_arrays(path)]))


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
