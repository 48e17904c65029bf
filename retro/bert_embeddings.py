r"""BERT embeddings of chunks: the keys of the database.

For a chunk of text $N$, $\text{BERT}(N)$ is the mean over its tokens of the last hidden states of
a frozen, pre-trained BERT (section 2.2 of arXiv:2112.04426):

$$\text{BERT}(N) = \frac{1}{n} \sum_{i=1}^{n} h_i$$

Because BERT never changes, the embeddings of a corpus, and with them all nearest neighbors, are
computed once, before training. In `bf16`, which some processors compute twice as fast, an embedding
has a cosine of at least 0.9996 to that in `fp32`. The distance of two chunks is the squared L2 distance
$\lVert \text{BERT}(N) - \text{BERT}(N') \rVert_2^2$.

As in the tutorial a chunk is read as text, without `[CLS]` and `[SEP]`, and the words that the ends of a
chunk of characters cut in two are left out. Different is the way to the same mean. The tutorial pads the
chunks of a batch, as they come, to one length and masks the padding: with 16 characters, 2.4 tokens on
average, most of what BERT computes is thrown away. Here chunks are sorted by length first, so next to
nothing is padded.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from retro.config import PACKAGED
from retro.device import pick_precision
from retro.text.pretrained import embedder_manifest, load_bert

TOKENS_PER_BATCH = 4096  # BERT tokens in one call; more take more memory, and on two cores no less time
LEAST_OF_LONGEST = 0.75  # length of the shortest chunk in a call, of the longest's
MORE_ON_A_GPU = 4  # times as many; of long chunks, an H200 embeds a fifth more a second with 16 times


class BERTChunkEmbeddings:
    r"""$\text{BERT}(N)$ for lists of chunks.

    * `device` is where BERT runs
    * `embedder` is the BERT: the packaged one, a folder, or a name on the hub such as
      `bert-base-uncased` (the tutorial's)
    * `trim` strips partial words from the ends of each chunk, which chunks of characters have
    * `precision` is `fp32`, `bf16`, or `auto`: `bf16` where `device` computes faster so

    Raises `ValueError` when there is no such BERT.
    """

    def __init__(
        self, device: torch.device | str, embedder: str = PACKAGED, trim: bool = True, precision: str = "auto"
    ) -> None:
        if precision not in ("auto", "fp32", "bf16"):
            raise ValueError(f"precision={precision!r} is not one of auto, fp32, bf16")
        self.device = torch.device(device)
        self.embedder = embedder
        self.trim = trim
        self.precision = pick_precision(precision, self.device)
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        self.tokenizer, self.model = load_bert(embedder, self.device, dtype)
        self.tokens_per_batch = TOKENS_PER_BATCH * (1 if self.device.type == "cpu" else MORE_ON_A_GPU)
        self.d_emb: int = self.model.config.hidden_size
        self.max_len: int = self.model.config.max_position_embeddings

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What embeddings depend on, as it stands in a database's manifest."""
        return embedder_manifest(self.embedder, self.tokenizer, self.model) | {
            "trim": self.trim, "precision": self.precision, "d_emb": self.d_emb,
        }  # fmt: skip

    @staticmethod
    def _trim_chunk(chunk: str) -> str:
        """Strip the first and the last word, which the chunk's ends may have cut, and whitespace.

        `s a popular programming la` becomes `a popular programming`. A chunk that would have
        nothing left (blank, one word, two words) is returned as it is.
        """
        words = chunk.split()
        if len(words) < 3:
            return chunk
        stripped = chunk.strip()
        return stripped[len(words[0]) : -len(words[-1])].strip()

    def tokens_of(self, chunks: Sequence[str]) -> list[tuple[int, ...]]:
        """BERT's tokens of each chunk, trimmed first if this trims; chunks of the same tokens have one embedding."""
        texts = [self._trim_chunk(chunk) for chunk in chunks] if self.trim else list(chunks)
        # Past transformers, which makes more of a text than its ids, in twice the time.
        tokenizer = self.tokenizer.backend_tokenizer
        tokenizer.no_padding()
        tokenizer.no_truncation()
        encoded = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [tuple(text.ids[: self.max_len]) for text in encoded]

    def __call__(
        self, chunks: Sequence[str], batch_size: int = 4096, progress: Callable[[int], Any] | None = None
    ) -> Tensor:
        """Embeddings of shape `[len(chunks), d_emb]`, float32, on `device`.

        * `batch_size` is the largest number of chunks in one call of BERT
        * `progress` is called with the numbers of chunks that are done, as in `tqdm.update`

        Chunks of the same BERT tokens are embedded once, the longest first, so that a batch has chunks of
        about one length. A text that has no BERT token (blank, or only control characters) gets the zero
        vector. Tokens beyond BERT's positions (512) are cut off.
        """
        return self.of_tokens(self.tokens_of(chunks), batch_size, progress)

    def of_tokens(
        self, tokens: Sequence[tuple[int, ...]], batch_size: int = 4096, progress: Callable[[int], Any] | None = None
    ) -> Tensor:
        """As a call, of chunks whose BERT tokens `tokens_of` gave, perhaps in another thread."""
        if not tokens:
            return torch.zeros(0, self.d_emb, device=self.device)
        row_of = {ids: row for row, ids in enumerate(dict.fromkeys(tokens))}
        chunks_of = Counter(tokens)
        embeddings = torch.zeros(len(row_of), self.d_emb, device=self.device)
        distinct = sorted(filter(None, row_of), key=len, reverse=True)
        done = 0
        with torch.inference_mode():
            while done < len(distinct):
                # As many for a length whenever there are: a CPU keeps kernels, and memory, for each shape.
                longest = len(distinct[done])
                n = min(batch_size, max(1, self.tokens_per_batch // longest))
                batch = [ids for ids in distinct[done : done + n] if len(ids) >= LEAST_OF_LONGEST * longest]
                embeddings[[row_of[ids] for ids in batch]] = self._means(batch)
                if progress:
                    progress(sum(chunks_of[ids] for ids in batch))
                done += len(batch)
        if progress:
            progress(chunks_of[()])
        return embeddings[torch.tensor([row_of[ids] for ids in tokens], device=self.device)]

    def _means(self, batch: Sequence[tuple[int, ...]]) -> Tensor:
        """Mean hidden states of chunks of BERT tokens, the longest first."""
        longest = len(batch[0])
        ids = torch.tensor([row + (0,) * (longest - len(row)) for row in batch], device=self.device)
        lengths = torch.tensor([len(row) for row in batch], device=self.device)
        present = torch.arange(longest, device=self.device) < lengths[:, None]
        padded = len(batch[-1]) < longest
        states = self.model(input_ids=ids, attention_mask=present if padded else None).last_hidden_state
        return (states.float() * present[:, :, None]).sum(1) / lengths[:, None]
