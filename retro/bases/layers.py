"""Where the attention of a pretrained decoder lies, and what it computes, as far as transformers tells."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from retro.errors import InvalidOption

AT_ONCE = 512  # sequences that the base computes keys and values for at one time
Contexts = dict[int, tuple[Tensor, Tensor]]  # of each layer: keys and values (N, H_kv, S, d_k)


def attention_layers(base: PreTrainedModel, pattern: str | None = None) -> list[nn.Module]:
    """The self-attention of each layer of a decoder.

    * `pattern` is where it lies, with {} for the number of the layer; left out, it is looked for

    Raises `InvalidOption` where it is not found.
    """
    n_layers = base.config.get_text_config().num_hidden_layers
    if pattern is not None:
        try:
            named = [base.get_submodule(pattern.format(p)) for p in range(n_layers)]
            if len(set(map(id, named))) < n_layers:
                raise AttributeError("it names one module for several layers")
            return named
        except (AttributeError, IndexError, KeyError, ValueError) as error:
            raise InvalidOption("attention", pattern, f"names no modules of {type(base).__name__} ({error})") from None
    # transformers keeps, for each kind of model, the class whose outputs are the attention of a layer.
    recorded = (getattr(module, "_can_record_outputs", None) or {} for module in base.modules())
    told = [outputs["attentions"] for outputs in recorded if "attentions" in outputs]
    kinds = tuple({getattr(kind, "target_class", kind) for kind in told if not isinstance(kind, (list, tuple))})
    found = [m for m in base.modules() if isinstance(m, kinds) and not getattr(m, "is_cross_attention", False)]
    if len(found) != n_layers:
        raise InvalidOption(
            "attention", pattern, f"is needed: {type(base).__name__} does not tell where the attention of its layers "
            "lies. Say it, with {} for the number of a layer, as in model.layers.{}.self_attn"
        )  # fmt: skip
    return sorted(found, key=lambda module: module.layer_idx)


def reading_layers(n_layers: int, is_new: bool = False) -> tuple[int, ...]:
    """Four layers behind the middle, where heads that copy lie: of SmolLM2's 30 layers 16, 18, 20 and 22.

    * `is_new`: what reads has no such heads, and is as good four layers on, where fewer are differentiated
    """
    shares = (share + 4 * is_new for share in (16, 18, 20, 22))
    return tuple(sorted({min(n_layers - 1, round(n_layers * share / 30)) for share in shares}))


def parent_of(base: nn.Module, child: nn.Module) -> nn.Module:
    """The module that has another one as its part."""
    return next(module for module in base.modules() if any(part is child for part in module.children()))


def add_low_rank(base: PreTrainedModel, rank: int = 8) -> None:
    """Let the linear layers of a base learn changes of low rank, in place (LoRA, arXiv:2106.09685), by peft."""
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise InvalidOption("trains", "lora", "needs peft. Install it: pip install peft") from None
    kinds = (nn.Linear, Conv1D)
    head = base.get_output_embeddings()
    names = [name for name, module in base.named_modules() if isinstance(module, kinds) and module is not head]
    turned = any(isinstance(module, Conv1D) for module in base.modules())  # its weights are (in, out)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names, fan_in_fan_out=turned)
    inject_adapter_in_model(config, base)


class _AllRecorded(Exception):
    """The last layer that is wanted has been recorded."""


class _Recorder(DynamicCache):
    """A cache that keeps what some layers compute, and ends the pass at the last of them."""

    def __init__(self, layers: Sequence[int]) -> None:
        super().__init__()
        self.wanted = layers
        self.contexts: Contexts = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx in self.wanted:
            self.contexts[layer_idx] = key_states, value_states
        if layer_idx == max(self.wanted):
            raise _AllRecorded
        return key_states, value_states


@torch.no_grad()
def keys_and_values(base: PreTrainedModel, tokens: Tensor, layers: Sequence[int]) -> Contexts:
    """Keys and values (N, H_kv, L, d_k) that some layers compute for sequences `tokens` (N, L), positions included.

    The pass ends at the last of these layers.
    """
    found = []
    for block in tokens.split(AT_ONCE):
        recorder = _Recorder(layers)
        try:
            base.base_model(input_ids=block, past_key_values=recorder, use_cache=True)
        except _AllRecorded:
            found.append(recorder.contexts)
            continue
        raise InvalidOption("base", type(base).__name__, "keeps no keys and values in the cache of transformers")
    if len(found) == 1:
        return found[0]
    return {p: tuple(torch.cat(parts) for parts in zip(*(of[p] for of in found), strict=True)) for p in layers}  # type: ignore[misc]


@torch.no_grad()
def arguments_of(base: PreTrainedModel, attentions: Sequence[nn.Module], n_tokens: int) -> list[dict[str, Any]]:
    """The arguments with which the attention of some layers is called, where the base reads `n_tokens` tokens."""
    found: list[dict[str, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append({"hidden_states": args[0], **kwargs} if args else kwargs)

    hooks = [attention.register_forward_pre_hook(note, with_kwargs=True) for attention in attentions]
    try:
        base.base_model(input_ids=torch.zeros(1, n_tokens, dtype=torch.long, device=base.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return found
