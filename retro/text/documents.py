"""Documents: named texts, found in files and folders, read one at a time."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# What is taken for text inside a folder. A file that is named itself may have any suffix.
_SUFFIXES = ".txt .md .rst .tex .html .xml .csv .py .pyi .js .ts .java .c .h .cc .cpp .hpp .go .rs .sh .jsonl"
TEXT_SUFFIXES = frozenset(_SUFFIXES.split())


@dataclass(frozen=True)
class Document:
    """A named text. `name` is a file's path below the folder it was found in, or `FILE.jsonl:LINE`."""

    name: str
    text: str


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


def sha256_of_text(text: str) -> str:
    """Names a document's text."""
    return hashlib.sha256(text.encode()).hexdigest()
