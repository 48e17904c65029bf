"""Which documents are held out: whole ones, drawn by a seeded hash of their text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from retro.storage.manifests import sha256_of_json
from retro.text.documents import Document, read_documents, sha256_of_text


@dataclass(frozen=True)
class Split:
    """Which documents there are, and which are held out."""

    sha256: str  # names all texts, in their order
    valid: tuple[str, ...]  # hashes of the texts that are held out, as drawn
    single: bool  # there is one text, and its last part is held out


def split_texts(texts: list[tuple[str, Path]], valid_fraction: float = 0.1, seed: int = 0) -> Split:
    """Draw the held-out documents, in one pass over the texts.

    They are drawn by a seeded hash of their text, so the split does not depend on the order of the files, and two
    copies of one text always fall on the same side.
    """
    found = [(d.name, sha256_of_text(d.text), len(d.text.encode())) for d in read_documents(texts)]
    if not found:
        raise ValueError(
            f"no text in {', '.join(str(path) for _, path in texts) or 'what was named'}: all of it is empty"
        )
    sha256, single = sha256_of_json(found), valid_fraction > 0 and len({sha for _, sha, _ in found}) == 1
    if valid_fraction == 0:
        return Split(sha256, (), single)
    if single:
        parts = split_single(read_documents(texts), True, valid_fraction)
        return Split(sha256, tuple(sha256_of_text(d.text) for d in parts if d.name.endswith("[valid]")), single)
    size: dict[str, int] = {}
    for _, sha, n_bytes in found:
        size[sha] = size.get(sha, 0) + n_bytes
    drawn = sorted(size, key=lambda sha: sha256_of_text(f"{seed}:{sha}"))
    held_out = np.cumsum([size[sha] for sha in drawn])
    n_valid = 1 + int(np.searchsorted(held_out, valid_fraction * held_out[-1]))
    return Split(sha256, tuple(drawn[: min(n_valid, len(size) - 1)]), single)


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
