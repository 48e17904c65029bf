"""RETRO, the Retrieval-Enhanced Transformer (Borgeaud et al., 2021, arXiv:2112.04426), in PyTorch.

A language model that looks things up while it writes. The text is cut into chunks. A frozen BERT
turns each chunk into a vector, a FAISS index finds the chunks that are nearest to it, and the
transformer reads those neighbors, with the text that followed them, while it predicts the next
chunk::

    text --> tokens --> chunks --> frozen BERT --> FAISS: key -> chunk + continuation
                          |                                        |
                          |        nearest neighbors, precomputed  |
                          v                                        v
                     decoder  <--- chunked cross-attention --- encoder of neighbors

The modules, in reading order:

* `retro.bert_embeddings` chunks of text to vectors
* `retro.database` vectors to nearest chunks
* `retro.model` the transformer
* `retro.dataset` samples with precomputed neighbors
* `retro.train` the loop, and the script that does the main job
* `retro.sample` text from the model, retrieving as it writes
* `retro.evaluate` what retrieval brings, in bits per byte
* `retro.causal_lm` a pretrained model that reads, as transformers knows them

The first five are the tutorial's. What makes them survive and scale lies behind them: `retro.text`, `retro.search`,
`retro.storage`, `retro.runs`, `retro.evaluation`, `retro.planning`, and the commands in `retro.cli`. The public names
can be imported from `retro` itself, which loads them when they are asked for; `train` and `evaluate` are functions of
modules of the same name: `from retro.train import train`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.3.0"

_PLACES = {
    "bert_embeddings": ("BERTChunkEmbeddings",),
    "causal_lm": ("RetrofitForCausalLM",),
    "config": (
        "CorpusConfig", "DatabaseConfig", "DatasetConfig", "EvaluateConfig", "RetroConfig", "SampleConfig",
        "TrainConfig",
    ),
    "database": ("RetroIndex", "build_database"),
    "dataset": ("Dataset", "build_dataset"),
    "errors": ("RetroError",),
    "evaluation.audit": ("audit",),
    "model": ("NearestNeighborEncoder", "RetroModel"),
    "runs.checkpoints": ("load_model", "save_model"),
    "sample": ("Sampler",),
    "search.updates": ("add_documents", "remove_documents"),
    "text.build": ("build_corpus",),
    "text.corpus": ("Corpus", "open_corpus"),
    "train": ("Trainer",),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _PLACES.items() for name in names}
__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    """A public name, imported when it is asked for (PEP 562)."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'retro' has no attribute {name!r}")
    return getattr(importlib.import_module(f"retro.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
