"""Retrieval in context: a pretrained model as it is, with neighbors before the text that it goes on with.

It needs no training (Ram et al., 2023, arXiv:2302.00083). As in RETRO, the next chunk reads what was found for a chunk,
so that is put before the text anew for each chunk, the nearest last, and the text behind it is read once more.
"""

from __future__ import annotations

import numpy as np
from transformers import PreTrainedModel

from retro.errors import InvalidOption


class InContext:
    """A pretrained model that a `Sampler` gives its neighbors in context.

    * `base` is a causal language model of transformers, which is left as it is
    * `chunk_len` is the m of the database, in tokens
    """

    def __init__(self, base: PreTrainedModel, chunk_len: int) -> None:
        shape = base.config.get_text_config()
        self.base, self.chunk_len = base, chunk_len
        self.n_vocab: int = base.get_input_embeddings().num_embeddings  # type: ignore[assignment]
        self.ca_layers = tuple(range(shape.num_hidden_layers))  # all of them read what stands before the text
        n_positions = getattr(shape, "max_position_embeddings", None)
        self.max_chunks: int | None = n_positions and n_positions // chunk_len  # that it was pretrained to read

    def eval(self) -> InContext:
        """As it is used: without dropout."""
        self.base.eval()
        return self

    def require_room(self, n_neighbors: int) -> None:
        """Raise `InvalidOption` for neighbors that would leave less than half of what it reads to the text."""
        if self.max_chunks is not None and 4 * n_neighbors > self.max_chunks:
            n_most, n_before = self.max_chunks * self.chunk_len, 2 * self.chunk_len * n_neighbors
            reason = f"would put {n_before:,} tokens before the text, of the {n_most:,} that the base reads"
            raise InvalidOption("n_neighbors", n_neighbors, reason)


def put_before(values: np.ndarray, chunk_len: int) -> np.ndarray:
    """Tokens of neighbors (K, 2m) in the order in which they are put before a text: the nearest last.

    They are whole chunks, so that those of the text stay what they are.
    """
    tokens = values[::-1].ravel()
    tokens = tokens[tokens >= 0]
    return tokens[len(tokens) % chunk_len :]
