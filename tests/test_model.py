import copy
import itertools
import math
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from labml_nn.transformers.retro import model as reference

from retro.attention import written_out_attention
from retro.config import PRESETS
from retro.errors import InvalidOption
from retro.loss import cross_entropy
from retro.model import (
    ChunkedCrossAttention,
    CrossAttention,
    NearestNeighborEncoder,
    RetroConfig,
    RetroModel,
    RotaryPositionalEmbeddings,
)
from retro.runs.checkpoints import load_model, save_model

N_VOCAB, CHUNK_LEN, N_CHUNKS = 13, 4, 4
SHAPE = (N_VOCAB, 16, 4, {1, 3}, CHUNK_LEN, 2, 8, 32)


def small(module=None):
    """The same small model, of this library or of the reference."""
    kind = module or __import__("retro.model", fromlist=["RetroModel"])
    torch.manual_seed(1)
    return kind.RetroModel(*SHAPE, encoder=kind.NearestNeighborEncoder(CHUNK_LEN, 2, {1}, 16, 2, 8, 32))


@pytest.fixture
def model():
    return small()


@pytest.fixture
def tokens():
    return torch.randint(N_VOCAB, (2, N_CHUNKS * CHUNK_LEN), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def neighbors():
    return torch.randint(N_VOCAB, (2, N_CHUNKS, 3, 2 * CHUNK_LEN), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("n_tokens", "n_chunks", "n_neighbors"),
    [(16, 4, 2), (17, 4, 2), (18, 4, 1), (10, 2, 3), (4, 1, 2), (7, 1, 1), (150, 37, 2)],  # 150: fused attention
)
def test_logits_and_gradients_are_the_references(n_tokens, n_chunks, n_neighbors):
    theirs, ours = small(reference), small()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    x = torch.randint(N_VOCAB, (2, n_tokens))
    ret = torch.randint(N_VOCAB, (2, n_chunks, n_neighbors, 2 * CHUNK_LEN))
    weights = torch.randn(2, n_tokens, N_VOCAB)
    for model in (theirs, ours):
        (model(x, ret) * weights).sum().backward()
    torch.testing.assert_close(ours(x, ret), theirs(x, ret), rtol=1e-5, atol=2e-6)
    grads = dict(ours.named_parameters())
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(grads[name].grad, parameter.grad, rtol=1e-4, atol=2e-4)


def test_a_sequence_shorter_than_a_chunk_is_the_references_without_retrieval():
    theirs, ours = small(reference), small()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.encoder.forward = lambda e, h: e  # it cannot reshape zero chunks
    x = torch.randint(N_VOCAB, (2, CHUNK_LEN - 1))
    none = torch.zeros(2, 0, 2, 2 * CHUNK_LEN, dtype=torch.long)
    torch.testing.assert_close(ours(x, none), theirs(x, none), rtol=1e-5, atol=2e-6)
    assert torch.equal(ours(x, none), ours(x))


@pytest.mark.parametrize("position", range(N_CHUNKS * CHUNK_LEN))
def test_a_token_never_changes_an_earlier_logit(model, tokens, neighbors, position):
    edited = tokens.clone()
    edited[:, position] = (edited[:, position] + 1) % N_VOCAB
    before, after = model(tokens, neighbors), model(edited, neighbors)
    torch.testing.assert_close(after[:, :position], before[:, :position], rtol=0, atol=1e-6)
    assert not torch.equal(after[:, position], before[:, position])


@pytest.mark.parametrize("u", range(N_CHUNKS))
def test_last_token_of_a_chunk_is_the_first_to_read_its_neighbors(model, tokens, neighbors, u):
    first_reader = (u + 1) * CHUNK_LEN - 1
    edited = neighbors.clone()
    edited[:, u] = (edited[:, u] + 1) % N_VOCAB
    before, after = model(tokens, neighbors), model(tokens, edited)
    assert torch.equal(after[:, :first_reader], before[:, :first_reader]), "the past saw the future"
    assert not torch.equal(after[:, first_reader], before[:, first_reader]), "retrieval is ignored"


def test_chunked_cross_attention_equals_a_loop_over_tokens():
    torch.manual_seed(0)
    layer = ChunkedCrossAttention(16, 2, 8, CHUNK_LEN)
    h, e = torch.randn(1, 14, 16), torch.randn(1, 3, 2, 8, 16)
    present = torch.rand(1, 3, 2, 8) > 0.3
    present[0, 1] = False  # the second chunk has no neighbor
    expected = h.clone()
    for i in range(14):
        u = (i + 1) // CHUNK_LEN - 1
        if u < 0 or not present[0, u].any():
            continue
        context = e[0, u][present[0, u]]  # (n, 16)
        q = layer.query(layer.norm(h[0, i])).view(2, 8)
        k, v = layer.key(context).view(-1, 2, 8), layer.value(context).view(-1, 2, 8)
        read = [(q[a] @ k[:, a].T / 8**0.5).softmax(-1) @ v[:, a] for a in range(2)]
        expected[0, i] += layer.output(torch.cat(read))
    torch.testing.assert_close(layer(h, e, present), expected, rtol=1e-5, atol=1e-6)


def test_a_missing_token_is_not_there(model, tokens, neighbors):
    missing = neighbors.clone()
    missing[:, :, :, 5:] = -1
    torch.testing.assert_close(model(tokens, missing), model(tokens, neighbors[:, :, :, :5]), rtol=1e-5, atol=2e-6)
    only_one = neighbors.clone()
    only_one[:, :, 1:] = -1
    torch.testing.assert_close(model(tokens, only_one), model(tokens, neighbors[:, :, :1]), rtol=1e-5, atol=2e-6)


def test_chunks_without_neighbors_read_nothing_bit_for_bit(model, tokens, neighbors):
    off = model(tokens)
    assert torch.equal(model(tokens, torch.full_like(neighbors, -1)), off)
    assert torch.equal(model(tokens, neighbors[:, :0]), off)
    loss = model(tokens, torch.full_like(neighbors, -1)).sum()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_prefix_logits_equal_full_logits(model, tokens, neighbors):
    full = model(tokens, neighbors)
    for n in range(1, tokens.shape[1] + 1):
        prefix = model(tokens[:, :n], neighbors[:, : n // CHUNK_LEN])
        torch.testing.assert_close(prefix, full[:, :n], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_parameter_gets_a_gradient(model, tokens, neighbors, dtype):
    model.to(dtype)(tokens, neighbors).float().square().sum().backward()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            assert parameter.grad.abs().sum() > 0, name


def test_nothing_is_made_on_another_device(tokens, neighbors):
    model = small().to("meta")
    logits = model(tokens.to("meta"), neighbors.to("meta"))
    assert logits.device.type == "meta"
    logits.sum().backward()


@pytest.mark.parametrize("length", [1, 7, 128, 129, 300])
@pytest.mark.parametrize("kind", ["causal", "masked", "open"])
def test_written_out_attention_is_torchs_own(length, kind):
    generator = torch.Generator().manual_seed(length)
    q, k, v = (torch.randn(3, 2, length, 8, generator=generator).requires_grad_() for _ in range(3))
    mask = torch.rand(3, 1, 1, length, generator=generator) > 0.3 if kind == "masked" else None
    if mask is not None:
        mask[..., 0] = True
    weights = torch.randn(q.shape, generator=generator)
    results = []
    for attention in (written_out_attention, F.scaled_dot_product_attention):
        read = attention(q, k, v, attn_mask=mask, is_causal=kind == "causal")
        results.append((read, *torch.autograd.grad((read * weights).sum(), (q, k, v))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("start", [0, 5])
def test_rotary_embeddings_are_the_references_from_any_position(start):
    x = torch.randn(2, 12, 3, 8)
    expected = reference.RotaryPositionalEmbeddings(8)(x)[:, start:]
    torch.testing.assert_close(RotaryPositionalEmbeddings(8)(x[:, start:], start), expected)


@pytest.mark.parametrize(("dtype", "digits"), [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
def test_a_model_in_half_precision_gives_the_logits_of_float32_to_its_precision(model, dtype, digits):
    length = 100 * CHUNK_LEN  # positions that half precision cannot count
    generator = torch.Generator().manual_seed(4)
    x = torch.randint(N_VOCAB, (1, length), generator=generator)
    ret = torch.randint(N_VOCAB, (1, length // CHUNK_LEN, 3, 2 * CHUNK_LEN), generator=generator)
    ret[:, 3], ret[:, 5, 1], ret[:, 6, :, 5:] = -1, -1, -1
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(dtype))  # rounded beforehand, so that what differs is the arithmetic
        expected, found = model(x, ret), copy.deepcopy(model).to(dtype)(x, ret)
    assert found.dtype == dtype
    assert (found.float() - expected).abs().max() < 8 * digits * expected.abs().max()


def test_angles_are_those_of_the_definition_whatever_the_parameter_was_cast_to():
    x = torch.randn(1, 9, 2, 8)
    n, i = torch.arange(3000, 3009, dtype=torch.float64)[:, None], torch.arange(4, dtype=torch.float64)
    angles = (n * 10_000 ** (-i / 4))[:, None]  # (9, 1, 4)
    first, second = x.double().chunk(2, dim=-1)
    expected = torch.cat(
        [first * angles.cos() - second * angles.sin(), first * angles.sin() + second * angles.cos()], dim=-1
    )
    rotary = RotaryPositionalEmbeddings(8)
    torch.testing.assert_close(rotary(x, 3000).double(), expected, rtol=0, atol=2e-3)  # 3000 radians in float32
    for dtype in (torch.bfloat16, torch.float16):
        there_and_back = copy.deepcopy(rotary).to(dtype).float()
        assert torch.equal(there_and_back(x, 3000), rotary(x, 3000))
        half = copy.deepcopy(rotary).to(dtype)(x.to(dtype), 3000)
        assert half.dtype == dtype and torch.equal(half, rotary(x.to(dtype).float(), 3000).to(dtype))
    doubled = rotary.double()(x.double() / 3)
    torch.testing.assert_close(doubled, RotaryPositionalEmbeddings(8)(x / 3).double(), rtol=0, atol=1e-5)
    assert torch.equal(doubled[:, 0], x[:, 0].double() / 3), "position 0 is not rotated, nor rounded"


@pytest.mark.parametrize("tied", [False, True])
def test_the_loss_in_pieces_is_the_whole_one_and_keeps_no_logits(tokens, neighbors, monkeypatch, tied):
    torch.manual_seed(1)
    model = RetroModel.from_config(
        RetroConfig(N_VOCAB, 16, 2, (1,), CHUNK_LEN, 2, 8, 32, 1, (0,), norm="rms", final_norm=True, tied=tied)
    )
    targets = tokens.roll(-1, dims=1)
    targets[0, 3:7], targets[1, -1] = -100, -100
    kept, asked = [], []

    def gradient(loss_of):
        model.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(tuple(x.shape)) or x, lambda x: x):
            loss = loss_of()
        loss.backward()
        return loss.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    def whole():
        return F.cross_entropy(model(tokens, neighbors).flatten(0, 1), targets.flatten(), reduction="sum")

    expected = gradient(whole)
    rows = {shape[0] for shape in kept if shape[-1:] == (N_VOCAB,) and len(shape) > 1}
    assert tokens.numel() in rows, "the plain loss keeps the logits of all tokens"
    logits = model.logits
    monkeypatch.setattr(model, "logits", lambda h: asked.append(len(h)) or logits(h))
    for at_once, sizes in ((10**6, [32]), (5 * N_VOCAB + 1, [5] * 6 + [2]), (1, [1] * 32)):
        monkeypatch.setattr("retro.loss.LOGITS_AT_ONCE", at_once)
        kept.clear(), asked.clear()
        torch.testing.assert_close(gradient(lambda: model(tokens, neighbors, targets=targets)), expected)
        again = sizes[::-1] if len(sizes) > 1 else []  # pieces are computed once more
        assert asked == sizes + again
        if again:
            assert not [shape for shape in kept if len(shape) == 2 and shape[-1] == N_VOCAB]
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, neighbors, targets=targets), expected[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_and_its_gradient_are_torchs_a_few_rows_at_a_time(monkeypatch, dtype):
    torch.manual_seed(0)
    logits = (4 * torch.randn(17, 50)).to(dtype)
    targets = torch.randint(50, (17,))
    targets[3:6] = -100

    def gradient(function, kept):
        ours = kept.clone().requires_grad_()
        loss = 0.3 * function(ours, targets)
        loss.backward()
        assert loss.dtype == torch.float32
        return loss.detach(), ours.grad

    expected = gradient(lambda x, y: F.cross_entropy(x.float(), y, reduction="sum"), logits)
    for at_once in (10**6, 4 * 50, 1):
        monkeypatch.setattr("retro.loss.ROWS_AT_ONCE", at_once)
        loss, found = gradient(cross_entropy, logits)
        torch.testing.assert_close(loss, expected[0])
        torch.testing.assert_close(
            found, expected[1], **({} if dtype == torch.float32 else {"rtol": 0.02, "atol": 1e-4})
        )
        assert not found[3:6].any()
        assert cross_entropy(logits, targets) == pytest.approx(loss.item() / 0.3, rel=1e-5)
    loss = cross_entropy(logits.requires_grad_(), targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="used up by the backward pass before"):
        loss.backward()


def test_bf16_gives_nearly_the_loss_and_the_gradients_of_fp32(model, tokens, neighbors):
    def gradient(enabled):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = model(tokens, neighbors)
        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (loss, exact), (rounded_loss, rounded) = gradient(False), gradient(True)
    assert rounded_loss == pytest.approx(loss, rel=2e-3) and rounded_loss != loss
    assert F.cosine_similarity(exact, rounded, dim=0) > 0.999


def test_the_model_compiles_as_one_graph(model, tokens, neighbors):
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, neighbors), model(tokens, neighbors), rtol=1e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler of C++")
def test_inductor_compiles_it_whole_and_gives_its_logits_and_gradients(recwarn):
    config = RetroConfig(50, 32, 2, (1,), 8, 2, 16, 64, 1, (0,), norm="rms", final_norm=True, relative_positions=True)
    model = RetroModel.from_config(config)
    x, ret = torch.randint(50, (2, 32)), torch.randint(50, (2, 4, 2, 16))
    ret[0, 1], ret[1, 2, 1, 9:] = -1, -1
    gradients = []
    for net in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        logits = net(x, ret)
        logits.square().sum().backward()
        gradients.append([logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for eager, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)
    assert not [w for w in recwarn if "complex" in str(w.message)]  # which it leaves to eager code


def test_importing_the_model_brings_nothing_but_torch():
    code = (
        "import sys, torch; before = set(sys.modules); import retro.model; "
        "print([n for n in set(sys.modules) - before if n.split('.')[0] != 'retro' and 'importlib' not in n])"
    )
    added = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not any(name in added for name in ("faiss", "transformers", "labml", "safetensors", "tokenizers")), added
    alone = subprocess.run(
        [sys.executable, "-c", "import sys, retro; print(len(sys.modules), 'torch' in sys.modules)"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert alone.split()[1] == "False" and int(alone.split()[0]) < 150


def test_wrong_shapes_are_refused(model, tokens, neighbors):
    with pytest.raises(ValueError, match=r"4 chunks of 4 tokens.*15 tokens"):
        model(tokens[:, :15], neighbors)
    with pytest.raises(ValueError, match=r"ca_layers=\[6\] do not exist; use 0\.\.5"):
        RetroConfig(10, ca_layers=(6,))
    with pytest.raises(ValueError, match=r"encoder_ca_layers=\[1, 1\] names a layer twice"):
        RetroConfig(10, encoder_ca_layers=(1, 1))
    with pytest.raises(ValueError, match="pass an encoder"):
        RetroModel(*SHAPE, encoder=None)
    with pytest.raises(ValueError, match=r"ca_layers=\[2\] do not exist"):
        NearestNeighborEncoder(4, 2, {2}, 16, 2, 8, 32)


def test_without_weights_the_loss_is_the_biases(model, tokens, neighbors):
    """Whatever is read, the model then predicts each token with the same probability."""
    torch.nn.init.zeros_(model.read.weight)
    for bias in (torch.zeros(N_VOCAB), torch.arange(1.0, N_VOCAB + 1).log()):  # token i: (i + 1) / (1 + ... + 13)
        model.read.bias.data.copy_(bias)
        for ret in (None, neighbors):
            loss = F.cross_entropy(model(tokens, ret).flatten(0, 1), tokens.flatten())
            share = (tokens + 1).double() / 91 if bias.any() else torch.full(tokens.shape, 1 / N_VOCAB)
            assert loss.item() == pytest.approx(-share.log().mean().item(), rel=1e-6)


def test_a_model_that_can_only_name_what_its_neighbors_hold_has_the_loss_that_follows():
    """Features 0..V-1 tell the token; cross-attention adds the mean of the neighbors' to V..2V-1, which give logits."""
    m, V, K = CHUNK_LEN, N_VOCAB - 1, 3
    model = RetroModel(V, 2 * V, 1, {0}, m, 1, V, 4, NearestNeighborEncoder(m, 1, {0}, 2 * V, 1, V, 4))
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.zero_(), module.bias.zero_()
        model.emb.weight.copy_(torch.eye(V, 2 * V))
        model.cca[0].value.weight.copy_(torch.eye(V, 2 * V))
        model.cca[0].output.weight.copy_(torch.eye(V, 2 * V).roll(V, dims=1).T)
        model.read.weight.copy_(torch.eye(V, 2 * V).roll(V, dims=1))
    held = torch.tensor([[3, 7, 7], [0, 1, 2], [11, 11, 11], [4, 5, 6]])  # tokens of each chunk's K neighbors
    x = torch.randint(V, (1, 4 * m), generator=torch.Generator().manual_seed(5))
    ret = held[None, :, :, None].expand(1, 4, K, 2 * m)
    # A neighbor's feature is 1 among 2V - 1 zeros; normalized, it is `gap` above them.
    gap = 1 / math.sqrt(1 / (2 * V) - 1 / (2 * V) ** 2 + 1e-5)
    log_p = model(x, ret).log_softmax(dim=-1)[0].tolist()
    for position in range(4 * m):
        u = (position + 1) // m - 1  # whose neighbors are read
        counts = [0] * V if u < 0 else held[u].bincount(minlength=V).tolist()
        total = sum(math.exp(gap * count / K) for count in counts)
        for token in range(V):
            assert log_p[position][token] == pytest.approx(gap * counts[token] / K - math.log(total), abs=1e-5)
    loss = F.cross_entropy(model(x)[0], x[0])
    assert loss.item() == pytest.approx(math.log(V), rel=1e-6), "without neighbors"


def copy_loss(informative: bool, n_steps: int = 180) -> float:
    """Loss on random tokens after training with neighbors that hold the next chunk, or that do not."""
    torch.manual_seed(0)
    m, n_vocab, n_chunks = 8, 32, 6
    config = RetroConfig(n_vocab, 64, 2, (1,), m, 4, 16, 128, 1, (0,))
    model = RetroModel.from_config(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(n_steps):
        text = torch.randint(n_vocab, (16, (n_chunks + 1) * m + 1))
        src, tgt = text[:, : n_chunks * m], text[:, 1 : n_chunks * m + 1]
        own = text[:, : (n_chunks + 1) * m].unfold(1, 2 * m, m)  # (B, C, 2m): chunk and true continuation
        other = torch.randint(n_vocab, own.shape)
        ret = torch.stack([own if informative else torch.randint(n_vocab, own.shape), other], dim=2)
        logits = model(src, ret)[:, m - 1 :]
        loss = F.cross_entropy(logits.flatten(0, 1), tgt[:, m - 1 :].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


def test_a_model_learns_to_copy_from_neighbors_and_only_from_informative_ones():
    uniform = 3.466  # ln 32
    assert copy_loss(informative=True) < 0.5 * uniform
    assert copy_loss(informative=False, n_steps=60) > 0.97 * uniform


# What the paper and later models have, as options.

OPTIONS = {"norm": "rms", "final_norm": True, "relative_positions": True, "tied": True, "init_std": 0.02}
CONFIG = RetroConfig(300, 64, 4, (1, 3), 8, 4, 16, 128, 2, (0,))


def test_norms_are_rms_and_logits_are_products_of_normalized_states_with_embeddings():
    model = RetroModel.from_config(replace(CONFIG, **OPTIONS))
    assert not any(isinstance(module, torch.nn.LayerNorm) for module in model.modules())
    assert sum(isinstance(module, torch.nn.RMSNorm) for module in model.modules()) == 4 * 2 + 2 + 2 * 2 + 1 + 2 + 1
    states = []
    model.ffw[-1].register_forward_hook(lambda *given: states.append(given[-1]))
    with torch.no_grad():
        model.norm.weight.uniform_(0.5, 2)
        logits = model(torch.arange(20)[None], torch.randint(300, (1, 2, 2, 16)))
    h = states[0].double()
    by_hand = (
        h / (h.square().mean(dim=-1, keepdim=True) + 1.2e-7).sqrt() * model.norm.weight @ model.emb.weight.double().T
    )
    torch.testing.assert_close(logits.double(), by_hand, rtol=1e-5, atol=1e-5)
    plain = RetroModel.from_config(replace(CONFIG, **OPTIONS | {"tied": False}))
    n, n_plain = (sum(weight.numel() for weight in m.parameters()) for m in (model, plain))
    assert n == n_plain - 300 * 64 - 300  # what reads the logits off, and its bias


def test_first_weights_have_their_size_and_depend_on_seed_and_name_alone():
    torch.manual_seed(3)
    model = RetroModel.from_config(replace(CONFIG, init_std=0.02))
    torch.manual_seed(3)
    torch.rand(7)  # draws in between change nothing
    plain = RetroModel.from_config(replace(CONFIG, init_std=0.02, ca_layers=()))
    torch.manual_seed(4)
    other = RetroModel.from_config(replace(CONFIG, init_std=0.02))
    layers = {
        name: layer for name, layer in model.named_modules() if isinstance(layer, (torch.nn.Linear, torch.nn.Embedding))
    }
    assert len(layers) == 1 + 4 * 4 + 4 * 2 + 1 + 2 * 4 + 2 * 4 + 2 * 2 + 4
    for name, layer in layers.items():
        expected = 0.02
        if name.endswith(("output", "lin2")):  # 2 layers of the encoder, 4 of the decoder, each with two projections
            expected /= math.sqrt(2 * (2 if name.startswith("encoder") else 4))
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.06), name
        assert layer.weight.mean().abs() < 0.002 and (getattr(layer, "bias", None) is None or not layer.bias.any())
    assert len({layer.weight.flatten()[0].item() for layer in layers.values()}) == len(layers), "drawn alike"
    for name, weight in plain.state_dict().items():
        if "norm" not in name:
            assert torch.equal(weight, model.state_dict()[name]), name
    assert not torch.equal(other.emb.weight, model.emb.weight)


def test_a_tied_model_is_saved_and_comes_back(tmp_path):
    config = replace(CONFIG, **OPTIONS)
    model = RetroModel.from_config(config)
    save_model(tmp_path, model, config)
    x, ret = torch.arange(20)[None], torch.randint(300, (1, 2, 2, 16))
    assert torch.equal(load_model(tmp_path)(x, ret), model(x, ret))
    model(x).logsumexp(dim=-1).sum().backward()  # without neighbors, which read embeddings too
    assert model.emb.weight.grad[100:].any(), "the logits of tokens that are not read have no gradient"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("norm", "batch", "is not one of layer, rms"),
        ("tied", 1, "is neither true nor false"),
        ("init_std", -1.0, "is neg"),
    ],
)
def test_options_of_another_kind_are_refused(name, value, said):
    with refused(InvalidOption, said):
        replace(CONFIG, **{name: value})


def head_of(layer: torch.nn.Linear, x: torch.Tensor, head: int, d_k: int = 4) -> torch.Tensor:
    """What a projection gives one head."""
    return layer(x)[head * d_k : (head + 1) * d_k]


def cosines(distance: int, D: int = 8) -> torch.Tensor:
    angles = [distance / 10_000 ** (2 * i / D) for i in range(D // 2)]
    return torch.tensor([f(angle) for angle in angles for f in (math.sin, math.cos)])


def read_in_a_loop(attention, reader: torch.Tensor, read: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    """What one normalized state reads of others at given distances, head by head."""
    heads, positions = [], attention.positions.project
    for head in range(2):
        query = head_of(attention.query, reader, head)
        scores = [
            query @ (head_of(attention.key, x, head) + head_of(positions, cosines(distance), head)) / 2
            for x, distance in read
        ]
        weights = torch.stack(scores).softmax(dim=0)
        heads.append(sum(w * head_of(attention.value, x, head) for w, (x, _) in zip(weights, read, strict=True)))
    return attention.output(torch.cat(heads))


@torch.no_grad()
def test_relative_positions_in_chunked_cross_attention_equal_a_loop():
    torch.manual_seed(0)
    m, C, K, T = 4, 2, 3, 11
    cca = ChunkedCrossAttention(8, 2, 4, m, most=2 * m)
    h, e, present = torch.randn(1, T, 8), torch.randn(1, C, K, 2 * m, 8), torch.rand(1, C, K, 2 * m) < 0.7
    found, normalized = cca(h, e, present)[0], cca.norm(h)[0]
    for i in range(T):
        u, row = (i + 1) // m - 1, (i + 1) % m
        expected = h[0, i]
        if u >= 0:
            read = [
                (e[0, u, k, tau], row - tau + m - 1) for k in range(K) for tau in range(2 * m) if present[0, u, k, tau]
            ]
            expected = expected + read_in_a_loop(cca, normalized[i], read)
        torch.testing.assert_close(found[i], expected)


@torch.no_grad()
def test_relative_positions_in_the_encoder_equal_a_loop():
    torch.manual_seed(0)
    m, C, K = 4, 2, 3
    ca = CrossAttention(8, 2, 4, most=2 * m)
    e, h = torch.randn(1, C, K, 2 * m, 8), torch.randn(1, C, m, 8)
    found, normalized = ca(e, h), ca.norm(e)
    for u, k, tau in itertools.product(range(C), range(K), range(2 * m)):
        read = [(h[0, u, i], tau - i) for i in range(m)]
        expected = e[0, u, k, tau] + read_in_a_loop(ca, normalized[0, u, k, tau], read)
        torch.testing.assert_close(found[0, u, k, tau], expected)


@pytest.mark.parametrize("own", [True, False])
def test_an_encoder_may_have_another_width_and_own_embeddings(own, tmp_path):
    config = replace(CONFIG, d_encoder=24, encoder_n_heads=3, encoder_d_k=6, encoder_d_ff=40, own_embeddings=own)
    model = RetroModel.from_config(config)
    shapes = {name: tuple(weight.shape) for name, weight in model.state_dict().items()}
    assert shapes["encoder.attn.0.query.weight"] == (18, 24) and shapes["encoder.ffw.1.lin1.weight"] == (40, 24)
    assert shapes["encoder.ca.0.query.weight"] == (18, 24) and shapes["encoder.ca.0.key.weight"] == (18, 64)
    assert shapes["cca.0.query.weight"] == (64, 64) and shapes["cca.1.value.weight"] == (64, 24)
    assert shapes.get("encoder.emb.weight") == ((300, 24) if own else None)
    assert shapes.get("encoder.resize.weight") == (None if own else (24, 64))
    x, ret = torch.arange(40).view(2, 20), torch.randint(300, (2, 2, 2, 16))
    resize, embedded = model.encoder.resize, (model.encoder.emb if own else model.emb).weight[ret]
    embedded = embedded if own else F.linear(embedded, resize.weight, resize.bias)
    torch.testing.assert_close(model.encoder.embed(ret, model.emb), embedded)
    assert not torch.equal(model(x, ret)[:, 7:], model(x)[:, 7:])
    save_model(tmp_path, model, config)
    assert torch.equal(load_model(tmp_path)(x, ret), model(x, ret))


@pytest.mark.parametrize(
    ("name", "millions"), [("paper-172m", 172), ("paper-425m", 425), ("paper-1.5b", 1451), ("paper-7.5b", 7532)]
)
def test_presets_of_the_paper_have_its_numbers_of_parameters(name, millions):
    """Of its table of models, without embeddings. Its self-attention has relative positions too, where ours rotates."""
    shape = PRESETS[name].model
    with torch.device("meta"):
        model = RetroModel.from_config(RetroConfig(n_vocab=10, chunk_len=64, **shape))
        # A projection of cosines for each layer of self-attention.
        replaced = shape["n_layers"] * shape["d_model"] * shape["n_heads"] * shape["d_k"] + 2 * 896 * 16 * 64
        logits = model(torch.zeros(1, 2048, dtype=torch.long), torch.zeros(1, 32, 2, 128, dtype=torch.long))
    embeddings = (model.emb.weight, model.encoder.emb.weight, model.read.weight)
    n = sum(p.numel() for p in model.parameters()) - sum(weight.numel() for weight in embeddings) + replaced
    assert n / 1e6 == pytest.approx(millions, abs=1.1, rel=0.0005)
    assert logits.shape == (1, 2048, 10)
    assert model.ca_layers[:2] == (5, 8) and model.encoder.ca_layers == (1,)
