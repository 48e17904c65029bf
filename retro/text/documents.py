"""Documents: named texts, found in files and folders, read one at a time."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from retro.errors import ArtifactError, CannotRead
from retro.storage.manifests import is_manifest
from retro.text.reading import decoded
from retro.text.records import PLAIN, RECORD_SUFFIXES, Columns, holds_records, is_dataset, read_records

# What is taken for text inside a folder. A file that is named itself may have any suffix.
_SUFFIXES = ".txt .md .rst .tex .html .xml .csv .py .pyi .js .ts .java .c .h .cc .cpp .hpp .go .rs .sh"
TEXT_SUFFIXES = frozenset((*_SUFFIXES.split(), *RECORD_SUFFIXES))
N_NAMED = 5  # of what is passed over; the rest is counted

# What retro writes is no text: the manifests that tell its folders (of a database, a run, a corpus or shards), and how
# its files begin that would be taken for text elsewhere (samples; reports, which quote text that is held out).
_OWN_MANIFESTS = ("retro.index.json", "run.json", "manifest.json", "corpus/manifest.json")
_OWN_FILES = {".jsonl": b'{"format_version":', ".html": b'<meta name="generator" content="retro">'}


@dataclass(frozen=True)
class Document:
    """A named text. `name` is a file's path below the folder it was found in, `FILE.jsonl:LINE`, or a record's own."""

    name: str
    text: str


@dataclass
class PassedOver:
    """What a search of folders for texts left out, to be told in a line: `str()` of it, empty if there was nothing."""

    kinds: Counter[str] = field(default_factory=Counter)  # files by their suffixes, which are not those of texts
    own: list[Path] = field(default_factory=list)  # folders and files that retro wrote
    others: Counter[str] = field(default_factory=Counter)  # by what they are, as "hidden folder"

    def __str__(self) -> str:
        said = []
        if self.kinds:
            named = ", ".join(f"{kind} {n:,}" for kind, n in self.kinds.most_common(N_NAMED))
            more = ", ..." if len(self.kinds) > N_NAMED else ""
            said.append(f"{_counted('file', self.kinds.total())} of other kinds ({named}{more})")
        for what, paths in (
            ("folder", [path for path in self.own if path.is_dir()]),
            ("file", [path for path in self.own if not path.is_dir()]),
        ):
            if paths:
                more = ", ..." if len(paths) > N_NAMED else ""
                said.append(
                    f"{_counted(what, len(paths))} of retro's own artifacts "
                    f"({', '.join(map(printable, paths[:N_NAMED]))}{more})"
                )
        said += [_counted(what, n) for what, n in self.others.items()]
        return ", ".join(said)


def _counted(what: str, n: int) -> str:
    return f"{n:,} {what}{'s' if n != 1 else ''}"


def printable(path: Path) -> str:
    """A path as text: a byte in it that is not UTF-8 as `\\xff`, whatever the locale is."""
    return os.fsencode(path.as_posix()).decode("utf-8", "backslashreplace")


def find_texts(paths: Sequence[str | Path]) -> list[tuple[str, Path]]:
    """Text files and datasets under files and folders, as (name, path), in order of their names.

    `hf:NAME`, `hf:NAME:SPLIT` and `hf:NAME:SPLIT:CONFIG` are datasets of the hub. A folder is searched without what is
    hidden in it, and without what retro wrote; links to folders are followed.

    Raises `FileNotFoundError` for a path that does not exist, `CannotRead` for one that may not be read, and
    `ValueError` for a folder without text.
    """
    return search_texts(paths)[0]


def search_texts(paths: Sequence[str | Path]) -> tuple[list[tuple[str, Path]], PassedOver]:
    """As `find_texts`; and what was passed over in the folders."""
    found: dict[Path, str] = {}
    passed_over = PassedOver()
    for path in map(Path, paths):
        with naming_what_cannot_be_read():
            if is_dataset(path):
                found[path] = printable(Path(path.resolve().name if path.is_dir() else path))
            elif path.is_dir():
                below = {file: printable(file.relative_to(path)) for file in _texts_below(path, passed_over)}
                if not below:
                    raise ValueError(
                        f"{path} holds no text: no file in it ends in one of {' '.join(sorted(TEXT_SUFFIXES))}"
                        + (f"; passed over: {passed_over}" if str(passed_over) else "")
                    )
                found |= below
            elif path.is_file():
                found[path] = printable(Path(path.name))
            elif path.exists():
                raise ValueError(f"{path} is neither a file nor a folder, and texts are read more than once; save it")
            else:
                raise FileNotFoundError(f"{path} does not exist; name a text file or a folder of text files")
    names = Counter(found.values())
    # Files of equal names in two folders are told apart by their whole paths.
    texts = sorted((name if names[name] == 1 else printable(path), path) for path, name in found.items())
    return texts, passed_over


def _texts_below(top: Path, passed_over: PassedOver) -> Iterator[Path]:
    """The text files below a folder. What lies behind a link comes last, so that it is named after its real folder."""
    seen: set[str] = set()
    folders = [str(top)]  # and those behind links, as they are found
    for start in folders:
        for folder, below, files in os.walk(start, onerror=_cannot_read):
            if (real := os.path.realpath(folder)) in seen:
                below.clear()
                continue
            seen.add(real)
            if folder != str(top) and _is_of_retro(Path(folder), {*below, *files}):
                passed_over.own.append(Path(folder))
                below.clear()
                continue
            if folder != str(top) and is_dataset(Path(folder)):
                below.clear()
                yield Path(folder)
                continue
            passed_over.others.update("hidden folder" for name in below if name[0] == ".")
            below[:] = sorted(name for name in below if name[0] != ".")
            folders += [path for name in below if os.path.islink(path := os.path.join(folder, name))]
            for file in (Path(folder, name) for name in sorted(files)):
                suffix = file.suffix.lower()
                if file.name[0] == ".":
                    passed_over.others["hidden file"] += 1
                elif not file.name.lower().endswith(tuple(TEXT_SUFFIXES)):
                    passed_over.kinds[printable(Path(suffix)) if suffix else "without suffix"] += 1
                elif not file.is_file():
                    passed_over.others["broken link" if file.is_symlink() else "special file"] += 1
                elif not file.stat().st_size:
                    passed_over.others["empty file"] += 1
                elif suffix in _OWN_FILES and _OWN_FILES[suffix] in _beginning(file):
                    passed_over.own.append(file)
                else:
                    yield file


def _is_of_retro(folder: Path, names: Collection[str]) -> bool:
    """Whether a folder, with these names in it, is one that retro writes: of data, of a run, of shards."""
    return any(file.partition("/")[0] in names and is_manifest(folder / file) for file in _OWN_MANIFESTS)


def _beginning(file: Path) -> bytes:
    with open(file, "rb") as opened:
        return opened.read(500)


def _cannot_read(error: OSError) -> None:
    raise CannotRead(Path(os.fsdecode(error.filename or "a file")), error)


@contextmanager
def naming_what_cannot_be_read() -> Iterator[None]:
    """Inside, an `OSError` of the system that names a file becomes a `CannotRead`."""
    try:
        yield
    except (ArtifactError, FileNotFoundError):
        raise
    except OSError as error:
        _cannot_read(error)


def read_text(path: Path) -> str:
    """A file's text. Raises `ValueError` naming the file, and the byte where it is not UTF-8 text, or `CannotRead`."""
    with naming_what_cannot_be_read():
        return decoded(path.read_bytes(), str(path))


def read_documents(texts: Iterable[tuple[str, Path]], columns: Columns = PLAIN) -> Iterator[Document]:
    """The documents of files, one at a time: a file each, or each record of a file or dataset of many.

    * `columns` are the fields of records that are their text and their name. Of several records of one name, those
      that come later are called by their place as well

    Files and records without any text are passed over.
    """
    seen = set[str]()
    for name, path in texts:
        if not holds_records(path):
            if (text := read_text(path)).strip():
                yield Document(name, text)
            continue
        with naming_what_cannot_be_read():
            for number, text, own in read_records(path, columns):
                if not text.strip():
                    continue
                place = f"{name}:{number}"
                called = place if own is None else f"{own} ({place})" if own in seen else own
                if own is not None:
                    seen.add(own)
                yield Document(called, text)


def sha256_of_text(text: str) -> str:
    """Names a document's text."""
    return hashlib.sha256(text.encode()).hexdigest()
