r"""The keys of the database: an embedding of every chunk, on disk.

Chunks are cut from the documents that are in the database: the training documents, and what was added later.
Their embeddings are computed once, in shards, and kept: what an index of codes finds is compared by its whole keys,
another index over the same keys needs no embedding, and adding a document embeds that document alone. A shard holds
rows of float32, or of float16 where half of the disk is wanted (`--key-bits 16`), and the rows of all shards, one after
the other, are those of `chunk_offsets`. Whoever reads keys gets float32.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from retro.errors import ArtifactError, DamagedFile, InvalidOption, require_match
from retro.search.index_file import INDEX_FILE
from retro.search.sentences import Embedder
from retro.storage.files import exclusive_lock
from retro.storage.manifests import sha256_of_json
from retro.storage.shards import TOKENS_PER_SHARD, Shards
from retro.text.corpus import Corpus

KEYS_FOLDER = "keys"


def chunk_offsets(corpus: Corpus, chunk_len: int) -> np.ndarray:
    """Offsets of the chunks of the database's documents, ascending, int64; as `ChunkOffsets` has them."""
    return ChunkOffsets(corpus, chunk_len)[:]


class ChunkOffsets:
    """Offsets of the chunks of the database's documents, ascending: two numbers for a document, none for a chunk.

    Every document is cut from its start on; what is left at its end, shorter than a chunk, is in
    the continuation of the last one. A document shorter than a chunk is a chunk.
    """

    def __init__(self, corpus: Corpus, chunk_len: int) -> None:
        self.documents = np.concatenate([np.arange(part.start, part.stop) for part in corpus.parts])
        self.starts, self.chunk_len = corpus.starts[self.documents], chunk_len
        counts = np.maximum(1, (corpus.starts[self.documents + 1] - self.starts) // chunk_len)
        self.firsts = np.concatenate([[0], np.cumsum(counts)])  # numbers of the first chunks of documents
        # Numbers of the chunks of each part of the corpus.
        ends = self.firsts[np.cumsum([0, *map(len, corpus.parts)])].tolist()
        self.parts = [range(first, last) for first, last in pairwise(ends)]

    def __len__(self) -> int:
        return int(self.firsts[-1])

    def __getitem__(self, numbers: slice | np.ndarray) -> np.ndarray:
        """Offsets (...) of the chunks of some numbers (...)."""
        if isinstance(numbers, slice):
            numbers = np.arange(*numbers.indices(len(self)))
        document = np.searchsorted(self.firsts, numbers, side="right") - 1
        return self.starts[document] + (numbers - self.firsts[document]) * self.chunk_len

    def numbers_of(self, offsets: np.ndarray) -> np.ndarray:
        """Numbers (...) of the chunks that begin at some offsets (...); -1 where none does."""
        document = np.maximum(np.searchsorted(self.starts, offsets, side="right") - 1, 0)
        within, rest = np.divmod(offsets - self.starts[document], self.chunk_len)
        numbers = self.firsts[document] + within
        return np.where((within >= 0) & (rest == 0) & (numbers < self.firsts[document + 1]), numbers, -1)

    def of_documents(self, documents: Collection[int]) -> np.ndarray:
        """Numbers [n] of the chunks of some documents, ascending."""
        places = np.searchsorted(self.documents, sorted(documents))
        numbers = [np.arange(*self.firsts[place : place + 2]) for place in places]
        return np.concatenate([np.zeros(0, dtype=np.int64), *numbers])


class Keys:
    """Embeddings of all chunks of a corpus' database, in shards on disk.

    * `data_path` has a folder `keys`, and in it one for all that the keys depend on: what is there for another text,
      chunk length or BERT stays beside it, in `others`
    * `embedder` is what the embeddings depend on: `BERTChunkEmbeddings.manifest`, or a database's manifest; in it
      `key_bits`, if they are not 32

    `offsets` are the chunks', ascending.
    """

    def __init__(self, data_path: Path, corpus: Corpus, chunk_len: int, embedder: Mapping[str, Any]) -> None:
        self.data_path, self.corpus, self.chunk_len = data_path, corpus, chunk_len
        self.d_emb, self.dtype = int(embedder["d_emb"]), np.dtype(f"float{embedder.get('key_bits', 32)}")
        per_shard = max(1, TOKENS_PER_SHARD // chunk_len)
        self.offsets = ChunkOffsets(corpus, chunk_len)
        inputs: list[str] = []
        firsts: list[int] = []
        for part, of_part in zip(corpus.parts, self.offsets.parts, strict=True):
            firsts += of_part[::per_shard]
            # The first part is the corpus itself, which the manifest names.
            texts = sha256_of_json([corpus.documents[i].sha256 for i in part]) if part.start else ""
            inputs += [texts] * (len(firsts) - len(inputs))
        self.firsts = np.array([*firsts, len(self.offsets)])  # number of each shard's first key, and of all
        self.n_shards = len(firsts)
        self.embedder = {name: embedder[name] for name in ("embedder_sha256", "trim", "precision")}
        manifest = {
            "corpus_sha256": corpus.sha256,
            "chunk_len": chunk_len,
            **self.embedder,
            "keys_per_shard": per_shard,
        }
        if self.dtype != np.float32:
            manifest["dtype"] = str(self.dtype)
        self.shards = Shards(data_path / KEYS_FOLDER / sha256_of_json(manifest)[:8], manifest, inputs, ".npy")

    @cached_property
    def in_database(self) -> np.ndarray:
        """Which of the keys are of documents that have not been removed, of shape `[n]`."""
        kept = np.ones(len(self.offsets), dtype=bool)
        kept[self.offsets.of_documents(self.corpus.removed)] = False
        return kept

    def compute(self, bert: Embedder, batch_size: int = 4096) -> None:
        """Embed the chunks whose shards are missing, each shard by itself, so that it has the same bytes always.

        Raises `StaleArtifact` for a BERT that is not the one the keys are of, `InvalidOption` for keys of more than
        16 bits can hold.
        """
        require_match(self.shards.folder, bert.manifest, self.embedder)

        on_gpu = str(getattr(bert, "device", "cpu")).startswith("cuda")

        def tokens_of(number: int) -> Sequence[Any]:
            offsets = self.offsets[self.firsts[number] : self.firsts[number + 1]]
            return bert.tokens_of(self.corpus.texts(offsets, self.chunk_len))

        def embed(number: int, tokens: Sequence[Any], path: Path, done: Callable[[int], Any]) -> None:
            keys = bert.of_tokens(tokens, batch_size, done).cpu().numpy()
            if self.dtype == np.float16 and (largest := np.abs(keys).max(initial=0)) > np.finfo(self.dtype).max:
                raise InvalidOption("key_bits", 16, f"cannot hold features of up to {largest:.0f}; use 32")
            with open(path, "wb") as file:
                np.save(file, keys.astype(self.dtype), allow_pickle=False)

        self.shards.make_missing("Embed", "chunk", np.diff(self.firsts).tolist(), embed, tokens_of, on_gpu)

    def compute_alone(self, bert: Embedder) -> None:
        """As `compute`, while nobody else writes into the data folder."""
        with exclusive_lock(self.data_path):
            self.compute(bert)

    @property
    def others(self) -> list[Path]:
        """Folders of the keys of other texts, chunk lengths and BERTs."""
        folder = self.shards.folder.parent
        return [p for p in folder.iterdir() if p.is_dir() and p != self.shards.folder] if folder.exists() else []

    def is_whole(self) -> bool:
        """True. Raises `MissingArtifact` if a shard is missing, or has not the bytes that its name speaks of."""
        for number in range(self.n_shards):
            self._shard(number)
        return True

    def _shard(self, number: int) -> np.ndarray:
        shard, expected = self.shards.mapped(number), (int(self.firsts[number + 1] - self.firsts[number]), self.d_emb)
        if shard.shape != expected or shard.dtype != self.dtype:
            found, wanted = f"{shard.dtype} {shard.shape}", f"{self.dtype} {expected}"
            raise DamagedFile(self.shards.path(number), f"holds {found}, but {wanted} is wanted")
        return shard

    def each_shard(self) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first key, keys of shape `[n, d_emb]`) of each shard, in order."""
        for number in range(self.n_shards):
            yield int(self.firsts[number]), self.of_shard(number)

    def of_shard(self, number: int) -> np.ndarray:
        """The keys of shard `number`, of shape `[n, d_emb]`."""
        return np.ascontiguousarray(self._shard(number), dtype=np.float32)

    def _by_shard(self, numbers: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(shard, where in `numbers` its keys are) of each shard that has any, its keys in the order of the file."""
        order = np.argsort(numbers, kind="stable")
        ends = np.searchsorted(numbers[order], self.firsts).tolist()
        yield from ((shard, order[a:b]) for shard, (a, b) in enumerate(pairwise(ends)) if a < b)

    def rows(self, numbers: np.ndarray) -> np.ndarray:
        """The keys of these numbers, of shape `[len(numbers), d_emb]`."""
        keys = np.empty((len(numbers), self.d_emb), dtype=np.float32)
        for shard, at in self._by_shard(numbers):
            keys[at] = self._shard(shard)[numbers[at] - self.firsts[shard]]
        return keys

    def distances(self, queries: np.ndarray, rows: np.ndarray, numbers: np.ndarray) -> np.ndarray:
        """Squared L2 distances of `queries[rows]` to the keys of `numbers`, which stay on disk; of shape `[n]`.

        * `queries` are float32, of shape `[q, d_emb]`
        * `rows`, `numbers` are of shape `[n]`, int64
        """
        distances = np.empty(len(numbers), dtype=np.float32)
        queries = np.ascontiguousarray(queries, dtype=np.float32)
        for shard, at in self._by_shard(numbers):
            found, keys, of = np.empty(len(at), dtype=np.float32), self._shard(shard), numbers[at] - self.firsts[shard]
            if keys.dtype != np.float32:  # of those that are wanted
                different, of = np.unique(of, return_inverse=True)
                keys = keys[different].astype(np.float32)
            arrays = queries, rows[at], keys, of, found
            faiss.pairwise_indexed_L2sqr(self.d_emb, len(at), *map(faiss.swig_ptr, arrays))
            distances[at] = found
        return distances

    def stored(self, offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which of some offsets `[n]` are those of chunks with a key on disk, of shape `[n]`, and these keys.

        None if any is missing or damaged: an index of whole keys serves without them.
        """
        numbers = self.offsets.numbers_of(offsets)
        try:
            return numbers >= 0, self.rows(numbers[numbers >= 0])
        except ArtifactError:
            return np.zeros(len(offsets), dtype=bool), self.rows(numbers[:0])

    def numbers_of(self, offsets: np.ndarray) -> np.ndarray:
        """Numbers of the keys of chunks at `offsets`. Raises `DamagedFile` for an offset that no chunk has."""
        numbers = self.offsets.numbers_of(offsets)
        if len(wrong := np.flatnonzero(numbers < 0)):
            raise DamagedFile(self.data_path / INDEX_FILE, f"holds offset {offsets[wrong[0]]}, where no chunk begins")
        return numbers

    def checked(self, offsets: np.ndarray) -> np.ndarray:
        """Offsets that an index holds, as they are. Raises `DamagedFile` if one lies outside of the text."""
        if offsets.size and not -1 <= offsets.min() <= offsets.max() < len(self.corpus.tokens):
            raise DamagedFile(
                self.data_path / INDEX_FILE,
                f"holds offset {offsets.max()}, but the text has {len(self.corpus.tokens)} tokens",
            )
        return offsets
