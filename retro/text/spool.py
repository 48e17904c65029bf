"""Documents that were read, in a file without a name: what is read more than once is decoded once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

from retro.progress import MOMENT, each
from retro.storage.files import naming_what_cannot_be_written
from retro.text.documents import Document


class Spool(Sequence[Document]):
    """Documents in their order, which take no memory but that of their names, and the disk that their texts take.

    * `documents` are read once, here
    * `near` is where there is room: the folder, or the closest one that exists, whose disk is used until this is closed

    Raises `CannotWrite` naming it where there is none.
    """

    def __init__(self, documents: Iterable[Document], near: Path) -> None:
        self._names, self._ends = list[str](), [0]
        with naming_what_cannot_be_written(near):
            place = next(folder for folder in (near, *near.absolute().parents) if folder.is_dir())
            self._file = tempfile.TemporaryFile(dir=place)
        for document in each(documents, "Read", "document", delay=MOMENT):
            with naming_what_cannot_be_written(near):  # and not what cannot be read
                self._ends.append(self._ends[-1] + self._file.write(document.text.encode()))
            self._names.append(document.name)
        with naming_what_cannot_be_written(near):
            self._file.flush()

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, number: int) -> Document: ...

    @overload
    def __getitem__(self, number: slice) -> list[Document]: ...

    def __getitem__(self, number: int | slice) -> Document | list[Document]:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        number = range(len(self))[number]
        start, end = self._ends[number], self._ends[number + 1]
        self._file.seek(start)
        return Document(self._names[number], self._file.read(end - start).decode())

    def __iter__(self) -> Iterator[Document]:
        return (self[number] for number in range(len(self)))
