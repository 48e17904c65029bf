"""The table of documents: what a corpus keeps of each besides its tokens, in a file that is mapped, not read.

A table of ten million documents is open at once, and takes no memory of its own. Of n documents the file has these
columns, one behind the other, in numbers of 8 bytes but for the hashes and the names:

    starts           n + 1     tokens before each document, and at last all of them
    groups           n         number of the first document of its group of near-duplicates
    sizes            n         bytes of its text in UTF-8
    ends of names    n         bytes from the start of all names to the end of this one
    hashes           n * 32    sha256 of its text
    names                      in UTF-8
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from retro.errors import DamagedFile
from retro.storage.known import known
from retro.storage.manifests import MAX_NUMBER

NUMBER, HASH = np.dtype("<i8"), np.dtype("V32")


@dataclass(frozen=True)
class DocumentEntry:
    """What the corpus keeps of a document besides its tokens."""

    name: str
    sha256: str  # of the text in UTF-8
    n_bytes: int  # of the text in UTF-8, for bits per byte
    n_tokens: int = 0


class Documents(Sequence[DocumentEntry]):
    """The entries of a table in a file; one is made when it is asked for.

    * `file` is the table
    * `n` is how many documents it has

    Raises `DamagedFile` for a file that is no such table.
    """

    def __init__(self, file: Path, n: int) -> None:
        self.file, self._n = file, n
        if not 0 < n <= file.stat().st_size // (4 * NUMBER.itemsize + HASH.itemsize):
            raise DamagedFile(file, f"is no table of {n} documents")
        self._map()
        if not known(file, f"is a table of {n}", self._is_one):
            raise DamagedFile(file, f"is no table of {n} documents")

    def _map(self) -> None:
        # Not as `np.memmap`, which every number taken from it would be as well.
        whole, at = np.asarray(np.memmap(self.file, np.uint8, mode="r")), 0

        def column(length: int, kind: np.dtype) -> np.ndarray:
            nonlocal at
            at += (n_bytes := length * kind.itemsize)
            return whole[at - n_bytes : at].view(kind)

        n = self._n
        self.starts, self.groups, self.n_bytes = column(n + 1, NUMBER), column(n, NUMBER), column(n, NUMBER)
        self.name_ends, self.hashes, self.names = column(n, NUMBER), column(n, HASH), whole[at:]

    def _is_one(self) -> int:
        starts, groups, ends, every = self.starts, self.groups, self.name_ends, np.arange(self._n)
        return int(
            starts[0] == 0
            and starts[-1] < MAX_NUMBER
            and bool((starts[1:] > starts[:-1]).all())
            and bool(((groups >= 0) & (groups <= every)).all() and (groups[groups] == groups).all())
            and bool(((self.n_bytes >= 0) & (self.n_bytes < MAX_NUMBER)).all())
            and ends[0] >= 0
            and bool((ends[1:] >= ends[:-1]).all())
            and ends[-1] == len(self.names)
            and self._names_are_text()
        )

    def _names_are_text(self) -> bool:
        try:
            self.names.tobytes().decode()
        except UnicodeDecodeError:
            return False
        inner = self.name_ends[self.name_ends < len(self.names)]
        return not ((self.names[inner] & 0xC0) == 0x80).any()  # no name ends inside a character

    def __getstate__(self) -> dict[str, Any]:
        return {"file": self.file, "_n": self._n}  # which another process maps itself

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def __len__(self) -> int:
        return self._n

    @overload
    def __getitem__(self, i: int) -> DocumentEntry: ...

    @overload
    def __getitem__(self, i: slice) -> list[DocumentEntry]: ...

    def __getitem__(self, i: int | slice) -> DocumentEntry | list[DocumentEntry]:
        if isinstance(i, slice):
            return [self._entry(number) for number in range(self._n)[i]]
        return self._entry(range(self._n)[i])

    def __iter__(self) -> Iterator[DocumentEntry]:
        return map(self._entry, range(self._n))

    def _entry(self, i: int) -> DocumentEntry:
        n_tokens, name_start = int(self.starts[i + 1] - self.starts[i]), int(self.name_ends[i - 1]) if i else 0
        name = self.names[name_start : int(self.name_ends[i])].tobytes().decode()
        return DocumentEntry(name, self.hashes[i].tobytes().hex(), int(self.n_bytes[i]), n_tokens)


def write_table(
    file: Path, documents: Sequence[DocumentEntry], groups: np.ndarray, before: Documents | None = None
) -> None:
    """Write the table of documents.

    * `groups` are those of all of them
    * `before` are documents that come before these
    """
    names = [document.name.encode() for document in documents]
    columns = [
        np.array([0, *(d.n_tokens for d in documents)]).cumsum(),
        np.array([d.n_bytes for d in documents]),
        np.array([len(name) for name in names]).cumsum(),
        np.frombuffer(b"".join(bytes.fromhex(d.sha256) for d in documents), HASH),
        np.frombuffer(b"".join(names), np.uint8),
    ]
    if before is not None:
        columns[0], columns[2] = columns[0][1:] + before.starts[-1], columns[2] + before.name_ends[-1]
        there = (before.starts, before.n_bytes, before.name_ends, before.hashes, before.names)
        columns = [np.concatenate(pair) for pair in zip(there, columns, strict=True)]
    starts, n_bytes, ends, hashes, text = columns
    with open(file, "wb") as out:
        for numbers in (starts, groups, n_bytes, ends):
            numbers.astype(NUMBER).tofile(out)
        hashes.tofile(out)
        text.tofile(out)
