"""Texts that are being written: what they read of neighbors, kept beside the cache of what they read of themselves.

Shapes: B texts, T tokens of a call, m tokens of a chunk.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from retro.errors import InvalidOption
from retro.retrofit import Decoding, Retrofit

TEXT = "retro_text"  # the attribute of a cache that has a `Text`


class Text:
    """B texts that are being written together: what a cache does not keep of them.

    * `model` writes
    * `starts` (B) are the places of their first tokens
    * `ends_early` is true where padding follows one of them, so that it cannot go on
    """

    def __init__(self, model: Retrofit, starts: list[int], ends_early: bool, device: torch.device) -> None:
        self.starts, self.ends_early = starts, ends_early
        self.decoding = Decoding(model, torch.tensor(starts, device=device))
        self.last: Tensor = torch.zeros(len(starts), 0, dtype=torch.long)  # (B, n) tokens, the latest of each

    def __deepcopy__(self, memo: dict[int, Any]) -> Text:
        """A copy with the same model: caches are copied to go on from one prompt in several ways."""
        memo[id(self.decoding.model)] = self.decoding.model
        copied = copy.copy(self)
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    def completed(self) -> list[tuple[int, int]]:
        """Texts whose chunk the next token completes, and the numbers of these chunks."""
        m, n = self.decoding.model.chunk_len, self.decoding.n_seen + 1
        return [(b, (n - start) // m - 1) for b, start in enumerate(self.starts) if (n - start) % m == 0]

    def n_next(self) -> int:
        """How many tokens the next pass can take, of which only the first may complete a chunk."""
        m, n = self.decoding.model.chunk_len, self.decoding.n_seen + 1
        return m - max((n - start) % m for start in self.starts)

    def remember(self, tokens: Tensor, n: int) -> None:
        """Keep the last `n` tokens of the texts, of which `tokens` (B, L) are new."""
        self.last = torch.cat([self.last.to(tokens.device), tokens], dim=1)[:, -n:]

    def select(self, texts: Tensor) -> None:
        """Go on with these texts (B), in this order, as a beam search does with the likeliest ones."""
        d = self.decoding
        self.starts = [self.starts[b] for b in texts.tolist()]
        d.starts, d.present, d.states, self.last = d.starts[texts], d.present[texts], d.states[texts], self.last[texts]
        d.contexts = {p: (keys[texts], values[texts]) for p, (keys, values) in d.contexts.items()}


def places_of_texts(x: Tensor, mask: Tensor | None) -> tuple[list[int], list[int]]:
    """Where the texts in `x` (B, T) start, and their lengths, by a `mask` (B, T) that is 0 for padding.

    Raises `InvalidOption` for a mask of another shape, and for padding between tokens.
    """
    B, T = x.shape
    if mask is None:
        return [0] * B, [T] * B
    if mask.shape != x.shape:
        raise InvalidOption("attention_mask", [*mask.shape], f"is not of the shape of the tokens, {[*x.shape]}")
    there = mask.bool().int()
    lengths, starts, ends = there.sum(dim=1), there.argmax(dim=1), T - there.flip(1).argmax(dim=1)
    if gaps := ((ends - starts != lengths) & (lengths > 0)).nonzero().flatten().tolist():
        raise InvalidOption("attention_mask", f"of text {gaps[0]}", "has padding between tokens")
    return starts.tolist(), lengths.tolist()


def require_no_gap(text: Text, mask: Tensor | None) -> None:
    """Raise `InvalidOption` where tokens would follow the padding behind a text."""
    if not text.ends_early and mask is not None:
        starts, lengths = places_of_texts(mask, mask)
        if starts == text.starts and all(s + n == mask.shape[1] for s, n in zip(starts, lengths, strict=True)):
            return
    elif not text.ends_early:
        return
    raise InvalidOption("attention_mask", "padding on the right", "cannot be followed by tokens; put it on the left")


def require_usable(cache: Cache, text: Text | None, retrofit: Retrofit, n_texts: int) -> None:
    """Raise `InvalidOption` for a cache that does not have exactly the tokens of its `Text`."""
    name, n = type(cache).__name__, cache.get_seq_length()
    if cache.is_compileable:
        raise InvalidOption(
            "past_key_values", name, "is of a fixed length, which retrieval cannot follow; use a DynamicCache"
        )
    if text is None:
        if n:
            reason = f"has {n} tokens that were read without neighbors; begin anew, or give the model no index"
            raise InvalidOption("past_key_values", name, reason)
    elif text.decoding.model is not retrofit or (text.decoding.n_seen, len(text.starts)) != (n, n_texts):
        raise InvalidOption(
            "past_key_values", name, f"has {n} tokens, {n_texts} texts are given, but what it has read is of "
            f"{text.decoding.n_seen} tokens, {len(text.starts)} texts; begin with a new cache"
        )  # fmt: skip
