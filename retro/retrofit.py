r"""RETROfit: a pretrained language model learns to read neighbors, and without them stays what it was.

Borgeaud et al., 2021 (arXiv:2112.04426), section 4.2: the weights of a pretrained model are frozen, and only what
reads neighbors is trained, on a few percent of the tokens. Here any decoder of Hugging Face's transformers can be the
base, and there are two ways to read.

**With heads that can copy** (`encoder="base"`). A pretrained model has heads that look for what followed the last time
and copy it (induction heads, arXiv:2209.11895), so that chunked cross-attention need not be learnt from nothing: in a
layer $p \in P$ it begins as a copy of that layer's self-attention. It reads what the same layer of the frozen base
computes for a neighbor that stands alone, its keys $k_j$ and values $v_j$. Of the copy, queries $q_i$ and output
projection $O$ are trained, and for each head a gate $g$ and a sink $s$:

$$\text{CCA}(h)_i = O \Big( g \, \frac{\sum_j e^{q_i \cdot k_j} \, v_j}{e^s + \sum_j e^{q_i \cdot k_j}} \Big)$$

$j$ runs over the tokens of all neighbors that token $i$ may read, as drawn in `retro.model`. The result is added to
what self-attention gives. In the beginning $g = 0$, so nothing changes. The sink is where a head looks when no neighbor
has what it looks for. A neighbor has the positions $0 \dots 2m - 1$, and those who read it $2m \dots 3m - 1$, as if
they followed it.

**The paper's way** (`encoder="new"`). A new `NearestNeighborEncoder` and, behind the layers $P$, a new
`ChunkedCrossAttention`, as in `retro.model`; the output projections begin at zero, and what is read is written in units
of the size of the states it is added to. All of it has to be learnt, so it learns more slowly.

Shapes: as in `retro.model`. N rows of readers, each of L tokens that read the same S = K*R tokens; H heads of the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from retro.attention import padding_mask
from retro.bases.layers import (
    Contexts,
    add_low_rank,
    arguments_of,
    attention_layers,
    keys_and_values,
    parent_of,
    reading_layers,
)
from retro.bases.readers import CopiedReader, NewReader, in_precision_of, size_of
from retro.chunks import back_in_place, begun_at, chunks_of_readers, require_whole_chunks
from retro.config import RetrofitConfig, require_layers
from retro.errors import InvalidOption
from retro.loss import cross_entropy
from retro.model import NearestNeighborEncoder, RetroModel
from retro.text.base_model import base_sha256

# Of the learning rate: gates and sinks are single numbers that go from 0 to about 1; a base is changed with care.
GATE_FACTOR, BASE_FACTOR = 50.0, 0.01
Model: TypeAlias = "RetroModel | Retrofit"  # what training, evaluation and sampling take


class Retrofit(nn.Module):
    """A pretrained model with chunked cross-attention, which is called as a `RetroModel` is.

    * `base` is a causal language model of transformers; it is frozen here, and its code left alone
    * `config` says which layers read, and how; `self.config` has what was chosen where it says nothing

    Without neighbors the logits are those of the base, bit for bit, and before any training with them too. Where the
    base learns as well (`config.trains`), that holds before training only; neighbors are encoded without a gradient.

    Raises `InvalidOption` for layers that the base does not have, or whose attention is not found.
    """

    def __init__(self, base: PreTrainedModel, config: RetrofitConfig) -> None:
        super().__init__()
        layers = attention_layers(base, config.attention)
        named = config.ca_layers
        chosen = tuple(sorted(reading_layers(len(layers), config.encoder == "new") if named is None else named))
        require_layers("ca_layers", chosen, len(layers))
        self.config, self.ca_layers, self.chunk_len = replace(config, ca_layers=chosen), chosen, config.chunk_len
        self.base = base.requires_grad_(False).eval()
        shape = base.config.get_text_config()
        self.n_vocab: int = base.get_input_embeddings().num_embeddings  # type: ignore[assignment]
        self.d_model: int = shape.hidden_size
        H, m = shape.num_attention_heads, config.chunk_len
        n_positions = getattr(shape, "max_position_embeddings", None)
        if n_positions is not None and 3 * m > n_positions:
            reason = f"is too long: neighbors and readers have 3 * chunk_len positions, the base has {n_positions}"
            raise InvalidOption("chunk_len", m, reason)
        self.max_chunks: int | None = n_positions and n_positions // m  # that it was pretrained to read
        attentions = [layers[p] for p in chosen]
        self.encoder: NearestNeighborEncoder | None = None
        self.cca = nn.ModuleList()
        if config.encoder == "new" and chosen:
            D, d, n = self.d_model, self.d_model // H, config.n_encoder_layers
            # Conditioned on the base in every layer, of which there are few.
            self.encoder = NearestNeighborEncoder(m, n, range(n), D, H, d, 4 * D)
            self.norm_e = nn.LayerNorm(D)
            self.cca = nn.ModuleList([NewReader(D, H, d, m) for _ in chosen])
            for part in (self.encoder, self.norm_e, self.cca):
                part.to(base.device)
            attentions = [parent_of(base, attention) for attention in attentions]  # read behind the whole layer
        elif chosen:
            arguments = arguments_of(base, attentions, 3 * m)
            example = keys_and_values(base, torch.zeros(1, 1, dtype=torch.long, device=base.device), chosen)
            calls = zip(attentions, arguments, chosen, strict=True)
            self.cca = nn.ModuleList([CopiedReader(layer, H, given, example[p]) for layer, given, p in calls])
        for p, module in zip(chosen, attentions, strict=True):
            module.register_forward_hook(partial(self._add_what_is_read, p), with_kwargs=True)
        if config.trains != "added":  # the hash is of what the base was
            self.config = replace(self.config, base_sha256=config.base_sha256 or base_sha256(base))
        if config.trains == "lora":
            add_low_rank(base)
        elif config.trains == "all":
            base.float().requires_grad_(True)
        # Once, so that a model that is frozen to be used keeps knowing what it has learnt.
        self.names = frozenset(name for name, weight in self.named_parameters() if weight.requires_grad)

    def forward(
        self, x: Tensor, ret: Tensor | None = None, stretches: Tensor | None = None, targets: Tensor | None = None
    ) -> Tensor:
        """Logits for the token after each token; arguments and errors are those of `RetroModel.forward`.

        * `x` are tokens, of shape `[batch_size, seq_len]`
        * `ret` are the neighbors of the chunks of `x`, tokens or -1, of shape
          `[batch_size, chunks, neighbors, neighbor_len]`; without it, or with no chunks, nothing is read
        * `stretches` are numbers of shape `[batch_size, seq_len]`, where several texts share a sequence; each text has
          positions of its own
        * `targets` are the tokens to predict, of shape `[batch_size, seq_len]`, or -100 for none

        Returns logits of shape `[batch_size, seq_len, n_vocab]`; of `targets` the sum of their cross entropies in nats.
        """
        mask = positions = None
        if stretches is not None:
            places = torch.arange(x.shape[1], device=x.device).expand_as(x)
            begins = F.pad(stretches[:, 1:] != stretches[:, :-1], (1, 0), value=True)
            positions = places - (places * begins).cummax(dim=1).values
            if getattr(self.base.config.get_text_config(), "sliding_window", None):
                self._require_apart()
            else:
                same = (stretches[:, None, :, None] == stretches[:, None, None]).tril()
                mask = torch.zeros_like(same, dtype=self.base.dtype).masked_fill(
                    ~same, torch.finfo(self.base.dtype).min
                )
        with self.reads(x, ret) as reading:
            logits = self.base(input_ids=x, attention_mask=mask, position_ids=positions, use_cache=False).logits
        if self.ca_layers and torch.is_grad_enabled() and not (reading and reading.contexts):
            logits = logits + 0 * sum(weight.sum() for weight in self.added().values())  # a gradient of zero, not none
        if targets is None:
            return logits
        return cross_entropy(logits.flatten(0, 1), targets.flatten())

    @cached_property
    def _keeps_apart(self) -> bool:
        """Whether a base with a sliding window sees where positions begin again, of which transformers makes its mask.

        A mask of ours would stand for the window too.
        """
        x = torch.zeros(2, 4, dtype=torch.long, device=self.base.device)
        x[1, :2] = 1
        with torch.no_grad():
            logits = self.base(input_ids=x, position_ids=torch.tensor([[0, 1, 0, 1]] * 2).to(x), use_cache=False).logits
        return torch.equal(logits[0, 2:], logits[1, 2:])

    def _require_apart(self) -> None:
        if not self._keeps_apart:
            raise InvalidOption(
                "base", type(self.base).__name__, "lets texts that share a sample read each other; leave out documents "
                "that are shorter than a sample"
            )  # fmt: skip

    @contextmanager
    def reads(
        self, x: Tensor, ret: Tensor | None, starts: Tensor | None = None, decoding: Decoding | None = None
    ) -> Iterator[Reading | None]:
        """Let a pass of the base over whole sequences `x` (B, T) read the neighbors `ret` (B, C, K, R) of its chunks.

        * `starts` and `decoding` are as in `Reading`
        """
        reading = None
        if self.ca_layers and ret is not None and (ret.shape[1] > 0 or decoding is not None):
            require_whole_chunks(x, ret, self.chunk_len)
            reading = Reading(self, ret, starts, decoding)
        with active(reading):
            yield reading

    def encode(self, ret: Tensor, h: Tensor | None = None) -> Contexts:
        """What N chunks' readers read of its neighbors `ret` (N, K, R), layer by layer.

        * `h` (N, m, D) are the states of the chunks that retrieved them, which only a new encoder reads
        """
        N, K = ret.shape[:2]
        is_there = (ret >= 0).any(dim=-1).flatten()
        places = is_there.nonzero()[:, 0]
        if not len(places):
            return {}
        neighbors = ret.flatten(0, 1)[places]  # (n, R): those that there are
        if self.encoder is not None:
            assert h is not None
            emb = self.base.get_input_embeddings()(neighbors.clamp(min=0))  # (n, R, D)
            with in_precision_of(h):
                e = self.encoder((emb / size_of(emb))[:, None, None], h[places // K], (neighbors >= 0)[:, None, None])
                e = self.norm_e(e).flatten(1, 3)  # (n, R, D)
                found = {p: cca.keys_values(e) for p, cca in zip(self.ca_layers, self.cca, strict=True)}  # type: ignore[operator]
        else:
            with active(None):
                found = keys_and_values(self.base, neighbors.clamp(min=0), self.ca_layers)

        def of_chunks(x: Tensor) -> Tensor:
            """(n, H_kv, R, d_k) -> (N, H_kv, K*R, d_k); where a neighbor is missing, zeros."""
            if len(places) < N * K:
                x = x.new_zeros(N * K, *x.shape[1:]).index_copy(0, places, x)
            return x.unflatten(0, (N, K)).transpose(1, 2).flatten(2, 3)

        return {p: (of_chunks(keys), of_chunks(values)) for p, (keys, values) in found.items()}

    def _add_what_is_read(self, p: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """A hook: the output of a module of the base, with what its readers read added."""
        reading = _reading.get()
        if reading is None or reading.of is not self:
            return None
        states, *others = output if isinstance(output, tuple) else (output,)
        h = states if self.encoder is not None else args[0] if args else kwargs["hidden_states"]
        if self.encoder is not None and p == self.ca_layers[0]:
            reading.take_in(h)
        added = reading.add_to(states, h, p, self.cca[self.ca_layers.index(p)])
        if added is None:
            return None
        return (added, *others) if isinstance(output, tuple) else added

    def train(self, mode: bool = True) -> Retrofit:
        """Only a new encoder is trained as such: what was pretrained, and copies of it, drop out nothing."""
        super().train(mode)
        for module in (self.base, *(self.cca if self.encoder is None else ())):
            module.eval()
        return self

    def added(self) -> dict[str, nn.Parameter]:
        """What is trained: everything that had a gradient when the model was made."""
        return {name: weight for name, weight in self.named_parameters() if name in self.names}

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """What is trained, and never a base that is not."""
        found = super().state_dict(*args, prefix=prefix, **kwargs)
        for name in [name for name in found if name.startswith(prefix)]:
            if name.removeprefix(prefix) not in self.names:
                del found[name]
        return found

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """Take up what `state_dict` gave. Raises `RuntimeError` for other names or shapes, as PyTorch does."""
        added = self.added()
        if strict and added.keys() != state_dict.keys():
            raise RuntimeError(
                f"the weights are not of this Retrofit: missing {sorted(added.keys() - state_dict.keys())[:3]}, "
                f"unexpected {sorted(state_dict.keys() - added.keys())[:3]}"
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained, with the factors of its learning rate: weights, gates and sinks, the base's own."""

        def factor(name: str) -> float:
            if name.startswith("base.") and "lora_" not in name:
                return BASE_FACTOR
            return GATE_FACTOR if name.endswith((".gate", ".sink")) else 1.0

        factors = {name: factor(name) for name in self.added()}
        return [
            {"params": [weight for name, weight in self.added().items() if factors[name] == of], "factor": of}
            for of in sorted(set(factors.values()), key=(1.0, GATE_FACTOR, BASE_FACTOR).index)
        ]


class Reading:
    """One pass of the base in which neighbors are read.

    A token's *row* is its place among the m tokens that read the same neighbors: 0 for the last one of a chunk.

    * `of` is the model that reads; its base may have other readers, who stay silent
    * `ret` (B, C, K, R) are the neighbors of the chunks of whole sequences; without it, the pass has the next few
      tokens of the texts of `decoding`
    * `starts` (B) are the places of each text's first token in whole sequences; left out, 0
    * `decoding`, if given, goes on with what the pass has computed
    """

    def __init__(
        self,
        of: Retrofit,
        ret: Tensor | None = None,
        starts: Tensor | None = None,
        decoding: Decoding | None = None,
    ) -> None:
        self.of, self.starts, self.decoding = of, starts, decoding
        self.is_whole = ret is not None
        self.ret = ret.flatten(0, 1) if ret is not None else torch.zeros(0)  # (N, K, R)
        self.contexts: Contexts = {}
        self.shares: list[Tensor] | None = None  # the attention (N, H, L, S) in each layer, if it is asked for
        if ret is not None and of.encoder is None and len(self.ret):
            self.contexts = of.encode(self.ret)

    def take_in(self, h: Tensor) -> None:
        """Let a new encoder read the states `h` (B, T, D) which the first reading layer has."""
        if not self.is_whole:
            assert self.decoding is not None
            self.decoding.keep(h)
            return
        m, C = self.of.chunk_len, len(self.ret) // len(h)
        h = begun_at(h, self.starts)
        if self.decoding is not None:
            self.decoding.keep_last(h)
        if C:
            self.contexts = self.of.encode(self.ret, h[:, : C * m].unflatten(1, (C, m)).flatten(0, 1))

    def add_to(self, states: Tensor, h: Tensor, p: int, reader: nn.Module) -> Tensor | None:
        """States (B, T, D) with what the readers of layer `p` read; None if there is nothing to read.

        * `h` (B, T, D) are the states by which they look for it
        """
        if self.is_whole:
            contexts, present = self.contexts, (self.ret >= 0).flatten(1)
        else:
            assert self.decoding is not None
            contexts, present = self.decoding.contexts, self.decoding.present
        if not contexts:
            return None
        m = self.of.chunk_len
        if self.is_whole:
            readers = chunks_of_readers(begun_at(h, self.starts), len(self.ret) // len(h), m)  # (N, m, D)
            rows = torch.arange(m, device=h.device)[None]
        else:
            readers, rows = h, self.decoding.rows[:, None] + torch.arange(h.shape[1], device=h.device)  # type: ignore[union-attr]
        mask, has_any = padding_mask(present)
        with in_precision_of(h):
            read = reader(readers, rows, *contexts[p], mask, self.shares).type_as(states)
        read = torch.where(has_any[:, None, None], read, 0.0)  # type: ignore[index]
        if self.is_whole:
            read = begun_at(back_in_place(read, h), None if self.starts is None else -self.starts)
        return states + read


_reading: ContextVar[Reading | None] = ContextVar("reading", default=None)  # each thread has its own


@contextmanager
def active(reading: Reading | None) -> Iterator[None]:
    """Let the base's passes read."""
    token = _reading.set(reading)
    try:
        yield
    finally:
        _reading.reset(token)


class Decoding:
    """What B texts read that are being written together, from one pass of the base to the next.

    * `model` writes
    * `starts` (B) are the places of each text's first token in the sequences that the base gets; B zeros for one text
    """

    def __init__(self, model: Retrofit, starts: Tensor) -> None:
        self.model, self.starts = model, starts
        self.n_seen = 0  # tokens of each sequence so far
        self.contexts: Contexts = {}  # of B chunks, the last whole one of each text
        self.present = torch.zeros(len(starts), 1, dtype=torch.bool, device=starts.device)  # (B, S)
        # Of the tokens of each text's unfinished chunk, where a new encoder will read it.
        self.states = torch.zeros(
            len(starts), model.chunk_len, model.d_model, dtype=model.base.dtype, device=starts.device
        )
        self.due: tuple[Tensor, Tensor] | None = None  # neighbors (n, K, R) of the chunks of n texts, and their numbers

    @property
    def rows(self) -> Tensor:
        """The rows (B) of the next tokens; a text's chunk is complete with a token of row 0."""
        return (self.n_seen - self.starts + 1) % self.model.chunk_len

    @contextmanager
    def begins(self, x: Tensor, ret: Tensor) -> Iterator[None]:
        """The first pass, over sequences `x` (B, T) with the neighbors `ret` (B, C, K, R) of all their whole chunks.

        The neighbors of chunks that a text does not have are -1.
        """
        m = self.model.chunk_len
        with self.model.reads(x, ret, self.starts, self) as reading:
            yield
        self.n_seen = x.shape[1]
        n_whole = (self.n_seen - self.starts) // m  # (B) chunks
        if reading is not None and reading.contexts:
            last = torch.arange(len(x), device=x.device) * ret.shape[1] + (n_whole - 1).clamp(min=0)
            self.contexts = {p: (keys[last], values[last]) for p, (keys, values) in reading.contexts.items()}
            self.present = (reading.ret >= 0).flatten(1)[last] & (n_whole > 0)[:, None]

    @contextmanager
    def goes_on(self, n: int, ret: Tensor | None = None, texts: Tensor | None = None) -> Iterator[None]:
        """A pass over the next `n` tokens of each text, of which only the first one may complete a chunk.

        * `ret` (n, K, R) are the neighbors of the chunks that are completed
        * `texts` (n) are the numbers of these texts; left out, all
        """
        reading = Reading(self.model, decoding=self)
        if ret is not None:
            texts = torch.arange(len(ret), device=ret.device) if texts is None else texts
            if self.model.encoder is None:
                self.take_up(ret, texts, self.model.encode(ret))
            else:
                self.due = ret, texts
        with active(reading):
            yield
        self.n_seen += n

    def take_up(self, ret: Tensor, texts: Tensor, contexts: Contexts) -> None:
        """Let the readers of some texts read other neighbors from now on."""
        B, S = len(self.starts), ret[0].numel()
        if self.present.shape[1] != S:
            self.contexts, self.present = {}, self.present.new_zeros(B, S)
        self.present = self.present.index_copy(0, texts, (ret >= 0).flatten(1))
        for p, pair in contexts.items():
            before = self.contexts.get(p) or tuple(x.new_zeros(B, *x.shape[1:]) for x in pair)
            keys, values = (old.index_copy(0, texts, new) for old, new in zip(before, pair, strict=True))
            self.contexts[p] = keys, values

    def forget(self) -> None:
        """Read nothing until other neighbors are taken up."""
        self.present = torch.zeros_like(self.present)

    def keep(self, h: Tensor) -> None:
        """Keep the states `h` (B, L, D) of the next tokens; those that complete a chunk have its neighbors encoded."""
        places = (self.rows[:, None] - 1 + torch.arange(h.shape[1], device=h.device)) % self.model.chunk_len
        each = torch.arange(len(h), device=h.device)
        self.states = self.states.type_as(h).index_put((each, places[:, 0]), h[:, 0])
        if self.due is not None:
            ret, texts = self.due
            self.take_up(ret, texts, self.model.encode(ret, self.states[texts]))
            self.due = None
        self.states = self.states.index_put((each[:, None], places[:, 1:]), h[:, 1:])

    def keep_last(self, h: Tensor) -> None:
        """Keep the states of each text's unfinished chunk, of `h` (B, T, D), which begin with the text."""
        m, T = self.model.chunk_len, h.shape[1]
        first = (T - self.starts) // m * m  # (B)
        places = (first[:, None] + torch.arange(m, device=h.device)).clamp(max=T - 1)
        self.states = h.gather(1, places[..., None].expand(-1, -1, h.shape[2]))
