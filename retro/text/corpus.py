"""Corpus: documents with names and boundaries, as one array of tokens.

The tutorial reads one text file. A corpus here is any number of documents, because
two things that RETRO promises are about documents: neighbors may be barred from the
document of the query (section 2.2 of arXiv:2112.04426), and held-out text is held out
by whole documents.

The training documents lie first, the validation documents after them, and behind both whatever is added to the
database later, in one array::

    tokens  | doc 0 | doc 1 | ...... | doc n_train-1 || doc n_train | ... || added | ... |
    starts  0       s_1     s_2                      s_{n_train}                         len(tokens)

An *offset* is always a position in that array, and stays what it is when documents are added or removed. The
array is memory-mapped, and so is the table of documents. The public attributes are
those of labml-helpers' `TextFileDataset` (`train`, `valid`, `text_to_i`, `itos`, `stoi`, `n_tokens`); such a
dataset can stand wherever a corpus is taken.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retro.errors import DamagedFile, MissingArtifact, StaleArtifact
from retro.storage.files import sha256_of_file
from retro.storage.known import known
from retro.storage.manifests import Fields, read_manifest, require_fields, sha256_of_json
from retro.text.copies import N_ORDERS, signatures_of
from retro.text.documents import sha256_of_text
from retro.text.table import DocumentEntry, Documents
from retro.text.tokenizer import CharTokenizer, Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

NO_TOKEN = -1  # stands where a value or a neighbor has no token
CORPUS_FOLDER = "corpus"  # in a data folder
TOKENS_FILE, TOKENIZER_FILE, MANIFEST_FILE = "tokens.bin", "tokenizer.json", "manifest.json"
SIGNATURES_FILE = "signatures.bin"


MANIFEST_FIELDS: Fields = {
    "name": str,
    "tokenizer": ("char", "subword"),
    "dtype": ("uint16", "uint32"),
    "n_train": int,
    "n_documents": int,
    "additions": list,
    "removed": list,
    "left_out": list,
    "sha256": str,
    "documents_sha256": str,
    "tokens.bin_sha256": str,
    "tokenizer.json_sha256": str,
    "signatures.bin_sha256": str,
}


def documents_file(manifest: dict[str, Any]) -> str:
    """The name of the table of documents, which is replaced by another when documents are added."""
    return f"documents-{manifest['documents_sha256'][:8]}.bin"


def _read_manifest(path: Path) -> dict[str, Any]:
    """A corpus' manifest. Raises `DamagedFile` if its numbers of documents cannot be."""
    if "n_documents" not in (found := read_manifest(path)):
        raise StaleArtifact(path, {"n_documents": (None, "a table of them")})
    require_fields(path, found, MANIFEST_FIELDS)
    n, counts = found["n_documents"], [found["n_train"], *found["additions"]]
    if not all(type(count) is int and 0 < count <= n for count in counts) or sum(counts) > n:
        raise DamagedFile(
            path, f"has {n} documents, but n_train={found['n_train']!r} and additions={found['additions']!r:.80}"
        )
    if not all(type(number) is int and 0 <= number < n for number in found["removed"]):
        raise DamagedFile(path, f"has {n} documents, but removed={found['removed']!r:.80}")
    if not re.fullmatch("[0-9a-f]{64}", found["documents_sha256"]):  # a part of it is the name of a file
        raise DamagedFile(path, f"has documents_sha256={found['documents_sha256']!r:.80}, which is no hash")
    return found


def largest_token(tokens: np.ndarray) -> int:
    """The largest of the tokens, read in parts; -1 for none."""
    parts = (tokens[i : i + (1 << 22)] for i in range(0, len(tokens), 1 << 22))
    return max((int(part.max()) for part in parts), default=-1)


def sha256_of_corpus(documents: Iterable[DocumentEntry], n_train: int, tokenizer: Tokenizer) -> str:
    """What names documents, their split and their tokenizer."""
    return sha256_of_json([[asdict(d) for d in documents], n_train, tokenizer.sha256])


def _map_signatures(folder: Path, n_documents: int) -> np.ndarray:
    return np.memmap(folder / SIGNATURES_FILE, np.uint32, mode="r")[: n_documents * N_ORDERS].reshape(-1, N_ORDERS)


class Corpus:
    """Documents as one array of tokens, training documents first.

    * `tokens` is the array, of shape `[n]`, memory-mapped when it comes from a file
    * `documents` are their entries, in the order of the array
    * `n_train` is how many of them are for training
    * `tokenizer` turns text into tokens and back
    * `manifest` is the manifest
    * `additions` are the numbers of documents that were added to the database, at one time each; they lie last
    * `removed` are the documents that are no longer in the database
    * `groups` are the groups of near-duplicates: for each document the number of the first in its group; left out,
      each document is alone
    * `signatures`, uint32 of shape `[documents, 128]`, tell near-duplicates (`retro.text.copies`); left out, they are
      computed when they are asked for
    """

    def __init__(
        self,
        tokens: np.ndarray,
        documents: Sequence[DocumentEntry],
        n_train: int,
        tokenizer: Tokenizer,
        manifest: dict[str, Any] | None = None,
        additions: Sequence[int] = (),
        removed: Iterable[int] = (),
        groups: Sequence[int] | np.ndarray | None = None,
        signatures: np.ndarray | None = None,
    ) -> None:
        self.tokens = tokens
        self.documents = documents
        self.n_train = n_train
        self.tokenizer = tokenizer
        if isinstance(documents, Documents):
            self.starts = documents.starts
        else:
            self.starts = np.cumsum([0] + [d.n_tokens for d in documents])
        self.manifest = manifest or {}
        self.additions = tuple(additions)
        self.removed = frozenset(removed)
        self.groups = np.arange(len(documents)) if groups is None else np.asarray(groups)
        if signatures is not None:
            self.signatures = signatures
        self.file: Path | None = None  # where the tokens are mapped from
        self._byte_scales: dict[int, float] = {}  # of documents: bytes of the text over bytes of the tokens

    def __getstate__(self) -> dict[str, Any]:
        """What another process is sent: not the tokens and signatures, if they lie in files, which it maps itself."""
        mapped = ("tokens", "signatures", "starts", "groups")
        return self.__dict__ | (dict.fromkeys(mapped) if self.file else {})

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.file:
            assert isinstance(self.documents, Documents)
            self.starts, self.groups = self.documents.starts, self.documents.groups
            self.tokens = np.memmap(self.file, dtype=self.manifest["dtype"], mode="r")[: self.starts[-1]]
            self.signatures = _map_signatures(self.file.parent, len(self.documents))

    @cached_property
    def signatures(self) -> np.ndarray:
        """What near-duplicates are told by: uint32, of shape `[documents, 128]`."""
        return signatures_of(
            self.text(start, d.n_tokens) for start, d in zip(self.starts.tolist(), self.documents, strict=False)
        )

    @property
    def held_out_signatures(self) -> tuple[list[int], np.ndarray]:
        """Numbers `[n]` of validation documents, and signatures `[n, 128]` that no other text may be near to.

        If one text was cut in two, whoever has the whole has its held-out part: the signature of the whole, which is
        the least of both parts', is among them.
        """
        numbers = list(self.split("valid"))
        signatures = self.signatures[self.n_train : self.n_train + len(numbers)]
        if not (self.is_one_text and numbers):
            return numbers, signatures
        return numbers * 2, np.concatenate([signatures, self.signatures[:2].min(axis=0, keepdims=True)])

    @cached_property
    def sha256(self) -> str:
        """Names everything that samples depend on: the documents but for added ones, their split, the tokenizer."""
        if "sha256" in self.manifest:
            return str(self.manifest["sha256"])
        return sha256_of_corpus(self.documents[: self.split("valid").stop], self.n_train, self.tokenizer)

    @cached_property
    def database_sha256(self) -> str:
        """Names everything that neighbors depend on: `sha256`, and what was added and removed since."""
        if not self.additions and not self.removed:
            return self.sha256
        added = [asdict(d) for d in self.documents[self.split("valid").stop :]]
        return sha256_of_json([self.sha256, added, self.additions, sorted(self.removed)])

    @staticmethod
    def load(folder: str | Path) -> Corpus:
        """Open what `build_corpus` wrote; once more if `retro add` replaces it in this moment.

        Raises if it is missing, damaged or of another version.
        """
        manifest = _read_manifest(Path(folder) / MANIFEST_FILE)
        while True:
            try:
                return Corpus._of_manifest(Path(folder), manifest)
            except (DamagedFile, FileNotFoundError):
                before, manifest = manifest, _read_manifest(Path(folder) / MANIFEST_FILE)
                if manifest == before:
                    raise

    @staticmethod
    def _of_manifest(folder: Path, manifest: dict[str, Any]) -> Corpus:
        """What a manifest says is in a folder."""

        def require(name: str, expected: str, length: int | None = None) -> Path:
            found = sha256_of_file(folder / name, length) if (folder / name).exists() else "no file"
            if found != expected:
                raise DamagedFile(folder / name, f"has sha256 {found}, but its manifest says {expected}")
            return folder / name

        # All are read whole before anything is made of them. Behind tokens and signatures may lie those of an addition
        # that was killed before it wrote the manifest.
        table = require(documents_file(manifest), manifest["documents_sha256"])
        documents = Documents(table, manifest["n_documents"])
        n_tokens = int(documents.starts[-1])
        n_bytes, n_signed = n_tokens * np.dtype(manifest["dtype"]).itemsize, len(documents) * 4 * N_ORDERS
        for name, length in ((TOKENS_FILE, n_bytes), (TOKENIZER_FILE, None), (SIGNATURES_FILE, n_signed)):
            require(name, manifest[f"{name}_sha256"], length)
        corpus = Corpus(
            np.memmap(folder / TOKENS_FILE, dtype=manifest["dtype"], mode="r")[:n_tokens],
            documents,
            manifest["n_train"],
            load_tokenizer(folder / TOKENIZER_FILE, manifest["tokenizer"]),
            manifest,
            manifest["additions"],
            manifest["removed"],
            documents.groups,
            _map_signatures(folder, len(documents)),
        )
        corpus.file = folder / TOKENS_FILE
        if len(corpus.tokens) != n_tokens:
            raise DamagedFile(
                folder / TOKENS_FILE, f"holds {len(corpus.tokens)} tokens, but its manifest says {n_tokens}"
            )
        largest = known(corpus.file, f"largest of {n_tokens} {manifest['dtype']}", lambda: largest_token(corpus.tokens))
        if largest >= corpus.n_tokens:
            raise DamagedFile(folder / TOKENS_FILE, f"holds token {largest}, but there are {corpus.n_tokens}")
        return corpus

    def require_own_name(self) -> None:
        """Raise `DamagedFile` if a manifest from a file calls its documents otherwise than they are."""
        found = sha256_of_corpus(self.documents[: self.split("valid").stop], self.n_train, self.tokenizer)
        if self.file and found != self.sha256:
            path = self.file.with_name(MANIFEST_FILE)
            raise DamagedFile(path, f"says that its sha256 is {self.sha256}, but that of its documents is {found}")

    @staticmethod
    def of(tds: Any) -> Corpus:
        """A corpus from a corpus, or from labml's `TextDataset` (its two parts become two documents)."""
        if isinstance(tds, Corpus):
            return tds
        parts = [("train", tds.train), ("valid", tds.valid)]
        arrays = [tds.text_to_i(text).numpy() for _, text in parts]
        name = Path(getattr(tds, "path", "text")).name
        documents = [
            DocumentEntry(f"{name} [{part}]", sha256_of_text(text), len(text.encode()), len(array))
            for (part, text), array in zip(parts, arrays, strict=True)
        ]
        return Corpus(np.concatenate(arrays), documents, 1, CharTokenizer(tds.itos))

    # The interface of labml's `TextFileDataset`.

    @property
    def train(self) -> str:
        """The training text, decoded anew at each access."""
        return self.text(0, self.n_train_tokens)

    @property
    def valid(self) -> str:
        """The validation text, decoded anew at each access."""
        return self.text(self.n_train_tokens, self.end_of_valid - self.n_train_tokens)

    @property
    def n_tokens(self) -> int:
        """Size of the vocabulary (labml's name for it)."""
        return self.tokenizer.n_tokens

    @cached_property
    def itos(self) -> list[str]:
        """Text of each token inside a text; empty for a number of no token."""
        return [self.tokenizer.decode_after([i], [i]) for i in range(self.n_tokens)]

    @cached_property
    def stoi(self) -> dict[str, int]:
        """Token of each text that is one token."""
        return {text: i for i, text in enumerate(self.itos) if text}

    def text_to_i(self, text: str) -> Tensor:
        """Tokens of a text, of shape `[n]`. Raises `ValueError` for a character the vocabulary lacks."""
        import torch

        return torch.tensor(self.tokenizer.encode(text), dtype=torch.long)

    # What retrieval needs: slices, boundaries, values.

    @property
    def n_train_tokens(self) -> int:
        """Length of the training part of `tokens`."""
        return int(self.starts[self.n_train])

    @property
    def end_of_valid(self) -> int:
        """Where the validation part of `tokens` ends; behind it lies what was added."""
        return int(self.starts[self.split("valid").stop])

    def split(self, name: str) -> range:
        """Numbers of the documents of `'train'` or `'valid'`."""
        end = len(self.documents) - sum(self.additions)
        return {"train": range(self.n_train), "valid": range(self.n_train, end)}[name]

    @property
    def is_one_text(self) -> bool:
        """Whether there is one text, whose last part is held out: it retrieves from its own beginning."""
        return self.n_train == 1 and self.documents[0].name.endswith(" [train]")

    @property
    def name(self) -> str:
        """What runs on this text are called."""
        return str(self.manifest.get("name", "text"))

    @property
    def parts(self) -> list[range]:
        """Numbers of the documents that the database was built from, then of those of each addition."""
        ends = np.cumsum([self.split("valid").stop, *self.additions]).tolist()
        return [self.split("train"), *map(range, ends[:-1], ends[1:])]

    @property
    def in_database(self) -> list[int]:
        """Numbers of the documents that can be retrieved: for training, or added, and not removed."""
        return [number for part in self.parts for number in part if number not in self.removed]

    def n_bytes_of(self, start: int, end: int) -> float:
        """UTF-8 bytes of the text that the tokens from `start` to `end`, of one document, stand for.

        If a tokenizer does not keep a text exactly, the bytes of a document's tokens are scaled to sum to those of its
        text.
        """
        n_bytes, number = self.tokenizer.n_bytes, int(self.document_of(start))
        if number not in self._byte_scales:
            first, last = int(self.starts[number]), int(self.starts[number + 1])
            parts = (self.tokens[i : min(i + (1 << 22), last)] for i in range(first, last, 1 << 22))
            total = sum(int(n_bytes[part].sum()) for part in parts)
            self._byte_scales[number] = self.documents[number].n_bytes / total if total else 1.0
        return float(n_bytes[self.tokens[start:end]].sum()) * self._byte_scales[number]

    def text(self, offset: int, length: int) -> str:
        """Decoded text of `length` tokens from `offset`, as it stands in its document, or documents."""
        context, end = self.tokenizer.context, min(offset + length, len(self.tokens))
        if not context:
            return self.tokenizer.decode(self.tokens[offset:end].tolist())
        parts = []
        for number in range(int(self.document_of(offset)), int(self.document_of(end - 1)) + 1):
            first, last = max(offset, int(self.starts[number])), min(end, int(self.starts[number + 1]))
            before = self.tokens[max(first - context, int(self.starts[number])) : first]
            parts.append(self.tokenizer.decode_after(before.tolist(), self.tokens[first:last].tolist()))
        return "".join(parts)

    def beginning_of_held_out(self, length: int) -> str:
        """At most `length` tokens of a document that nobody trains on, as text to be continued."""
        first = self.split("valid")[0]
        return self.texts(self.starts[first : first + 1], length)[0]

    def texts(self, offsets: np.ndarray, length: int) -> list[str]:
        """Decoded text from each offset on, of `length` tokens or up to the end of its document."""
        ends = np.minimum(offsets + length, self.ends_of(offsets))
        return [self.text(start, end - start) for start, end in zip(offsets.tolist(), ends.tolist(), strict=True)]

    def document_of(self, offsets: np.ndarray | int) -> np.ndarray:
        """Number of the document that each offset lies in."""
        return np.searchsorted(self.starts, offsets, side="right") - 1

    def ends_of(self, offsets: np.ndarray | int) -> np.ndarray:
        """End of the document that each offset lies in."""
        return self.starts[self.document_of(offsets) + 1]

    def barred_ranges(self, offsets: np.ndarray) -> np.ndarray:
        """What queries at `offsets` (n) may not find: ranges `(first, end)` of offsets, of shape `[n, r, 2]`.

        They hold the document of the query and all its near-duplicates; `(0, 0)` is no range.
        """
        firsts, ranges = self._ranges_of_groups
        groups = self.groups[self.document_of(offsets)]
        first, n = firsts[groups], firsts[groups + 1] - firsts[groups]
        nth = np.arange(n.max(initial=1))
        there = nth < n[:, None]
        return np.where(there[..., None], ranges[np.where(there, first[:, None] + nth, 0)], 0)

    @cached_property
    def _ranges_of_groups(self) -> tuple[np.ndarray, np.ndarray]:
        """The ranges of all groups, of shape `[n, 2]`; those of the group `g` are from `firsts[g]` to `firsts[g + 1]`.

        (A table with a row for each group would be as wide as the group with the most ranges needs.)
        """
        order = np.argsort(self.groups, kind="stable")
        groups, follows = self.groups[order], np.diff(order, prepend=-2) == 1
        first = np.flatnonzero(~follows | (np.diff(groups, prepend=-1) != 0))  # of documents that follow each other
        last = np.append(first[1:], len(order)) - 1
        firsts = np.searchsorted(groups[first], np.arange(len(order) + 1))
        return firsts, np.stack([self.starts[order[first]], self.starts[order[last] + 1]], axis=1)

    def values(self, offsets: np.ndarray, length: int) -> np.ndarray:
        """Tokens from each offset on, up to the end of its document.

        * `offsets` has any shape `[...]`; -1 is no offset

        Returns an int64 array of shape `[..., length]`, with `NO_TOKEN` wherever the document has
        ended or there was no offset.
        """
        offsets = np.asarray(offsets, dtype=np.int64)
        positions = offsets[..., None] + np.arange(length)
        ends = self.ends_of(np.maximum(offsets, 0))
        missing = (offsets < 0)[..., None] | (positions >= ends[..., None])
        return np.where(missing, NO_TOKEN, self.tokens[np.where(missing, 0, positions)].astype(np.int64))


def open_corpus(data_path: str | Path) -> Corpus:
    """The corpus of a data folder; else the tutorial's text, `tiny_shakespeare.txt`, if it lies there."""
    data_path = Path(data_path)
    if (data_path / CORPUS_FOLDER / MANIFEST_FILE).exists():
        return Corpus.load(data_path / CORPUS_FOLDER)
    from labml_helpers.datasets.text import TextFileDataset

    folder, file = data_path / CORPUS_FOLDER, data_path / "tiny_shakespeare.txt"
    if not file.exists():
        raise MissingArtifact(folder, f"there is no {file}, and {folder} does not exist")
    return Corpus.of(TextFileDataset(file, list))
