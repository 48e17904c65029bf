"""Held-out text: texts to evaluate, and a check that they were neither trained on nor put into a database."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retro.errors import SeenText
from retro.text.copies import near, signature
from retro.text.corpus import Corpus, DocumentEntry
from retro.text.documents import find_texts, read_documents, sha256_of_text
from retro.text.records import PLAIN, Columns
from retro.text.tokenizer import Tokenizer

N_NAMED = 5  # documents that an error names; the others are counted


def held_out_texts(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    columns: Columns = PLAIN,
) -> Corpus:
    """A corpus in memory of texts to evaluate: all of them are validation documents.

    * `columns` are the fields of records that are their text and their name
    """
    arrays, entries, signatures = [], [], []
    for document in read_documents(find_texts(paths), columns):
        try:
            ids = np.asarray(tokenizer.encode(document.text), dtype=np.int32)
        except ValueError as error:
            raise ValueError(f"{document.name}: {error}") from None
        n_bytes = len(document.text.encode())
        arrays.append(ids)
        signatures.append(signature(document.text))
        entries.append(DocumentEntry(document.name, sha256_of_text(document.text), n_bytes, len(ids)))
    if not any(len(ids) > 1 for ids in arrays):
        raise ValueError(f"there is nothing to predict in {', '.join(map(str, paths))}; name longer texts")
    return Corpus(np.concatenate(arrays), entries, 0, tokenizer, signatures=np.array(signatures))


def require_held_out(corpus: Corpus, *seen: Corpus) -> None:
    """Raise `SeenText` if a validation document was trained on, or added to a database, in a corpus of `seen`.

    A document that is near to one of those (`retro.text.copies`) is the same, whatever their names are.
    """
    held_out, signatures = corpus.held_out_signatures
    for other in seen:
        if other.sha256 == corpus.sha256:
            continue  # a corpus keeps its own two sides apart, even if both are parts of one document
        trained = np.array([i for part in other.parts for i in part])
        found = [
            f"{corpus.documents[i].name} is {other.documents[trained[copies[0]]].name}, or nearly"
            for i, copies in zip(held_out, near(signatures, other.signatures[trained]), strict=True)
            if copies
        ]
        if found:
            more = f"; and {len(found) - N_NAMED} more" if len(found) > N_NAMED else ""
            raise SeenText(
                f"text to be evaluated is in the training text or in the database: {'; '.join(found[:N_NAMED])}{more}. "
                f"Leave it out, or use a database without it"
            )
