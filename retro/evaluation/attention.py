r"""How the attention of chunked cross-attention is shared out among the neighbors that a chunk reads.

With the weights $a_{ij}$ from token $i$ to token $j$ of any neighbor, summing to 1 over $j$:

$$\text{share}(k) = \underset{\text{layers, heads, } i}{\text{mean}} \ \sum_{j \in \text{neighbor } k} a_{ij}$$

Shapes: as in `retro.model`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from retro.attention import padding_mask, written_out_attention
from retro.chunks import chunks_of_readers
from retro.evaluation.result import Evaluation
from retro.evaluation.windows import windows
from retro.model import ChunkedCrossAttention, RetroModel
from retro.retrofit import Model, Retrofit


@torch.inference_mode()
def attention_shares(model: Model, x: Tensor, ret: Tensor) -> Tensor:
    """Share of chunked cross-attention that each neighbor gets (B, C, K), on the CPU.

    * `x` are tokens (B, T)
    * `ret` are the neighbors of its chunks (B, C, K, R), tokens or -1

    It is the mean over layers, heads and the tokens that read the chunk's neighbors. The shares of a chunk sum to 1 (of
    a `Retrofit`, to 1 with those of the heads' sinks), or are 0 where there is nothing to read.
    """
    device = next(model.parameters()).device
    x, ret = x.to(device), ret.to(device)
    weights = _weights_of_copies(model, x, ret) if isinstance(model, Retrofit) else _weights(model, x, ret)
    if not weights:
        return torch.zeros(ret.shape[:3])
    of_tokens = torch.stack(weights).mean(dim=0)  # (B, C, m, K)
    C, m = of_tokens.shape[1:3]
    # The neighbors of the last chunk may have fewer than m readers, because the sequence ends.
    is_token = (torch.arange(C * m, device=device) + m - 1 < x.shape[1]).view(C, m, 1)
    shares = (of_tokens * is_token).sum(dim=2) / is_token.sum(dim=1)
    return shares.cpu()


def _weights(model: RetroModel, x: Tensor, ret: Tensor) -> list[Tensor]:
    """In each layer, the share (B, C, m, K) of each neighbor in the attention of each of its readers."""
    found: list[Tensor] = []
    hooks = [cca.register_forward_pre_hook(lambda cca, args: found.append(_of_layer(cca, *args))) for cca in model.cca]
    try:
        model(x, ret)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _of_layer(cca: ChunkedCrossAttention, h: Tensor, e: Tensor, present: Tensor) -> Tensor:
    """Shares (B, C, m, K) in one layer, from the arguments of its `forward`."""
    B, (C, K, R), m = len(h), e.shape[1:4], cca.chunk_len
    queries = cca.queries(chunks_of_readers(h, C, m))  # (B*C, m, H, d_k)
    keys, _ = cca.keys_values(e.flatten(2, 3).flatten(0, 1))  # (B*C, H, K*R, d_k)
    mask, has_neighbor = padding_mask(present.flatten(2).flatten(0, 1))
    assert has_neighbor is not None
    mask = cca.with_positions(mask, queries, torch.arange(m, device=h.device), K, R)
    mask = mask if mask is None or mask.dtype == torch.bool else mask.float()
    # If a token's value is the one-hot number of its neighbor, attention returns each neighbor's weight.
    # Shares of a model in half precision sum to 1 as well.
    queries, keys = queries.transpose(1, 2).float(), keys.float()
    values = torch.eye(K, device=keys.device).repeat_interleave(R, dim=0)
    weights = written_out_attention(queries, keys, values.expand(B * C, cca.n_heads, -1, -1), attn_mask=mask)
    return torch.where(has_neighbor[:, None, None], weights.mean(dim=1), 0.0).view(B, C, m, K)


def _weights_of_copies(model: Retrofit, x: Tensor, ret: Tensor) -> list[Tensor]:
    """As `_weights`, of a pretrained model; what is missing from a sum of 1 is what the heads' sinks got."""
    (B, C, K, R), m = ret.shape, model.chunk_len
    with model.reads(x, ret) as reading:
        if reading is None:
            return []
        reading.shares = []
        model.base(input_ids=x, use_cache=False)
    has_neighbor = (ret >= 0).any(dim=-1).any(dim=-1)[..., None, None]  # (B, C, 1, 1)
    weights = (w.mean(dim=1).view(B, C, m, K, R).sum(dim=-1) for w in reading.shares)
    return [torch.where(has_neighbor, w, 0.0) for w in weights]


def shares_of_chunks(evaluation: Evaluation, model: Model, chunks: np.ndarray) -> list[Tensor | None]:
    """For each chunk, the shares (K) of the neighbors that it reads, in the window that scored it.

    * `chunks` are numbers of chunks

    It is None for a chunk that begins its window, because there is no chunk before it whose neighbors it could
    read. (The first token of such a chunk is scored by the window before, if there is one.)
    """
    corpus, offsets, m = evaluation.corpus, evaluation.offsets, evaluation.index.chunk_len
    second = np.minimum(offsets[chunks] + 1, corpus.ends_of(offsets[chunks]) - 1)  # tokens
    shares: dict[int, Tensor | None] = dict.fromkeys(chunks.tolist())
    for start, end, scored in windows(corpus, evaluation.window, evaluation.stride, evaluation.n_windows):
        in_window = chunks[(scored <= second) & (second <= end)].tolist()
        first, n_whole = int(np.searchsorted(offsets, start)), (end - start) // m
        if not in_window or in_window == [first]:
            continue
        ret = evaluation.index.values(evaluation.neighbors[first : first + n_whole, : evaluation.n_neighbors])
        tokens = torch.from_numpy(corpus.tokens[start:end].astype(np.int64))
        found = attention_shares(model, tokens[None], torch.from_numpy(ret)[None])[0]  # (C, K)
        shares |= {number: found[number - 1 - first] for number in in_window if number > first}
    return list(shares.values())
