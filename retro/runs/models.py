"""The model of a run, made or loaded: a `RetroModel`, or a `Retrofit` of a pretrained base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from retro.config import ModelConfig, RetroConfig, RetrofitConfig
from retro.errors import DamagedFile, InvalidOption
from retro.model import RetroModel
from retro.retrofit import Model, Retrofit
from retro.text.base_model import base_sha256, load_base, widened
from retro.text.corpus import Corpus
from retro.text.tokenizer import train_tokenizer


def new_model(config: ModelConfig, device: torch.device | str = "cpu") -> Model:
    """A model of this shape, with new weights, on the CPU.

    * `device` is where it will be: a base has the precision that is fast there

    Raises `InvalidOption` for a base that is not there, or has other weights than the config says.
    """
    if isinstance(config, RetroConfig):
        return RetroModel.from_config(config)
    base = widened(load_base(config.base), device)
    found = base_sha256(base)
    if config.base_sha256 not in (None, found):
        raise InvalidOption(
            "base", config.base, f"has other weights (sha256 {found[:12]}) than the one that was trained with "
            f"({str(config.base_sha256)[:12]}); name that one"
        )  # fmt: skip
    return Retrofit(base, replace(config, base_sha256=found))


def moved(config: ModelConfig, base: str | None) -> ModelConfig:
    """The config of a model whose base is now elsewhere; as it is, if `base` is None.

    Raises `InvalidOption` for a model without a base.
    """
    if base is None:
        return config
    if not isinstance(config, RetrofitConfig):
        raise InvalidOption("base", base, "is not what this model was made with, which is a RetroModel; leave it out")
    return replace(config, base=base)


def seeded_model(config: ModelConfig, seed: int, device: torch.device | str = "cpu") -> Model:
    """`new_model`, whose new weights are those that a run with this seed begins with."""
    torch.manual_seed(seed)
    return new_model(config, device)


def retrofit_for(
    corpus: Corpus, chunk_len: int, shape: dict[str, Any], seed: int, device: torch.device | str = "cpu"
) -> Retrofit:
    """A base that is to learn to read a corpus; its config has all that is chosen for it.

    * `shape` are values of `RetrofitConfig`
    * `seed` and `device` are as in `seeded_model`

    Raises `InvalidOption` if the corpus has another tokenizer than the base.
    """
    config = RetrofitConfig(**{**shape, "chunk_len": chunk_len})
    model = seeded_model(config, seed, device)
    assert isinstance(model, Retrofit)
    require_tokenizer(config.base, model.n_vocab, corpus, chunk_len)
    return model


def require_tokenizer(base: str, n_vocab: int, corpus: Corpus, chunk_len: int) -> None:
    """Raise `InvalidOption` if a corpus has another tokenizer than a base with `n_vocab` tokens."""
    if (own := train_tokenizer(base, ()).sha256) != (found := corpus.tokenizer.sha256):
        raise InvalidOption(
            "base", base, f"has another tokenizer (sha256 {own[:12]}) than the corpus ({found[:12]}); build the "
            f"corpus with it: retro database TEXT --tokenizer {base} --chunk-len {chunk_len}"
        )  # fmt: skip
    if corpus.n_tokens > n_vocab:
        raise InvalidOption("base", base, f"has {n_vocab} tokens, but its tokenizer has {corpus.n_tokens}")


def filled(
    config: ModelConfig, tensors: dict[str, torch.Tensor], folder: Path, device: torch.device | str = "cpu"
) -> Model:
    """`new_model`, with the weights of a checkpoint in `folder`. Raises `DamagedFile` if they do not fit."""
    if isinstance(config, RetroConfig):
        with torch.device("meta"):  # takes no memory, whatever size the config claims
            require_shapes(RetroModel.from_config(config).state_dict(), tensors, folder)
    model = new_model(config, device)
    require_shapes(model.state_dict(), tensors, folder)
    model.load_state_dict(tensors)
    return model


def require_shapes(expected: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Raise `DamagedFile` if the weights of a checkpoint in `folder` have other names or shapes than a model's."""
    if {name: weight.shape for name, weight in expected.items()} != {name: w.shape for name, w in found.items()}:
        raise DamagedFile(folder / "model.safetensors", "is damaged or of another shape than its config.json")
