r"""Training samples with their neighbors, retrieved once, before training.

A sample is `chunks_per_sample` chunks of consecutive text from one document, and for each chunk
$C_u$ its nearest neighbors $\text{RET}(C_u)$. Since BERT is frozen they never change, so they are
computed once and kept as offsets: a JSON Lines file with a header line, which holds the hash of what
follows, then one line a sample::

    {"offset": 1041, "neighbors": [[88112, 4032], ...], "distances": [[3.1, 3.4], ...]}

**No neighbor may hold text that its sample has yet to predict.** Otherwise the model learns to copy
the answer, and its loss says nothing about unseen text. Let $m = 16$, and let chunk $u$ of a sample
start at offset 1000. The tutorial keeps any neighbor that starts after $1000 + 16 + 8 = 1024$; one
at 1025 holds the text from 1025 to 1056, but the sample goes on to predict the text from 1016 on.
Here the search leaves out, for each query,

* `exclude='document'`: everything from the document of the query (the paper's rule), or
* `exclude='sample'`: every chunk whose value overlaps the sample's span (for a single document), or
* `exclude='span'`: what the tutorial's filter leaves out. It leaks, and exists to reproduce that.

`audit` checks the written file by plain arithmetic on offsets.
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from retro.commands import dataset_command

    raise SystemExit(dataset_command())

import hashlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as PyTorchDataset
from tqdm import tqdm

from retro import distributed
from retro.artifacts import (
    FORMAT_VERSION,
    Fields,
    differences,
    package_versions,
    parse_json,
    remove_unfinished,
    require_match,
    sealed,
    written_whole,
)
from retro.corpus import NO_TOKEN, Corpus
from retro.database import MANIFEST_FILE, RetroIndex, open_corpus
from retro.keys import TOKENS_PER_PIECE
from retro.shards import Shards

DATASET_FILE = {"train": "retro_train_dataset.jsonl", "valid": "retro_valid_dataset.jsonl"}
EXCLUDE = ("document", "sample", "span")
REPAIR = "python -m retro.dataset"
MAX_HEADER = 1 << 20  # bytes of a dataset's first line
MAX_SAMPLE = 1 << 30  # tokens of a sample times neighbors of a chunk
HEADER_FIELDS: Fields = {
    "split": ("train", "valid"),
    "n_samples": int,
    "chunk_len": int,
    "chunks_per_sample": int,
    "n_neighbors": int,
    "exclude": EXCLUDE,
    "corpus_sha256": str,
    "index_sha256": str,
    "sha256": str,
}
IGNORED_TARGET = -100  # what torch's cross entropy passes over by default


def build_dataset(
    chunk_len: int | None = None,
    chunks_per_sample: int = 32,
    skip_range: int = 8,
    *,
    corpus: Any = None,
    data_path: str | Path = "data",
    index: RetroIndex | None = None,
    n_neighbors: int = 2,
    exclude: str | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Retrieve the neighbors of all samples; the first arguments are the tutorial's.

    * `chunk_len` is the length of a chunk; left out, the database's
    * `chunks_per_sample` is the number of chunks of a sample
    * `skip_range`: before each sample, fewer than this many tokens are skipped, at random, so that
      samples are not aligned with the chunks in the database
    * `corpus` is a `Corpus` or a labml `TextDataset`; left out, the one in `data_path`
    * `index` retrieves; left out, the database in `data_path`, its BERT on `device`
    * `n_neighbors` is the number of neighbors of a chunk, $K$
    * `exclude` is one of `EXCLUDE`; left out, `document`, or `sample` when only one document trains

    Writes a file for the training and one for the validation documents into `data_path` and returns
    their headers. The last sample of a document may be shorter. An interrupted build continues after
    the last block of samples. Raises `ValueError` when the text is too short for a sample or no chunk
    has a neighbor.
    """
    data_path = Path(data_path)
    corpus = open_corpus(data_path) if corpus is None else Corpus.of(corpus)
    index = index or RetroIndex(chunk_len, n_neighbors=n_neighbors, data_path=data_path, corpus=corpus, device=device)
    if chunk_len is not None:
        repair = f"python -m retro.database TEXT ... --chunk-len {chunk_len}"
        require_match(data_path / MANIFEST_FILE, index.made_with, {"chunk_len": chunk_len}, repair)
    exclude = exclude or default_exclude(corpus)
    if exclude not in EXCLUDE:
        raise ValueError(f"exclude={exclude!r} is not one of {', '.join(EXCLUDE)}")
    if exclude == "document" and corpus.n_train < 2:
        raise ValueError("exclude='document' leaves no neighbors: one document trains. Use --exclude sample")
    headers = {}
    for split, name in DATASET_FILE.items():
        offsets = sample_offsets(corpus, split, index.chunk_len, chunks_per_sample, skip_range, seed)
        header = {
            "format_version": FORMAT_VERSION,
            "split": split,
            "n_samples": len(offsets),
            **wanted_dataset(index.made_with, chunks_per_sample, skip_range, n_neighbors, exclude, seed),
            "versions": package_versions(),
        }
        path = data_path / name
        if distributed.agreed(partial(_is_whole, path, header)):  # before it was interrupted
            distributed.first(partial(remove_unfinished, data_path, parts_folder(path)))
        else:
            with distributed.only_writer(data_path):
                write_samples(path, header, offsets, index)
            distributed.wait()
        headers[split] = read_header(path)
    return headers


def _is_whole(path: Path, header: dict[str, Any]) -> bool:
    """Whether the dataset of this header is there, neither torn nor altered."""
    try:
        found = read_header(path)
        return not differences(found, header) and found["sha256"] == _sha256_of_body(path)
    except (FileNotFoundError, ValueError):
        return False


def default_exclude(corpus: Corpus) -> str:
    """`document`, or `sample` where that would leave nothing."""
    return "document" if corpus.n_train > 1 else "sample"


def wanted_dataset(
    database: dict[str, Any], chunks_per_sample: int, skip_range: int, n_neighbors: int, exclude: str, seed: int
) -> dict[str, Any]:
    """The part of a dataset's header that tells whether it has to be built again."""
    return {
        "chunk_len": database["chunk_len"],
        "chunks_per_sample": chunks_per_sample,
        "skip_range": skip_range,
        "n_neighbors": n_neighbors,
        "exclude": exclude,
        "seed": seed,
        "corpus_sha256": database["corpus_sha256"],
        "index_sha256": database["index_sha256"],
    }


def sample_offsets(
    corpus: Corpus, split: str, chunk_len: int, chunks_per_sample: int, skip_range: int, seed: int
) -> list[int]:
    """Where the samples of a split start: one after the other through each document, with random skips.

    The last sample of a document holds what is left, if that is a chunk and a token to predict.
    """
    if skip_range < 1:
        raise ValueError(f"skip_range={skip_range}, but it must be at least 1 (which skips nothing)")
    rng = np.random.default_rng([seed, split == "valid"])
    offsets = []
    for number in corpus.split(split):
        i, end = int(corpus.starts[number]), int(corpus.starts[number + 1])
        while (i := i + int(rng.integers(skip_range))) + chunk_len < end:
            offsets.append(i)
            i += chunks_per_sample * chunk_len
    n_tokens = int(corpus.starts[corpus.split(split).stop] - corpus.starts[corpus.split(split).start])
    needed = chunks_per_sample * chunk_len + 1 if split == "train" else chunk_len + 1
    if not offsets or n_tokens < needed:
        raise ValueError(
            f"the {split} text has {n_tokens} tokens in {len(corpus.split(split))} documents, but a sample needs "
            f"{needed} ({chunks_per_sample} chunks of {chunk_len}). Use more text, or fewer or shorter chunks: "
            f"--chunks-per-sample, --chunk-len"
        )
    return offsets


def n_tokens_of_samples(corpus: Corpus, offsets: Any, chunk_len: int, chunks_per_sample: int) -> np.ndarray:
    """Input tokens of the samples at `offsets`: whole chunks, or up to the last but one of its document."""
    return np.minimum(chunks_per_sample * chunk_len, corpus.ends_of(offsets) - 1 - offsets)


def write_samples(path: Path, header: dict[str, Any], offsets: list[int], index: RetroIndex) -> None:
    """Retrieve in blocks, each kept as a shard beside `path`, then put them together."""
    per_block = max(1, TOKENS_PER_PIECE // (header["chunk_len"] * header["chunks_per_sample"]))
    blocks = [offsets[i : i + per_block] for i in range(0, len(offsets), per_block)]
    shards = Shards(parts_folder(path), header, [""] * len(blocks), ".jsonl")
    distributed.first(shards.open)
    missing = shards.missing()
    mine = sum(len(blocks[number]) for number in distributed.share(list(range(len(blocks)))))
    n_done = mine - sum(len(blocks[number]) for number in missing)
    with tqdm(total=mine, initial=n_done, desc=f"Neighbors ({header['split']})", unit="sample") as bar:
        for number in missing:
            lines = [json.dumps(sample) for sample in retrieve_samples(np.array(blocks[number]), header, index)]
            with shards.written(number) as temporary:
                temporary.write_bytes(("\n".join(lines) + "\n").encode())
            bar.update(len(lines))
    distributed.wait()
    distributed.first(lambda: _put_together(path, header, shards))


def _put_together(path: Path, header: dict[str, Any], shards: Shards) -> None:
    files, digest = [shards.path(number) for number in range(len(shards))], hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    with written_whole(path) as temporary, open(temporary, "wb") as whole:
        whole.write((json.dumps(sealed(header | {"sha256": digest.hexdigest()})) + "\n").encode())
        for file in files:
            whole.write(file.read_bytes())
    shards.remove()


def parts_folder(path: Path) -> Path:
    """Where the finished blocks of an unfinished dataset lie."""
    return path.with_suffix(".parts")


def retrieve_samples(offsets: np.ndarray, header: dict[str, Any], index: RetroIndex) -> Iterator[dict[str, Any]]:
    """The samples at `offsets`, with neighbors and distances of each whole chunk; all are retrieved at once."""
    corpus, m, C = index.corpus, header["chunk_len"], header["chunks_per_sample"]
    n_chunks = n_tokens_of_samples(corpus, offsets, m, C) // m
    firsts = np.repeat(offsets, n_chunks)  # start of the sample of each chunk
    ends = np.cumsum(n_chunks)
    chunks = firsts + m * (np.arange(len(firsts)) - np.repeat(ends - n_chunks, n_chunks))  # start of each chunk

    excluded = None  # validation documents are not in the database
    if header["split"] == "train" and header["exclude"] == "document":
        documents = corpus.document_of(firsts)
        excluded = np.stack([corpus.starts[documents], corpus.starts[documents + 1]], axis=1)
    elif header["split"] == "train" and header["exclude"] == "sample":
        # A value of 2m tokens that starts here or later reaches into the sample.
        excluded = np.stack([firsts - 2 * m + 1, firsts + C * m + 1], axis=1)
    elif header["split"] == "train":
        span = m + index.exclude_neighbor_span
        excluded = np.stack([chunks - span, chunks + span + 1], axis=1)

    distances, found = index.search(index.embed(corpus.texts(chunks, m)), header["n_neighbors"], excluded)
    for offset, rows in zip(offsets.tolist(), np.split(np.arange(len(chunks)), ends[:-1]), strict=True):
        present = [found[row] >= 0 for row in rows]
        yield {
            "offset": offset,
            "neighbors": [found[row][has].tolist() for row, has in zip(rows, present, strict=True)],
            "distances": [
                [round(d, 4) for d in distances[row][has].tolist()] for row, has in zip(rows, present, strict=True)
            ],
        }


class Dataset(PyTorchDataset):
    """Samples for training, from a file that `build_dataset` or the tutorial wrote.

    * `file_path` is the path of the file
    * `tds` is the corpus, or a labml `TextDataset`, that its text comes from

    An item is `(src, tgt, neighbors)`: tokens of shape `[chunks * chunk_len]`, the tokens after them,
    and neighbors of shape `[chunks, neighbors, 2 * chunk_len]`, all int64. Where a sample is shorter,
    `src` is filled up with 0 and `tgt` with -100, which cross entropy ignores; where a neighbor or
    a token of it is missing, there is -1. Memory holds the position of each line, not the lines.
    """

    def __init__(self, file_path: str | Path, tds: Any) -> None:
        self.path = Path(file_path)
        self.tds = tds
        if not self.path.exists():
            raise FileNotFoundError(f"{self.path} does not exist. Make it: {REPAIR}")
        with open(self.path, "rb") as file:
            self.inline = file.read(1) == b"["  # the tutorial's: one list of texts
        if self.inline:
            self.samples = _read_inline(self.path)
            return
        self.corpus = Corpus.of(tds)
        self.header = read_header(self.path)
        require_match(self.path, self.header, {"corpus_sha256": self.corpus.sha256}, REPAIR)
        self.lines = _line_starts(self.path)
        if (found := len(self.lines) - 2) != self.header["n_samples"]:
            raise ValueError(
                f"{self.path} has {found} samples, but its header says {self.header['n_samples']}. Rebuild it: {REPAIR}"
            )
        require_match(self.path, {"sha256": _sha256_of_body(self.path)}, {"sha256": self.header["sha256"]}, REPAIR)
        length, most = self.header["chunk_len"] * self.header["chunks_per_sample"], len(self.corpus.tokens)
        if length > most or length * self.header["n_neighbors"] > MAX_SAMPLE:
            raise ValueError(
                f"{self.path} has samples of {length} tokens with {self.header['n_neighbors']} neighbors a chunk, but "
                f"the corpus has {most} tokens, and {MAX_SAMPLE} is the most of both. Rebuild it: {REPAIR}"
            )
        self.bytes = np.memmap(self.path, mode="r", dtype=np.uint8)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples) if self.inline else self.header["n_samples"]

    def line(self, idx: int) -> dict[str, Any]:
        """Sample `idx` as it is written: offsets and distances. Raises `ValueError` for what cannot be one."""
        text = self.bytes[self.lines[idx + 1] : self.lines[idx + 2]].tobytes()
        try:
            sample = json.loads(text)
            offset, rows, n = sample["offset"], sample["neighbors"], len(self.corpus.tokens)
            fits = type(offset) is int and 0 <= offset < n and len(rows) <= self.header["chunks_per_sample"]
            for row in rows if fits else ():
                fits &= type(row) is list and len(row) <= self.header["n_neighbors"]
                fits &= all(type(start) is int and 0 <= start < n for start in row)
        except (ValueError, KeyError, TypeError, RecursionError):
            fits = False
        if not fits:
            raise ValueError(
                f"{self.path}, line {idx + 2} is no sample of a corpus of {len(self.corpus.tokens)} tokens: "
                f"{text[:80]!r}. Rebuild it: {REPAIR}"
            )
        return sample

    def __getitem__(self, idx: int) -> tuple[Tensor, Tensor, Tensor]:
        """Sample `idx`, as described above."""
        if not 0 <= idx < len(self):
            raise IndexError(f"sample {idx} of {len(self)}")
        if self.inline:
            return self._inline_item(*self.samples[idx])
        sample, m, C = self.line(idx), self.header["chunk_len"], self.header["chunks_per_sample"]
        offset = sample["offset"]
        n = int(n_tokens_of_samples(self.corpus, offset, m, C))
        tokens = self.corpus.tokens[offset : offset + n + 1].astype(np.int64)
        src, tgt = torch.zeros(C * m, dtype=torch.long), torch.full((C * m,), IGNORED_TARGET)
        src[:n], tgt[:n] = torch.from_numpy(tokens[:-1]), torch.from_numpy(tokens[1:])
        offsets = np.full((C, self.header["n_neighbors"]), -1)
        for u, row in enumerate(sample["neighbors"]):
            offsets[u, : len(row)] = row
        return src, tgt, torch.from_numpy(self.corpus.values(offsets, 2 * m))

    def _inline_item(self, src: str, tgt: str, neighbors: list[list[str]]) -> tuple[Tensor, Tensor, Tensor]:
        values = [[self.tds.text_to_i(text) for text in row] for row in neighbors]
        K = max(len(row) for row in values)
        R = max(len(value) for row in values for value in row)
        padded = torch.full((len(values), K, R), NO_TOKEN)
        for u, row in enumerate(values):
            for k, value in enumerate(row):
                padded[u, k, : len(value)] = value
        return self.tds.text_to_i(src), self.tds.text_to_i(tgt), padded


def read_header(path: Path) -> dict[str, Any]:
    """First line of a dataset: what made it. Raises `ValueError` if it is not one."""
    with open(path, "rb") as file:
        first = file.readline(MAX_HEADER)
    header = parse_json(path, first, REPAIR, HEADER_FIELDS)
    for name in ("chunk_len", "chunks_per_sample", "n_neighbors", "n_samples"):
        if header[name] < 1:
            raise ValueError(f"{path} has {name}={header[name]}, but at least 1 is wanted. Rebuild it: {REPAIR}")
    return header


def _sha256_of_body(path: Path) -> str:
    """The hash of everything but the first line."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.readline()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _read_inline(path: Path) -> list[Any]:
    """The tutorial's samples: lists of a text, the text shifted by one, and texts of neighbors of each chunk."""
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
        raise ValueError(f"{path} holds no list of [text, text, neighbors]. Rebuild it: {REPAIR}")
    return samples


def _line_starts(path: Path) -> np.ndarray:
    """Positions of the lines in bytes, and of the end of the last whole one; read in blocks."""
    starts, position = [np.zeros(1, dtype=np.int64)], 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            starts.append(np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n")) + position + 1)
            position += len(block)
    return np.concatenate(starts)


def audit(dataset: Dataset) -> dict[str, int]:
    """Count the neighbors that overlap text which their sample has yet to predict.

    The neighbors of chunk `u` are first read by its last token, to predict the token after it; so
    a value may not overlap the sample's tokens from the end of chunk `u` on. The count uses only
    offsets, not the search that found them.
    """
    corpus, m, C = dataset.corpus, dataset.header["chunk_len"], dataset.header["chunks_per_sample"]
    counts = {"samples": len(dataset), "leaking_samples": 0, "chunks": 0, "neighbors": 0, "leaking_neighbors": 0}
    for idx in range(len(dataset)):
        sample = dataset.line(idx)
        offset, rows = sample["offset"], sample["neighbors"]
        starts = np.array([n for row in rows for n in row], dtype=np.int64)
        ends = np.minimum(starts + 2 * m, corpus.starts[corpus.document_of(starts) + 1])
        chunk = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        unpredicted = offset + (chunk + 1) * m
        end = offset + int(n_tokens_of_samples(corpus, offset, m, C)) + 1
        leaking = (starts < end) & (ends > unpredicted)
        counts["chunks"] += len(rows)
        counts["neighbors"] += len(starts)
        counts["leaking_neighbors"] += int(leaking.sum())
        counts["leaking_samples"] += bool(leaking.any())
    return counts
