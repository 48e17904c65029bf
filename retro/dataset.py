r"""Training samples with their neighbors, retrieved once, before training.

A sample is `chunks_per_sample` chunks of consecutive text from one document, and for each chunk
$C_u$ its nearest neighbors $\text{RET}(C_u)$. Since BERT is frozen they never change, so they are
computed once and kept as offsets: a JSON Lines file with a header line, then one line a sample::

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

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset as PyTorchDataset
from tqdm import tqdm

from retro.artifacts import FORMAT_VERSION, package_versions, require_match
from retro.corpus import NO_TOKEN, Corpus
from retro.database import MANIFEST_FILE, TOKENS_PER_PIECE, RetroIndex, open_corpus

DATASET_FILE = {"train": "retro_train_dataset.jsonl", "valid": "retro_valid_dataset.jsonl"}
EXCLUDE = ("document", "sample", "span")
REPAIR = "python -m retro.dataset"
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
        write_samples(data_path / name, header, offsets, index)
        headers[split] = header
    return headers


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
    """Retrieve in blocks into `path`.part, from where an earlier call stopped, then rename it to `path`."""
    part = path.with_name(path.name + ".part")
    per_block = max(1, TOKENS_PER_PIECE // (header["chunk_len"] * header["chunks_per_sample"]))
    n_done = _resume(part, header, per_block)
    try:
        with open(part, "ab") as file:
            bar = tqdm(total=len(offsets), initial=n_done, desc=f"Neighbors ({header['split']})", unit="sample")
            for start in range(n_done, len(offsets), per_block):
                block = offsets[start : start + per_block]
                lines = [json.dumps(sample) for sample in retrieve_samples(np.array(block), header, index)]
                file.write(("\n".join(lines) + "\n").encode())
                file.flush()
                bar.update(len(block))
            bar.close()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise OSError(
            f"cannot write {path}: {error.strerror}. Nothing written earlier was changed; "
            "free some space, then run the same command again to continue."
        ) from error


def _resume(part: Path, header: dict[str, Any], per_block: int) -> int:
    """Make `part` hold the header and whole blocks only; returns how many samples that is."""
    first = (json.dumps(header) + "\n").encode()
    starts = _line_starts(part) if part.exists() else np.zeros(1, dtype=np.int64)
    if len(starts) == 1 or part.open("rb").readline() != first:
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(first)
        return 0
    n_done = (len(starts) - 2) // per_block * per_block
    os.truncate(part, int(starts[n_done + 1]))
    return n_done


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
            self.samples = json.loads(self.path.read_text(encoding="utf-8"))
            return
        self.corpus = Corpus.of(tds)
        self.lines = _line_starts(self.path)
        self.header = read_header(self.path)
        require_match(self.path, self.header, {"corpus_sha256": self.corpus.sha256}, REPAIR)
        if (found := len(self.lines) - 2) != self.header["n_samples"]:
            raise ValueError(
                f"{self.path} has {found} samples, but its header says {self.header['n_samples']}. Rebuild it: {REPAIR}"
            )
        self.bytes = np.memmap(self.path, mode="r", dtype=np.uint8)

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples) if self.inline else self.header["n_samples"]

    def line(self, idx: int) -> dict[str, Any]:
        """Sample `idx` as it is written: offsets and distances."""
        return json.loads(self.bytes[self.lines[idx + 1] : self.lines[idx + 2]].tobytes())

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
        first = file.readline()
    try:
        header = json.loads(first)
        if header["format_version"] != FORMAT_VERSION:
            raise ValueError(f"format version {header['format_version']}, not {FORMAT_VERSION}")
        header["n_samples"], header["corpus_sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a dataset of retro ({error}). Rebuild it: {REPAIR}") from None
    return header


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
