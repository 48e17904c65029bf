"""Evaluation: every figure against numbers worked out by hand, or a slower way."""

import dataclasses
import json
import math
import re
import shutil
from datetime import date
from difflib import SequenceMatcher

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CHUNK_LEN
from scipy.stats import t as student
from test_train_and_sample import CONFIG, SHAPE

from retro.cli import main
from retro.config import EvaluateConfig
from retro.database import RetroIndex
from retro.errors import SeenText
from retro.evaluate import Evaluation, evaluate, held_out_texts
from retro.evaluation.figures import plot, table
from retro.evaluation.held_out import require_held_out
from retro.evaluation.intervals import judged
from retro.evaluation.leakage import longest_common_run
from retro.evaluation.result import DATABASE_FIELDS, VARIANTS, joined, saved_bits
from retro.evaluation.windows import losses, of_others, others_drawn, predicted_bytes, windows
from retro.model import RetroConfig, RetroModel
from retro.progress import note
from retro.storage.manifests import read_manifest
from retro.text.build import build_corpus
from retro.text.corpus import Corpus, DocumentEntry
from retro.text.tokenizer import CharTokenizer, train_tokenizer
from retro.train import train

WINDOW = 4 * CHUNK_LEN
IN_WINDOWS = EvaluateConfig(window=WINDOW)


def model_of(index, **shape):
    torch.manual_seed(3)
    return RetroModel.from_config(RetroConfig(index.corpus.n_tokens, chunk_len=CHUNK_LEN, **{**SHAPE, **shape})).eval()


@pytest.fixture(scope="module")
def evaluation(index):
    baseline = model_of(index, ca_layers=())
    return evaluate(model_of(index), index.corpus, index, config=IN_WINDOWS, baseline=baseline)


def test_a_uniform_model_has_the_log_of_the_vocabulary_over_bytes_per_token(index):
    model = model_of(index)
    torch.nn.init.zeros_(model.read.weight)
    torch.nn.init.zeros_(model.read.bias)
    corpus = index.corpus
    documents = [corpus.documents[i] for i in corpus.split("valid")]
    firsts = [corpus.tokens[corpus.starts[i]] for i in corpus.split("valid")]  # predicted by nothing
    n_bytes = sum(d.n_bytes for d in documents) - sum(len(corpus.tokenizer.decode([i]).encode()) for i in firsts)
    n_tokens = sum(d.n_tokens - 1 for d in documents)
    expected = n_tokens * math.log2(corpus.n_tokens) / n_bytes
    found = evaluate(model, corpus, index, config=IN_WINDOWS)
    for variant in ("on", "off", "random"):
        assert found.bits_per_byte(variant)["value"] == pytest.approx(expected, rel=1e-6)
    assert found.gain("off")["value"] == 0


def test_on_is_off_bit_for_bit_when_there_are_no_neighbors(index, evaluation):
    model, corpus, offsets = model_of(index), index.corpus, evaluation.offsets
    none = np.full((len(offsets), 2), -1)
    options = (windows(corpus, WINDOW, WINDOW // 2), 8, "cpu", "test")
    without = losses(model, corpus, index, None, *options)
    assert np.array_equal(losses(model, corpus, index, none, *options), without)
    assert np.array_equal(evaluation.nats["off"], without)
    assert not np.array_equal(evaluation.nats["on"], without), "neighbors are ignored"
    assert not np.array_equal(evaluation.nats["on"], evaluation.nats["random"])


def test_random_neighbors_are_the_mean_of_shuffles_and_never_those_of_an_unfinished_chunk(index, evaluation):
    model, corpus, offsets = model_of(index), index.corpus, evaluation.offsets
    is_whole = offsets + CHUNK_LEN <= corpus.ends_of(offsets)
    assert is_whole.sum() == len(offsets) - 1, "the text ends with a chunk"
    neighbors = np.where(is_whole[:, None], evaluation.neighbors[:, :2], -1)
    options = (windows(corpus, WINDOW, WINDOW // 2), 8, "cpu", "test")
    rng, documents = np.random.default_rng(0), corpus.document_of(offsets)
    chunks = [others_drawn(is_whole, documents, rng) for _ in range(3)]
    shuffles = [of_others(neighbors, of_shuffle, documents, rng) for of_shuffle in chunks]
    drawn = [losses(model, corpus, index, shuffle, *options) for shuffle in shuffles]
    assert not np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[1], drawn[2])
    np.testing.assert_allclose(evaluation.nats["random"], sum(drawn) / 3, rtol=1e-12)
    assert evaluation.n_shuffles == evaluation.summary()["n_shuffles"] == 3
    once = evaluate(model, corpus, index, config=dataclasses.replace(IN_WINDOWS, n_shuffles=1), others=("random",))
    assert np.array_equal(once.nats["random"], drawn[0]) and once.n_shuffles == 1
    assert evaluate(model, corpus, index, config=IN_WINDOWS, others=()).summary()["n_shuffles"] == 0
    with pytest.raises(ValueError, match="n_shuffles=0 is not at least 1"):
        dataclasses.replace(IN_WINDOWS, n_shuffles=0)


@pytest.mark.parametrize("stride", [CHUNK_LEN, 2 * CHUNK_LEN, WINDOW])
def test_each_token_is_scored_once_with_the_context_that_the_stride_leaves_it(index, stride):
    model, corpus = model_of(index), index.corpus
    found = evaluate(model, corpus, index, config=EvaluateConfig(window=WINDOW, stride=stride))
    (number,) = corpus.split("valid")
    start, end = int(corpus.starts[number]), int(corpus.starts[number + 1])
    expected = np.zeros(end - start)
    # One window for each token: the first that holds it.
    for i in range(1, end - start):
        first = max(0, math.ceil((i - WINDOW) / stride)) * stride
        assert i <= WINDOW or i - first >= WINDOW - stride
        tokens = torch.from_numpy(corpus.tokens[start + first : start + i].astype(np.int64))[None]
        n_chunks = tokens.shape[1] // CHUNK_LEN
        u = first // CHUNK_LEN
        ret = torch.from_numpy(index.values(found.neighbors[u : u + n_chunks, :2]))[None]
        with torch.no_grad():
            logits = model(tokens, ret if n_chunks else None)[0, -1]
        expected[i] = F.cross_entropy(logits, torch.tensor(int(corpus.tokens[start + i])))
        if i > 2.5 * WINDOW:
            break
    np.testing.assert_allclose(found.nats["on"][: i + 1], expected[: i + 1], rtol=1e-4, atol=1e-5)
    assert (found.nats["on"][1:] > 0).all() and found.nats["on"][0] == 0


def test_windows_are_as_many_at_once_as_a_vocabulary_allows_and_no_figure_changes(index, monkeypatch):
    model, corpus, shapes = model_of(index), index.corpus, []
    model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    cut = windows(corpus, WINDOW, WINDOW)

    def measured(batch_size, at_once):
        monkeypatch.setattr("retro.evaluation.windows.LOGITS_ON_A_CPU", at_once * WINDOW * corpus.n_tokens)
        shapes.clear()
        return losses(model, corpus, index, None, cut, batch_size, "cpu", "off")

    expected = measured(3, 100)
    assert max(n for n, _ in shapes) == 3
    np.testing.assert_allclose(measured(100, 2), expected, rtol=1e-5, atol=1e-5)
    assert max(n for n, _ in shapes) == 2 and len(shapes) == -(len(cut) // -2)
    np.testing.assert_allclose(measured(100, 0), expected, rtol=1e-5, atol=1e-5)
    assert len(shapes) == len(cut), "one at least"


def test_random_neighbors_come_from_another_document_or_else_from_earlier_text():
    rng = np.random.default_rng(0)
    numbers = np.array([0, 1, 2, -1, 4, 5, 6, 7])  # of chunks; each has its own number as a neighbor, one has none
    neighbors = np.stack([numbers, np.where(numbers < 0, -1, numbers + 10)], axis=1)
    documents = np.array([3, 3, 3, 3, 3, 4, 4, 5])
    retrieves = numbers >= 0

    def shuffled(documents):
        return of_others(neighbors, others_drawn(retrieves, documents, rng), documents, rng)

    drawn = np.stack([shuffled(documents) for _ in range(300)])  # (300, c, K)
    assert (drawn[:, 3] == -1).all() and (np.delete(drawn, 3, axis=1) >= 0).all()
    assert (np.delete(drawn, 3, axis=1)[..., 1] == np.delete(drawn, 3, axis=1)[..., 0] + 10).all(), "torn apart"
    found = [set(drawn[:, chunk, 0].tolist()) for chunk in range(8)]
    first, second = {0, 1, 2, 4}, {5, 6}
    assert found == [second | {7}] * 3 + [{-1}] + [second | {7}] + [first | {7}] * 2 + [first | second]
    # Of a single document only earlier chunks' are drawn: a later one was retrieved with text still to be predicted.
    one = np.stack([shuffled(np.zeros(8, dtype=int))[:, 0] for _ in range(300)])
    found = [set(one[:, chunk].tolist()) for chunk in range(8)]
    assert found == [{-1}, {0}, {0, 1}, {-1}, {0, 1, 2}, {0, 1, 2, 4}, {0, 1, 2, 4, 5}, {0, 1, 2, 4, 5, 6}]
    assert others_drawn(retrieves[:1], documents[:1], rng).tolist() == [-1]
    assert others_drawn(retrieves[3:4], documents[:1], rng).tolist() == [-1]
    # Chunk 1 found nothing, so that it gets nothing; chunk 2, for which it was drawn, gets those of 0, the only other.
    found = of_others(neighbors[[0, 3, 5]], np.array([1, 2, 1]), np.array([0, 0, 1]), rng)
    assert found.tolist() == [[5, 15], [-1, -1], [0, 10]]


def test_only_chunks_that_are_read_retrieve_and_no_figure_changes(index, of_two, monkeypatch):
    """Where some windows of a long text are evaluated, most of its chunks are read by nobody."""
    model, asked, nearest_at = model_of(index), [], RetroIndex.nearest_at

    def counted(self, offsets, *others):
        asked.append(len(offsets))
        return nearest_at(self, offsets, *others)

    monkeypatch.setattr(RetroIndex, "nearest_at", counted)
    for corpus, stride, n_windows, n_shuffles in (
        (index.corpus, None, 1, 3),
        (index.corpus, WINDOW, 2, 1),
        (of_two, None, 1, 1),
        (of_two, WINDOW, 1, 1),
        (of_two, WINDOW, None, 1),
    ):
        config = EvaluateConfig(1, WINDOW, stride, n_windows, n_shuffles)
        asked.clear()
        options = {"config": config, "against": ("in-context",)}
        few, n_few = evaluate(model, corpus, index, **options), sum(asked)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("retro.evaluate.are_asked_for", lambda offsets, *_: np.ones(len(offsets), dtype=bool))
            every = evaluate(model, corpus, index, **options)
        n, n_documents = len(every.offsets), len(corpus.split("valid"))
        assert sum(asked) - n_few == n
        n_read = n_documents * (n_windows or n) * (WINDOW // CHUNK_LEN + 1) * (1 + n_shuffles)
        assert n_few <= min(n_read, n) and (n_few < n) == (n_windows is not None)
        assert few.summary() == every.summary() and np.isnan(few.overlap).sum() == n - n_few


def test_what_a_chunk_could_copy_is_counted_where_it_reads():
    """A chunk that begins its window has no chunk before it whose neighbors it could read."""
    assert by_hand().summary()["copyable_tokens"] == {"2 tokens": 0.5}
    each_in_its_own = dataclasses.replace(by_hand(), window=2, stride=2)
    assert each_in_its_own.summary()["copyable_tokens"] == {}


def test_the_longest_common_run_is_that_of_a_brute_force_search(monkeypatch):
    monkeypatch.setattr("retro.search.chunks.TOKENS_AT_ONCE", 7 * 4 * 12)  # seven chunks at once, and one at last
    rng = np.random.default_rng(0)
    chunks, values = rng.integers(0, 3, (50, 6)), rng.integers(0, 3, (50, 4, 12))
    chunks[rng.random(chunks.shape) < 0.05] = -1
    values[rng.random(values.shape) < 0.05] = -1

    def brute_force(chunk, rows):
        best = 0
        for i in range(len(chunk)):
            for j in range(i + 1, len(chunk) + 1):
                part = tuple(chunk[i:j])
                for row in rows:
                    if -1 not in part and any(tuple(row[k : k + j - i]) == part for k in range(len(row))):
                        best = max(best, j - i)
        return best

    expected = [brute_force(chunk, rows) for chunk, rows in zip(chunks, values, strict=True)]
    assert longest_common_run(chunks, values).tolist() == expected
    assert len(set(expected)) > 3, "the cases are all alike"
    long = np.arange(300)
    assert longest_common_run(long[None], long[None, None, 1:]).tolist() == [299], "longer than a byte can count"


def test_leakage_and_copyable_tokens_of_text_that_was_planted(plays, index):
    corpus = index.corpus
    stolen = corpus.text(int(corpus.starts[1]) + 5 * CHUNK_LEN, 3 * CHUNK_LEN)  # three whole chunks of the database
    ids = corpus.tokenizer.encode(stolen)
    tokens = np.asarray(ids[: 3 * CHUNK_LEN], dtype=np.int32)
    planted = Corpus(tokens, [DocumentEntry("new", "0", len(stolen.encode()), len(tokens))], 0, corpus.tokenizer)
    found = evaluate(model_of(index), planted, index, config=IN_WINDOWS)
    assert found.overlap.tolist() == [1, 1, 1]
    # The first chunk reads nothing; the others read the chunk before them with its continuation: themselves.
    assert found.copyable_tokens.tolist() == [0, CHUNK_LEN, CHUNK_LEN]
    # Of a last chunk that is shorter, r(C) is over its own length.
    entry = DocumentEntry("new", "0", len(stolen.encode()), len(tokens) - 5)
    shorter = Corpus(tokens[:-5], [entry], 0, corpus.tokenizer)
    assert evaluate(model_of(index), shorter, index, config=IN_WINDOWS).overlap.tolist()[:2] == [1, 1]


def test_overlap_is_that_with_ten_neighbors_over_the_length_of_the_chunk(index, evaluation):
    corpus, ends = index.corpus, [*evaluation.offsets[1:].tolist(), index.corpus.end_of_valid]
    chunks = [corpus.tokens[a:b].tolist() for a, b in zip(evaluation.offsets.tolist(), ends, strict=True)]

    def overlap(chunk, neighbors):
        values = (value[value >= 0].tolist() for value in index.values(neighbors))
        runs = (SequenceMatcher(None, chunk, value, autojunk=False).find_longest_match().size for value in values)
        return max(runs) / len(chunk)

    of_ten, of_two = (
        [overlap(chunk, row[:k]) for chunk, row in zip(chunks, evaluation.neighbors, strict=True)] for k in (10, 2)
    )
    assert evaluation.overlap.tolist() == of_ten != of_two
    assert len(chunks[-1]) < CHUNK_LEN and of_ten[-1] > 0


def test_a_held_out_document_is_measured_as_if_it_were_the_only_one(plays, index):
    entries = [DocumentEntry(str(n), str(n), n, n) for n in (4, 6, 2, 9)]
    corpus = Corpus(np.zeros(21, dtype=np.int32), entries, 1, CharTokenizer("a"))
    # Tokens 4 to 9, 10 and 11, and 12 to 20 are held out; the last of each is predicted, but not read.
    assert windows(corpus, 4, 2) == [(4, 8, 5), (6, 9, 9), (10, 11, 11), (12, 16, 13), (14, 18, 17), (16, 20, 19)]
    spans, tokens = [(3000, 3150), (100, 117), (5000, 5077)], index.corpus.tokens
    texts = [tokens[a:b].astype(np.int32) for a, b in spans]
    entries = [DocumentEntry(str(i), str(i), 3 * len(text), len(text)) for i, text in enumerate(texts)]
    model = model_of(index)

    def nats(*some):
        chosen = Corpus(np.concatenate([texts[i] for i in some]), [entries[i] for i in some], 0, index.corpus.tokenizer)
        return evaluate(model, chosen, index, config=IN_WINDOWS, others=("off",)).nats

    together, alone = nats(0, 1, 2), [nats(i) for i in range(3)]
    for name in ("on", "off"):
        expected = np.concatenate([one[name] for one in alone])
        np.testing.assert_allclose(together[name], expected, rtol=1e-4, atol=1e-5)


def by_hand() -> Evaluation:
    """Two documents of two chunks of two tokens each, with losses of whole bits."""
    entries = [DocumentEntry("a", "a", 4, 4), DocumentEntry("b", "b", 4, 4)]
    corpus = Corpus(np.zeros(8, dtype=np.int32), entries, 0, CharTokenizer("ab"))
    bits = {"on": [0, 1, 2, 2, 0, 3, 4, 4], "off": [0, 2, 2, 4, 0, 3, 4, 2]}
    nats = {name: np.array(values) * math.log(2) for name, values in bits.items()}
    n_bytes = np.array([0, 1, 1, 1, 0, 1, 2, 2.0])
    manifest = dict.fromkeys(DATABASE_FIELDS, 0) | {"retriever": "bert", "rerank_by": "overlap"}
    index = type("Index", (), {"chunk_len": 2, "corpus": corpus, "manifest": manifest | {"chunk_len": 2}})()
    none = np.full((4, 10), -1)
    return Evaluation(
        corpus, index, 2, 4, 4, nats, n_bytes, np.array([0, 2, 4, 6]), none, none, np.array([0, 0.5, 0.25, 1]),
        np.array([0, 2, 0, 1]), 0,
    )  # fmt: skip


def test_the_figures_are_those_worked_out_by_hand():
    summary = by_hand().summary()
    # on: 1+2+2 + 3+4+4 = 16 bits over 3 + 5 = 8 bytes; off: 2+2+4 + 3+4+2 = 17 bits.
    assert summary["bits_per_byte"]["on"]["value"] == pytest.approx(2.0)
    assert summary["bits_per_byte"]["off"]["value"] == pytest.approx(17 / 8)
    assert summary["gain"]["over off"]["value"] == pytest.approx(1 / 8)
    # 3 bits over 3 bytes gained in a, -2 over 5 in b: residuals 3 - 3/8 = 21/8 and -2 - 5/8 = -21/8, shares 3/8 and
    # 5/8, so V = (21/8)^2 * (8/5 + 8/3) / 8^2 = 0.459375. Worth 8^2 / (3^2 + 5^2) = 32/17 documents: 15/17 degrees.
    reach = student.ppf(0.975, 15 / 17) * math.sqrt(0.459375)
    gain = summary["gain"]["over off"]
    assert (gain["low"], gain["high"]) == pytest.approx((1 / 8 - reach, 1 / 8 + reach))
    assert gain["verdict"] == "undecided" and (gain["n_documents"], gain["n_seeds"]) == (2, 1)
    assert summary["n_effective_documents"] == pytest.approx(32 / 17) and summary["n_seeds"] == 1
    assert summary["by_document"]["on"] == pytest.approx([5, 11]) and summary["by_document"]["bytes"] == [3, 5]
    rows = {row["alpha"]: row for row in summary["filtered"]}
    # r(C) is 0, 0.5 in a and 0.25, 1 in b. Up to 12.5%: chunk 0 alone, 1 bit over 1 byte (off: 2).
    assert rows[0.125]["n_chunks"] == 1 and rows[0.125]["bits_per_byte"] == pytest.approx({"on": 1, "off": 2})
    assert rows[0.125]["gain"]["over off"] == {
        "value": pytest.approx(1), "low": None, "high": None, "n_documents": 1, "n_seeds": 1, "p": None,
        "verdict": "undecided",
    }  # fmt: skip
    assert rows[0.125]["n_documents"] == 1 and rows[0.25]["n_documents"] == 2
    # Up to 25%: chunks 0 and 2, 1 + 3 bits over 1 + 1 bytes (off: 2 + 3).
    assert rows[0.25]["n_chunks"] == 2 and rows[0.25]["bits_per_byte"] == pytest.approx({"on": 2, "off": 2.5})
    # Up to 50%: chunks 0, 1, 2: 1 + 4 + 3 bits over 1 + 2 + 1 bytes (off: 2 + 6 + 3).
    assert rows[0.5]["bits_per_byte"] == pytest.approx({"on": 2, "off": 11 / 4})
    assert rows[0.5]["share_of_bytes"] == pytest.approx(4 / 8)
    assert rows[1.0]["n_chunks"] == 4 and rows[1.0]["bits_per_byte"]["on"] == pytest.approx(2.0)
    assert json.loads(json.dumps(summary)) == summary


def test_a_verdict_counts_the_gains_of_its_table():
    one, evaluation = by_hand().summary(), by_hand()
    on, off = evaluation.nats["on"], evaluation.nats["off"]
    three = dataclasses.replace(evaluation, nats=evaluation.nats | {"random": off, "baseline": off}).summary()
    alone = one["gain"]["over off"]["p"]
    assert 0 < alone < 1 and alone == judged({"": saved_bits(one, "off", one)})[""]["p"]
    assert {gain["p"] for gain in three["gain"].values()} == {min(1, 3 * alone)}
    # A gain of 1 bit for each byte, in both documents alike.
    sure = dataclasses.replace(evaluation, nats={"on": on, "off": on + evaluation.n_bytes * math.log(2)}).summary()
    assert sure["gain"]["over off"]["verdict"] == "yes"


def test_the_evaluations_of_two_seeds_are_joined_into_one():
    first, other = by_hand(), by_hand()
    # The other model gains 1 bit more in each document: 4 and -1 instead of 3 and -2, so 3/8 over 8 bytes, not 1/8.
    extra = np.array([0, 1, 0, 0, 0, 1, 0, 0]) * math.log(2)
    other = dataclasses.replace(other, nats=other.nats | {"off": other.nats["off"] + extra})
    found = joined([first.summary(), other.summary()])
    gain = found["gain"]["over off"]
    assert found["n_seeds"] == gain["n_seeds"] == 2 and gain["n_documents"] == 2
    assert gain["value"] == pytest.approx(2 / 8) and found["bits_per_byte"]["off"]["value"] == pytest.approx(18 / 8)
    # Documents: 3.5 and -1.5 bits, residuals 3.5 - 3/4 = 2.75 and -2.75, V = 2.75^2 * (8/5 + 8/3) / 64. Seeds: 1/8 and
    # 3/8 have the variance 1/32, half of it is that of their mean, with one degree of freedom.
    documents = student.ppf(0.975, 15 / 17) ** 2 * 2.75**2 * (8 / 5 + 8 / 3) / 64
    seeds = student.ppf(0.975, 1) ** 2 / 64
    assert gain["high"] - gain["value"] == pytest.approx(math.sqrt(documents + seeds))
    row = found["filtered"][-1]
    assert row["gain"]["over off"]["high"] == pytest.approx(gain["high"]) and row["n_chunks"] == 4
    # Up to r(C) = 25%: chunks 0 and 2, off - on of 1 + 0 bits, and 2 + 1 of the other, over 2 bytes.
    assert found["filtered"][1]["gain"]["over off"]["value"] == pytest.approx((1 / 2 + 3 / 2) / 2)
    assert json.loads(json.dumps(found)) == found
    assert "2 documents (worth 1.9 of equal size) and 2 seeds of the weights" in table(found)
    with pytest.raises(ValueError, match="more than the seed cannot be joined; these: stride, bytes"):
        changed = dataclasses.replace(other, stride=2, n_bytes=other.n_bytes + 1)
        joined([first.summary(), changed.summary()])


def test_a_table_says_how_many_documents_seeds_and_shuffles_stand_behind_it(evaluation):
    summary = evaluation.summary()
    lines = table(summary).splitlines()
    said = "behind each number: 1 document and 1 seed of the weights; random neighbors: the mean of 3 shuffles"
    assert said in lines
    two = by_hand().summary()
    assert "behind each number: 2 documents (worth 1.9 of equal size) and 1 seed of the weights" in table(two)
    rows = [line.split() for line in table(two).splitlines() if line.startswith(("12.5%", "100.0%"))]
    assert [row[:3] for row in rows] == [["12.5%", "1", "1"], ["100.0%", "4", "2"]]  # r(C), chunks, documents
    p = two["filtered"][-1]["gain"]["over off"]["p"]
    assert rows[0][-2:] == ["–", "undecided"] and rows[1][-2:] == [f"{p:.4f}", "undecided"]


def test_a_plot_shows_what_is_gained_in_the_color_of_what_it_is_gained_over(tmp_path, monkeypatch):
    pyplot = pytest.importorskip("matplotlib.pyplot", reason="the plot needs it: pip install matplotlib")
    drawn = []
    monkeypatch.setattr(pyplot, "close", drawn.append)
    summary = by_hand().summary()
    plot(summary | {"bits_per_byte": {"off": summary["bits_per_byte"]["off"]}}, tmp_path / "one.png")
    (alone,) = drawn.pop().axes[0].lines
    plot(summary, tmp_path / "few.png")
    assert alone.get_color() == drawn[0].axes[0].lines[1].get_color(), "in every plot"
    bits, gain = {f"way {i}": i / 8 for i in range(11)}, {"value": 0.1, "low": 0.0, "high": 0.2}
    rows = [{"alpha": a, "n_chunks": 1, "bits_per_byte": bits, "gain": {"over way 7": gain}} for a in (0.5, 1.0)]
    plot({"bits_per_byte": bits, "gain": {"over way 7": gain}, "filtered": rows}, tmp_path / "many.png", bits)
    for figure, n in zip(drawn, (len(by_hand().nats), 11), strict=True):
        left, right = figure.axes
        colors = {line.get_label(): line.get_color() for line in left.lines}
        assert len(set(colors.values())) == len(colors) == n
        gains = {name: line.get_color() for line in right.lines if (name := line.get_label()).startswith("over ")}
        assert gains and all(color == colors[name.removeprefix("over ")] for name, color in gains.items())
        assert bool(figure.legends) == (left.get_legend() is None) == (n == 11), "beside, where there are many"


def test_in_a_narrow_terminal_tables_lose_columns_and_no_line_is_broken_in_a_word(evaluation, monkeypatch, capsys):
    summary = evaluation.summary()
    of_one = {"operations": 1e9, "seconds": 1, "weights": 1e9, "kept": 1e9, "searched": 1e9}
    whole = table(summary := summary | {"costs": dict.fromkeys(VARIANTS, of_one)})
    assert max(map(len, whole.splitlines())) > 100 and table(summary, 500) == whole
    narrow = table(summary, 80)
    rows = [line for line in narrow.splitlines()[3:] if re.search(r"\S {2,}\S", line)]
    assert len(rows) > 15 and max(map(len, rows)) <= 80
    gain, shown = summary["gain"]["over off"], next(row for row in rows if row.startswith("retrieval off"))
    assert f"{gain['value']:+.4f}" in shown and shown.endswith(gain["verdict"])
    (of_overlap,) = (row for row in rows if row.startswith("r(C) up to"))
    assert of_overlap.split()[3:] == ["chunks", "on", "off", "random", "baseline", "gain", "over", "off", "gain?"]
    monkeypatch.setattr("retro.progress.terminal_width", lambda: 80)
    note("   " + "an indented command " * 8 + "\n" + narrow)
    indented, *lines = capsys.readouterr().out.splitlines()
    assert len(indented) > 80 >= max(map(len, lines))
    assert " ".join(lines).split() == narrow.split(), "nothing is lost"


@pytest.mark.parametrize("name", ["char", "bpe:300"])
def test_bytes_are_those_of_the_text_in_utf8(tmp_path, name):
    text = "naïve café, 3 € — 日本語 🎭 " * 4
    (tmp_path / "a.txt").write_text(text)
    corpus = held_out_texts([tmp_path / "a.txt"], train_tokenizer(name, [text]))
    n_bytes = predicted_bytes(corpus)
    first = corpus.tokenizer.n_bytes[corpus.tokens[0]]
    assert n_bytes.sum() == len(text.encode()) - first and n_bytes[0] == 0
    assert corpus.tokenizer.n_bytes[corpus.tokens].sum() == len(text.encode())


def test_a_tokenizer_that_loses_text_still_counts_all_of_its_bytes(tmp_path):
    tokenizer = CharTokenizer("ab")
    corpus = Corpus(np.array([0, 1, 1, 0], dtype=np.int32), [DocumentEntry("a", "a", 8, 4)], 0, tokenizer)
    # Four tokens of one byte each stand for eight bytes: two each, but for the first, which nothing predicts.
    assert predicted_bytes(corpus).tolist() == [0, 2, 2, 2]


def test_documents_that_were_seen_are_refused_by_their_text_and_not_by_their_name(plays, index, tmp_path):
    corpus = index.corpus
    require_held_out(corpus, corpus)
    seen = corpus.documents[0].name
    (tmp_path / "copy.md").write_text((plays / seen).read_text() + "!")
    with pytest.raises(SeenText, match=rf"copy\.md is {seen}, or nearly"):
        evaluate(model_of(index), held_out_texts([tmp_path / "copy.md"], corpus.tokenizer), index, config=IN_WINDOWS)
    (tmp_path / seen).write_text("Another text, which happens to have the name of a play.")
    require_held_out(held_out_texts([tmp_path / seen], corpus.tokenizer), corpus)
    with pytest.raises(ValueError, match="nothing to predict"):
        (tmp_path / "one.md").write_text("a")
        held_out_texts([tmp_path / "one.md"], corpus.tokenizer)


def test_no_part_of_a_file_is_held_out_from_another_part_of_it(plays, tmp_path):
    """A corpus of one document holds out its end; the whole file is nearly what it trains on."""
    file = plays / "hamlet.md"
    halves = build_corpus([file], tmp_path / "halves", "char")
    require_held_out(halves, halves)
    with pytest.raises(ValueError, match=r"hamlet\.md is hamlet\.md \[train\], or nearly"):
        require_held_out(held_out_texts([file], halves.tokenizer), halves)
    (tmp_path / "new.md").write_text("Ω")
    with pytest.raises(ValueError, match=r"new\.md: 'Ω' \(character 0 of the text\)"):
        held_out_texts([tmp_path / "new.md"], halves.tokenizer)


def test_what_cannot_be_compared_is_refused(index):
    with pytest.raises(ValueError, match="no retrieval to measure"):
        evaluate(model_of(index, ca_layers=()), index.corpus, index, config=IN_WINDOWS)
    with pytest.raises(ValueError, match=r"the baseline reads neighbors in layers \(1,\)"):
        evaluate(model_of(index), index.corpus, index, config=IN_WINDOWS, baseline=model_of(index))
    corpus = index.corpus
    everything = Corpus(corpus.tokens, corpus.documents, len(corpus.documents), corpus.tokenizer)
    with pytest.raises(ValueError, match="no validation documents"):
        evaluate(model_of(index), everything, index, config=IN_WINDOWS)


def test_a_decoder_with_the_same_seed_starts_the_same_with_and_without_retrieval(index):
    with_retrieval, without = model_of(index).state_dict(), model_of(index, ca_layers=()).state_dict()
    assert len(without) > 20 and set(without) < set(with_retrieval)
    assert all(torch.equal(weight, with_retrieval[name]) for name, weight in without.items())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": WINDOW + 1}, f"window={WINDOW + 1} is not a positive multiple of chunk_len={CHUNK_LEN}"),
        ({"window": WINDOW, "stride": 2 * WINDOW}, f"stride={2 * WINDOW} is not .* up to {WINDOW}"),
        ({"window": WINDOW, "stride": 0}, "stride=0"),
        ({"n_neighbors": 0}, "n_neighbors=0"),
    ],
)
def test_odd_lengths_are_refused(index, options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(model_of(index), index.corpus, index, config=EvaluateConfig(**options))


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """A working folder with data, a run and a baseline without retrieval."""
    place = tmp_path_factory.mktemp("runs")
    shutil.copytree(data, place / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        with_retrieval, _ = train(config=CONFIG, model_shape=SHAPE, device="cpu")
        without, _ = train(config=CONFIG, model_shape={**SHAPE, "ca_layers": ()}, device="cpu", name="baseline")
    return place, place / with_retrieval, place / without


def test_one_command_evaluates_a_run_on_new_text_with_another_database(runs, plays, tmp_path, monkeypatch, capsys):
    place, run, baseline = runs
    monkeypatch.chdir(place)
    latest = [str(folder.parent.relative_to(place)) for folder in (run, baseline)]  # logs/NAME stands for its run
    assert main(["evaluate", "--run", latest[0], "--baseline", latest[1]]) == 0
    assert "retrieval on" in capsys.readouterr().out
    out = run / "evaluation"
    first = read_manifest(out / "evaluation.json")
    assert set(first["bits_per_byte"]) == {"on", "off", "random", "baseline"}
    assert (out / "filtered.png").read_bytes().startswith(b"\x89PNG")
    assert first["baseline_differs"] == []
    longer, _ = train(resume=baseline, config=dataclasses.replace(CONFIG, steps=CONFIG.steps + 1), device="cpu")
    unlike = ["--run", str(run), "--baseline", str(longer), "--out", str(tmp_path / "unlike")]
    in_context = ["--against", "in-context", "--window", str(12 * CHUNK_LEN), "--n-windows", "1"]
    capsys.readouterr()
    assert main(["evaluate", *unlike, *in_context]) == 0
    costs = read_manifest(tmp_path / "unlike" / "evaluation.json")["costs"]
    assert set(costs) == {"on", "off", "baseline", "in-context"}
    assert costs["in-context"]["weights"] == costs["baseline"]["weights"] < costs["on"]["weights"]
    assert (tmp_path / "unlike" / "costs.png").read_bytes().startswith(b"\x89PNG")
    said = capsys.readouterr().out
    assert "a generated token" in said
    assert f"continues_step={CONFIG.steps}, but continues_step=None is wanted" in said

    # A database of other documents, in the words of the run's tokenizer, with all of them in it.
    new = tmp_path / "new"
    new.mkdir()
    (new / "new.md").write_text((plays / first["documents"][0]).read_text()[3000:6000])
    shutil.copy(plays / first["documents"][0], tmp_path / "added.md")
    command = [str(plays / "hamlet.md"), str(tmp_path / "added.md"), "--valid-fraction", "0"]
    shape = ["--chunk-len", str(CHUNK_LEN), "--data-path", str(tmp_path / "db")]
    assert main(["database", *command, *shape, "--tokenizer", "data/corpus"]) == 0
    options = ["--run", str(run), str(new), "--database", str(tmp_path / "db"), "--n-neighbors", "4", "--stride", "32"]
    capsys.readouterr()
    page = tmp_path / "report.html"
    assert main(["evaluate", *options, "--out", str(tmp_path / "out"), "--report", str(page)]) == 0
    assert "new.md" in page.read_text() and "hamlet.md" in page.read_text()
    assert f"{run} · {CONFIG.steps} steps · {date.today():%-d %B %Y}" in page.read_text()
    second = read_manifest(tmp_path / "out" / "evaluation.json")
    assert second["n_neighbors"] == 4 and second["stride"] == 32 and second["documents"] == ["new.md"]
    assert second["database"]["n_documents"] == 2
    assert second["filtered"][-2]["n_chunks"] < second["n_chunks"], "a text that stands in the database has no overlap"

    # What does not fit is refused with the command that repairs it.
    def refused(*options):
        assert main(["evaluate", *options]) == 1
        return capsys.readouterr().err

    assert "is in the training text or in the database" in refused(
        "--run", str(run), "--database", str(tmp_path / "db")
    )
    chars = ["--data-path", str(tmp_path / "chars"), "--tokenizer", "char"]
    assert main(["database", *command, "--chunk-len", "32", *chars]) == 0
    assert "next: retro evaluate --run RUN TEXT" in capsys.readouterr().out
    message = refused("--run", str(run), str(new), "--database", str(tmp_path / "chars"))
    assert "chunk_len=32, but chunk_len=16 is wanted; tokenizer_sha256" in message
    assert f"--tokenizer data/corpus --valid-fraction 0 --chunk-len 16 --data-path {tmp_path / 'chars'}" in message
    assert "was trained with retrieval" in refused("--run", str(run), "--baseline", str(run))
    assert "no retrieval to measure" in refused("--run", str(baseline), str(new))
    monkeypatch.chdir(tmp_path)
    assert f"data, where {run} was made, does not exist" in refused("--run", str(run), str(new))


def test_training_needs_text_to_validate_on(plays, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(plays), "--valid-fraction", "0"]) == 1
    assert "--valid-fraction 0 leaves nothing to validate on" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
    assert main(["database", str(plays), "--valid-fraction", "1"]) == 1
    assert "--valid-fraction 1.0 is not a share" in capsys.readouterr().err


def test_a_corpus_may_hold_nothing_out_and_take_over_a_tokenizer_of_characters(plays, tmp_path):
    first = build_corpus([plays], tmp_path / "first", "char")
    second = build_corpus([plays / "hamlet.md"], tmp_path / "second", str(tmp_path / "first"), valid_fraction=0)
    assert second.tokenizer.sha256 == first.tokenizer.sha256 and second.n_train == len(second.documents) == 1
    assert second.train == (plays / "hamlet.md").read_text()


def test_a_model_may_be_measured_with_any_number_of_neighbors(index):
    found = {k: evaluate(model_of(index), index.corpus, index, config=EvaluateConfig(k, WINDOW)) for k in (1, 2, 12)}
    assert np.array_equal(found[1].nats["off"], found[12].nats["off"])
    assert len({f.bits_per_byte("on")["value"] for f in found.values()}) == 3
    assert found[12].neighbors.shape[1] == 12 and np.array_equal(found[12].overlap, found[1].overlap)


def test_an_evaluation_without_room_for_a_neighbor_has_neither_copyable_tokens_nor_overlap(index, tmp_path):
    (tmp_path / "short.md").write_text("Short.")
    found = evaluate(model_of(index), held_out_texts([tmp_path / "short.md"], index.corpus.tokenizer), index)
    summary = found.summary()
    assert summary["copyable_tokens"] == {} and summary["gain"]["over off"]["value"] == 0
    assert "retrieval on" in table(summary)


def test_the_index_may_be_another_than_in_training(index, evaluation, data, bert):
    again = RetroIndex(CHUNK_LEN, data_path=data, bert=bert)
    again.dense.index = faiss.read_index(str(data / "retro.index"))  # in memory; the other is mapped from its file
    again.index.remove_ids(np.unique(evaluation.neighbors[:, 0]))  # nobody's nearest neighbor is left
    other = evaluate(model_of(index), index.corpus, again, config=IN_WINDOWS)
    assert not np.isin(other.neighbors, evaluation.neighbors[:, 0]).any() and (other.neighbors >= 0).all()
    assert np.array_equal(other.nats["off"], evaluation.nats["off"])
    assert not np.array_equal(other.nats["on"], evaluation.nats["on"])
