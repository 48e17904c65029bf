r"""Evaluation: what retrieval brings to text that the model was not trained on, and how much of it is copying.

The measure is bits per byte (section 4.1 of arXiv:2112.04426), over all predicted tokens of the held-out
documents. Bytes are those of the text in UTF-8, so models with different tokenizers can be compared:

$$\text{bpb} = \frac{\sum_i -\log_2 p(x_i \mid \dots)}{\sum_i \text{bytes}(x_i)}$$

It is measured several times over the same windows of text:

* `on`: each chunk has the neighbors that it retrieved from the database,
* `off`: there are no neighbors, so chunked cross-attention passes states through,
* `random`: each chunk has the neighbors of a chunk drawn from the other documents (if there are none, of an earlier
  one); the mean over three such shuffles,
* `baseline`: another model, trained without retrieval, if there is one,
* rivals: other ways to use what was retrieved, or as much computing (`retro.evaluation.rivals`).

A model that gains from what was retrieved, and not just from having something to read, is better
`on` than `off`, `random` *and* `baseline`.

**Leakage** (section 2.6). Held-out text may be in the database all the same, as a quotation or a licence
is. For each evaluated chunk $C$ of $m$ tokens, ten neighbors are retrieved with $C$ itself as the query; $s$
is the length of the longest run of tokens that $C$ has in common with one of them or its continuation:

$$r(C) = \frac{s}{m}, \qquad
\text{bpb}(\alpha) = \frac{\sum_{C:\, r(C) \le \alpha} -\log_2 p(C)}{\sum_{C:\, r(C) \le \alpha} \text{bytes}(C)}$$

At small $\alpha$ only those chunks remain that have little in common with their nearest neighbors in the
database: a gain there is hardly copying.

Documents are cut into windows of at most `window` tokens, `stride` apart, on boundaries of chunks. A window
scores the tokens that the windows before it did not, so each token is scored once, with at least
`window - stride` tokens before it (except at the beginning of a document).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from retro.config import DatasetConfig, EvaluateConfig
from retro.database import RetroIndex
from retro.errors import InvalidOption
from retro.evaluation.held_out import held_out_texts, require_held_out
from retro.evaluation.leakage import N_LEAKAGE_NEIGHBORS, copyable, overlaps, retrieve
from retro.evaluation.result import Evaluation
from retro.evaluation.rivals import BOTH, require_room, rival_losses
from retro.evaluation.windows import (
    are_asked_for,
    chunk_offsets,
    is_scored,
    losses,
    of_others,
    others_drawn,
    predicted_bytes,
    windows,
)
from retro.retrofit import Model
from retro.text.corpus import Corpus

__all__ = ["Evaluation", "evaluate", "held_out_texts"]


def evaluate(
    model: Model,
    corpus: Corpus,
    index: RetroIndex,
    *,
    config: EvaluateConfig | None = None,
    baseline: Model | None = None,
    others: Sequence[str] = ("off", "random"),
    against: Sequence[str] = (),
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Measure a model on the validation documents of a corpus.

    * `corpus` holds the documents; `held_out_texts` makes one of any texts
    * `index` is the database to retrieve from: any with the model's tokenizer and `chunk_len`
    * `config` says how many neighbors a chunk reads and how the text is cut. What it leaves out becomes 2 neighbors,
      windows of 32 chunks, and a stride of half a window
    * `baseline` is a model without retrieval to compare with
    * `others` are what to measure beside `on`; each takes another pass over the text
    * `against` are rivals (`retro.evaluation.rivals`) of the baseline, or without one of the model with retrieval off,
      which are measured on the same tokens
    * `n_shuffles` is how often random neighbors are drawn, from a fixed seed; each takes a pass, and a token's loss is
      the mean over them. Each chunk draws its own, so what is left of chance counts as noise of the documents

    Raises `InvalidOption` for lengths that are not whole chunks, or no shuffle, `SeenText` for documents that the
    database holds, and `ValueError` for a model or a database that does not fit.
    """
    config, m = config or EvaluateConfig(), index.chunk_len
    n_neighbors = config.n_neighbors or DatasetConfig.n_neighbors
    window = config.window or DatasetConfig.chunks_per_sample * m
    stride = config.stride or max(m, window // 2 // m * m)
    if window % m:
        raise InvalidOption("window", window, f"is not a positive multiple of chunk_len={m}")
    if stride % m or stride > window:
        raise InvalidOption("stride", stride, f"is not a positive multiple of chunk_len={m} up to {window}")
    _require_comparable(model, corpus, index, baseline)
    require_held_out(corpus, index.corpus)
    if against and "off" not in others:
        raise InvalidOption("against", ", ".join(against), "needs the model alone: measure off as well")
    # Who goes without retrieval goes with the model that was trained so, if there is one.
    goes_with = {r: (model, "off") if baseline is None or r == BOTH else (baseline, "baseline") for r in against}
    for rival, (net, _) in goes_with.items():
        require_room(rival, net, corpus, index, n_neighbors, window)

    offsets, cut = chunk_offsets(corpus, m), windows(corpus, window, stride, config.n_windows)  # (c)
    is_whole, of_chunks = offsets + m <= corpus.ends_of(offsets), corpus.document_of(offsets)
    rng, n_shuffles = np.random.default_rng(0), config.n_shuffles if "random" in others else 0
    drawn = [others_drawn(is_whole, of_chunks, rng) for _ in range(n_shuffles)]
    asked, k = are_asked_for(offsets, cut, drawn), max(n_neighbors, N_LEAKAGE_NEIGHBORS)
    neighbors, distances = np.full((len(offsets), k), -1), np.full((len(offsets), k), np.inf, dtype=np.float32)
    neighbors[asked], distances[asked] = retrieve(corpus, index, offsets[asked], k)  # (c, >= 10)
    read = np.where(is_whole[:, None], neighbors[:, :n_neighbors], -1)  # only whole chunks retrieve
    shuffles = [of_others(read, numbers, of_chunks, rng) for numbers in drawn]
    retrieved: dict[str, Sequence[np.ndarray | None]] = {"on": [read], "off": [None], "random": shuffles}
    passes = {name: (model, retrieved[name]) for name in ("on", *others)}
    if baseline is not None:
        passes["baseline"] = (baseline, [None])
    nats = {
        name: np.mean([losses(net, corpus, index, r, cut, config.batch_size, device, name) for r in rets], axis=0)
        for name, (net, rets) in passes.items()
    }
    for rival, (net, alone) in goes_with.items():
        nats[rival] = rival_losses(
            rival, net, corpus, index, read, nats[alone], cut, window, stride, config.batch_size, device
        )
    overlap = np.where(asked, overlaps(corpus, index, offsets, neighbors[:, :N_LEAKAGE_NEIGHBORS]), np.nan)
    copied, n_bytes = copyable(corpus, index, offsets, read), predicted_bytes(corpus) * is_scored(corpus, cut)
    return Evaluation(
        corpus, index, n_neighbors, window, stride, nats, n_bytes, offsets, neighbors, distances, overlap, copied,
        n_shuffles, config.n_windows,
    )  # fmt: skip


def _require_comparable(model: Model, corpus: Corpus, index: RetroIndex, baseline: Model | None) -> None:
    """Raise `ValueError` if there is nothing to measure, or if model, text and database do not fit together."""
    if not corpus.split("valid"):
        raise ValueError(
            "the corpus has no validation documents to evaluate; name texts: held_out_texts(paths, tokenizer)"
        )
    if not model.ca_layers:
        raise ValueError("the model reads no neighbors (it has no ca_layers), so there is no retrieval to measure")
    if baseline is not None and baseline.ca_layers:
        raise ValueError(f"the baseline reads neighbors in layers {baseline.ca_layers}; it should have ca_layers=()")
    if model.chunk_len != index.chunk_len:
        raise ValueError(
            f"the database has chunk_len={index.chunk_len}, but the model reads chunk_len={model.chunk_len}"
        )
    if corpus.tokenizer.sha256 != index.corpus.tokenizer.sha256:
        raise ValueError(
            f"the database was made with another tokenizer (sha256 {index.corpus.tokenizer.sha256[:12]}, but the text "
            f"has {corpus.tokenizer.sha256[:12]}); rebuild it with the tokenizer of the text"
        )


if __name__ == "__main__":
    from retro.cli import script

    script("evaluate")
