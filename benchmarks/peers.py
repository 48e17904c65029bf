"""The implementations that retro is measured against, as published.

Only what cannot be as published is replaced, from outside: the device (the tutorial's code asks for
`cuda:0`), the BERT (a name on a hub) and the place of the text. Two imports that neither code path uses
get stand-ins: torchvision, of labml-nn's image data sets, which has no CPU build beside every torch; and
autofaiss, of retro-pytorch's index builder, which refuses the NumPy of today.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import torch
from labml import lab
from transformers import BertModel, BertTokenizer  # before the stand-in for torchvision, for which it looks

from retro.config import PACKAGED, RetroConfig
from retro.text.pretrained import find_embedder


def stand_in(*names: str) -> None:
    """Make modules of these names importable that hold nothing real."""
    for name in names:
        sys.modules[name] = MagicMock(__spec__=ModuleSpec(name, None), __path__=[])


def labml(folder: Path) -> Any:
    """labml-nn's RETRO on the CPU, with the packaged BERT, reading and writing in `folder`."""
    stand_in("torchvision", "torchvision.datasets", "torchvision.transforms")
    from labml_nn.transformers.retro import bert_embeddings, database, dataset, model, train

    class Packaged:
        def __init__(self, kind: Any) -> None:
            self.kind = kind

        def from_pretrained(self, name: str, cache_dir: str) -> Any:
            return self.kind.from_pretrained(find_embedder(PACKAGED))

    bert_embeddings.BertModel, bert_embeddings.BertTokenizer = Packaged(BertModel), Packaged(BertTokenizer)
    published = bert_embeddings.BERTChunkEmbeddings
    database.BERTChunkEmbeddings = lambda device: published(torch.device("cpu"))
    lab.configure({"path": str(folder), "data_path": str(folder), "experiments_path": str(folder / "logs")})
    return type(
        "Labml",
        (),
        {
            "BERTChunkEmbeddings": published,
            "build_database": staticmethod(database.build_database),
            "build_dataset": staticmethod(dataset.build_dataset),
            "Dataset": dataset.Dataset,
            "TextFileDataset": train.TextFileDataset,
            "Sampler": train.Sampler,
            "model": model,
            "Noam": train.Noam,
        },
    )


def retro_pytorch(config: RetroConfig) -> torch.nn.Module:
    """retro-pytorch's model in the sizes of a config, but heads of at least 32 features: it allows none smaller."""
    stand_in("autofaiss")
    from retro_pytorch import RETRO

    no_dropout = {f"{part}_{kind}_dropout": 0.0 for part in ("enc", "dec") for kind in ("attn", "ff")}
    c, d_k = config, max(32, config.d_k)
    return RETRO(
        num_tokens=c.n_vocab,
        chunk_size=c.chunk_len,
        max_seq_len=512,
        enc_dim=c.d_encoder or c.d_model,
        enc_depth=c.n_encoder_layers,
        enc_cross_attn_layers=tuple(p + 1 for p in c.encoder_ca_layers),  # which it counts from 1
        dec_dim=c.d_model,
        dec_depth=c.n_layers,
        dec_cross_attn_layers=tuple(p + 1 for p in c.ca_layers),
        heads=c.n_heads * c.d_k // d_k,
        dim_head=d_k,
        **no_dropout,
    )


def sentence_transformer() -> Any:
    """sentence-transformers over the packaged BERT: the mean over its tokens."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    bert = Transformer(find_embedder(PACKAGED))
    return SentenceTransformer(modules=[bert, Pooling(bert.get_word_embedding_dimension())], device="cpu")
