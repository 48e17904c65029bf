"""A base that can copy, its weights set by hand: what a pretrained model has learnt of induction heads, and no more."""

import math

import torch
from transformers import LlamaConfig, LlamaForCausalLM

N_BACK, SIZE, D_HEAD = 4, 32, 256  # tokens that have to agree; features of a token's code; of a head
THETA = 1e10
LOW = D_HEAD // 4  # the first of a half's frequencies that hardly turn over some hundred tokens


@torch.no_grad()
def copying_llama(n_vocab: int, sharpness: float = 8.0, certainty: float = 8.0) -> LlamaForCausalLM:
    """A Llama of two layers that looks for the last `N_BACK` tokens and says what followed them there.

    A state is a one, then the codes of the token, of the 1, 2, ... tokens before it, and of the token to be said.
    Heads of the first layer look 1, 2, ... tokens back, by rotary angles alone, and copy the code they find. A head of
    the second layer compares the codes of itself and those before with the codes before each token, and copies that
    token's code.
    """
    D = SIZE * (N_BACK + 3)  # heads want a multiple
    base = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=n_vocab, hidden_size=D, intermediate_size=1, num_hidden_layers=2, num_attention_heads=N_BACK,
            num_key_value_heads=N_BACK, head_dim=D_HEAD, max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": THETA}, bos_token_id=None, eos_token_id=None,
        )
    )  # fmt: skip
    for name, weight in base.named_parameters():
        weight.fill_(1.0 if "norm" in name else 0.0)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2, (n_vocab, SIZE), generator=generator).float().mul(2).sub(1) / math.sqrt(SIZE)
    code = [slice(1 + SIZE * i, 1 + SIZE * (i + 1)) for i in range(N_BACK + 2)]  # of the token, those before, the next
    base.model.embed_tokens.weight[:, 0] = 1
    base.model.embed_tokens.weight[:, code[0]] = codes
    base.lm_head.weight[:, code[-1]] = codes * certainty * math.sqrt((N_BACK + 3) / D)
    first, second = (layer.self_attn for layer in base.model.layers)
    size = math.sqrt(D / 2)  # of a one and a code of length 1, after RMSNorm; then with N_BACK codes more
    scale = math.sqrt(D_HEAD)  # attention divides by it
    angles = THETA ** (-torch.arange(LOW // 2) * 2 / D_HEAD)
    half = torch.arange(LOW // 2)
    for back in range(1, N_BACK + 1):
        rows = (back - 1) * D_HEAD
        first.q_proj.weight[rows + half, 0] = (angles * back).cos() * 30 * scale / size**2
        first.q_proj.weight[rows + D_HEAD // 2 + half, 0] = -(angles * back).sin() * 30 * scale / size**2
        first.k_proj.weight[rows + half, 0] = 1
        first.v_proj.weight[rows : rows + SIZE, code[0]] = torch.eye(SIZE) / size
        first.o_proj.weight[code[back], rows : rows + SIZE] = torch.eye(SIZE)
    size = math.sqrt(D / (N_BACK + 2))
    slow = torch.cat([torch.arange(LOW, 2 * LOW), torch.arange(3 * LOW, 4 * LOW)]).view(N_BACK, SIZE)
    for i in range(N_BACK):
        second.q_proj.weight[slow[i], code[i]] = torch.eye(SIZE) * sharpness * scale / size**2
        second.k_proj.weight[slow[i], code[i + 1]] = torch.eye(SIZE)
    second.v_proj.weight[:SIZE, code[0]] = torch.eye(SIZE) / size
    second.o_proj.weight[code[-1], :SIZE] = torch.eye(SIZE)
    return base
