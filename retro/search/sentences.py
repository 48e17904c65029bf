"""Embeddings by any model of sentence-transformers, in the place of the tutorial's BERT.

Pooling, normalization and prompts (`query: ` and `passage: ` of e5, the instruction of bge) are the model's own: chunks
of the database are encoded as documents, those that are looked for as queries.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from retro.bert_embeddings import BERTChunkEmbeddings
from retro.config import BERT, PACKAGED
from retro.device import pick_precision
from retro.errors import InvalidOption
from retro.search.chunks import Chunks
from retro.text.corpus import Corpus
from retro.text.pretrained import SHAPE, find_embedder, naming_what_cannot_be_loaded

TOKENS_AT_ONCE = 8192  # of texts that are encoded together, as many as their model takes at most


class Embedder(Protocol):
    """What turns chunks into keys."""

    embedder: str  # its name
    d_emb: int  # features of a key

    @property
    def manifest(self) -> dict[str, Any]:
        """`embedder`, `embedder_sha256`, `trim`, `precision` and `d_emb`: what keys depend on."""
        ...

    def tokens_of(self, chunks: Sequence[str]) -> Sequence[Any]:
        """What `of_tokens` is given of each chunk of the database; called in another thread."""
        ...

    def of_tokens(self, tokens: Any, batch_size: int = 4096, progress: Callable[[int], Any] | None = None) -> Tensor:
        """Keys of shape `[n, d_emb]`, float32."""
        ...

    def __call__(self, chunks: Sequence[str]) -> Tensor:
        """Embeddings of chunks that are looked for, of shape `[n, d_emb]`, float32."""
        ...


class SentenceEmbeddings:
    """Embeddings of chunks by a model of sentence-transformers; called as `BERTChunkEmbeddings` is.

    * `name` is a folder, a name on the hub, or the packaged one
    * `trim` strips partial words from the ends of each chunk

    Raises `InvalidOption` where there is no such model, or sentence-transformers is not installed.
    """

    def __init__(self, device: torch.device | str, name: str, trim: bool = True, precision: str = "auto") -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            reason = "is a model of sentence-transformers, which is not installed: pip install sentence-transformers"
            raise InvalidOption("retriever", name, reason) from None
        self.device, self.embedder, self.trim = torch.device(device), name, trim
        self.precision = pick_precision(precision, self.device)
        options = {"dtype": torch.bfloat16 if self.precision == "bf16" else torch.float32, "use_safetensors": True}
        with naming_what_cannot_be_loaded("retriever", name, "model of sentence-transformers", PACKAGED):
            self.model = SentenceTransformer(find_embedder(name), device=str(self.device), model_kwargs=options)
        self.model.eval().requires_grad_(False)
        self.d_emb = int(self.model.get_embedding_dimension() or 0)
        prompts = {kind: self.model.prompts.get(kind) or "" for kind in ("query", "document", "passage")}
        # Whether a chunk is encoded to be found as it is to look for others.
        self.is_symmetric = prompts["query"] == (prompts["document"] or prompts["passage"])

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """What embeddings depend on, as it stands in a database's manifest: among it a hash of weights and modules."""
        # Static embeddings, which are not computed by a network, have a tokenizer without a wrapper.
        tokenizer = json.loads(getattr(self.model.tokenizer, "backend_tokenizer", self.model.tokenizer).to_str())
        text = {name: tokenizer[name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
        models: list[Any] = [getattr(module, "auto_model", None) for module in self.model]
        shape = next((model.config for model in models if model is not None), None)
        made = {
            "text": text,
            "shape": {name: getattr(shape, name, None) for name in SHAPE},
            "modules": [[type(module).__name__, config_of(module)] for module in self.model],
            "prompts": self.model.prompts,
            "most": self.model.max_seq_length,
        }
        return {
            "embedder": self.embedder, "embedder_sha256": sha256_of_model(self.model, made), "trim": self.trim,
            "precision": self.precision, "d_emb": self.d_emb,
        }  # fmt: skip

    def tokens_of(self, chunks: Sequence[str]) -> list[str]:
        """The chunks as they are encoded: trimmed, if this trims."""
        return [BERTChunkEmbeddings._trim_chunk(chunk) for chunk in chunks] if self.trim else list(chunks)

    def of_tokens(
        self, tokens: Sequence[str], batch_size: int = 4096, progress: Callable[[int], Any] | None = None
    ) -> Tensor:
        """Embeddings `[n, d_emb]` of chunks of the database, float32."""
        return self._encoded(self.model.encode_document, tokens, batch_size, progress)

    def __call__(
        self, chunks: Sequence[str], batch_size: int = 4096, progress: Callable[[int], Any] | None = None
    ) -> Tensor:
        """Embeddings `[n, d_emb]` of chunks that are looked for, float32."""
        return self._encoded(self.model.encode_query, self.tokens_of(chunks), batch_size, progress)

    def _encoded(
        self, encode: Any, texts: Sequence[str], batch_size: int, progress: Callable[[int], Any] | None
    ) -> Tensor:
        distinct = list(dict.fromkeys(texts))
        if not distinct:
            return torch.zeros(0, self.d_emb, device=self.device)
        most = self.model.max_seq_length or 512  # infinite for static embeddings, which take no memory for it
        n = max(1, min(batch_size, TOKENS_AT_ONCE // most)) if math.isfinite(most) else batch_size
        found = encode(distinct, batch_size=n, convert_to_tensor=True, show_progress_bar=False).float()
        row_of = {text: row for row, text in enumerate(distinct)}
        if progress:
            progress(len(texts))
        return found[torch.tensor([row_of[text] for text in texts], device=found.device)].to(self.device)


class CrossEncoded:
    """A cross-encoder of sentence-transformers, which reads query and neighbor together: a `Judge` of neighbors.

    * `name` is a folder, or a name on the hub

    Raises `InvalidOption` where there is no such model, or it gives more than one score.
    """

    def __init__(self, device: torch.device | str, name: str) -> None:
        try:
            from sentence_transformers import CrossEncoder
        except ImportError:
            reason = "is a model of sentence-transformers, which is not installed: pip install sentence-transformers"
            raise InvalidOption("rerank_by", name, reason) from None
        with naming_what_cannot_be_loaded("rerank_by", name, "cross-encoder"):
            self.model = CrossEncoder(name, device=str(device), model_kwargs={"use_safetensors": True})
        if self.model.num_labels != 1:
            reason = f"is no cross-encoder for ranking: it gives {self.model.num_labels} scores of a pair, not 1"
            raise InvalidOption("rerank_by", name, reason)
        self.model.eval().requires_grad_(False)

    @cached_property
    def sha256(self) -> str:
        """Names its weights, its tokenizer, and how they are used."""
        shape = self.model.config.to_dict()
        made = {name: value for name, value in shape.items() if name not in ("_name_or_path", "transformers_version")}
        tokenizer = self.model.tokenizer.backend_tokenizer.to_str()
        return sha256_of_model(self.model, [made, self.model.max_seq_length, tokenizer])

    def __call__(self, queries: Chunks, found: np.ndarray, corpus: Corpus, chunk_len: int) -> np.ndarray:
        """The score of each query with each chunk that it found, of shape `[q, n]`."""
        there = np.argwhere(found >= 0)
        texts = corpus.texts(found[tuple(there.T)], chunk_len)
        pairs = [(queries.texts[row], text) for row, text in zip(there[:, 0].tolist(), texts, strict=True)]
        said = np.zeros(found.shape, dtype=np.float32)
        if pairs:  # the scores themselves: of squashed ones the best would all be 1
            same = torch.nn.Identity()
            said[tuple(there.T)] = self.model.predict(pairs, activation_fn=same, show_progress_bar=False)
        return said


def sha256_of_model(model: torch.nn.Module, made: Any) -> str:
    """A hash of what a model is `made` with, as JSON, and of its weights."""
    digest = hashlib.sha256(json.dumps(made, sort_keys=True, default=str).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def config_of(module: Any) -> dict[str, Any]:
    """What a module of sentence-transformers is made with, besides weights."""
    return {name: getattr(module, name, None) for name in getattr(module, "config_keys", ())}


def load_embedder(
    kind: str, embedder: str, device: torch.device | str, trim: bool, precision: str = "auto"
) -> Embedder:
    """What embeds: the frozen BERT `embedder`, or for any other `kind` that model of sentence-transformers."""
    if kind == BERT:
        return BERTChunkEmbeddings(device, embedder, trim, precision)
    return SentenceEmbeddings(device, kind, trim, precision)
