r"""Training samples with their neighbors, retrieved once, before training.

A sample is `chunks_per_sample` chunks of text, and for each chunk $C_u$ its nearest neighbors $\text{RET}(C_u)$. Since
BERT is frozen they never change, so they are computed once and kept as offsets, a line of JSON for each sample::

    {"offsets": [1041], "neighbors": [[88112, 4032], ...], "distances": [[3.1, 3.4], ...]}

Most samples are one *stretch* of consecutive text. Shorter ones, ends of documents and whole short documents, share a
sample: each begins with a chunk of its own, reads no token and no neighbor of the others, and ends before a -1.

**No neighbor may hold text that its sample has yet to predict.** Otherwise the model learns to copy the answer, and its
loss says nothing about unseen text. Let $m = 16$, and let chunk $u$ of a sample start at offset 1000. The tutorial
keeps any neighbor that starts after $1000 + 16 + 8 = 1024$; one at 1025 holds the text from 1025 to 1056, but the
sample goes on to predict the text from 1016 on. Here the search leaves out, for each query,

* `exclude='document'`: everything from the document of the query (the paper's rule) and its near-duplicates, or
* `exclude='sample'`: every chunk whose value overlaps the sample's span (for a single document), or
* `exclude='span'`: what the tutorial's filter leaves out. It leaks, and exists to reproduce that.

`retro.evaluation.audit` checks the written file: by plain arithmetic on offsets, and by what neighbors hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset as PyTorchDataset

from retro.config import DatasetConfig, with_given
from retro.database import RetroIndex, build_database
from retro.errors import InvalidOption, TextTooShort, require_match
from retro.search.retrievers import Given
from retro.storage.sample_file import SampleFile, dataset_cache_key, is_tutorials, read_tutorials, write_samples
from retro.text.corpus import NO_TOKEN, Corpus, open_corpus

DATASET_FILE = {"train": "retro_train_dataset.jsonl", "valid": "retro_valid_dataset.jsonl"}
Offsets = Sequence[Sequence[int]]  # of each sample, where its stretches start
IGNORED_TARGET = -100  # what torch's cross entropy passes over by default


def build_dataset(
    chunk_len: int | None = None,
    chunks_per_sample: int | None = None,
    skip_range: int | None = None,
    *,
    config: DatasetConfig | None = None,
    corpus: Any = None,
    data_path: str | Path = "data",
    index: RetroIndex | None = None,
    device: Any = "cpu",
    neighbors: tuple[np.ndarray, np.ndarray] | None = None,
) -> dict[str, dict[str, Any]]:
    """Retrieve the neighbors of all samples; the first arguments are the tutorial's.

    * `chunk_len` is the length of a chunk; left out, the database's
    * `chunks_per_sample` is the number of chunks of a sample
    * `skip_range`: before each sample, fewer than this many tokens are skipped, at random, so that samples are not
      aligned with the chunks in the database; with 1 they are, and their keys are not computed again
    * `config` has these, with the tutorial's defaults, and more; what is given beside it goes before it
    * `corpus` is a `Corpus` or a labml `TextDataset`; left out, the one in `data_path`
    * `index` retrieves; left out, the database in `data_path`, its BERT on `device`
    * `neighbors` are your own, if there is no database: offsets of `sample_chunks` (n), and of theirs (n, K), or -1

    Writes a file for the training and one for the validation documents into `data_path` and returns their headers, in
    which `n_targets` is the number of tokens that are predicted. Raises `TextTooShort` when there is not enough for a
    sample, `InvalidOption` when no chunk can have a neighbor.
    """
    given = None if neighbors is None else Given(*neighbors)
    config = config or (DatasetConfig() if given is None else DatasetConfig(n_neighbors=given.neighbors.shape[1]))
    config = with_given(config, {"chunks_per_sample": chunks_per_sample, "skip_range": skip_range})
    corpus = open_corpus(data_path) if corpus is None else Corpus.of(corpus)
    if given:
        build_database(given.chunk_len_in(data_path, chunk_len), corpus=corpus, data_path=data_path, retriever=given)
    index = index or RetroIndex(chunk_len, data_path=data_path, corpus=corpus, device=device, retriever=given)
    if chunk_len is not None:
        require_match(Path(data_path), index.manifest, {"chunk_len": chunk_len})
    headers = {}
    for split, name in DATASET_FILE.items():
        offsets = sample_offsets(corpus, split, index.chunk_len, config)
        lengths = stretch_lengths(corpus, np.concatenate(offsets), index.chunk_len * config.chunks_per_sample)
        header = {"split": split, "n_samples": len(offsets), "n_targets": int(lengths.sum())}
        header |= dataset_cache_key(index.manifest, corpus, config, what_to_exclude(corpus, config))
        header |= {"n_probe": index.n_probe, "exclude_neighbor_span": index.exclude_neighbor_span}  # perhaps others

        def retrieve(some: Offsets, header: dict[str, Any] = header) -> Iterator[dict[str, Any]]:
            return retrieve_samples(some, header, index)

        headers[split] = write_samples(Path(data_path) / name, header, offsets, retrieve)
    return headers


def what_to_exclude(corpus: Corpus, config: DatasetConfig) -> str:
    """What neighbors may not come from: as the config says, else the document, or its sample where one trains."""
    if config.exclude == "document" and corpus.n_train < 2:
        raise InvalidOption("exclude", "document", "leaves no neighbors: one document trains. Use sample")
    return config.exclude or ("document" if corpus.n_train > 1 else "sample")


def sample_offsets(corpus: Corpus, split: str, chunk_len: int, config: DatasetConfig) -> Offsets:
    """Where the stretches of each sample of a split start: one after the other through each document.

    Before each, some tokens are skipped at random, unless too few would be left for a chunk and a token to predict.
    Stretches that are shorter than a sample are put together in the order in which they come.
    """
    rng = np.random.default_rng([config.seed, split == "valid"])
    m, C, samples, shared, used = chunk_len, config.chunks_per_sample, list[list[int]](), list[int](), 0
    for number in corpus.split(split):
        i, end = int(corpus.starts[number]), int(corpus.starts[number + 1])
        while i + 1 < end:
            skipped = int(rng.integers(config.skip_range))
            i += skipped if i + skipped + m < end else 0
            n = min(C * m, end - 1 - i)
            if n == C * m:
                samples.append([i])
            else:
                if used + -(n // -m) > C:
                    samples.append(shared)
                    shared, used = [], 0
                shared.append(i)
                used += n // m + 1  # at least one place between two stretches
            i += C * m
    samples += [shared] if shared else []
    documents = corpus.split(split)
    n_tokens, needed = int(np.diff(corpus.starts)[documents].sum()), C * m + 1 if split == "train" else 2
    if not samples or n_tokens < needed:
        raise TextTooShort(
            f"the {split} text has {n_tokens} tokens in {len(documents)} documents, but a sample needs {needed} "
            f"({C} chunks of {m}). Use more text, or fewer or shorter chunks"
        )
    return samples


def stretch_lengths(corpus: Corpus, offsets: Any, most: int) -> np.ndarray:
    """Input tokens of the stretches at `offsets`: `most`, or up to the last but one of the document."""
    return np.minimum(most, corpus.ends_of(offsets) - 1 - offsets)


def sample_chunks(corpus: Corpus, chunk_len: int, config: DatasetConfig) -> np.ndarray:
    """Where all chunks start that read neighbors, in training and validation samples (n)."""
    starts = np.concatenate([x for split in DATASET_FILE for x in sample_offsets(corpus, split, chunk_len, config)])
    return chunks_of_stretches(corpus, starts, chunk_len, config.chunks_per_sample)[0]


def chunks_of_stretches(corpus: Corpus, starts: np.ndarray, m: int, C: int) -> tuple[np.ndarray, np.ndarray]:
    """Where the whole chunks of stretches start that are up to `C` chunks of `m` long, and how many each has."""
    n_chunks = stretch_lengths(corpus, starts, C * m) // m
    first = np.repeat(np.cumsum(n_chunks) - n_chunks, n_chunks)  # number of the first chunk of each one's stretch
    return np.repeat(starts, n_chunks) + m * (np.arange(n_chunks.sum()) - first), n_chunks


def retrieve_samples(offsets: Offsets, header: dict[str, Any], index: RetroIndex) -> Iterator[dict[str, Any]]:
    """The samples at `offsets`, with neighbors and distances of each whole chunk; all are retrieved at once."""
    corpus, m, C = index.corpus, header["chunk_len"], header["chunks_per_sample"]
    starts = np.concatenate(offsets)
    chunks, n_chunks = chunks_of_stretches(corpus, starts, m, C)
    stretches, ends = np.repeat(starts, n_chunks), np.cumsum(n_chunks)  # start of the stretch of each chunk
    excluded = excluded_ranges(chunks, stretches, header, index)
    distances, found = index.nearest_at(chunks, header["n_neighbors"], excluded)
    last = ends[np.cumsum([len(sample) for sample in offsets]) - 1]  # behind the chunks of each sample
    for sample, rows in zip(offsets, np.split(np.arange(len(chunks)), last[:-1]), strict=True):
        yield {
            "offsets": sample,
            "neighbors": [found[row][found[row] >= 0].tolist() for row in rows],
            "distances": [[round(d, 4) for d in distances[row][found[row] >= 0].tolist()] for row in rows],
        }


def excluded_ranges(chunks: np.ndarray, stretches: np.ndarray, header: dict[str, Any], index: RetroIndex) -> np.ndarray:
    """What may not be retrieved for each chunk: offsets `(first, end)` of chunks, of shape `[n, r, 2]`.

    * `chunks`, `stretches` (n) are where the chunks, and the stretches that they are in, start
    """
    m, C = header["chunk_len"], header["chunks_per_sample"]
    if header["split"] == "valid" or header["exclude"] == "document":
        return index.corpus.barred_ranges(stretches)
    if header["exclude"] == "sample":  # a value of 2m tokens that starts here or later reaches into it
        return np.stack([stretches - 2 * m + 1, stretches + C * m + 1], axis=1)[:, None]
    span = m + index.exclude_neighbor_span
    return np.stack([chunks - span, chunks + span + 1], axis=1)[:, None]


class Dataset(PyTorchDataset):
    """Samples for training, from a file that `build_dataset` or the tutorial wrote.

    * `file_path` is the path of the file
    * `tds` is the corpus, or a labml `TextDataset`, that its text comes from

    An item is `(src, tgt, neighbors)`: tokens of shape `[chunks * chunk_len]`, the tokens after them, and neighbors of
    shape `[chunks, neighbors, 2 * chunk_len]`, all int64. In `src` -1 stands between two stretches, and 0 after the
    last; `tgt` has -100 there, which cross entropy ignores; where a neighbor or a token of it is missing, there is -1.
    """

    def __init__(self, file_path: str | Path, tds: Any) -> None:
        self.path = Path(file_path)
        self.texts = [_tensors(*texts, tds) for texts in read_tutorials(self.path)] if is_tutorials(self.path) else None
        if self.texts is None:
            self.corpus = Corpus.of(tds)
            self.samples = SampleFile(self.path, self.corpus)
            self.header = self.samples.header

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.samples if self.texts is None else self.texts)

    def line(self, idx: int) -> dict[str, Any]:
        """Sample `idx` as it is written: offsets and distances."""
        return self.samples[idx]

    def __getitem__(self, idx: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sample `idx`, as described above."""
        if not 0 <= idx < len(self):
            raise IndexError(f"sample {idx} of {len(self)}")
        if self.texts is not None:
            return self.texts[idx]
        sample, m, C = self.samples[idx], self.header["chunk_len"], self.header["chunks_per_sample"]
        src, tgt = torch.zeros(C * m, dtype=torch.long), torch.full((C * m,), IGNORED_TARGET)
        neighbors, rows = np.full((C, self.header["n_neighbors"]), -1), iter(sample["neighbors"])
        start = end = 0  # of a stretch in the sample
        for offset in sample["offsets"]:
            src[end:start] = NO_TOKEN
            n = int(stretch_lengths(self.corpus, offset, C * m))
            end, tokens = start + n, torch.from_numpy(self.corpus.tokens[offset : offset + n + 1].astype(np.int64))
            src[start:end], tgt[start:end] = tokens[:-1], tokens[1:]
            for u, row in zip(range(start // m, end // m), rows, strict=False):
                neighbors[u, : len(row)] = row
            start = (end // m + 1) * m
        return src, tgt, torch.from_numpy(self.corpus.values(neighbors, 2 * m))


def _tensors(
    src: str, tgt: str, neighbors: list[list[str]], tds: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The tutorial's sample of texts as tensors."""
    values = [[tds.text_to_i(text) for text in row] for row in neighbors]
    longest = max(len(value) for row in values for value in row)
    padded = torch.full((len(values), max(map(len, values)), longest), NO_TOKEN)
    for u, row in enumerate(values):
        for k, value in enumerate(row):
            padded[u, k, : len(value)] = value
    return tds.text_to_i(src), tds.text_to_i(tgt), padded


if __name__ == "__main__":
    from retro.cli import script

    script("dataset")
