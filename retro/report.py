r"""Report: a page that shows what retrieval did to each token of some held-out passages.

The gain of a token is how many bits cheaper it became because there were neighbors to read:

$$g_i = \log_2 p(x_i \mid x_{<i}, \text{RET}) - \log_2 p(x_i \mid x_{<i})$$

Beside each chunk $C_u$ stand the neighbors that were read while it was predicted. These are
$\text{RET}(C_{u-1})$, retrieved for the chunk before it: the last token of $C_{u-1}$, which predicts the first
token of $C_u$, is the first to read them, and the last but one of $C_u$ is the last. Each neighbor has its share
of their attention; with the weights $a_{ij}$ from token $i$ to token $j$ of any neighbor, summing to 1 over $j$:

$$\text{share}(k) = \underset{\text{layers, heads, } i}{\text{mean}} \ \sum_{j \in \text{neighbor } k} a_{ij}$$

The page is one file without scripts, and everything in it that comes from a text is escaped.

Shapes: as in `retro.model`; n evaluated tokens and c chunks as in `Evaluation`. Offsets count tokens.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from retro.artifacts import written_whole
from retro.corpus import Corpus
from retro.evaluate import Evaluation, windows
from retro.model import ChunkedCrossAttention, RetroModel, readable, written_out_attention

CHUNKS_PER_PASSAGE = 8  # at most: a screen or two
FULL_COLOR_BITS = 2.0  # a gain from which on the color is no stronger
NOTABLE_BITS = 0.5  # a gain from which on a line break, which has no width to be colored, gets a sign
MIN_RUN = 3  # tokens in common; shorter runs are in almost any two texts
N_OPEN = 2  # neighbors of a chunk; the others are folded unless they have a run in common
MAX_CHARACTER = 4  # tokens that one character may be spread over: as many as its bytes in UTF-8

Piece = tuple[int, int, str]  # the text of the tokens between two offsets


@dataclass(frozen=True)
class Read:
    """A neighbor that was read while a chunk was predicted."""

    offset: int  # in the database's corpus
    distance: float  # squared L2 distance to the chunk before, which retrieved it
    share: float  # of attention
    run: tuple[int, int]  # start and end of what it has in common with the predicted chunk, empty if nothing
    in_chunk: tuple[int, int]  # the same in the evaluated corpus


@torch.inference_mode()
def attention_shares(model: RetroModel, x: Tensor, ret: Tensor) -> Tensor:
    """Share of chunked cross-attention that each neighbor gets (B, C, K), on the CPU.

    * `x` are tokens (B, T)
    * `ret` are the neighbors of its chunks (B, C, K, R), tokens or -1

    It is the mean over layers, heads and the tokens that read the chunk's neighbors. The shares of a chunk
    sum to 1, or are 0 where nothing can be read.
    """
    device = next(model.parameters()).device
    found: list[Tensor] = []
    hooks = [cca.register_forward_pre_hook(lambda cca, args: found.append(_shares(cca, *args))) for cca in model.cca]
    try:
        model(x.to(device), ret.to(device))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(found).mean(dim=0).cpu() if found else torch.zeros(ret.shape[:3])


def _shares(cca: ChunkedCrossAttention, h: Tensor, e: Tensor, present: Tensor) -> Tensor:
    """Shares (B, C, K) in one layer, from what its `forward` is given."""
    (B, T, D), (C, K, R), m = h.shape, e.shape[1:4], cca.chunk_len
    shifted = F.pad(h, (0, 0, -(m - 1), C * m - (T - (m - 1)))).reshape(B * C, m, D)
    queries = cca.split_heads(cca.query(cca.norm(shifted))).transpose(1, 2)  # (B*C, H, m, d_k)
    keys, _ = cca.keys_values(e.flatten(2, 3).flatten(0, 1))  # (B*C, H, K*R, d_k)
    mask, has_neighbor = readable(present.flatten(2).flatten(0, 1))
    assert has_neighbor is not None
    # With the number of its neighbor, one-hot, as a token's value, what is read is each neighbor's weight.
    values = torch.eye(K, dtype=keys.dtype, device=keys.device).repeat_interleave(R, dim=0)
    weights = written_out_attention(queries, keys, values.expand(B * C, cca.n_heads, -1, -1), attn_mask=mask)
    weights = torch.where(has_neighbor[:, None, None], weights.mean(dim=1), 0.0).view(B, C, m, K)
    # The neighbors of the last chunk may have fewer than m readers: the sequence ends.
    is_token = (torch.arange(C * m, device=h.device) + m - 1 < T).view(C, m, 1)
    return (weights * is_token).sum(dim=2) / is_token.sum(dim=1)


def write_report(path: Path, evaluation: Evaluation, model: RetroModel, n_passages: int = 6) -> None:
    """Write an HTML page with passages of the evaluated text, their gains and their neighbors.

    * `model` is the one that was evaluated
    * `n_passages` are shown: a third with the largest gain, a third around the median, a third with the
      largest loss

    Raises `ValueError` for no passages and `OSError` when the page cannot be written.
    """
    if n_passages < 1:
        raise ValueError(f"n_passages={n_passages} is not at least 1")
    ranked = rank_passages(evaluation)
    sections = [
        _passage(evaluation, model, ranked[rank], f"rank {rank + 1:,} of {len(ranked):,}", kind)
        for rank, kind in choose(len(ranked), n_passages)
    ]
    with written_whole(Path(path)) as temporary:
        temporary.write_text(_page(evaluation, len(ranked), sections), encoding="utf-8")


def rank_passages(evaluation: Evaluation) -> list[np.ndarray]:
    """The evaluated text as passages, each the numbers of its chunks, from the largest total gain to the largest loss.

    A document is cut into passages of nearly equal length, so every chunk is in one, and in one only.
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
    """Ranks to show, from 0, each with `gain`, `median` or `loss`: a third each, the first kind rounded up first."""
    n = min(n_passages, n_ranked)
    n_gain, n_loss, n_median = (n + 2) // 3, (n + 1) // 3, n // 3
    middle = max(n_gain, (n_ranked - n_median) // 2)
    ranks = {
        "gain": range(n_gain),
        "median": range(middle, middle + n_median),
        "loss": range(n_ranked - 1, n_ranked - 1 - n_loss, -1),
    }
    return [(rank, kind) for kind, of_kind in ranks.items() for rank in of_kind]


def shares_of_chunks(evaluation: Evaluation, model: RetroModel, chunks: np.ndarray) -> list[Tensor | None]:
    """For each chunk, the shares (K) of the neighbors that it reads, in the window that scored it.

    It is None for a chunk that begins its window, because there is no chunk before it to have retrieved any.
    The very first token of such a chunk is scored by the window before, if there is one.
    """
    corpus, m = evaluation.corpus, evaluation.index.chunk_len
    cut = windows(corpus, evaluation.window, evaluation.stride)
    scored = [first for _, _, first in cut]
    offsets = evaluation.offsets[chunks]
    second = np.minimum(offsets + 1, corpus.ends_of(offsets) - 1)
    window_of = [cut[bisect_right(scored, token) - 1][:2] for token in second.tolist()]
    shares = {}
    for start, end in set(window_of):
        u, n_whole = int(np.searchsorted(evaluation.offsets, start)), (end - start) // m
        ret = evaluation.index.values(evaluation.neighbors[u : u + n_whole, : evaluation.n_neighbors])
        tokens = torch.from_numpy(corpus.tokens[start:end].astype(np.int64))
        shares[start] = attention_shares(model, tokens[None], torch.from_numpy(ret)[None])[0]
    before = [(offset - start) // m - 1 for offset, (start, _) in zip(offsets.tolist(), window_of, strict=True)]
    return [shares[start][u] if u >= 0 else None for u, (start, _) in zip(before, window_of, strict=True)]


def pieces(corpus: Corpus, start: int, end: int) -> list[Piece]:
    """Text of the tokens `start:end`, as (offset, end, text) of the fewest tokens that are whole characters.

    A character belongs to where it begins: one that is spread over `start` is left out, one over `end` is whole.
    """
    number = int(corpus.document_of(start))
    first = max(start - MAX_CHARACTER + 1, int(corpus.starts[number]))
    ids = corpus.tokens[first : min(end + MAX_CHARACTER - 1, int(corpus.starts[number + 1]))].tolist()
    whole, done, n_done = corpus.tokenizer.decode(ids), "", 0
    found: list[Piece] = []
    for n in range(1, len(ids) + 1):
        text = corpus.tokenizer.decode(ids[:n])
        if not whole.startswith(text):
            continue  # a broken character is decoded as another one, with which the whole text does not go on
        if text != done:
            found.append((first + n_done, first + n, text[len(done) :]))
            done, n_done = text, n
        elif found:  # a token that adds nothing belongs to the one before
            found[-1], n_done = (found[-1][0], first + n, found[-1][2]), n
    return [piece for piece in found if start <= piece[0] < end]


def common_run(chunk: Sequence[int], value: Sequence[int]) -> tuple[int, int, int]:
    """(start in `chunk`, start in `value`, length) of their longest common run of tokens; length 0 below `MIN_RUN`."""
    run = SequenceMatcher(None, chunk, value, autojunk=False).find_longest_match()
    return (run.a, run.b, run.size) if run.size >= MIN_RUN else (0, 0, 0)


def neighbors_read(evaluation: Evaluation, number: int, shares: Tensor | None) -> list[Read]:
    """The neighbors that were read while chunk `number` was predicted, nearest first: those of the chunk before it.

    * `shares` (K) are theirs, or None if nothing was read
    """
    if shares is None:
        return []
    index, start = evaluation.index, int(evaluation.offsets[number])
    chunk = evaluation.corpus.values(np.array(start), index.chunk_len)
    found = []
    for k in range(evaluation.n_neighbors):
        offset, distance = int(evaluation.neighbors[number - 1, k]), float(evaluation.distances[number - 1, k])
        if offset < 0:
            continue
        value = index.values(np.array(offset))
        a, b, n = common_run(chunk[chunk >= 0].tolist(), value[value >= 0].tolist())
        run, in_chunk = (offset + b, offset + b + n), (start + a, start + a + n)
        found.append(Read(offset, distance, float(shares[k]), run, in_chunk))
    return found


def _place(corpus: Corpus, offset: int) -> str:
    """Where an offset is: in which document, and which token of it."""
    number = int(corpus.document_of(offset))
    return f"{escape(corpus.documents[number].name)} <span>from token {offset - corpus.starts[number]:,}</span>"


def _touches(piece: Piece, runs: Sequence[tuple[int, int]]) -> bool:
    return any(piece[0] < end and piece[1] > start for start, end in runs)


def _token(evaluation: Evaluation, piece: Piece, in_run: bool) -> str:
    """A piece of text as a span that is colored by its gain."""
    first, end, text = piece
    tokens = slice(first - evaluation.start, end - evaluation.start)
    on, off = (float(evaluation.nats[v][tokens].sum()) / math.log(2) for v in ("on", "off"))
    gain, body = off - on, escape(text)
    if abs(gain) >= NOTABLE_BITS:
        body = body.replace("\n", '<i class="break"></i>\n')
    losses = f"{on:.2f} bits on, {off:.2f} off, gain {gain:+.2f}"
    if end - first > 1:
        losses += f" ({end - first} tokens)"
    elif first in evaluation.corpus.starts:
        losses = "first of its document, not predicted"
    title = escape(text.replace("\n", "↵").replace(" ", "␣") + ": " + losses)  # signs, for a lone space to be seen
    kind = ("up" if gain > 0 else "down") + " run" * in_run
    return f'<span class="{kind}" style="--g:{min(abs(gain) / FULL_COLOR_BITS, 1):.2f}" title="{title}">{body}</span>'


def _neighbor(evaluation: Evaluation, read: Read, is_open: bool) -> str:
    """A neighbor: what it is, its chunk and its continuation, with the common run marked."""
    corpus, m = evaluation.index.corpus, evaluation.index.chunk_len
    end_of_document = int(corpus.ends_of(read.offset))
    parts = []
    for start, kind in ((read.offset, "text"), (read.offset + m, "text continuation")):
        found = pieces(corpus, start, min(start + m, end_of_document)) if start < end_of_document else []
        runs = groupby(found, lambda piece: _touches(piece, [read.run]))
        texts = [(marked, escape("".join(text for _, _, text in run))) for marked, run in runs]
        body = "".join(f"<mark>{text}</mark>" if marked else text for marked, text in texts)
        parts.append(f'<div class="{kind}" dir="auto">{body}</div>' * bool(body))
    return f"""<details{" open" * is_open}><summary>{_place(corpus, read.offset)}
<span>squared distance {read.distance:.3f}</span>
<span><i class="bar" style="--share:{read.share:.0%}"></i>{read.share:.0%} of attention</span></summary>
{"".join(parts)}</details>"""


def _chunk(evaluation: Evaluation, number: int, shares: Tensor | None, retrieved_for: str) -> str:
    """A row: a chunk, and beside it the neighbors of the chunk before, which `retrieved_for` names."""
    corpus, m, start = evaluation.corpus, evaluation.index.chunk_len, int(evaluation.offsets[number])
    of_document = start - int(corpus.starts[corpus.document_of(start)])
    reads = neighbors_read(evaluation, number, shares)
    if reads:
        note = f"what was retrieved for {retrieved_for}."
    elif of_document == 0:
        note = "nothing, as no chunk of the document is before it."
    else:
        note = "nothing was retrieved." if shares is not None else "nothing, but for its first token: a window begins."
    texts = pieces(corpus, start, min(start + m, int(corpus.ends_of(start))))
    spans = [_token(evaluation, piece, _touches(piece, [read.in_chunk for read in reads])) for piece in texts]
    gain = evaluation.of_chunks(evaluation.nats["off"] - evaluation.nats["on"])[number] / math.log(2)
    cards = [_neighbor(evaluation, read, k < N_OPEN or read.run[0] < read.run[1]) for k, read in enumerate(reads)]
    return f"""<div class="row">
<div><p class="note">Chunk {of_document // m + 1:,} <b>{round(gain, 1) + 0.0:+.1f} bits</b></p>
<div class="text" dir="auto">{"".join(spans)}</div></div>
<div><p class="note">Read while predicting this chunk: {note}</p>
<div class="cards">{"".join(cards)}</div></div>
</div>
"""


def _passage(evaluation: Evaluation, model: RetroModel, chunks: np.ndarray, rank: str, kind: str) -> str:
    """A section: a passage's figures and its chunks."""
    n_bytes = evaluation.of_chunks(evaluation.n_bytes)[chunks].sum()
    on, off = (evaluation.of_chunks(evaluation.nats[v])[chunks].sum() / math.log(2) / n_bytes for v in ("on", "off"))
    # Where all passages gain, the last of them lost nothing; and the other way round.
    names = {
        "gain": "largest gain" if on <= off else "smallest loss",
        "loss": "largest loss" if off <= on else "smallest gain",
        "median": "median",
    }
    before = ["the chunk before this passage"] + ["the chunk above"] * (len(chunks) - 1)
    rows = zip(chunks.tolist(), shares_of_chunks(evaluation, model, chunks), before, strict=True)
    return f"""<section>
<p class="kind">{names[kind]} <span>{rank}</span></p>
<h2>{_place(evaluation.corpus, int(evaluation.offsets[chunks[0]]))}</h2>
<p class="figures"><b>{off - on:+.3f}</b> bits per byte saved: {on:.3f} with retrieval on, {off:.3f} off</p>
{"".join(_chunk(evaluation, *row) for row in rows)}</section>
"""


def _figure(value: dict[str, float | None], form: str) -> str:
    if value["value"] is None:
        return "–"
    interval = "" if value["low"] is None else f" <small>{value['low']:{form}} to {value['high']:{form}}</small>"
    return f"{value['value']:{form}}{interval}"


def _summary(summary: dict[str, Any]) -> str:
    """The table of all held-out text."""
    names = {"on": "on", "off": "off", "random": "random neighbors", "baseline": "trained without it"}
    rows = []
    for variant, value in summary["bits_per_byte"].items():
        gain = summary["gain"].get(f"over {variant}")
        cells = [_figure(value, ".3f"), _figure(gain, "+.4f") if gain else ""]
        rows.append(f'<tr><th scope="row">{names[variant]}</th><td>{cells[0]}</td><td>{cells[1]}</td></tr>')
    return f"""<table>
<thead><tr><th scope="col">Retrieval</th><th scope="col">Bits per byte</th><th scope="col">Saved by retrieval</th></tr>
</thead><tbody>{"".join(rows)}</tbody></table>"""


def _page(evaluation: Evaluation, n_ranked: int, sections: Sequence[str]) -> str:
    summary, m = evaluation.summary(), evaluation.index.chunk_len
    database, d = summary["database"], len(summary["documents"])
    intervals = " Small figures are 95% intervals over documents." if d > 1 else ""
    steps = [(-1, "down"), (-0.67, "down"), (-0.33, "down"), (0, "up"), (0.33, "up"), (0.67, "up"), (1, "up")]
    scale = "".join(f'<span class="{kind}" style="--g:{abs(g)}"></span>' for g, kind in steps)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>What retrieval did, token by token</title>
<style>{STYLE}</style>
</head>
<body>
<header>
<h1>What retrieval did, token by token</h1>
<p>A model read held-out text twice: once with text retrieved from a database, once without. Each token is
colored by what the retrieved text changed, blue where the token became easier to predict and orange where it became
harder. Beside each chunk of the text is what the model read while it predicted that chunk.</p>
{_summary(summary)}
<p class="note">{d:,} held-out document{"s" * (d > 1)}, {summary["n_bytes"]:,.0f} bytes, in windows of
{summary["window"]:,} tokens, {summary["stride"]:,} apart. The database has {database["n_chunks"]:,} chunks of
{m:,} tokens from {database["n_documents"]:,} documents; a chunk retrieves {summary["n_neighbors"]:,}.{intervals}</p>
<p><b>How the passages were chosen.</b> All held-out text was cut into {n_ranked:,} passages of at most
{CHUNKS_PER_PASSAGE} chunks, none overlapping, and ranked by total gain. Shown are, a third each, those with the
largest gain, those around the median, and those with the largest loss. The extremes are here because they are extreme;
the median is what is usual.</p>
</header>
<p class="legend"><span class="scale">−{FULL_COLOR_BITS:g} bits, harder {scale} easier, +{FULL_COLOR_BITS:g} bits</span>
<span><u class="run">underlined</u> and <mark>marked</mark>: the
longest run of tokens, {MIN_RUN} or more, that a chunk shares with a neighbor</span>
<span>below a neighbor’s dashed line: its continuation</span></p>
<main>
{"".join(sections)}</main>
</body>
</html>
"""


STYLE = """
:root { color-scheme: light dark; --paper: #fdfcfa; --ink: #1f2328; --faint: #62666d; --line: #e3dfd7; --card: #f5f2ec;
  --mark: #ffe08a; --run: #7a5c00; --up: 33 113 214; --down: 226 104 12; --strongest: .62; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #16181b; --ink: #e7e4de; --faint: #9ba0a7; --line: #30343a; --card: #1e2125;
    --mark: #6b5310; --run: #e3b93c; --up: 60 132 246; --down: 232 112 20; --strongest: .72; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 84rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.55 system-ui, sans-serif; }
h2, .text, summary { overflow-wrap: anywhere; }
header { max-width: 46rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 1rem; }
h2 { font-size: 1.25rem; line-height: 1.3; margin: 0; }
h2 span, .kind span, .note, small { color: var(--faint); font-weight: normal; }
p { margin: 0 0 1rem; }
table { border-collapse: collapse; margin: 0 0 1rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .3rem 1.5rem .3rem 0; border-bottom: 1px solid var(--line); }
th { font-weight: 600; }
small { font-size: .8125rem; white-space: nowrap; }
.note { font-size: .875rem; }
.legend { position: sticky; top: 0; z-index: 1; display: flex; flex-wrap: wrap; gap: .25rem .75rem; margin: 1rem 0 0;
  padding: .5rem 0; background: var(--paper); border-bottom: 1px solid var(--line); font-size: .8125rem; }
.scale { white-space: nowrap; }
.scale :last-child { margin-right: .375rem; }
.scale span { padding: 0 .5rem; border: solid var(--line); border-width: 1px 0; }
section { margin-top: 3rem; }
.kind { margin: 0; font-size: .875rem; font-weight: 600; }
.kind span { margin-left: .5rem; }
.figures { margin: 0 0 .5rem; }
.row { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: .5rem 2rem; padding: .75rem 0;
  border-top: 1px solid var(--line); }
.row .note { margin: 0 0 .25rem; font-size: .8125rem; }
.text { font: .875rem/1.6 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; white-space: pre-wrap; }
.up { background: rgb(var(--up) / calc(var(--g) * var(--strongest))); }
.down { background: rgb(var(--down) / calc(var(--g) * var(--strongest))); }
.run { text-decoration: underline 2px var(--run); text-underline-offset: 3px; }
mark { background: var(--mark); color: inherit; }
.break::before { content: "↵"; font-style: normal; color: var(--faint); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: .5rem;
  align-items: start; }
details { background: var(--card); padding: .5rem .75rem; border-radius: 4px; }
summary { cursor: pointer; font-size: .8125rem; line-height: 1.5; }
summary > span { display: inline-block; margin-left: .75rem; color: var(--faint); }
.bar { display: inline-block; width: 3rem; height: .5rem; margin-right: .375rem; border: 1px solid var(--faint);
  background: linear-gradient(var(--faint) 0 0) 0 / var(--share) 100% no-repeat; }
details .text { margin-top: .375rem; font-size: .8125rem; line-height: 1.5; }
.continuation { padding-top: .375rem; border-top: 1px dashed var(--faint); }
@media (max-width: 50rem) {
  body { padding-top: 1rem; }
  .row { grid-template-columns: minmax(0, 1fr); }
  .legend { position: static; }
  th, td { padding-right: .75rem; }
  small { display: block; } }
"""
