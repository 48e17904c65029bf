"""Costs of a generated token: counted operations are those of the products, worked out by hand."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import CHUNK_LEN, refused
from test_evaluate import model_of
from test_retrofit import SHAPE, new_retrofit, some_text
from transformers import LlamaConfig, LlamaForCausalLM

from retro.config import EvaluateConfig, RetrofitConfig
from retro.decoding import decoder_of
from retro.errors import InvalidOption
from retro.evaluate import evaluate
from retro.evaluation.costs import costs
from retro.evaluation.figures import plot_costs, table
from retro.retrofit import Retrofit

M, K, WINDOW = CHUNK_LEN, 2, 16 * CHUNK_LEN
T = 12 * M  # three quarters of a window


RIVALS = ("in-context", "longer-context")


def costs_of(variants, model, index, **options):
    """As `costs` of two neighbors and a window, of the index's own held-out text."""
    return costs(variants, model, index.corpus, index, n_neighbors=K, window=WINDOW, n_rounds=1, **options)


def products(model, n_tokens, n_read):
    """Multiplications of a plain decoder's matrices, for `n_tokens` that each read so many, with logits of one."""
    width = model.attn[0].n_heads * model.attn[0].d_k
    d, d_ff = model.d_model, model.ffw[0].lin1.out_features
    of_layer = n_tokens * (4 * d * width + 2 * d * d_ff) + 2 * width * n_tokens * n_read
    return len(model.attn) * of_layer + d * model.n_vocab


def one_by_one(model, n_tokens, n_before):
    """The same of tokens behind `n_before`, in passes of one."""
    return sum(products(model, 1, n_before + 1 + i) for i in range(n_tokens))


def test_operations_of_a_model_alone_and_with_neighbors_before_its_text_are_its_products(index):
    model = model_of(index)
    found = costs_of(("on", "off", "random", *RIVALS), model, _that_finds_at_once(index))
    assert set(found) == {"on", "off", "in-context", "longer-context"}, "random neighbors cost what others do"
    assert M * found["off"]["operations"] == 2 * one_by_one(model, M, T - 1)
    n_more = 2 * M * K
    text = WINDOW - n_more - M  # what leaves room for neighbors and a chunk to write
    assert M * found["longer-context"]["operations"] == 2 * one_by_one(model, M, text + n_more - 1)
    anew = products(model, n_more + text, n_more + text)
    assert M * found["in-context"]["operations"] == 2 * (anew + one_by_one(model, M - 1, n_more + text))


def test_what_has_no_cost_is_refused_in_a_sentence(index):
    model = model_of(index)
    with refused(InvalidOption, "variants in_context is not one of on, off, random, in-context, longer-context, both"):
        costs_of(("on", "in_context"), model, index)
    with refused(InvalidOption, "variants baseline is not one of"):
        costs_of(("baseline",), model, index)
    with refused(InvalidOption, "in-context would leave 0 of the 64 tokens"):
        costs(("in-context",), model, index.corpus, index, n_neighbors=K, window=4 * M)


def test_reading_costs_what_reads_and_encodes_neighbors_more(index):
    model = model_of(index)
    found = costs_of(("on", "off"), model, index)
    cca, encoder = model.cca[0], model.encoder
    width, R, d = cca.n_heads * cca.d_k, 2 * M, encoder.d_model
    reading = M * (2 * model.d_model * width + 2 * width * K * R)  # queries, outputs; scores and values
    encoding = 2 * K * R * d * width  # keys and values that the readers keep
    ffw = encoder.ffw[0].lin1.out_features
    encoding += K * R * (4 * d * width + 2 * d * ffw + 2 * width * R)
    encoding += K * R * (2 * d * width + 2 * width * M) + 2 * M * d * width  # they read the chunk
    assert len(model.cca) == len(encoder.attn) == len(encoder.ca) == 1
    at_once = costs_of(("on",), model, _that_finds_at_once(index))
    more = M * (at_once["on"]["operations"] - found["off"]["operations"])
    assert more == 2 * (reading + encoding)
    assert found["on"]["operations"] > at_once["on"]["operations"], "BERT embeds the chunk that looks for neighbors"


def _that_finds_at_once(index):
    """An index whose look-ups compute nothing."""
    offsets = index.nearest_at(torch.tensor([0]).numpy(), K)[1]
    names = ("corpus", "chunk_len", "manifest", "data_path", "values")
    return SimpleNamespace(nearest=lambda texts, k: (None, offsets), **{name: getattr(index, name) for name in names})


def test_operations_of_a_pretrained_base_are_its_products(index):
    wide = {"vocab_size": index.corpus.n_tokens, "max_position_embeddings": 2 * WINDOW}
    config = RetrofitConfig("tiny", chunk_len=M, ca_layers=(1,))
    model = Retrofit(LlamaForCausalLM(LlamaConfig(**SHAPE | wide)).eval(), config).eval()
    shape = model.base.config
    d, H, kv, d_k = shape.hidden_size, shape.num_attention_heads, shape.num_key_value_heads, shape.head_dim
    found = costs_of(("on", "off"), model, index)
    of_layer = d * d_k * (2 * H + 2 * kv) + 3 * d * shape.intermediate_size
    alone = sum(shape.num_hidden_layers * (of_layer + 2 * H * d_k * (T + i)) + d * model.n_vocab for i in range(M))
    assert M * found["off"]["operations"] == 2 * alone
    assert found["on"]["operations"] > found["off"]["operations"]


def test_bytes_are_those_of_weights_text_and_database(index, of_two):
    model = model_of(index)
    variants = ("on", "off", "in-context", "knn-lm")
    found = costs(variants, model, of_two, index, n_neighbors=K, window=WINDOW, n_rounds=2)
    width = 2 * model.attn[0].n_heads * model.attn[0].d_k * 4  # bytes of a key and a value
    assert found["off"]["kept"] == len(model.attn) * (T - 1 + M) * width
    assert found["on"]["kept"] == found["off"]["kept"] + len(model.cca) * K * 2 * M * width
    assert found["on"]["weights"] == 4 * sum(weight.numel() for weight in model.parameters())
    assert found["off"]["searched"] == 0 < found["on"]["searched"] == found["in-context"]["searched"]
    corpus = index.corpus
    n_states = sum(int(corpus.starts[i + 1] - corpus.starts[i]) - 1 for i in corpus.in_database)
    assert found["knn-lm"]["searched"] == n_states * (4 * model.d_model + corpus.tokens.itemsize)
    assert found["on"]["searched"] > corpus.tokens.itemsize * index.manifest["n_chunks"] * M
    assert all(cost["seconds"] > 0 for cost in found.values())
    searching = 2 * n_states * model.d_model
    assert found["knn-lm"]["operations"] == found["off"]["operations"] + searching, "a product with each, for a token"


@torch.no_grad()
@pytest.mark.parametrize("kind", ["retro", "llama"])
def test_a_decoder_that_is_given_no_neighbors_takes_any_number_of_tokens_at_once(index, kind):
    model = model_of(index) if kind == "retro" else new_retrofit("llama")
    (x,), _ = some_text(n_texts=1)
    decoder = decoder_of(model, reads=False)
    at = len(x) - 3
    torch.testing.assert_close(decoder.feed(x[:at]), model(x[None, :at])[0, -1], atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(decoder.feed(x[at:]), model(x[None])[0, -1], atol=2e-5, rtol=1e-4)


def test_costs_are_shown_as_a_table_and_a_plot(index, tmp_path):
    pytest.importorskip("matplotlib", reason="the plot needs it: pip install matplotlib")
    config = EvaluateConfig(n_neighbors=K, window=WINDOW, stride=WINDOW, n_windows=1, n_shuffles=1)
    evaluation = evaluate(model_of(index), index.corpus, index, config=config, against=RIVALS)
    found = costs_of(evaluation.nats, model_of(index), index)
    summary = json.loads(json.dumps(evaluation.summary() | {"costs": found}))
    shown = table(summary)
    of_costs = shown[shown.index("a generated token") :].splitlines()
    row = next(line for line in of_costs if line.startswith("neighbors in its context"))
    cost = summary["costs"]["in-context"]
    assert row.split()[4] == f"{cost['operations'] / 1e6:,.1f}"
    plot_costs(summary, tmp_path / "costs.png")
    assert (tmp_path / "costs.png").read_bytes().startswith(b"\x89PNG")
