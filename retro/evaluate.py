r"""Evaluation: what retrieval brings to text that nobody trained on, and how much of it is copying.

The measure is bits per byte (section 4.1 of arXiv:2112.04426), over all predicted tokens of the held-out
documents; bytes are those of the text in UTF-8, so that tokenizers compare:

$$\text{bpb} = \frac{\sum_i -\log_2 p(x_i \mid \dots)}{\sum_i \text{bytes}(x_i)}$$

It is taken several times over the same windows of text:

* `on`: each chunk has retrieved its neighbors from the database,
* `off`: there are no neighbors, so chunked cross-attention passes states through,
* `random`: each chunk has the neighbors of another chunk, half the evaluated text away,
* `baseline`: another model, trained without retrieval, if there is one.

A model that gains from what was retrieved, and not merely from being given something to read, is better
`on` than `off`, `random` *and* `baseline`.

**Leakage** (section 2.6). Held-out text may stand in the database all the same, as a quotation or a licence
does. For each evaluated chunk $C$ of $m$ tokens, ten neighbors are retrieved with $C$ itself as the query; $s$
is the length of the longest string of tokens that $C$ has in common with one of them and its continuation:

$$r(C) = \frac{s}{m}, \qquad
\text{bpb}(\alpha) = \frac{\sum_{C:\, r(C) \le \alpha} -\log_2 p(C)}{\sum_{C:\, r(C) \le \alpha} \text{bytes}(C)}$$

At small $\alpha$ only chunks remain that have little in common with what is nearest to them in the database: a
gain there is hardly copying.

Documents are cut into windows of at most `window` tokens, `stride` apart, on boundaries of chunks. A window
scores the tokens that the one before it did not, so each token is scored once, with at least
`window - stride` tokens before it (but for a document's beginning).
"""

from __future__ import annotations

if __name__ == "__main__":  # before torch is imported, so that --help answers at once
    from retro.run_commands import evaluate_command

    raise SystemExit(evaluate_command())

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from retro.artifacts import FORMAT_VERSION, package_versions
from retro.corpus import Corpus, DocumentEntry, find_texts, read_documents
from retro.database import RetroIndex
from retro.dataset import IGNORED_TARGET
from retro.model import RetroModel
from retro.tokenizer import Tokenizer

N_LEAKAGE_NEIGHBORS = 10  # section 2.6
ALPHAS = tuple(step / 8 for step in range(1, 9))  # 12.5% to 100%, as in figure 6
N_RESAMPLES = 2000  # of the bootstrap
CHUNKS_PER_PIECE = 4096  # embedded, searched and compared at once: what bounds memory


@dataclass(frozen=True)
class Evaluation:
    """Losses of held-out text, token by token, and what its chunks retrieved.

    n are the evaluated tokens, from `start` on in `corpus`; c their chunks, of which each document's last may
    be shorter than `chunk_len`.
    """

    corpus: Corpus  # its validation documents are evaluated
    index: RetroIndex
    n_neighbors: int  # K
    window: int
    stride: int
    nats: dict[str, np.ndarray]  # (n) loss of each token, for each variant; 0 for a document's first, never predicted
    n_bytes: np.ndarray  # (n) of each predicted token
    offsets: np.ndarray  # (c) where the chunks start in `corpus`
    neighbors: np.ndarray  # (c, at least 10) offsets in `index.corpus`, nearest first; -1 for none
    distances: np.ndarray  # (c, at least 10) squared L2 distances
    overlap: np.ndarray  # (c) r(C)
    headroom: np.ndarray  # (c) tokens of the longest string in common with the neighbors of the chunk before

    @property
    def start(self) -> int:
        """Offset in `corpus` of the first evaluated token."""
        return int(self.offsets[0])

    def of_chunks(self, per_token: np.ndarray) -> np.ndarray:
        """Sums (c) over the tokens of each chunk of an array (n)."""
        return np.add.reduceat(per_token, self.offsets - self.start)

    def _by_document(self, per_token: np.ndarray, chosen: np.ndarray | None = None) -> np.ndarray:
        """Sums over each document's chunks, or over the `chosen` ones (c)."""
        sums = self.of_chunks(per_token)
        if chosen is not None:
            sums = np.where(chosen, sums, 0.0)
        first = self.corpus.split("valid").start
        return np.bincount(self.corpus.document_of(self.offsets) - first, sums, len(self.corpus.split("valid")))

    def bits_per_byte(self, variant: str, chosen: np.ndarray | None = None) -> dict[str, float | None]:
        """`value`, and the `low` and `high` end of its 95% interval, over all chunks or the `chosen` ones (c)."""
        bits = self.nats[variant] / math.log(2)
        return ratio_of_sums(self._by_document(bits, chosen), self._by_document(self.n_bytes, chosen))

    def gain(self, over: str, chosen: np.ndarray | None = None) -> dict[str, float | None]:
        """Bits per byte that retrieval saves over a variant; both are drawn in pairs, so the interval is its own."""
        bits = (self.nats[over] - self.nats["on"]) / math.log(2)
        return ratio_of_sums(self._by_document(bits, chosen), self._by_document(self.n_bytes, chosen))

    def summary(self) -> dict[str, Any]:
        """Everything as numbers, JSON-safe."""
        others = [variant for variant in self.nats if variant != "on"]
        m, reads = self.index.chunk_len, self.offsets > self.corpus.starts[self.corpus.document_of(self.offsets)]
        filtered = []
        for alpha in ALPHAS:
            chosen = self.overlap <= alpha
            row: dict[str, Any] = {"alpha": alpha, "n_chunks": int(chosen.sum())}
            row |= {"share_of_bytes": float(self.of_chunks(self.n_bytes)[chosen].sum() / self.n_bytes.sum())}
            row |= {"bits_per_byte": {v: self.bits_per_byte(v, chosen)["value"] for v in self.nats}}
            filtered.append(row | {"gain": {f"over {v}": self.gain(v, chosen) for v in others}})
        database = self.index.made_with
        return {
            "format_version": FORMAT_VERSION,
            "documents": [self.corpus.documents[i].name for i in self.corpus.split("valid")],
            "n_tokens": len(self.n_bytes),
            "n_bytes": float(self.n_bytes.sum()),
            "n_chunks": len(self.offsets),
            "n_neighbors": self.n_neighbors,
            "window": self.window,
            "stride": self.stride,
            "database": {k: database[k] for k in ("n_chunks", "chunk_len", "index", "n_probe", "recall", "embedder")}
            | {"n_documents": len(self.index.corpus.in_database), "index_sha256": database["index_sha256"]},
            "bits_per_byte": {variant: self.bits_per_byte(variant) for variant in self.nats},
            # Sums of each document: two evaluations of the same documents can be compared in pairs.
            "by_document": {v: (self._by_document(nats) / math.log(2)).tolist() for v, nats in self.nats.items()}
            | {"bytes": self._by_document(self.n_bytes).tolist()},
            "gain": {f"over {variant}": self.gain(variant) for variant in others},
            "filtered": filtered,
            # Of the chunks that have a chunk before them, whose neighbors they read.
            "headroom": {f"{k} tokens": float((self.headroom[reads] >= k).mean()) for k in (4, 8, 16, m) if k <= m}
            if reads.any()
            else {},
            "versions": package_versions(),
        }


def ratio_of_sums(numerators: np.ndarray, denominators: np.ndarray) -> dict[str, float | None]:
    """Sum of the numerators over that of the denominators, with a 95% bootstrap interval.

    * `numerators`, `denominators` (d) are of the documents, which are drawn with replacement, because tokens
      of one document are not independent

    The ends are None for one document, which tells nothing about others; all is None where the sum is 0.
    """
    value = float(numerators.sum() / denominators.sum()) if denominators.sum() else None
    documents = np.flatnonzero(denominators)
    if len(documents) < 2:
        return {"value": value, "low": None, "high": None}
    share = np.full(len(documents), 1 / len(documents))
    drawn = np.random.default_rng(0).multinomial(len(documents), share, size=N_RESAMPLES)
    low, high = np.quantile((drawn @ numerators[documents]) / (drawn @ denominators[documents]), [0.025, 0.975])
    return {"value": value, "low": float(low), "high": float(high)}


def held_out_texts(paths: Sequence[str | Path], tokenizer: Tokenizer) -> Corpus:
    """Texts to evaluate, all of them validation documents, in memory."""
    arrays, entries = [], []
    for document in read_documents(find_texts(paths)):
        try:
            ids, data = np.asarray(tokenizer.encode(document.text), dtype=np.int32), document.text.encode()
        except ValueError as error:
            raise ValueError(f"{document.name}: {error}") from None
        arrays.append(ids)
        entries.append(DocumentEntry(document.name, hashlib.sha256(data).hexdigest(), len(data), len(ids)))
    if not any(len(ids) > 1 for ids in arrays):
        raise ValueError(f"there is nothing to predict in {', '.join(map(str, paths))}; name longer texts")
    return Corpus(np.concatenate(arrays), entries, 0, tokenizer)


def require_held_out(corpus: Corpus, *seen: Corpus) -> None:
    """Raise `ValueError` if a validation document trained, or was added to a database, in a corpus in `seen`.

    Documents are compared by the hash of their text and by name: another version of a file is no new text,
    and neither is the file of which another part was held out.
    """
    evaluated = [corpus.documents[i] for i in corpus.split("valid")]
    for other in seen:
        if other.sha256 == corpus.sha256:
            continue  # a corpus keeps its own two sides apart, even where both are parts of one document
        trained = [other.documents[i] for part in other.parts for i in part]
        by_name, by_text = {_whole_name(d.name) for d in trained}, {d.sha256: d.name for d in trained}
        found = [f"{d.name} has the text of {by_text[d.sha256]}" for d in evaluated if d.sha256 in by_text]
        found += [
            f"{d.name} has the name of a document there"
            for d in evaluated
            if d.sha256 not in by_text and _whole_name(d.name) in by_name
        ]
        if found:
            more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
            raise ValueError(
                f"text to be evaluated is in the training text or in the database: {'; '.join(found[:5])}{more}. Leave "
                f"it out, rename what is another document, or use a database without it: --database DIR"
            )


def _whole_name(name: str) -> str:
    """The document that a part of a single-document corpus is a part of."""
    return name.removesuffix(" [train]").removesuffix(" [valid]")


def evaluate(
    model: RetroModel,
    corpus: Corpus,
    index: RetroIndex,
    *,
    n_neighbors: int = 2,
    window: int | None = None,
    stride: int | None = None,
    baseline: RetroModel | None = None,
    others: Sequence[str] = ("off", "random"),
    batch_size: int = 8,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Measure a model on the validation documents of a corpus.

    * `corpus` holds the documents; `held_out_texts` makes one of any texts
    * `index` is the database to retrieve from: any with the model's tokenizer and `chunk_len`
    * `n_neighbors` is how many neighbors a chunk reads
    * `window` is the most tokens that the model sees at once; left out, 32 chunks
    * `stride` is how far windows are apart; left out, half a window. Both are whole chunks
    * `baseline` is a model without retrieval to compare with
    * `others` are what to measure beside `on`; each costs a pass over the text
    * `batch_size` windows are evaluated at once

    Raises `ValueError` for documents that the database holds, another tokenizer, or odd lengths.
    """
    m = index.chunk_len
    window = window or 32 * m
    stride = max(m, window // 2 // m * m) if stride is None else stride
    for name, length, most in (("window", window, None), ("stride", stride, window)):
        if length % m or not 0 < length <= (most or length):
            raise ValueError(
                f"{name}={length} is not a positive multiple of chunk_len={m}" + f" up to {most}" * bool(most)
            )
    if not corpus.split("valid"):
        raise ValueError(
            "the corpus has no validation documents to evaluate; name texts: held_out_texts(paths, tokenizer)"
        )
    if not model.ca_layers:
        raise ValueError("the model reads no neighbors (it has no ca_layers), so there is no retrieval to measure")
    if baseline is not None and baseline.ca_layers:
        raise ValueError(f"the baseline reads neighbors in layers {baseline.ca_layers}; it should have ca_layers=()")
    if n_neighbors < 1:
        raise ValueError(f"n_neighbors={n_neighbors} is not at least 1")
    if model.chunk_len != m:
        raise ValueError(f"the database has chunk_len={m}, but the model reads chunk_len={model.chunk_len}")
    if corpus.tokenizer.sha256 != index.corpus.tokenizer.sha256:
        raise ValueError(
            f"the database was made with another tokenizer (sha256 {index.corpus.tokenizer.sha256[:12]}, but the text "
            f"has {corpus.tokenizer.sha256[:12]}). Rebuild it: python -m retro.database TEXT ... --tokenizer CORPUS"
        )
    require_held_out(corpus, index.corpus)

    offsets = _chunk_offsets(corpus, m)
    neighbors, distances = _retrieve(corpus, index, offsets, max(n_neighbors, N_LEAKAGE_NEIGHBORS))
    read = np.where(_is_whole(corpus, offsets, m)[:, None], neighbors[:, :n_neighbors], -1)
    reads = {"on": read, "off": None, "random": _elsewhere(read)}
    passes = {name: (model, reads[name]) for name in ("on", *others)}
    if baseline is not None:
        passes["baseline"] = (baseline, None)
    nats = {
        name: losses(net, corpus, index, offsets, ret, window, stride, batch_size, device, name)
        for name, (net, ret) in passes.items()
    }
    lengths = np.diff(np.append(offsets, corpus.end_of_valid))
    overlap = longest_common(corpus, index, offsets, neighbors[:, :N_LEAKAGE_NEIGHBORS]) / lengths
    before = np.concatenate([np.full_like(read[:1], -1), read[:-1]])  # a chunk reads the neighbors of the one before
    before[np.isin(offsets, corpus.starts)] = -1
    headroom = longest_common(corpus, index, offsets, before)
    n_bytes = _bytes_of_tokens(corpus)
    return Evaluation(
        corpus, index, n_neighbors, window, stride, nats, n_bytes, offsets, neighbors, distances, overlap, headroom
    )


def _documents(corpus: Corpus) -> Iterator[tuple[int, int]]:
    """First offset and end of each validation document."""
    for number in corpus.split("valid"):
        yield int(corpus.starts[number]), int(corpus.starts[number + 1])


def _chunk_offsets(corpus: Corpus, chunk_len: int) -> np.ndarray:
    """Where the chunks of the validation documents start; a document's last may be shorter."""
    return np.concatenate([np.arange(start, end, chunk_len) for start, end in _documents(corpus)])


def _is_whole(corpus: Corpus, offsets: np.ndarray, chunk_len: int) -> np.ndarray:
    return offsets + chunk_len <= corpus.ends_of(offsets)


def _bytes_of_tokens(corpus: Corpus) -> np.ndarray:
    """UTF-8 bytes (n) of each predicted token of the validation documents; 0 for the first of a document.

    Where a tokenizer does not keep a text exactly, they are scaled so that a document has its own number.
    """
    base = int(corpus.starts[corpus.n_train])
    n_bytes = corpus.tokenizer.n_bytes[np.asarray(corpus.tokens[base : corpus.end_of_valid], dtype=np.int64)].astype(
        np.float64
    )
    for number, (start, end) in zip(corpus.split("valid"), _documents(corpus), strict=True):
        part = n_bytes[start - base : end - base]
        if part.sum():
            part *= corpus.documents[number].n_bytes / part.sum()
        part[:1] = 0
    return n_bytes


def _retrieve(corpus: Corpus, index: RetroIndex, offsets: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Neighbors and distances (c, k) of chunks, nearest first."""
    found, bar = [], tqdm(total=len(offsets), desc="Retrieve", unit="chunk")
    for start in range(0, len(offsets), CHUNKS_PER_PIECE):
        piece = offsets[start : start + CHUNKS_PER_PIECE]
        found.append(index.search(index.embed(corpus.texts(piece, index.chunk_len)), k))
        bar.update(len(piece))
    bar.close()
    return np.concatenate([n for _, n in found]), np.concatenate([d for d, _ in found])


def _elsewhere(neighbors: np.ndarray) -> np.ndarray:
    """Give the neighbors (c, K) of each chunk that has some to the one half the evaluated text away.

    Of one or two chunks none gets any: there is no other, or only the next one, whose text is to be predicted.
    """
    has = np.flatnonzero((neighbors >= 0).any(axis=1))
    elsewhere = np.full_like(neighbors, -1)
    if len(has) > 2:
        elsewhere[has] = neighbors[np.roll(has, len(has) // 2)]
    return elsewhere


def windows(corpus: Corpus, window: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, end, scored): tokens `start:end` are read; of those after them, tokens from `scored` on are scored."""
    found = []
    for first, end_of_document in _documents(corpus):
        scored, start = first + 1, first
        while scored < end_of_document:
            end = min(start + window, end_of_document - 1)
            found.append((start, end, scored))
            scored, start = end + 1, start + stride
    return found


@torch.inference_mode()
def losses(
    model: RetroModel,
    corpus: Corpus,
    index: RetroIndex,
    offsets: np.ndarray,
    neighbors: np.ndarray | None,
    window: int,
    stride: int,
    batch_size: int,
    device: torch.device | str,
    name: str,
) -> np.ndarray:
    """Cross entropy (n) of each token of the validation documents, in nats; 0 for the first of a document.

    * `offsets` (c) are the chunks, `neighbors` (c, K) the offsets of what they retrieved, or None
    * `name` stands beside the progress bar
    """
    model.eval()
    m, base = model.chunk_len, int(offsets[0])
    nats = np.zeros(corpus.end_of_valid - base)
    # Long ones first, so that a batch has windows of about one length.
    todo = sorted(windows(corpus, window, stride), key=lambda w: w[0] - w[1])
    for i in tqdm(range(0, len(todo), batch_size), desc=f"Evaluate ({name})", unit="batch", mininterval=1):
        batch = todo[i : i + batch_size]
        n_chunks = math.ceil((batch[0][1] - batch[0][0]) / m)
        src = torch.zeros(len(batch), n_chunks * m, dtype=torch.long)
        tgt = torch.full_like(src, IGNORED_TARGET)
        ret = np.full((len(batch), n_chunks, 1 if neighbors is None else neighbors.shape[1]), -1)
        for row, (start, end, _) in enumerate(batch):
            tokens = torch.from_numpy(corpus.tokens[start : end + 1].astype(np.int64))
            src[row, : end - start], tgt[row, : end - start] = tokens[:-1], tokens[1:]
            if neighbors is not None:
                n_whole, u = (end - start) // m, int(np.searchsorted(offsets, start))
                ret[row, :n_whole] = neighbors[u : u + n_whole]
        values = None if neighbors is None else torch.from_numpy(index.values(ret)).to(device)
        logits = model(src.to(device), values).float()
        loss = F.cross_entropy(logits.flatten(0, 1), tgt.to(device).flatten(), reduction="none").view(src.shape).cpu()
        for row, (start, end, scored) in enumerate(batch):
            nats[scored - base : end + 1 - base] = loss[row, scored - 1 - start : end - start].numpy()
    return nats


def longest_common(corpus: Corpus, index: RetroIndex, offsets: np.ndarray, neighbors: np.ndarray) -> np.ndarray:
    """Tokens (c) of the longest string that a chunk has in common with one of its neighbors or their continuations.

    * `offsets` (c) are chunks of `corpus`, `neighbors` (c, K) offsets in `index.corpus`, -1 for none
    """
    longest = np.zeros(len(offsets), dtype=np.int64)
    m = index.chunk_len
    for start in range(0, len(offsets), CHUNKS_PER_PIECE):
        piece = slice(start, start + CHUNKS_PER_PIECE)
        chunks, values = corpus.values(offsets[piece], m), index.values(neighbors[piece])  # (c, m), (c, K, 2m)
        longest[piece] = longest_common_run(chunks, values)
    return longest


def longest_common_run(chunks: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Length (N) of the longest run of tokens of `chunks` (N, m) in one of `values` (N, K, R); -1 equals nothing.

    `run` at step i is the length of the common run that ends at token i of the chunk and at each token of a
    value: one more than where both were a token earlier.
    """
    run = np.zeros((*values.shape[:2], values.shape[2] + 1), dtype=np.int16)
    longest = np.zeros(len(chunks), dtype=np.int16)
    for i in range(chunks.shape[1]):
        token = chunks[:, i, None, None]
        run[..., 1:] = np.where((values == token) & (token >= 0), run[..., :-1] + 1, 0)
        longest = np.maximum(longest, run.max(axis=(1, 2)))
    return longest.astype(np.int64)


def table(summary: dict[str, Any]) -> str:
    """The figures as text for a terminal."""
    names = {"on": "retrieval on", "off": "retrieval off", "random": "random neighbors", "baseline": "baseline"}
    d, over = summary["database"], next(iter(summary["gain"]), None)
    lines = [
        f"held out  {len(summary['documents']):,} documents, {summary['n_bytes']:,.0f} bytes predicted, "
        f"{summary['n_chunks']:,} chunks; windows of {summary['window']} tokens, {summary['stride']} apart",
        f"database  {d['n_documents']:,} documents, {d['n_chunks']:,} chunks in {d['index']}; "
        f"{summary['n_neighbors']} neighbors",
        "",
        f"{'':<20}{'bits per byte':<28}gain of retrieval over it",
    ]
    for variant, value in summary["bits_per_byte"].items():
        gain = summary["gain"].get(f"over {variant}")
        lines.append(
            f"{names.get(variant, variant):<20}{_figure(value):<28}{_figure(gain, sign=True) if gain else ''}".rstrip()
        )
    variants = list(summary["bits_per_byte"])
    lines += ["", f"{'r(C) up to':<12}{'chunks':>8}  " + "".join(f"{v:>10}" for v in variants)]
    lines[-1] += f"  gain {over}" if over else ""
    for row in summary["filtered"]:
        values = [row["bits_per_byte"][v] for v in variants]
        lines.append(
            f"{row['alpha']:<12.1%}{row['n_chunks']:>8,}  "
            + "".join("         –" if v is None else f"{v:>10.3f}" for v in values)
            + (f"  {_figure(row['gain'][over], sign=True)}" if over else "")
        )
    shares = ", ".join(f"{share:.1%} share {k}" for k, share in summary["headroom"].items())
    return "\n".join([*lines, "", f"of the chunks that read neighbors, {shares or 'none'} or more in a row with them"])


def _figure(value: dict[str, float | None], sign: bool = False) -> str:
    kind = "+.4f" if sign else ".3f"
    if value["value"] is None:
        return "–"
    text = f"{value['value']:{kind}}"
    return text if value["low"] is None else f"{text} ({value['low']:{kind}} to {value['high']:{kind}})"


def plot(summary: dict[str, Any], path: Path) -> None:
    """The filtered curves as a PNG. Raises `ImportError` without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = ("C0", "C1", "C7", "C2", "C4")
    rows = [row for row in summary["filtered"] if row["n_chunks"]]
    alphas = [100 * row["alpha"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for variant, color in zip(summary["bits_per_byte"], colors, strict=False):
        left.plot(alphas, [row["bits_per_byte"][variant] for row in rows], marker="o", label=variant, color=color)
    left.set(title="Chunks filtered by overlap", ylabel="bits per byte")
    for name, color in zip(summary["gain"], colors[1:], strict=False):
        gains = [row["gain"][name] for row in rows]
        right.plot(alphas, [gain["value"] for gain in gains], marker="o", label=name, color=color)
        if all(gain["low"] is not None for gain in gains):
            ends = [gain["low"] for gain in gains], [gain["high"] for gain in gains]
            right.fill_between(alphas, *ends, color=color, alpha=0.15, linewidth=0)
    right.axhline(0, color="grey", linewidth=0.8)
    right.set(title="Gain of retrieval, with 95% intervals", ylabel="bits per byte saved")
    for axes in (left, right):
        axes.set(xlabel="r(C) up to, %")
        axes.legend(frameon=False, fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)
