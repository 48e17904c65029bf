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
array is memory-mapped, so a corpus costs memory only for its table of documents. The public attributes are
those of labml-helpers' `TextFileDataset` (`train`, `valid`, `text_to_i`, `itos`, `stoi`, `n_tokens`); such a
dataset can stand wherever a corpus is taken.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from retro.artifacts import (
    FORMAT_VERSION,
    MAX_NUMBER,
    Fields,
    only_writer,
    package_versions,
    read_json,
    require_match,
    sha256_of_file,
    sha256_of_json,
    write_json,
    written_whole,
)
from retro.tokenizer import CharTokenizer, Tokenizer, load_tokenizer, train_tokenizer

if TYPE_CHECKING:
    from torch import Tensor

# What is taken for text inside a folder. A file that is named itself may have any suffix.
_SUFFIXES = ".txt .md .rst .tex .html .xml .csv .py .pyi .js .ts .java .c .h .cc .cpp .hpp .go .rs .sh .jsonl"
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())
NO_TOKEN = -1  # stands where a value or a neighbor has no token
REPAIR = "python -m retro.database TEXT ..."


@dataclass(frozen=True)
class Document:
    """A named text. `name` is a file's path below the folder it was found in, or `FILE.jsonl:LINE`."""

    name: str
    text: str


@dataclass(frozen=True)
class DocumentEntry:
    """What the corpus keeps of a document besides its tokens."""

    name: str
    sha256: str  # of the text in UTF-8
    n_bytes: int  # of the text in UTF-8, for bits per byte
    n_tokens: int = 0


def find_texts(paths: Sequence[str | Path]) -> list[tuple[str, Path]]:
    """Text files under files and folders, as (name, path), in order of their names.

    Raises `FileNotFoundError` for a path that does not exist and `ValueError` for a
    folder without text.
    """
    found: dict[Path, str] = {}
    for path in map(Path, paths):
        if path.is_dir():
            below = [p for p in sorted(path.rglob("*")) if p.suffix.lower() in TEXT_SUFFIXES and p.is_file()]
            below = [p for p in below if not any(part.startswith(".") for part in p.relative_to(path).parts)]
            if not below:
                raise ValueError(
                    f"{path} holds no text: no file in it ends in one of {' '.join(sorted(TEXT_SUFFIXES))}"
                )
            found |= {p: p.relative_to(path).as_posix() for p in below}
        elif path.exists():
            found[path] = path.name
        else:
            raise FileNotFoundError(f"{path} does not exist; name a text file or a folder of text files")
    names = Counter(found.values())
    # Files of equal names in two folders are told apart by their whole paths.
    return sorted((name if names[name] == 1 else path.as_posix(), path) for path, name in found.items())


def read_text(path: Path) -> str:
    """A file's text. Raises `ValueError` naming the file and byte offset where it is not UTF-8 text."""
    data = path.read_bytes()
    if (nul := data.find(b"\0")) >= 0:
        raise ValueError(f"{path} is binary, not text: it has a zero byte at byte {nul}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}. "
            f"Convert it (iconv -t UTF-8) or leave it out."
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_documents(texts: Iterable[tuple[str, Path]]) -> Iterator[Document]:
    """The documents of files, one at a time: a file each, or each line's `text` of a `.jsonl` file.

    Files and lines without any text are passed over.
    """
    for name, path in texts:
        text = read_text(path)
        if path.suffix.lower() != ".jsonl":
            if text.strip():
                yield Document(name, text)
            continue
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)["text"]
            except (ValueError, KeyError, TypeError):
                entry = None
            if not isinstance(entry, str):
                raise ValueError(f'{path}, line {number}: expected a JSON object with a "text" string')
            if entry.strip():
                yield Document(f"{name}:{number}", entry)


MANIFEST_FIELDS: Fields = {
    "tokenizer": ("char", "subword"),
    "dtype": ("uint16", "uint32"),
    "n_train": int,
    "documents": list,
    "additions": list,
    "removed": list,
    "tokens.bin_sha256": str,
    "tokenizer.json_sha256": str,
}


def _documents_of(path: Path, manifest: dict[str, Any]) -> list[DocumentEntry]:
    """The documents of a manifest. Raises `ValueError` if they, or the numbers that speak of them, cannot be."""
    n, kinds = len(manifest["documents"]), (str, str, int, int)
    for number, entry in enumerate(manifest["documents"]):
        fits = type(entry) is list and tuple(map(type, entry)) == kinds
        if not (fits and 0 <= entry[2] < MAX_NUMBER and 0 < entry[3] < MAX_NUMBER):
            raise ValueError(
                f"{path}, document {number}: {entry!r:.80} is not [name, sha256, bytes, tokens]. Rebuild it: {REPAIR}"
            )
    counts = [manifest["n_train"], *manifest["additions"]]
    if not all(type(count) is int and 0 < count <= n for count in counts) or sum(counts) > n:
        raise ValueError(
            f"{path} has {n} documents, but n_train={manifest['n_train']!r} and additions="
            f"{manifest['additions']!r:.80}. Rebuild it: {REPAIR}"
        )
    if not all(type(number) is int and 0 <= number < n for number in manifest["removed"]):
        raise ValueError(f"{path} has {n} documents, but removed={manifest['removed']!r:.80}. Rebuild it: {REPAIR}")
    return [DocumentEntry(*entry) for entry in manifest["documents"]]


def largest_token(tokens: np.ndarray) -> int:
    """The largest of the tokens, read in parts; -1 for none."""
    parts = (tokens[i : i + (1 << 22)] for i in range(0, len(tokens), 1 << 22))
    return max((int(part.max()) for part in parts), default=-1)


class Corpus:
    """Documents as one array of tokens, training documents first.

    * `tokens` is the array, of shape `[n]`, memory-mapped when it comes from a file
    * `documents` are their entries, in the order of the array
    * `n_train` is how many of them are for training
    * `tokenizer` turns text into tokens and back
    * `made_with` is the manifest
    * `additions` are the numbers of documents that were added to the database, at one time each; they lie last
    * `removed` are the documents that are no longer in the database
    """

    def __init__(
        self,
        tokens: np.ndarray,
        documents: list[DocumentEntry],
        n_train: int,
        tokenizer: Tokenizer,
        made_with: dict[str, Any] | None = None,
        additions: Sequence[int] = (),
        removed: Iterable[int] = (),
    ) -> None:
        self.tokens = tokens
        self.documents = documents
        self.n_train = n_train
        self.tokenizer = tokenizer
        self.starts = np.cumsum([0] + [d.n_tokens for d in documents])
        self.made_with = made_with or {}
        self.additions = tuple(additions)
        self.removed = frozenset(removed)

    @cached_property
    def sha256(self) -> str:
        """Names everything that samples depend on: the documents but for added ones, their split, the tokenizer."""
        base = self.documents[: self.split("valid").stop]
        return sha256_of_json([[asdict(d) for d in base], self.n_train, self.tokenizer.sha256])

    @cached_property
    def database_sha256(self) -> str:
        """Names everything that neighbors depend on: `sha256`, and what was added and removed since."""
        if not self.additions and not self.removed:
            return self.sha256
        added = [asdict(d) for d in self.documents[self.split("valid").stop :]]
        return sha256_of_json([self.sha256, added, self.additions, sorted(self.removed)])

    @staticmethod
    def load(folder: str | Path) -> Corpus:
        """Open what `build_corpus` wrote. Raises if it is missing, damaged or of another version."""
        folder = Path(folder)
        made_with = read_json(folder / "manifest.json", REPAIR, MANIFEST_FIELDS)
        documents = _documents_of(folder / "manifest.json", made_with)
        n_tokens = sum(document.n_tokens for document in documents)
        # Both are read whole before anything is made of them. Behind the tokens may lie those of an addition that
        # was killed before it wrote the manifest.
        for name, n_bytes in (
            ("tokens.bin", n_tokens * np.dtype(made_with["dtype"]).itemsize),
            ("tokenizer.json", None),
        ):
            found = sha256_of_file(folder / name, n_bytes) if (folder / name).exists() else "no file"
            require_match(folder / name, {"sha256": found}, {"sha256": made_with[f"{name}_sha256"]}, REPAIR)
        corpus = Corpus(
            np.memmap(folder / "tokens.bin", dtype=made_with["dtype"], mode="r")[:n_tokens],
            documents,
            made_with["n_train"],
            load_tokenizer(folder / "tokenizer.json", made_with["tokenizer"]),
            made_with,
            made_with["additions"],
            made_with["removed"],
        )
        if len(corpus.tokens) != n_tokens:
            raise ValueError(
                f"{folder / 'tokens.bin'} holds {len(corpus.tokens)} tokens, but its manifest says "
                f"{n_tokens}. Rebuild it: {REPAIR}"
            )
        if (largest := largest_token(corpus.tokens)) >= corpus.n_tokens:
            raise ValueError(
                f"{folder / 'tokens.bin'} holds token {largest}, but there are {corpus.n_tokens}. Rebuild it: {REPAIR}"
            )
        return corpus

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
        """Text of each token."""
        return [self.tokenizer.decode([i]) for i in range(self.n_tokens)]

    @cached_property
    def stoi(self) -> dict[str, int]:
        """Token of each text that is one token."""
        return {text: i for i, text in enumerate(self.itos)}

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
    def parts(self) -> list[range]:
        """Numbers of the documents that the database was built from, then of those of each addition."""
        ends = np.cumsum([self.split("valid").stop, *self.additions]).tolist()
        return [self.split("train"), *map(range, ends[:-1], ends[1:])]

    @property
    def in_database(self) -> list[int]:
        """Numbers of the documents that can be retrieved: for training, or added, and not removed."""
        return [number for part in self.parts for number in part if number not in self.removed]

    def bytes_per_token(self, split: str) -> float:
        """Mean UTF-8 bytes of a token of the split, which makes nats per token comparable as bits per byte."""
        documents = [self.documents[i] for i in self.split(split)]
        return sum(d.n_bytes for d in documents) / sum(d.n_tokens for d in documents)

    def text(self, offset: int, length: int) -> str:
        """Decoded text of `length` tokens from `offset`."""
        return self.tokenizer.decode(self.tokens[offset : offset + length].tolist())

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


def build_corpus(
    paths: Sequence[str | Path],
    folder: str | Path,
    tokenizer: str = "char",
    valid_fraction: float = 0.1,
    seed: int = 0,
) -> Corpus:
    """Read texts into a corpus folder: `tokens.bin`, `tokenizer.json`, `manifest.json`.

    * `paths` are text files and folders of them
    * `tokenizer` is `char`, `bpe:SIZE` (trained here, on the training documents), or the name or
      folder of any Hugging Face tokenizer
    * `valid_fraction` is the least share of the bytes to hold out, in whole documents; the last part
      of the text when there is only one document, as in the tutorial; 0 holds nothing out

    The texts are read once for each pass and one document at a time. Raises `ValueError`
    for text that cannot be used and leaves an existing corpus as it was.
    """
    folder = Path(folder)
    texts = find_texts(paths)
    plan = plan_corpus(texts, valid_fraction, seed)
    valid = set(plan["valid"])

    def documents(split: str) -> Iterator[Document]:
        for document in split_single(read_documents(texts), plan["single"], valid_fraction):
            if (sha256_of_text(document.text) in valid) == (split == "valid"):
                yield document

    # As in the tutorial, every character of either part is in the vocabulary. A subword
    # vocabulary is learnt from the training documents alone.
    train_texts = (d.text for d in documents("train"))
    all_texts = (d.text for split in ("train", "valid") for d in documents(split))
    encoder = train_tokenizer(tokenizer, all_texts if tokenizer == "char" else train_texts)

    dtype = np.dtype("uint16" if encoder.n_tokens <= 1 << 16 else "uint32")
    entries: list[DocumentEntry] = []
    n_train = 0
    # The manifest, which knows the hashes of the other two files, comes after them.
    with only_writer(folder):
        with written_whole(folder / "tokens.bin") as temporary, written_whole(folder / "tokenizer.json") as mapping:
            with open(temporary, "wb") as file:
                for split in ("train", "valid"):
                    entries += write_documents(file, documents(split), encoder, dtype)
                    n_train = n_train or len(entries)
                    if not n_train:
                        raise ValueError(f"no text to train on has a token of the tokenizer {tokenizer}")
            encoder.save(mapping)
            hashes = {"tokens.bin_sha256": sha256_of_file(temporary), "tokenizer.json_sha256": sha256_of_file(mapping)}
        manifest = {
            "format_version": FORMAT_VERSION,
            **wanted_corpus(plan, tokenizer, valid_fraction, seed),
            "tokenizer": encoder.kind,
            "dtype": str(dtype),
            "n_train": n_train,
            "additions": [],
            "removed": [],
            **hashes,
            "versions": package_versions(),
            "documents": [list(asdict(entry).values()) for entry in entries],
        }
        write_json(folder / "manifest.json", manifest)
    return Corpus.load(folder)


def write_documents(
    file: BinaryIO, documents: Iterable[Document], encoder: Tokenizer, dtype: np.dtype
) -> list[DocumentEntry]:
    """Append the tokens of documents to a file; returns their entries. What has no token is no document."""
    entries = []
    for document in documents:
        ids = np.asarray(encoder.encode(document.text), dtype=dtype)
        if not len(ids):
            continue  # of characters that the tokenizer drops
        file.write(ids.tobytes())
        entries.append(
            DocumentEntry(document.name, sha256_of_text(document.text), len(document.text.encode()), len(ids))
        )
    return entries


def wanted_corpus(plan: dict[str, Any], tokenizer: str, valid_fraction: float, seed: int) -> dict[str, Any]:
    """The part of a corpus' manifest that tells whether it has to be built again."""
    name = tokenizer
    if (file := Path(tokenizer) / "tokenizer.json").is_file():
        name = f"{Path(tokenizer).name}:{sha256_of_file(file)[:12]}"
    return {
        "texts_sha256": plan["sha256"],
        "tokenizer_name": name,
        "valid_fraction": valid_fraction,
        "seed": seed,
    }


def plan_corpus(texts: list[tuple[str, Path]], valid_fraction: float = 0.1, seed: int = 0) -> dict[str, Any]:
    """Which documents there are and which are held out, from one pass over the texts.

    Documents are drawn by a seeded hash of their text, so the split does not depend on
    the order of the files, and two copies of one text always fall on the same side.
    """
    found = [(d.name, sha256_of_text(d.text), len(d.text.encode())) for d in read_documents(texts)]
    if not found:
        raise ValueError(
            f"no text in {', '.join(str(path) for _, path in texts) or 'what was named'}: all of it is empty"
        )
    plan = {"sha256": sha256_of_json(found), "single": valid_fraction > 0 and len({sha for _, sha, _ in found}) == 1}
    if valid_fraction == 0:
        return plan | {"valid": []}
    if plan["single"]:
        whole = split_single(read_documents(texts), True, valid_fraction)
        return plan | {"valid": [sha256_of_text(d.text) for d in whole if d.name.endswith("[valid]")]}
    size: dict[str, int] = {}
    for _, sha, n_bytes in found:
        size[sha] = size.get(sha, 0) + n_bytes
    drawn = sorted(size, key=lambda sha: sha256_of_text(f"{seed}:{sha}"))
    held_out = np.cumsum([size[sha] for sha in drawn])
    n_valid = 1 + int(np.searchsorted(held_out, valid_fraction * held_out[-1]))
    return plan | {"valid": drawn[: min(n_valid, len(size) - 1)]}


def split_single(documents: Iterable[Document], single: bool, valid_fraction: float) -> Iterator[Document]:
    """Documents as they are; but a corpus of one document is cut into its first and its last part."""
    for document in documents:
        if not single:
            yield document
            continue
        cut = int(len(document.text) * (1 - valid_fraction))
        if not 0 < cut < len(document.text):
            raise ValueError(f"{document.name} has {len(document.text)} characters: too few to hold some out")
        yield Document(f"{document.name} [train]", document.text[:cut])
        yield Document(f"{document.name} [valid]", document.text[cut:])
        return  # any further documents are copies of this one


def sha256_of_text(text: str) -> str:
    """Names a document's text."""
    return hashlib.sha256(text.encode()).hexdigest()
