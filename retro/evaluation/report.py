r"""Report: a page that shows what retrieval did to each token of some held-out passages.

The gain of a token is how many bits cheaper it became because there were neighbors to read:

$$g_i = \log_2 p(x_i \mid x_{<i}, \text{RET}) - \log_2 p(x_i \mid x_{<i})$$

Beside each chunk $C_u$ are the neighbors that were read while it was predicted. These are $\text{RET}(C_{u-1})$,
retrieved for the chunk before it: the first to read them is the last token of $C_{u-1}$, which predicts the first
token of $C_u$, and the last to read them is the last but one of $C_u$.

The page is one file without scripts. Its template is `report.html.j2`, which escapes whatever comes from a text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from torch import Tensor

from retro.errors import InvalidOption
from retro.evaluation.attention import shares_of_chunks
from retro.evaluation.figures import behind
from retro.evaluation.intervals import format_interval, format_p
from retro.evaluation.passages import (
    CHUNKS_PER_PASSAGE,
    MIN_RUN,
    TextSpan,
    choose,
    common_run,
    marked,
    rank_passages,
    text_spans,
    touches,
)
from retro.evaluation.result import VARIANTS, Evaluation
from retro.retrofit import Model
from retro.search.chunks import how_far
from retro.storage.files import atomic_write
from retro.text.corpus import Corpus

FULL_COLOR_BITS = 2.0  # a gain from which on the color is no stronger
NOTABLE_BITS = 0.5  # a gain from which on a line break, which has no width to be colored, gets a sign
N_OPEN = 2  # neighbors of a chunk; the others are folded unless they have a run in common


def write_report(
    path: Path, evaluation: Evaluation, model: Model, n_passages: int = 6, about: Sequence[str] = ()
) -> None:
    """Write an HTML page with passages of the evaluated text, their gains and their neighbors.

    * `model` is the one that was evaluated
    * `about` is what to say of it in words, as its name and how long it was trained; the day stands behind that
    * `n_passages` are shown: a third with the largest gain, a third around the median, a third with the largest loss

    Raises `InvalidOption` for no passages and `CannotWrite` when the page cannot be written.
    """
    if n_passages < 1:
        raise InvalidOption("n_passages", n_passages, "is not at least 1")
    ranked = rank_passages(evaluation)
    chosen = choose(len(ranked), n_passages)
    environment = Environment(loader=PackageLoader("retro.evaluation", ""), autoescape=True, undefined=StrictUndefined)
    environment.filters |= {"number": format, "interval": format_interval, "p": format_p, "behind": behind}
    page = environment.get_template("report.html.j2").render(
        about=[*about, f"{date.today().day} {date.today():%B %Y}"],
        summary=evaluation.summary(),
        variants=VARIANTS,
        passages=[_passage(evaluation, model, ranked[rank], rank, kind) for rank, kind in chosen],
        n_ranked=len(ranked),
        chunks_per_passage=CHUNKS_PER_PASSAGE,
        full_color_bits=FULL_COLOR_BITS,
        min_run=MIN_RUN,
    )
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _passage(evaluation: Evaluation, model: Model, chunks: np.ndarray, rank: int, kind: str) -> dict[str, Any]:
    """A passage's figures and its chunks."""
    n_bytes = evaluation.of_chunks(evaluation.n_bytes)[chunks].sum()
    on, off = (evaluation.of_chunks(evaluation.nats[v])[chunks].sum() / math.log(2) / n_bytes for v in ("on", "off"))
    # If all passages gain, even the last of them lost nothing; and the other way round.
    gain, loss = "largest gain" if on <= off else "smallest loss", "largest loss" if off <= on else "smallest gain"
    shares = shares_of_chunks(evaluation, model, chunks)
    return {
        "kind": {"gain": gain, "median": "median", "loss": loss}[kind],
        "rank": rank + 1,
        "place": _place(evaluation.corpus, int(evaluation.offsets[chunks[0]])),
        "on": on,
        "off": off,
        "chunks": [_chunk(evaluation, *chunk) for chunk in zip(chunks.tolist(), shares, strict=True)],
    }


def _chunk(evaluation: Evaluation, number: int, shares: Tensor | None) -> dict[str, Any]:
    """A chunk, token by token, and the neighbors that it read, with their `shares` (K)."""
    corpus, m, start = evaluation.corpus, evaluation.index.chunk_len, int(evaluation.offsets[number])
    read = [] if shares is None else _neighbors(evaluation, number, shares)
    runs = [neighbor["run_in_chunk"] for neighbor in read]
    spans = text_spans(corpus, start, min(start + m, int(corpus.ends_of(start))))
    gain = evaluation.of_chunks(evaluation.nats["off"] - evaluation.nats["on"])[number] / math.log(2)
    return {
        "number": _place(corpus, start)[1] // m + 1,  # in its document
        "gain": round(gain, 1) + 0.0,  # no -0.0
        "begins_window": shares is None,
        "tokens": [_token(evaluation, span, touches(span, runs)) for span in spans],
        "neighbors": read,
    }


def _token(evaluation: Evaluation, span: TextSpan, in_run: bool) -> dict[str, Any]:
    """The text of a token, or of the few that make a character, with its losses."""
    tokens = slice(span.start - evaluation.start, span.end - evaluation.start)
    on, off = (float(evaluation.nats[v][tokens].sum()) / math.log(2) for v in ("on", "off"))
    losses = f"{on:.2f} bits on, {off:.2f} off, gain {off - on:+.2f}"
    if span.end - span.start > 1:
        losses += f" ({span.end - span.start} tokens)"
    elif span.start in evaluation.corpus.starts:
        losses = "first of its document, not predicted"
    return {
        "text": span.text,
        "losses": losses,
        "gains": off > on,
        "color": min(abs(off - on) / FULL_COLOR_BITS, 1),
        "is_notable": abs(off - on) >= NOTABLE_BITS,
        "in_run": in_run,
    }


def _neighbors(evaluation: Evaluation, number: int, shares: Tensor) -> list[dict[str, Any]]:
    """The neighbors that were read while chunk `number` was predicted, nearest first: those of the chunk before it."""
    index, m, start = evaluation.index, evaluation.index.chunk_len, int(evaluation.offsets[number])
    chunk = evaluation.corpus.values(np.array(start), m)
    found: list[dict[str, Any]] = []
    for k, share in enumerate(shares.tolist()):
        if (offset := int(evaluation.neighbors[number - 1, k])) < 0:
            continue
        value = index.values(np.array(offset))
        a, b, n = common_run(chunk[chunk >= 0].tolist(), value[value >= 0].tolist())
        run, end = (offset + b, offset + b + n), int(index.corpus.ends_of(offset))
        found.append(
            {
                "place": _place(index.corpus, offset),
                "distance": how_far(evaluation.distances[number - 1, k]),  # to the chunk before
                "share": share,
                "run_in_chunk": (start + a, start + a + n),
                "is_open": len(found) < N_OPEN or n > 0,
                "chunk": marked(index.corpus, offset, min(offset + m, end), run),
                "continuation": marked(index.corpus, offset + m, min(offset + 2 * m, end), run),
            }
        )
    return found


def _place(corpus: Corpus, offset: int) -> tuple[str, int]:
    """Where an offset is: in which document, and at which token of it."""
    number = int(corpus.document_of(offset))
    return corpus.documents[number].name, int(offset - corpus.starts[number])
