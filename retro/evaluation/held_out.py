"""Held-out text: texts to evaluate, and a check that they were neither trained on nor put into a database."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from retro.errors import SeenText
from retro.text.corpus import Corpus, DocumentEntry
from retro.text.documents import find_texts, read_documents, sha256_of_text
from retro.text.tokenizer import Tokenizer

N_NAMED = 5  # documents that an error names; the others are counted


def held_out_texts(paths: Sequence[str | Path], tokenizer: Tokenizer) -> Corpus:
    """A corpus in memory of texts to evaluate: all of them are validation documents."""
    arrays, entries = [], []
    for document in read_documents(find_texts(paths)):
        try:
            ids = np.asarray(tokenizer.encode(document.text), dtype=np.int32)
        except ValueError as error:
            raise ValueError(f"{document.name}: {error}") from None
        n_bytes = len(document.text.encode())
        arrays.append(ids)
        entries.append(DocumentEntry(document.name, sha256_of_text(document.text), n_bytes, len(ids)))
    if not any(len(ids) > 1 for ids in arrays):
        raise ValueError(f"there is nothing to predict in {', '.join(map(str, paths))}; name longer texts")
    return Corpus(np.concatenate(arrays), entries, 0, tokenizer)


def require_held_out(corpus: Corpus, *seen: Corpus) -> None:
    """Raise `SeenText` if a validation document was trained on, or added to a database, in a corpus of `seen`.

    Documents are compared by the hash of their text and by name: a new version of a file is not new text, nor is a
    file of which another part was held out.
    """
    for other in seen:
        if other.sha256 == corpus.sha256:
            continue  # a corpus keeps its own two sides apart, even if both are parts of one document
        trained = [other.documents[i] for part in other.parts for i in part]
        names, texts = {_file_of(d.name) for d in trained}, {d.sha256: d.name for d in trained}
        found = []
        for document in (corpus.documents[i] for i in corpus.split("valid")):
            if document.sha256 in texts:
                found.append(f"{document.name} has the text of {texts[document.sha256]}")
            elif _file_of(document.name) in names:
                found.append(f"{document.name} has the name of a document there")
        if found:
            more = f"; and {len(found) - N_NAMED} more" if len(found) > N_NAMED else ""
            raise SeenText(
                f"text to be evaluated is in the training text or in the database: {'; '.join(found[:N_NAMED])}{more}. "
                f"Leave it out, rename it if it is another document, or use a database without it"
            )


def _file_of(name: str) -> str:
    """The file that a document of a single-file corpus is a part of."""
    return name.removesuffix(" [train]").removesuffix(" [valid]")
