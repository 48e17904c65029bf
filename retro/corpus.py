"""Corpus: documents with names and boundaries, as one array of tokens.

The tutorial reads one text file. A corpus here is any number of documents, because
two things that RETRO promises are about documents: neighbors may be barred from the
document of the query (section 2.2 of arXiv:2112.04426), and held-out text is held out
by whole documents.

The training documents lie first, the validation documents after them, in one array::

    tokens  | doc 0 | doc 1 | ...... | doc n_train-1 || doc n_train | ... |
    starts  0       s_1     s_2                      s_{n_train}          len(tokens)

An *offset* is always a position in that array. The array is memory-mapped, so a corpus
costs memory only for its table of documents. The public attributes are those of
labml-helpers' `TextFileDataset` (`train`, `valid`, `text_to_i`, `itos`, `stoi`,
`n_tokens`); such a dataset can stand wherever a corpus is taken.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from retro.artifacts import (
    FORMAT_VERSION,
    package_versions,
    read_json,
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
    names = list(found.values())
    # Files of equal names in two folders are told apart by their whole paths.
    return sorted((name if names.count(name) == 1 else path.as_posix(), path) for path, name in found.items())


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


class Corpus:
    """Documents as one array of tokens, training documents first.

    * `tokens` is the array, of shape `[n]`, memory-mapped when it comes from a file
    * `documents` are their entries, in the order of the array
    * `n_train` is how many of them are for training
    * `tokenizer` turns text into tokens and back
    * `made_with` is the manifest
    """

    def __init__(
        self,
        tokens: np.ndarray,
        documents: list[DocumentEntry],
        n_train: int,
        tokenizer: Tokenizer,
        made_with: dict[str, Any] | None = None,
    ) -> None:
        self.tokens = tokens
        self.documents = documents
        self.n_train = n_train
        self.tokenizer = tokenizer
        self.starts = np.cumsum([0] + [d.n_tokens for d in documents])
        self.made_with = made_with or {}

    @cached_property
    def sha256(self) -> str:
        """Names everything that an offset depends on: the documents, their split, the tokenizer."""
        return sha256_of_json([[asdict(d) for d in self.documents], self.n_train, self.tokenizer.sha256])

    @staticmethod
    def load(folder: str | Path) -> Corpus:
        """Open what `build_corpus` wrote. Raises if it is missing, damaged or of another version."""
        folder = Path(folder)
        made_with = read_json(folder / "manifest.json", REPAIR)
        tokenizer = load_tokenizer(folder / "tokenizer.json", made_with["tokenizer"])
        documents = [DocumentEntry(*entry) for entry in made_with["documents"]]
        corpus = Corpus(np.zeros(0), documents, made_with["n_train"], tokenizer, made_with)
        file, dtype = folder / "tokens.bin", np.dtype(made_with["dtype"])
        expected = int(corpus.starts[-1]) * dtype.itemsize
        found = file.stat().st_size if file.exists() else 0
        if found != expected:
            raise ValueError(f"{file} holds {found} bytes, but its manifest says {expected}. Rebuild it: {REPAIR}")
        if tokenizer.sha256 != made_with["tokenizer_sha256"]:
            raise ValueError(f"{folder / 'tokenizer.json'} was altered after the corpus was made. Rebuild it: {REPAIR}")
        corpus.tokens = np.memmap(file, dtype=dtype, mode="r")
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
            DocumentEntry(f"{name} [{part}]", _sha256(text), len(text.encode()), len(array))
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
        return self.text(self.n_train_tokens, len(self.tokens) - self.n_train_tokens)

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

    def split(self, name: str) -> range:
        """Numbers of the documents of `'train'` or `'valid'`."""
        return {"train": range(self.n_train), "valid": range(self.n_train, len(self.documents))}[name]

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
            if (_sha256(document.text) in valid) == (split == "valid"):
                yield document

    # As in the tutorial, every character of either part is in the vocabulary. A subword
    # vocabulary is learnt from the training documents alone.
    train_texts = (d.text for d in documents("train"))
    all_texts = (d.text for split in ("train", "valid") for d in documents(split))
    encoder = train_tokenizer(tokenizer, all_texts if tokenizer == "char" else train_texts)

    dtype = np.dtype("uint16" if encoder.n_tokens <= 1 << 16 else "uint32")
    entries: list[DocumentEntry] = []
    n_train = 0
    # All three files are complete before the first one takes its place.
    with written_whole(folder / "tokens.bin") as temporary:
        with open(temporary, "wb") as file:
            for split in ("train", "valid"):
                for document in documents(split):
                    ids = np.asarray(encoder.encode(document.text), dtype=dtype)
                    ids.tofile(file)
                    sha256, n_bytes = _sha256(document.text), len(document.text.encode())
                    entries.append(DocumentEntry(document.name, sha256, n_bytes, len(ids)))
                n_train = n_train or len(entries)
        with written_whole(folder / "tokenizer.json") as temporary_tokenizer:
            encoder.save(temporary_tokenizer)
            manifest = {
                "format_version": FORMAT_VERSION,
                **wanted_corpus(plan, tokenizer, valid_fraction, seed),
                "tokenizer": encoder.kind,
                "tokenizer_sha256": encoder.sha256,
                "dtype": str(dtype),
                "n_train": n_train,
                "versions": package_versions(),
                "documents": [list(asdict(entry).values()) for entry in entries],
            }
            write_json(folder / "manifest.json", manifest)
    return Corpus.load(folder)


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
    found = [(d.name, _sha256(d.text), len(d.text.encode())) for d in read_documents(texts)]
    if not found:
        raise ValueError(
            f"no text in {', '.join(str(path) for _, path in texts) or 'what was named'}: all of it is empty"
        )
    plan = {"sha256": sha256_of_json(found), "single": valid_fraction > 0 and len({sha for _, sha, _ in found}) == 1}
    if valid_fraction == 0:
        return plan | {"valid": []}
    if plan["single"]:
        whole = split_single(read_documents(texts), True, valid_fraction)
        return plan | {"valid": [_sha256(d.text) for d in whole if d.name.endswith("[valid]")]}
    size: dict[str, int] = {}
    for _, sha, n_bytes in found:
        size[sha] = size.get(sha, 0) + n_bytes
    drawn = sorted(size, key=lambda sha: _sha256(f"{seed}:{sha}"))
    valid: list[str] = []
    while not valid or (
        sum(size[s] for s in valid) < valid_fraction * sum(size.values()) and len(valid) < len(size) - 1
    ):
        valid.append(drawn[len(valid)])
    return plan | {"valid": valid}


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


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
