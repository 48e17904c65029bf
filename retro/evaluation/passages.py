"""Passages: which parts of the evaluated text a report shows, and their tokens as legible text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import groupby
from typing import NamedTuple

import numpy as np

from retro.evaluation.result import Evaluation
from retro.text.corpus import Corpus

CHUNKS_PER_PASSAGE = 8  # at most: a screen or two
MIN_RUN = 3  # tokens in common; shorter runs are in almost any two texts
MAX_CHARACTER = 4  # tokens that one character may be spread over: as many as its bytes in UTF-8


class TextSpan(NamedTuple):
    """The text of the tokens `start:end`."""

    start: int
    end: int
    text: str


def rank_passages(evaluation: Evaluation) -> list[np.ndarray]:
    """The evaluated text as passages, from the largest total gain to the largest loss; each is its chunks' numbers.

    A document is cut into passages of nearly equal length, so every chunk is in exactly one.
    """
    gains = evaluation.of_chunks(evaluation.nats["off"] - evaluation.nats["on"])
    n_bytes = evaluation.of_chunks(evaluation.n_bytes)
    numbers, documents = np.arange(len(gains)), evaluation.corpus.document_of(evaluation.offsets)
    passages: list[np.ndarray] = []
    for chunks in np.split(numbers, np.flatnonzero(np.diff(documents)) + 1):
        passages += np.array_split(chunks, math.ceil(len(chunks) / CHUNKS_PER_PASSAGE))
    predicted = [chunks for chunks in passages if n_bytes[chunks].sum() > 0]
    return sorted(predicted, key=lambda chunks: -gains[chunks].sum())


def choose(n_ranked: int, n_passages: int) -> list[tuple[int, str]]:
    """Ranks to show, from 0, each with its kind: `gain`, `median` or `loss`, a third of each.

    What is left over goes to the gains, then to the losses.
    """
    n = min(n_passages, n_ranked)
    n_gain, n_loss, n_median = (n + 2) // 3, (n + 1) // 3, n // 3
    middle = max(n_gain, (n_ranked - n_median) // 2)
    ranks = {
        "gain": range(n_gain),
        "median": range(middle, middle + n_median),
        "loss": range(n_ranked - 1, n_ranked - 1 - n_loss, -1),
    }
    return [(rank, kind) for kind, of_kind in ranks.items() for rank in of_kind]


def text_spans(corpus: Corpus, start: int, end: int) -> list[TextSpan]:
    """Text of the tokens `start:end`, each span the fewest tokens that are whole characters.

    A character belongs to where it begins: one that begins before `start` is left out, one that ends after `end` is
    whole. A token that adds nothing belongs to the one after it, or at the document's end to the one before.
    """
    number = int(corpus.document_of(start))
    first = max(start - MAX_CHARACTER + 1, int(corpus.starts[number]))
    last = min(end + MAX_CHARACTER - 1, int(corpus.starts[number + 1]))
    whole, n_done, begin = corpus.text(first, last - first), 0, first
    found: list[TextSpan] = []
    for stop in range(first + 1, last + 1):
        if not (text := corpus.text(begin, stop - begin)):
            continue
        if found and corpus.text(found[-1].start, stop - found[-1].start) == found[-1].text:
            found[-1], begin = found[-1]._replace(end=stop), stop  # the text has a replacement character: a byte of it
        elif whole.startswith(text, n_done):  # else it is that of a broken character, which is whole there
            found.append(TextSpan(begin, stop, text))
            n_done, begin = n_done + len(text), stop
    if found and begin < end:
        found[-1] = found[-1]._replace(end=end)
    return [span for span in found if start <= span.start < end]


def common_run(chunk: Sequence[int], value: Sequence[int]) -> tuple[int, int, int]:
    """(start in `chunk`, start in `value`, length) of their longest common run of tokens; length 0 below `MIN_RUN`."""
    run = SequenceMatcher(None, chunk, value, autojunk=False).find_longest_match()
    return (run.a, run.b, run.size) if run.size >= MIN_RUN else (0, 0, 0)


def touches(span: TextSpan, runs: Sequence[tuple[int, int]]) -> bool:
    """Whether some text is in one of the runs of tokens `(start, end)`."""
    return any(span.start < end and span.end > start for start, end in runs)


def marked(corpus: Corpus, start: int, end: int, run: tuple[int, int]) -> list[tuple[bool, str]]:
    """The text of tokens `start:end` in parts, each with whether it is in a run of tokens."""
    spans = text_spans(corpus, start, end) if start < end else []
    parts = groupby(spans, lambda span: touches(span, [run]))
    return [(in_run, "".join(span.text for span in part)) for in_run, part in parts]
