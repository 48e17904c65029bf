"""RETROfit: the base stays what it was, neighbors are read where they may be, and only what was added learns."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import refused
from transformers import (
    DynamicCache,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from retro.config import RetrofitConfig
from retro.decoding import RecomputingDecoder, RetrofitDecoder, decoder_of
from retro.errors import InvalidOption
from retro.evaluation.attention import attention_shares
from retro.retrofit import Decoding, Retrofit

N_VOCAB, CHUNK_LEN, CA_LAYERS = 97, 4, (1, 3)
SHAPE = {
    "vocab_size": N_VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
PLAIN = {name: value for name, value in SHAPE.items() if name != "num_key_value_heads"}
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=12)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=12)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=N_VOCAB, n_embd=32, n_layer=4, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0)
    ),
    "gpt_neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**PLAIN)),
    "opt": lambda: OPTForCausalLM(
        OPTConfig(
            vocab_size=N_VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=4, num_attention_heads=4,
            max_position_embeddings=128, word_embed_proj_dim=32,
        )
    ),
    "phi": lambda: PhiForCausalLM(PhiConfig(**PLAIN)),
}  # fmt: skip
every_base = pytest.mark.parametrize("name", BASES)
each_encoder = pytest.mark.parametrize("encoder", ["base", "new"])


def new_base(name: str) -> PreTrainedModel:
    """A tiny base whose every weight is random, biases too."""
    torch.manual_seed(0)
    base = BASES[name]()
    for weight in base.parameters():
        torch.nn.init.normal_(weight, mean=0.0 if weight.dim() > 1 else 0.5, std=0.2)
    return base


def new_retrofit(name: str = "llama", encoder: str = "base", trained: bool = True) -> Retrofit:
    """A tiny Retrofit, whose added weights are as after a training that changed each of them."""
    config = RetrofitConfig("tiny", chunk_len=CHUNK_LEN, ca_layers=CA_LAYERS, encoder=encoder)
    model = Retrofit(new_base(name), config)
    if trained:
        with torch.no_grad():
            for weight in model.added().values():
                weight += 0.3 * torch.randn_like(weight)
    return model.eval()


def some_text(n_tokens: int = 22, n_texts: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens (B, T) and three neighbors (B, C, 3, R) of each whole chunk; some are missing, or are short."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randint(1, N_VOCAB, (n_texts, n_tokens), generator=generator)
    ret = torch.randint(1, N_VOCAB, (n_texts, n_tokens // CHUNK_LEN, 3, 2 * CHUNK_LEN), generator=generator)
    ret[0, 1] = -1
    ret[-1, 2, 1, 5:] = -1
    ret[-1, 0, 0] = -1
    return x, ret


@every_base
@each_encoder
@torch.no_grad()
def test_without_neighbors_or_training_the_logits_are_the_bases_bit_for_bit(name, encoder):
    x, ret = some_text()
    alone = new_base(name).eval()(input_ids=x).logits
    untrained, trained = new_retrofit(name, encoder, trained=False), new_retrofit(name, encoder)
    assert torch.equal(untrained(x), alone) and torch.equal(untrained(x, ret), alone)
    assert torch.equal(trained(x), alone) and torch.equal(trained(x, ret[:, :0]), alone)
    assert torch.equal(trained(x, torch.full_like(ret, -1)), alone), "missing neighbors were read"
    assert torch.equal(trained.base(input_ids=x).logits, alone), "the base itself reads"
    assert not torch.equal(trained(x, ret), alone)


@every_base
@each_encoder
@torch.no_grad()
def test_the_last_token_of_a_chunk_is_the_first_to_read_its_neighbors(name, encoder):
    model, (x, ret) = new_retrofit(name, encoder), some_text()
    before = model(x, ret)
    for u in range(ret.shape[1]):
        edited = ret.clone()
        edited[:, u] = torch.where(ret[:, u] < 0, ret[:, u], (ret[:, u] + 1) % N_VOCAB)
        after, first = model(x, edited), (u + 1) * CHUNK_LEN - 1
        assert torch.equal(after[:, :first], before[:, :first]), "the past saw the future"
        read = [b for b in range(2) if (ret[b, u] >= 0).any()]
        assert not any(torch.equal(after[b, first], before[b, first]) for b in read), "retrieval is ignored"


@each_encoder
@torch.no_grad()
def test_what_stands_behind_the_end_of_a_neighbor_is_not_read(encoder):
    model, (x, ret) = new_retrofit(encoder=encoder), some_text()
    cut = ret.clone()
    cut[:, :, 1, 3:] = -1
    shorter = cut[..., :3].clone()
    rest = torch.full_like(cut, -1)
    rest[..., :3] = shorter
    rest[:, :, [0, 2]] = cut[:, :, [0, 2]]
    torch.testing.assert_close(model(x, cut), model(x, rest))
    without = torch.cat([ret[:, :, :1], ret[:, :, 2:]], dim=2)
    missing = ret.clone()
    missing[:, :, 1] = -1
    torch.testing.assert_close(model(x, missing), model(x, without), atol=2e-5, rtol=1e-5)


@each_encoder
@torch.no_grad()
def test_a_neighbor_that_is_missing_is_not_encoded(encoder):
    model, (x, ret) = new_retrofit(encoder=encoder), some_text()
    n_embedded = []
    model.base.get_input_embeddings().register_forward_hook(lambda _, given, __: n_embedded.append(given[0].numel()))
    model(x, ret)
    n_there = (ret >= 0).any(dim=-1).sum()
    assert sorted(n_embedded) == sorted([x.numel(), n_there * ret.shape[-1]]) and n_there == ret[..., 0].numel() - 4


def rotated(x: torch.Tensor, position: int) -> torch.Tensor:
    """A head's features (d) at a position, as Llama turns them: feature i with i + d/2, by position * 10000^(-2i/d)."""
    half = len(x) // 2
    angle = position * 10_000.0 ** (-torch.arange(half) / half)
    a, b = x[:half], x[half:]
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()])


@torch.no_grad()
def test_copied_attention_equals_a_loop_over_tokens_heads_and_neighbors():
    """The formula at the top of `retro.retrofit`, for the first reading layer of a Llama."""
    model, (x, ret) = new_retrofit(), some_text(n_texts=1)
    layer, reader, m, d, H = model.base.model.layers[1], model.cca[0], CHUNK_LEN, 8, 4
    seen = []

    def note(_, __, kwargs, output):
        if kwargs["hidden_states"].shape[:2] == x.shape:  # and not what the base computes for neighbors
            seen.append((kwargs["hidden_states"][0], output[0][0]))

    hook = layer.self_attn.register_forward_hook(note, with_kwargs=True)
    model(x, ret)
    model(x)
    hook.remove()
    (h, reading), (_, alone) = seen
    added = reading - alone  # (T, D)
    expected = torch.zeros_like(added)
    for i in range(m - 1, x.shape[1]):
        u, row = (i + 1) // m - 1, (i + 1) % m
        if u >= ret.shape[1]:
            continue
        # What the base computes for each neighbor by itself, at its own positions from 0.
        keys, values = [], []
        for neighbor in ret[0, u]:
            n = int((neighbor >= 0).sum())
            if n:
                cache = DynamicCache()
                model.base(input_ids=neighbor[None, :n], past_key_values=cache, use_cache=True)
                keys.append(cache.layers[1].keys[0])
                values.append(cache.layers[1].values[0])
        if not keys:
            continue
        keys, values = torch.cat(keys, dim=1), torch.cat(values, dim=1)  # (H_kv, S, d)
        read = []
        for head in range(H):
            query = rotated(reader.copy.q_proj.weight[head * d : (head + 1) * d] @ h[i], 2 * m + row)
            scores = torch.stack([query @ key / d**0.5 for key in keys[head // 2]])
            weights = scores.exp() / (reader.sink[head].exp() + scores.exp().sum())
            read.append(reader.gate[head] * (weights[:, None] * values[head // 2]).sum(dim=0))
        expected[i] = reader.copy.o_proj.weight @ torch.cat(read)
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(added, expected, atol=1e-5, rtol=1e-4)


@every_base
@each_encoder
@torch.no_grad()
def test_texts_written_together_read_as_each_by_itself(name, encoder):
    """Two texts of 21 and 18 tokens, padded on the left: a prompt of 11 places at once, then token by token."""
    model, pads, n, n_prompt, m = new_retrofit(name, encoder), (0, 3), 21, 11, CHUNK_LEN
    texts = [some_text(n - pad, 1)[0][0] for pad in pads]
    rets = [some_text(n - pad, 2)[1][-1] for pad in pads]
    rets[1][1] = -1
    whole = [model(x[None], ret[None])[0] for x, ret in zip(texts, rets, strict=True)]
    x = torch.stack(
        [torch.cat([torch.zeros(pad, dtype=torch.long), text]) for pad, text in zip(pads, texts, strict=True)]
    )
    is_token = torch.stack([torch.arange(n) >= pad for pad in pads]).long()
    positions = (is_token.cumsum(dim=1) - 1).clamp(min=0)
    ret = torch.full((2, n_prompt // m, 3, 2 * m), -1)
    for b, pad in enumerate(pads):
        n_whole = (n_prompt - pad) // m
        ret[b, :n_whole] = rets[b][:n_whole]
    decoding, cache = Decoding(model, torch.tensor(pads)), DynamicCache(config=model.base.config)

    def base(start: int, end: int) -> torch.Tensor:
        of_opt = name == "opt"  # which makes positions of the mask
        return model.base(
            input_ids=x[:, start:end], attention_mask=is_token[:, :end], past_key_values=cache, use_cache=True,
            position_ids=None if of_opt else positions[:, start:end],
        ).logits  # fmt: skip

    with decoding.begins(x[:, :n_prompt], ret):
        found = [base(0, n_prompt)]
    for i in range(n_prompt, n):
        complete = [b for b, pad in enumerate(pads) if (i - pad + 1) % m == 0]
        due = torch.stack([rets[b][(i - pads[b] + 1) // m - 1] for b in complete]) if complete else None
        with decoding.goes_on(1, due, torch.tensor(complete) if complete else None):
            found.append(base(i, i + 1))
    for b, pad in enumerate(pads):
        torch.testing.assert_close(torch.cat(found, dim=1)[b, pad:], whole[b], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@each_encoder
@torch.no_grad()
def test_a_cached_decoder_gives_the_logits_of_the_whole_text(name, encoder):
    model = new_retrofit(name, encoder)
    (x,), (ret,) = some_text(n_texts=1)
    ret[2] = -1
    cached, plain = decoder_of(model), RecomputingDecoder(model)
    assert isinstance(cached, RetrofitDecoder)
    for decoder in (cached, plain):
        while decoder.length < len(x):
            start, n = decoder.length, decoder.n_next()
            due = ret[start // CHUNK_LEN] if decoder.completes_chunk else None
            logits = decoder.feed(x[start : start + n], due)
            n_whole = decoder.length // CHUNK_LEN
            expected = model(x[None, : decoder.length], ret[None, :n_whole])[0, -1]
            torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-4)
    cached.restart()
    torch.testing.assert_close(cached.feed(x[:2]), model(x[None, :2])[0, -1], atol=2e-5, rtol=1e-4)


@every_base
@torch.no_grad()
def test_texts_that_share_a_sequence_read_and_stand_as_each_by_itself(name):
    model, (x, ret) = new_retrofit(name), some_text(20)
    stretches = torch.tensor([[0] * 8 + [2] * 12, [0] * 20])
    together = model(x, ret, stretches)
    torch.testing.assert_close(together[0, :8], model(x[:1, :8], ret[:1, :2])[0], atol=2e-5, rtol=1e-4)
    own = ret[:1, 2:].clone()
    torch.testing.assert_close(together[0, 11:], model(x[:1, 8:], own)[0, 3:], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(together[1], model(x[1:], ret[1:])[0], atol=2e-5, rtol=1e-4)


@every_base
@each_encoder
def test_only_what_was_added_learns_and_nothing_below_it_is_differentiated(name, encoder):
    model, (x, ret) = new_retrofit(name, encoder), some_text()
    states = []
    hook = model.base.get_input_embeddings().register_forward_hook(lambda _, __, output: states.append(output))
    model.train()
    model(x, ret).logsumexp(dim=-1).sum().backward()
    hook.remove()
    added = model.added()
    assert all(weight.grad is not None and weight.grad.any() for weight in added.values())
    assert not [n for n, w in model.base.named_parameters() if w.grad is not None or w.requires_grad]
    assert not states[-1].requires_grad
    assert set(model.state_dict()) == set(added)
    grouped = [id(weight) for group in model.parameter_groups() for weight in group["params"]]
    assert sorted(grouped) == sorted(map(id, added.values()))


def test_keys_and_values_are_the_bases_own_and_take_no_memory():
    model = new_retrofit()
    for reader, p in zip(model.cca, CA_LAYERS, strict=True):
        of_base = model.base.model.layers[p].self_attn
        assert reader.copy.k_proj is of_base.k_proj and reader.copy.v_proj is of_base.v_proj
        assert reader.copy.q_proj is not of_base.q_proj
    names = ("gate", "sink", "copy.q_proj.weight", "copy.o_proj.weight")
    assert set(model.added()) == {f"cca.{i}.{name}" for i in range(2) for name in names}


@each_encoder
def test_a_batch_without_any_neighbor_has_a_gradient_of_zero(encoder):
    model, (x, ret) = new_retrofit(encoder=encoder).train(), some_text()
    model(x, torch.full_like(ret, -1)).sum().backward()
    assert all(weight.grad is not None for weight in model.added().values())
    if encoder == "base":  # a new one encodes what is masked
        assert not any(weight.grad.any() for weight in model.added().values())


@each_encoder
def test_a_few_steps_make_a_batch_likelier(encoder):
    torch.manual_seed(0)
    model, (x, ret) = new_retrofit(encoder=encoder, trained=False).train(), some_text()
    optimizer = torch.optim.Adam(
        [{"params": group["params"], "lr": 1e-3 * group["factor"]} for group in model.parameter_groups()]
    )
    losses = []
    for _ in range(40):
        logits = model(x, ret)[:, CHUNK_LEN - 1 : -1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), x[:, CHUNK_LEN:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_nothing_is_dropped_out_of_what_was_pretrained(name):
    model, (x, ret) = new_retrofit(name), some_text()
    with torch.no_grad():
        assert torch.equal(model.train()(x, ret), model.eval()(x, ret))


@each_encoder
def test_weights_come_back_and_others_are_refused(encoder):
    model, (x, ret) = new_retrofit(encoder=encoder), some_text()
    again = new_retrofit(encoder=encoder, trained=False)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        assert torch.equal(again(x, ret), model(x, ret))
    lacking = dict(list(model.state_dict().items())[1:])
    with pytest.raises(RuntimeError, match="not of this Retrofit"):
        again.load_state_dict(lacking)


@each_encoder
def test_a_base_in_half_precision_stays_so_and_what_is_added_is_exact(encoder):
    x, ret = some_text()
    base = new_base("llama").to(torch.bfloat16)
    config = RetrofitConfig("tiny", chunk_len=CHUNK_LEN, ca_layers=CA_LAYERS, encoder=encoder)
    model = Retrofit(base, config)
    with torch.no_grad():
        assert torch.equal(model(x, ret), new_base("llama").to(torch.bfloat16)(input_ids=x).logits)
    assert {weight.dtype for weight in model.added().values()} == {torch.float32}
    full = new_retrofit(encoder=encoder)
    model.load_state_dict(full.state_dict())
    with torch.no_grad():
        read, expected = (m(x, ret).float() - m(x).float() for m in (model, full))
    assert (read - expected).norm() < 0.1 * expected.norm()
    model(x, ret).float().logsumexp(dim=-1).sum().backward()
    assert all(weight.grad is not None and weight.grad.isfinite().all() for weight in model.added().values())


@torch.no_grad()
def test_two_threads_read_each_its_own_neighbors():
    model, (x, ret) = new_retrofit(), some_text()
    others = ret.flip(0, 1)
    expected = [model(x, ret), model(x, others), model(x)]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(10):
            found = [future.result() for future in [pool.submit(model, x, r) for r in (ret, others, None)]]
            assert all(map(torch.equal, found, expected))


@torch.no_grad()
def test_two_retrofits_of_one_base_do_not_mix():
    x, ret = some_text()
    base = new_base("llama")
    one = Retrofit(base, RetrofitConfig("tiny", chunk_len=CHUNK_LEN, ca_layers=CA_LAYERS))
    other = Retrofit(base, RetrofitConfig("tiny", chunk_len=CHUNK_LEN, ca_layers=(2,)))
    other.cca[0].gate += 1
    assert torch.equal(one(x, ret), one(x)) and not torch.equal(other(x, ret), other(x))


@torch.no_grad()
def test_attention_is_shared_out_among_the_neighbors_that_are_there():
    model, (x, ret) = new_retrofit(), some_text(24)
    shares = attention_shares(model, x, ret)
    assert shares.shape == ret.shape[:3]
    there = (ret >= 0).any(dim=-1)
    assert (shares[~there] == 0).all() and (shares[there] > 0).all() and (shares.sum(dim=-1) < 1).all()
    for reader in model.cca:
        reader.sink -= 100  # nobody looks there
    sums = attention_shares(model, x, ret).sum(dim=-1)
    torch.testing.assert_close(sums, there.any(dim=-1).float())


def test_layers_that_are_not_there_are_refused():
    with refused(InvalidOption, r"--ca-layers '\[4\]' do not exist; use 0\.\.3"):
        Retrofit(new_base("llama"), RetrofitConfig("tiny", chunk_len=4, ca_layers=(1, 4)))
    with refused(InvalidOption, r"--ca-layers '\(\)' names no layer"):
        RetrofitConfig("tiny", ca_layers=())


def test_an_architecture_that_does_not_tell_is_asked_for_and_taken():
    x, ret = some_text()
    base = new_base("llama")
    for module in base.modules():
        if isinstance(module, PreTrainedModel):
            module._can_record_outputs = {}  # as in a model of one's own
    config = RetrofitConfig("tiny", chunk_len=CHUNK_LEN, ca_layers=CA_LAYERS)
    with refused(InvalidOption, r"LlamaForCausalLM does not tell where .* as in model\.layers\.\{\}\.self_attn"):
        Retrofit(base, config)
    with refused(InvalidOption, "names no modules of LlamaForCausalLM"):
        Retrofit(base, RetrofitConfig("tiny", attention="model.blocks.{}.attn"))
    model = Retrofit(base, RetrofitConfig("tiny", chunk_len=4, ca_layers=(1, 3), attention="model.layers.{}.self_attn"))
    model.load_state_dict(new_retrofit().state_dict())
    with torch.no_grad():
        assert torch.equal(model(x, ret), new_retrofit()(x, ret))


def test_reading_layers_lie_behind_the_middle():
    from retro.bases.layers import reading_layers

    assert reading_layers(30) == (16, 18, 20, 22)
    assert reading_layers(12) == (6, 7, 8, 9)
    assert reading_layers(2) == (1,) == reading_layers(2, is_new=True)
    assert reading_layers(30, is_new=True) == (20, 22, 24, 26)


@pytest.mark.parametrize("trains", ["lora", "all"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_base_can_learn_too_and_is_then_saved_with_what_was_added(name, trains):
    x, ret = some_text()
    alone = new_base(name).eval()(input_ids=x).logits
    config = RetrofitConfig("tiny", chunk_len=CHUNK_LEN, ca_layers=CA_LAYERS, trains=trains)
    model = Retrofit(new_base(name), config).train()
    with torch.no_grad():
        torch.testing.assert_close(model(x, ret), alone, atol=1e-5, rtol=1e-5)
    own = {n for n in model.added() if n.startswith("base.")}
    assert own and all(("lora_" in n) == (trains == "lora") for n in own)
    n_base = sum(weight.numel() for weight in new_base(name).parameters())
    n_own = sum(weight.numel() for n, weight in model.added().items() if n in own)
    assert n_own == n_base if trains == "all" else 0 < n_own < n_base
    factors = {id(w): group["factor"] for group in model.parameter_groups() for w in group["params"]}
    assert len(factors) == len(model.added())
    assert {factors[id(model.added()[n])] for n in own} == {0.01 if trains == "all" else 1.0}
    optimizer = torch.optim.Adam(model.added().values(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        model(x, ret).logsumexp(dim=-1).sum().backward()
        optimizer.step()
    assert not torch.allclose(model.eval()(x), alone, atol=1e-3), "the base has not learnt"
    again = Retrofit(new_base(name), config).eval()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    with torch.no_grad():
        assert torch.equal(again(x, ret), model(x, ret))


@torch.no_grad()
def test_many_retrofits_of_one_base_take_no_more_than_their_own_memory():
    base = new_base("llama")
    for _ in range(3):
        model = Retrofit(base, RetrofitConfig("tiny", chunk_len=CHUNK_LEN, ca_layers=CA_LAYERS))
    assert not any(reader.copy._forward_hooks for reader in model.cca), "a copy of the readers before it"
    assert sum(w.numel() for w in model.parameters()) == sum(w.numel() for w in new_retrofit().parameters())


def test_a_model_that_is_frozen_to_be_used_keeps_what_it_has_learnt():
    model = new_retrofit()
    names = set(model.state_dict())
    model.requires_grad_(False)
    assert set(model.state_dict()) == names and set(model.added()) == names
    assert set(model.state_dict(prefix="x.")) == {f"x.{name}" for name in names}
    assert set(torch.nn.ModuleDict({"x": model}).state_dict()) == {f"x.{name}" for name in names}
    new_retrofit(trained=False).requires_grad_(False).load_state_dict(model.state_dict())


@each_encoder
def test_padding_before_a_text_has_no_gradient_that_is_not_a_number(encoder):
    model, (x, ret) = new_retrofit(encoder=encoder).train(), some_text()
    starts = torch.tensor([0, 5])
    with model.reads(x, ret[:, :4], starts):
        logits = model.base(input_ids=x, attention_mask=(torch.arange(22) >= starts[:, None]).long()).logits
    logits[:, 5:].logsumexp(dim=-1).sum().backward()
    assert all(weight.grad.isfinite().all() for weight in model.added().values())


def test_neighbors_of_other_texts_are_refused():
    model, (x, ret) = new_retrofit(), some_text()
    with pytest.raises(ValueError, match="neighbors for 1 texts, but tokens of 2"):
        model(x, ret[:1])


@torch.no_grad()
def test_neighbors_are_encoded_in_blocks_as_at_once(monkeypatch):
    model, (x, ret) = new_retrofit(), some_text()
    expected = model(x, ret)
    monkeypatch.setattr("retro.bases.layers.AT_ONCE", 4)
    torch.testing.assert_close(model(x, ret), expected)


def test_a_chunk_that_is_too_long_for_the_bases_positions_is_refused():
    with refused(InvalidOption, r"--chunk-len 43 is too long: .* the base has 128"):
        Retrofit(new_base("gpt2"), RetrofitConfig("tiny", chunk_len=43, ca_layers=(1,)))


@pytest.mark.parametrize("pattern", ["model.layers.0.self_attn", "model.layers.{x}.self_attn", "{"])
def test_a_pattern_that_names_no_module_of_each_layer_is_refused(pattern):
    with refused(InvalidOption, "names no modules of LlamaForCausalLM"):
        Retrofit(new_base("llama"), RetrofitConfig("tiny", attention=pattern))


def test_a_base_that_does_not_keep_texts_apart_is_refused_where_they_share_a_sample(monkeypatch):
    model, (x, ret) = new_retrofit("mistral"), some_text(20)
    stretches = torch.tensor([[0] * 8 + [2] * 12] * 2)
    model(x, ret, stretches)
    model = new_retrofit("mistral")
    monkeypatch.setattr("transformers.masking_utils.find_packed_sequence_indices", lambda *_: None)
    with refused(InvalidOption, "MistralForCausalLM lets texts that share a sample read each other"):
        model(x, ret, stretches)
