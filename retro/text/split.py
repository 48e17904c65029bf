"""Which documents are held out: whole ones, drawn by a seeded hash of their text, and no copy of one trains.

Documents can also be drawn by whole folders, whose files are kin: those of a project, a series, an author.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np

from retro import cluster
from retro.errors import InvalidOption
from retro.storage.manifests import sha256_of_json
from retro.text.copies import N_ORDERS, SCHEME, by_processes, groups_of, signature, signatures_of
from retro.text.documents import Document, read_documents, sha256_of_text
from retro.text.in_shards import Found, InShards
from retro.text.records import PLAIN, Columns

SIGNATURES_FOLDER = "signatures.shards"  # while they are computed


@dataclass(frozen=True)
class Split:
    """Which documents there are, and what becomes of each; all in the order of reading."""

    sha256: str  # names all texts, in their order
    found: Found
    sides: tuple[str, ...]  # of each: `train`, `valid`, or `` if it is left out
    signatures: np.ndarray  # (n, 128), by which near-duplicates are told
    groups: np.ndarray  # (n) of near-duplicates: each document's is the number of the first in it
    left_out: tuple[tuple[str, str], ...]  # names of those left out, each with the held-out one that it is near to
    single: bool  # there is one text, and its last part is held out


def list_documents(texts: list[tuple[str, Path]], columns: Columns = PLAIN) -> Found:
    """What documents there are, in one pass over the texts. Raises `ValueError` if there are none."""
    found = [entry_of(document) for document in read_documents(texts, columns)]
    require_text(found, texts)
    return found


def entry_of(document: Document) -> tuple[str, str, int]:
    """Name, sha256 and bytes of a document."""
    return document.name, sha256_of_text(document.text), len(document.text.encode())


def require_text(documents: Sequence[object], texts: list[tuple[str, Path]]) -> None:
    """Raise `ValueError` naming the texts if there is no document in them."""
    if not documents:
        raise ValueError(
            f"no text in {', '.join(str(path) for _, path in texts) or 'what was named'}: all of it is empty"
        )


def texts_sha256(found: Found) -> str:
    """Names all texts, in their order."""
    return sha256_of_json(found)


def split_texts(
    documents: Sequence[Document],
    valid_fraction: float = 0.1,
    seed: int = 0,
    keep_near_held_out: bool = False,
    hold_out: str = "documents",
    folder: Path | None = None,
) -> Split:
    """Draw the held-out documents, in one pass over them.

    They are drawn by a seeded hash of their text, so the split does not depend on the order of the files. Of a group
    of near-duplicates one text is drawn for all: it is held out, and the others are left out, so that nobody trains on
    them or retrieves them.

    * `keep_near_held_out` leaves them in the training text all the same
    * `hold_out` is what is drawn: `documents`, or whole `folders` of them. A folder that has no more than a copy of
      what is held out loses that copy, and trains: else files that are everywhere would make one of all folders.

    * `folder` takes signatures that are finished while there are more to compute, for who holds its lock

    Raises `InvalidOption` where no folder can be held out.
    """
    found = [entry_of(document) for document in documents]
    different = {sha256: number for number, (_, sha256, _) in reversed([*enumerate(found)])}  # the first of each text
    signatures = _signatures(documents, found, sorted(different.values()), folder)
    signs = signatures[[different[sha256] for _, sha256, _ in found]]
    groups, n = groups_of(signs), len(found)
    if valid_fraction > 0 and not groups.any() and hold_out == "documents":
        return _split_of_one(documents, found, valid_fraction)
    sides = np.full(n, "train", dtype="<U5")
    if valid_fraction > 0:
        units = list(range(n)) if hold_out == "documents" else folders_of([name for name, _, _ in found])
        drawn, valid = _drawn(found, groups, units, valid_fraction, seed)
        if not valid:
            raise InvalidOption(
                "hold_out", hold_out, "leaves nothing to train on: one folder has all documents, or copies of them"
            )
        left = np.isin(units, drawn) if keep_near_held_out else np.isin(groups, groups[valid])
        sides[left] = ""
        sides[valid] = "valid"
    held_out = {int(groups[i]): found[i][0] for i in np.flatnonzero(sides == "valid")}
    left_out = tuple((found[i][0], held_out[int(groups[i])]) for i in np.flatnonzero(sides == ""))
    return Split(texts_sha256(found), found, tuple(sides.tolist()), signs, groups, left_out, False)


def _signatures(documents: Sequence[Document], found: Found, numbers: list[int], folder: Path | None) -> np.ndarray:
    """The signatures of documents with these numbers, among those of all, of shape `[n, 128]`; 0 for the others."""
    signatures = np.zeros((len(found), N_ORDERS), dtype=np.uint32)
    if folder is None:
        signatures[numbers] = signatures_of(documents[number].text for number in numbers)
        return signatures
    made = InShards(folder / SIGNATURES_FOLDER, {"scheme": SCHEME}, found, numbers)
    made.compute("Compare", documents, _signed, cluster.mapped if cluster.is_there() else by_processes)
    for batch, (of_batch,) in made.arrays(1):
        signatures[batch] = of_batch
    return signatures


def _signed(documents: list[Document]) -> tuple[np.ndarray]:
    return (signatures_of(document.text for document in documents),)


def folders_of(names: list[str]) -> list[int]:
    """For each document the number of the first one in its folder."""
    first: dict[str, int] = {}
    return [first.setdefault(str(PurePosixPath(name).parent), number) for number, name in enumerate(names)]


def _drawn(
    found: Found, groups: np.ndarray, units: list[int], valid_fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """The units that are drawn, and the numbers of the documents to hold out: of each group the first one in them.

    * `units` are what is drawn, for each document: itself, or its folder

    A unit whose documents are all held out already, or with which nothing would be left to train on, is passed over.
    """
    by_group: dict[int, str] = {}  # the least hash of a text in it, which no order of the files changes
    groups_in: dict[int, dict[int, int]] = {}  # of a unit: the first document in it of each of its groups
    for number, (group, unit, (_, sha256, _)) in enumerate(zip(groups.tolist(), units, found, strict=True)):
        by_group[group] = min(sha256, by_group.get(group, sha256))
        groups_in.setdefault(unit, {}).setdefault(group, number)

    def order(unit: int) -> str:
        return sha256_of_text(f"{seed}:{','.join(sorted(by_group[group] for group in groups_in[unit]))}")

    drawn, held_out, n_bytes = list[int](), dict[int, int](), 0
    wanted = valid_fraction * sum(found[group][2] for group in by_group)
    for unit in sorted(groups_in, key=order):
        new = {group: number for group, number in groups_in[unit].items() if group not in held_out}
        if new and len(held_out) + len(new) < len(by_group):
            drawn.append(unit)
            held_out |= new
            n_bytes += sum(found[group][2] for group in new)
            if n_bytes >= wanted:
                break
    return drawn, list(held_out.values())


def _split_of_one(documents: Sequence[Document], found: Found, valid_fraction: float) -> Split:
    """The split of one text: the first of the documents is cut in two, the others are copies of it."""
    parts = cut_in_two(documents[0], valid_fraction)
    left_out = tuple((name, found[0][0]) for name, _, _ in found[1:])
    signs = np.array([signature(part.text) for part in parts])
    return Split(texts_sha256(found), [*map(entry_of, parts)], ("train", "valid"), signs, np.arange(2), left_out, True)


def cut_in_two(document: Document, valid_fraction: float) -> list[Document]:
    """The first and the last part of a document. Raises `ValueError` where one of them would be empty."""
    cut = int(len(document.text) * (1 - valid_fraction))
    if not 0 < cut < len(document.text):
        raise ValueError(f"{document.name} has {len(document.text)} characters: too few to hold some out")
    return [
        Document(f"{document.name} [train]", document.text[:cut]),
        Document(f"{document.name} [valid]", document.text[cut:]),
    ]
