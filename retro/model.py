r"""RETRO: a causal transformer that also reads retrieved text.

Borgeaud et al., 2021 (arXiv:2112.04426), section 2. A sequence is $l$ chunks $C_1 \dots C_l$ of $m$
tokens; $\text{RET}(C_u)$ are the $k$ neighbors that were retrieved for chunk $C_u$, each with its
continuation. The model predicts each token from the tokens before it and from the neighbors of the
chunks before its own (equation 1):

$$\log p(X) = \sum_{u=1}^{l} \sum_{i=1}^{m}
\log p\big(x_{(u-1)m+i} \mid (x_j)_{j<(u-1)m+i},\ (\text{RET}(C_{u'}))_{u'<u}\big)$$

$\text{RET}(C_u)$ depends on all of $C_u$, so no token of $C_u$ may be predicted with it. The last
token of $C_u$, whose output predicts the first token of $C_{u+1}$, is the first to read it.
Chunked cross-attention therefore works on chunks that are shifted to the left by $m - 1$ tokens.
With $m = 4$, tokens numbered from 0, and $u$ for $\text{RET}(C_u)$::

    chunk     |      C_1       |      C_2       |      C_3       |
    token     |  0   1   2   3 |  4   5   6   7 |  8   9  10  11 |
    predicts  |  1   2   3   4 |  5   6   7   8 |  9  10  11  12 |
    reads     |  -   -   -   1 |  1   1   1   2 |  2   2   2   3 |

Where this differs from the paper it follows the tutorial. Rotary positions in self-attention stay; the
paper's RMSNorm, its norm before the logits, its relative positions in cross-attention and an encoder with
width and embeddings of its own are options.

Shapes: B batch, T tokens, C chunks, m `chunk_len`, K neighbors, R tokens of a neighbor (2m), D
`d_model`, H heads. In a neighbor tensor -1 means "no token": it is masked wherever it could be
read, and a chunk all of whose neighbors are missing reads nothing at all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from retro.attention import RelativePositions, dot_product_attention, fused_linear, padding_mask
from retro.chunks import back_in_place, chunks_of_readers, require_whole_chunks
from retro.config import RetroConfig, require_layers
from retro.initialization import initialized
from retro.loss import cross_entropy_in_parts

Norm = Callable[[int], nn.Module]  # makes a layer that normalizes so many features
NORMS: dict[str, Norm] = {"layer": nn.LayerNorm, "rms": nn.RMSNorm}


class RotaryPositionalEmbeddings(nn.Module):
    r"""Rotary position embeddings (RoPE, arXiv:2104.09864).

    Features $i$ and $i + d/2$ of the head at position $n$ are rotated by the angle $n \theta_i$, with
    $\theta_i = \text{base}^{-2i/d}$ for $i$ from 0, so that a product of query and key depends on the
    distance of their positions only.

    * `d` is the number of features of a head
    * `base` is the constant of $\theta_i$
    """

    def __init__(self, d: int, base: int = 10_000) -> None:
        super().__init__()
        self.d, self.base = d, base
        # A parameter, though it never learns and is read nowhere: the tutorial's checkpoints have it.
        self.theta = nn.Parameter(self._theta(None), requires_grad=False)

    def forward(self, x: Tensor, start: int = 0) -> Tensor:
        """Rotate `x` of shape `[batch, seq_len, n_heads, d]`, whose first position is `start`."""
        pairs = x.unflatten(-1, (2, -1)).mT.flatten(-2)
        rotated = self.rotate(pairs, self.rotations(start, start + x.shape[1]))
        return rotated.unflatten(-1, (-1, 2)).mT.flatten(-2)

    def rotations(self, start: int, end: int) -> Tensor:
        r"""Cosines and sines of $n \theta_i$ for the positions from `start` to `end`: `[end - start, 1, d/2, 2]`."""
        # Of the definition and not the parameter: in half precision, to which that may have been cast, an angle of some
        # hundred radians is off by a radian.
        theta = self._theta(self.theta.device)
        positions = torch.arange(start, end, device=theta.device, dtype=theta.dtype)
        angles = torch.outer(positions, theta)[:, None]
        return torch.stack([angles.cos(), angles.sin()], dim=-1)

    def _theta(self, device: torch.device | None) -> Tensor:
        return self.base ** -(torch.arange(0, self.d, 2, device=device).float() / self.d)

    @staticmethod
    def rotate(x: Tensor, rotations: Tensor) -> Tensor:
        """Rotate `x` (..., T, H, d), in which the features i and i + d/2 of a pair lie side by side.

        A pair is then a complex number, and rotating it is one product, in float32 at least. What compiles a model has
        no complex numbers, and makes one of their parts.
        """
        pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))  # (..., T, H, d/2, 2)
        if torch.compiler.is_compiling():
            (a, b), (cos, sin) = pairs.unbind(dim=-1), rotations.unbind(dim=-1)
            rotated = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
        else:
            rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotations))
        return rotated.flatten(-2).type_as(x)


class Attention(nn.Module):
    r"""What the three kinds of attention share: pre-norm, projections, $\text{softmax}(QK^T/\sqrt{d_k})V$.

    * `d_model` is the number of features of an embedding
    * `n_heads` is the number of heads
    * `d_k` is the number of features of a head
    * `norm` makes the layer that normalizes what comes in: `nn.LayerNorm`, or the paper's `nn.RMSNorm`
    * `most` is the largest distance that relative positions of cross-attention tell apart; None for no such positions
    * `d_context` is the number of features of what cross-attention reads, if that is another
    """

    def __init__(
        self, d_model: int, n_heads: int, d_k: int, norm: Norm = nn.LayerNorm, most: int | None = None,
        d_context: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.n_heads = n_heads
        self.d_k = d_k
        self.query = nn.Linear(d_model, n_heads * d_k)
        self.key = nn.Linear(d_context or d_model, n_heads * d_k)
        self.value = nn.Linear(d_context or d_model, n_heads * d_k)
        self.norm = norm(d_model)
        self.output = nn.Linear(n_heads * d_k, d_model)
        self.positions = None if most is None else RelativePositions(d_model, n_heads, d_k, most)

    def split_heads(self, x: Tensor) -> Tensor:
        """(N, L, H*d_k) -> (N, L, H, d_k)."""
        return x.unflatten(-1, (-1, self.d_k))

    def keys_values(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """What a context (N, S, D) offers to be read: keys and values, both (N, H, S, d_k)."""
        weight, bias = fused_linear(self.key, self.value)
        keys, values = self.split_heads(F.linear(context, weight, bias)).transpose(1, 2).chunk(2, dim=1)
        return keys, values

    def attend(
        self, queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Queries (N, L, H, d_k) read keys and values (N, H, S, d_k) -> (N, L, D).

        * `mask`, if given, is true where they may read, or is added to their scores
        """
        queries = queries.transpose(1, 2)  # (N, H, L, d_k)
        read = dot_product_attention(queries, keys, values, mask, is_causal)  # (N, H, L, d_k)
        return self.output(read.transpose(1, 2).flatten(2))


class SelfAttention(Attention):
    r"""Self-attention $\text{ATTN}$ with rotary positions, causal in the decoder and not in the encoder.

    * `is_causal` bars each position from the positions after it
    """

    def __init__(self, d_model: int, n_heads: int, d_k: int, is_causal: bool, norm: Norm = nn.LayerNorm) -> None:
        super().__init__(d_model, n_heads, d_k, norm)
        self.is_causal = is_causal
        self.rotary_pe = RotaryPositionalEmbeddings(d_k)

    def rotations(self, T: int) -> Tensor:
        """What turns queries and keys of positions 0..T-1, for all heads so that memory is read in order."""
        return self.rotary_pe.rotations(0, T).expand(-1, 2 * self.n_heads, -1, -1).contiguous()

    def forward(self, h: Tensor, mask: Tensor | None = None, rotations: Tensor | None = None) -> Tensor:
        """`h` (N, T, D) reads itself -> (N, T, D), residual included.

        * `mask` (N, 1, 1, T) or (N, 1, T, T), if given, is true where there is a token to read; it is then all that
          bars a position
        * `rotations` are what `rotations` gives, the same for all layers; left out, they are computed here
        """
        n = self.n_heads * self.d_k
        qk, values = F.linear(self.norm(h), *self.projection()).split([2 * n, n], dim=-1)
        rotations = self.rotations(h.shape[1]) if rotations is None else rotations
        rotated = self.rotary_pe.rotate(self.split_heads(qk), rotations)
        queries, keys = rotated.chunk(2, dim=2)  # (N, T, H, d_k) each
        keys, values = keys.transpose(1, 2), self.split_heads(values).transpose(1, 2)  # (N, H, T, d_k)
        return h + self.attend(queries, keys, values, mask, self.is_causal and mask is None)

    def projection(self) -> tuple[Tensor, Tensor]:
        """Weight (3*H*d_k, D) and bias that give queries and keys, both with features in pairs, and values.

        Queries and keys may have their features in any order, as long as it is the same one.
        """

        def paired(x: Tensor) -> Tensor:
            return x.unflatten(0, (self.n_heads, 2, -1)).transpose(1, 2)  # (H, d_k/2, 2, ...)

        q, k, v = self.query, self.key, self.value
        weight = torch.cat([paired(q.weight), paired(k.weight), v.weight.view_as(paired(v.weight))])
        bias = torch.cat([paired(q.bias), paired(k.bias), v.bias.view_as(paired(v.bias))])
        return weight.flatten(0, 2), bias.flatten(0, 2)


class CrossAttention(Attention):
    r"""Cross-attention $\text{CA}$ of the encoder: neighbors read the chunk that retrieved them.

    A neighbor's token $\tau$ is $\tau - i$ away from the chunk's token $i$. Without relative positions there are no
    explicit ones: the states on both sides carry them.
    """

    def forward(self, e: Tensor, h: Tensor) -> Tensor:
        """`e` (B, C, K, R, D) reads `h` (B, C, m, D), already normalized -> (B, C, K, R, D)."""
        # All neighbors of a chunk read the same m states, so they are one long row of queries.
        queries = self.split_heads(self.query(self.norm(e)).flatten(2, 3).flatten(0, 1))  # (B*C, K*R, H, d_k)
        keys, values = self.keys_values(h.flatten(0, 1))  # (B*C, H, m, d_k)
        mask = None
        if self.positions is not None:
            (K, R), m = e.shape[2:4], h.shape[2]
            tau, i = torch.arange(R, device=e.device).repeat(K), torch.arange(m, device=e.device)
            mask = self.positions(queries, tau[:, None] - i, None)
        return e + self.attend(queries, keys, values, mask).view(e.shape)


class ChunkedCrossAttention(Attention):
    r"""Chunked cross-attention $\text{CCA}$ of the decoder: tokens read the neighbors of the chunk before.

    * `chunk_len` is the length of a chunk, $m$

    Without relative positions, as in the tutorial, which part of a neighbor matters is found by content.
    """

    def __init__(
        self, d_model: int, n_heads: int, d_k: int, chunk_len: int, norm: Norm = nn.LayerNorm, most: int | None = None,
        d_context: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(d_model, n_heads, d_k, norm, most, d_context)
        self.chunk_len = chunk_len

    def forward(self, h: Tensor, e: Tensor, present: Tensor | None = None) -> Tensor:
        r"""Decoder states `h` (B, T, D) read encoded neighbors `e` (B, C, K, R, D) -> (B, T, D).

        * `present` (B, C, K, R), if given, is true where `e` encodes a token

        Token $i$, counted from 0, reads $\text{RET}(C_u)$ with $u = \lfloor (i + 1) / m \rfloor$; the first
        $m - 1$ tokens, for which $u = 0$, and those whose chunk has no neighbors, come out as they went in.
        """
        if e.shape[1] == 0:
            return h
        mask, has_neighbor = padding_mask(None if present is None else present.flatten(2).flatten(0, 1))
        queries = self.queries(chunks_of_readers(h, e.shape[1], self.chunk_len))
        mask = self.with_positions(mask, queries, torch.arange(self.chunk_len, device=h.device), *e.shape[2:4])
        read = self.attend(queries, *self.keys_values(e.flatten(2, 3).flatten(0, 1)), mask)  # (B*C, m, D)
        if has_neighbor is not None:
            read = torch.where(has_neighbor[:, None, None], read, 0.0)
        return h + back_in_place(read, h)

    def queries(self, h: Tensor) -> Tensor:
        """States (N, L, D) -> their queries (N, L, H, d_k)."""
        return self.split_heads(self.query(self.norm(h)))

    def with_positions(
        self, mask: Tensor | None, queries: Tensor, rows: Tensor, K: int, R: int, keys: Tensor | None = None
    ) -> Tensor | None:
        r"""The mask of readers in `rows` (..., L), with what their distances from a neighbor add to the scores.

        Row $i$ is $i - \tau + m - 1$ away from token $\tau$ of any neighbor: row 0, the last token of the chunk that
        retrieved it, stands where the first $m$ tokens of the neighbor end.
        """
        if self.positions is None:
            return mask
        distances = rows[..., None] - torch.arange(R, device=rows.device).repeat(K) + self.chunk_len - 1
        return self.positions(queries, distances, mask, keys)


class FeedForward(nn.Module):
    r"""Position-wise feed-forward layer $\text{FFW}$: two linear layers with a ReLU between.

    * `d_model` is the number of features of an embedding
    * `d_ff` is the number of features of the hidden layer
    """

    def __init__(self, d_model: int, d_ff: int, norm: Norm = nn.LayerNorm) -> None:
        super().__init__()
        self.lin1 = nn.Linear(d_model, d_ff)
        self.lin2 = nn.Linear(d_ff, d_model)
        self.norm = norm(d_model)

    def forward(self, h: Tensor) -> Tensor:
        """(..., D) -> (..., D), residual included."""
        return h + self.lin2(F.relu(self.lin1(self.norm(h)), inplace=True))


class NearestNeighborEncoder(nn.Module):
    r"""Nearest neighbor encoder $\text{ENCODER}(\text{RET}(C_u)_{1 \le u \le l}, H)$ (algorithm 1).

    A transformer that reads each neighbor in both directions, since all of it is known. It is
    conditioned on the decoder: in the layers `ca_layers` the neighbors of $C_u$ read the states $H_u$ of
    the chunk that retrieved them, so that they can keep what matters to it. That is no leak, because
    nobody reads those neighbors before the last token of $C_u$ (see the drawing above). $H$ is what the
    decoder has computed when it first reads neighbors, after self-attention of layer $\min(P)$.

    * `chunk_len` is the length of a chunk
    * `n_layers` is the number of layers, $L_{enc}$
    * `ca_layers` are the layers with cross-attention, $P_{enc}$, counted from 0
    * `d_model`, `n_heads`, `d_k`, `d_ff`, `norm`, `positions` are as in `RetroModel`, and may be others
    * `d_decoder` is the number of features of the states of the decoder, if that is another
    * `n_vocab` is the number of tokens in the vocabulary, for embeddings of its own; left out, it has the decoder's
    """

    def __init__(
        self,
        chunk_len: int,
        n_layers: int,
        ca_layers: Collection[int],
        d_model: int,
        n_heads: int,
        d_k: int,
        d_ff: int,
        norm: Norm = nn.LayerNorm,
        positions: bool = False,
        d_decoder: int | None = None,
        n_vocab: int | None = None,
    ) -> None:
        super().__init__()
        require_layers("ca_layers", ca_layers, n_layers)
        self.d_model, d_decoder = d_model, d_decoder or d_model
        self.chunk_len = chunk_len
        self.ca_layers = tuple(sorted(ca_layers))
        most = 2 * chunk_len if positions else None
        self.ca = nn.ModuleList([CrossAttention(d_model, n_heads, d_k, norm, most, d_decoder) for _ in self.ca_layers])
        self.attn = nn.ModuleList([SelfAttention(d_model, n_heads, d_k, False, norm) for _ in range(n_layers)])
        self.ffw = nn.ModuleList([FeedForward(d_model, d_ff, norm) for _ in range(n_layers)])
        self.norm_h = norm(d_decoder)
        self.emb = None if n_vocab is None else nn.Embedding(n_vocab, d_model)
        is_narrower = n_vocab is None and d_model != d_decoder
        self.resize = nn.Linear(d_decoder, d_model) if is_narrower else nn.Identity()

    def embed(self, ret: Tensor, emb: nn.Embedding) -> Tensor:
        """Embeddings (B, C, K, R, D) of neighbors `ret` (B, C, K, R): its own, or those of the decoder, `emb`."""
        return self.resize((emb if self.emb is None else self.emb)(ret.clamp(min=0)))

    def forward(self, e: Tensor, h: Tensor, present: Tensor | None = None) -> Tensor:
        """Encode neighbors' embeddings `e` (B, C, K, R, D), given decoder states `h` (B, T, D), T >= C*m.

        * `present` (B, C, K, R), if given, is true where `e` embeds a token

        Returns (B, C, K, R, D). All chunks and neighbors are encoded in parallel.
        """
        C, m = e.shape[1], self.chunk_len
        # H_u, the states of each chunk; an unfinished chunk at the end has retrieved nothing yet.
        h = self.norm_h(h[:, : C * m].unflatten(1, (C, m)))  # (B, C, m, D)
        mask, _ = padding_mask(None if present is None else present.flatten(0, 2))
        rotations = self.attn[0].rotations(e.shape[3])  # type: ignore[operator]
        for p, (attn, ffw) in enumerate(zip(self.attn, self.ffw, strict=True)):
            e = attn(e.flatten(0, 2), mask, rotations).view(e.shape)  # each neighbor for itself: (B*C*K, R, D)
            if p in self.ca_layers:
                e = self.ca[self.ca_layers.index(p)](e, h)
            e = ffw(e)
        return e


class RetroModel(nn.Module):
    r"""The RETRO decoder (algorithm 1).

    * `n_vocab` is the number of tokens in the vocabulary
    * `d_model` is the number of features of an embedding
    * `n_layers` is the number of layers, $L$
    * `ca_layers` are the layers with chunked cross-attention, $P$, counted from 0; without any,
      this is a plain transformer, and `encoder` may be None
    * `chunk_len` is the length of a chunk
    * `n_heads` is the number of heads of an attention layer
    * `d_k` is the number of features of a head
    * `d_ff` is the number of features of the feed-forward layers
    * `encoder` is the nearest neighbor encoder
    * `norm` makes the layers that normalize: `nn.LayerNorm`, or the paper's `nn.RMSNorm`
    * `final_norm`: states are normalized before the logits, as in the paper
    * `tied`: the embeddings are what reads the logits off, too
    * `positions`: cross-attention sees distances, as in the paper
    """

    def __init__(
        self,
        n_vocab: int,
        d_model: int,
        n_layers: int,
        ca_layers: Collection[int],
        chunk_len: int,
        n_heads: int,
        d_k: int,
        d_ff: int,
        encoder: NearestNeighborEncoder | None,
        *,
        norm: Norm = nn.LayerNorm,
        final_norm: bool = False,
        tied: bool = False,
        positions: bool = False,
    ) -> None:
        super().__init__()
        require_layers("ca_layers", ca_layers, n_layers)
        if ca_layers and encoder is None:
            raise ValueError(f"ca_layers={sorted(ca_layers)} read neighbors, but encoder is None; pass an encoder")
        self.max_chunks: int | None = None  # as many as the samples that it is trained on have: positions are learnt
        self.n_vocab: int = n_vocab
        self.d_model: int = d_model
        self.chunk_len = chunk_len
        self.ca_layers = tuple(sorted(ca_layers))
        self.encoder = encoder
        self.emb = nn.Embedding(n_vocab, d_model)
        self.attn = nn.ModuleList([SelfAttention(d_model, n_heads, d_k, True, norm) for _ in range(n_layers)])
        self.ffw = nn.ModuleList([FeedForward(d_model, d_ff, norm) for _ in range(n_layers)])
        self.norm = norm(d_model) if final_norm else nn.Identity()
        self.read = None if tied else nn.Linear(d_model, n_vocab)
        # Last, so that with the same seed a decoder draws the same weights with and without it.
        d_encoder = d_model if encoder is None else encoder.d_model
        shape = (d_model, n_heads, d_k, chunk_len, norm, 2 * chunk_len if positions else None, d_encoder)
        self.cca = nn.ModuleList([ChunkedCrossAttention(*shape) for _ in self.ca_layers])
        self.norm_e = norm(d_encoder)

    def forward(
        self, x: Tensor, ret: Tensor | None = None, stretches: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """Logits for the token after each token, or what the tokens that come after them cost.

        * `x` are tokens, of shape `[batch_size, seq_len]`
        * `ret` are the neighbors of the chunks of `x`, tokens or -1, of shape
          `[batch_size, chunks, neighbors, neighbor_len]`; without it, or with no chunks, nothing is read
        * `stretches` are numbers of shape `[batch_size, seq_len]`, where several texts share a sequence: a token reads
          tokens of its own number only
        * `targets` are the tokens to predict, of shape `[batch_size, seq_len]`, or -100 for none

        Returns logits of shape `[batch_size, seq_len, n_vocab]`; of `targets` the sum of their cross entropies in nats,
        for which the logits are not all kept. Raises `ValueError` when there are neighbors of a chunk that `x` does not
        hold whole.
        """
        h = self.emb(x)
        retrieving = ret is not None and ret.shape[1] > 0 and bool(self.ca_layers)
        if retrieving:
            require_whole_chunks(x, ret, self.chunk_len)  # type: ignore[arg-type]
        present = ret >= 0 if retrieving else None  # type: ignore[operator]
        mask = None if stretches is None else (stretches[:, None, :, None] == stretches[:, None, None]).tril()
        rotations = self.attn[0].rotations(x.shape[1])  # type: ignore[operator]
        # Layer p of algorithm 1: ATTN, then CCA if p is in P, then FFW, each with its residual inside.
        for p, (attn, ffw) in enumerate(zip(self.attn, self.ffw, strict=True)):
            h = attn(h, mask, rotations)
            if retrieving and p in self.ca_layers:
                if p == self.ca_layers[0]:
                    # Once for all reading layers, with the states that the first of them has.
                    e = self.encode(ret, h, present)  # type: ignore[arg-type]
                h = self.cca[self.ca_layers.index(p)](h, e, present)
            h = ffw(h)
        return self.logits(h) if targets is None else cross_entropy_in_parts(self.logits, h, targets, self.n_vocab)

    def logits(self, h: Tensor) -> Tensor:
        """States (..., D) behind the last layer -> logits (..., n_vocab)."""
        h = self.norm(h)
        return F.linear(h, self.emb.weight) if self.read is None else self.read(h)

    def encode(self, ret: Tensor, h: Tensor, present: Tensor | None) -> Tensor:
        """Neighbors `ret` (B, C, K, R) encoded with the decoder states `h` (B, T, D) -> (B, C, K, R, D)."""
        assert self.encoder is not None
        return self.norm_e(self.encoder(self.encoder.embed(ret, self.emb), h, present))

    @staticmethod
    def from_config(config: RetroConfig) -> RetroModel:
        """A new model of this shape. With the same seed, its decoder is the same whether it reads neighbors or not."""
        c, encoder = config, None
        norm, positions = NORMS[c.norm], c.relative_positions
        if c.ca_layers:
            with torch.random.fork_rng(devices=[]):  # drawn aside, so that the decoder's draws do not depend on it
                torch.manual_seed(torch.initial_seed() + 1)
                encoder = NearestNeighborEncoder(
                    c.chunk_len, c.n_encoder_layers, c.encoder_ca_layers, c.d_encoder or c.d_model,
                    c.encoder_n_heads or c.n_heads, c.encoder_d_k or c.d_k, c.encoder_d_ff or c.d_ff,
                    norm, positions, c.d_model, c.n_vocab if c.own_embeddings else None,
                )  # fmt: skip
        model = RetroModel(
            c.n_vocab, c.d_model, c.n_layers, c.ca_layers, c.chunk_len, c.n_heads, c.d_k, c.d_ff, encoder,
            norm=norm, final_norm=c.final_norm, tied=c.tied, positions=positions,
        )  # fmt: skip
        return model if c.init_std is None else initialized(model, c.init_std)


__all__ = ["NearestNeighborEncoder", "RetroConfig", "RetroModel"]
