"""Rivals: what is put before a text is what it says, for each token by itself, and never what is still to come."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CHUNK_LEN, refused
from test_evaluate import model_of

from retro.config import EvaluateConfig
from retro.errors import InvalidOption
from retro.evaluate import evaluate
from retro.evaluation import knn_lm
from retro.evaluation.knn_lm import Memory, chosen, knn_lm_losses, knn_probability, mixed
from retro.evaluation.rivals import RIVALS, pieces, rival_losses
from retro.evaluation.windows import losses, windows
from retro.text.corpus import Corpus

M, K, WINDOW, STRIDE = CHUNK_LEN, 2, 8 * CHUNK_LEN, 6 * CHUNK_LEN
IN_WORDS = RIVALS[:3]  # those that read more
CONFIG = EvaluateConfig(n_neighbors=K, window=WINDOW, stride=STRIDE, n_windows=3, batch_size=5)


def roomy(index, most):
    """A model that reads up to `most` chunks, or as many as a window has."""
    model = model_of(index)
    model.max_chunks = most
    return model


@pytest.mark.parametrize("most", [None, 9, 40])  # chunks; of 9 a window with neighbors has no room for all
@pytest.mark.parametrize("rival", IN_WORDS)
def test_a_rivals_losses_are_those_of_a_loop_over_tokens(index, rival, most):
    model, corpus = roomy(index, most), index.corpus
    found = evaluate(model, corpus, index, config=CONFIG, others=("off",), against=(rival,))
    (number,) = corpus.split("valid")
    start, all_tokens = int(corpus.starts[number]), corpus.tokens.tolist()
    room = (most or WINDOW // M) * M
    n_read = 0
    scored = {t - start: w - start for w, end, at in windows(corpus, WINDOW, STRIDE, 3) for t in range(at, end + 1)}
    for i, first in scored.items():  # `first` is where the window starts that scores this token
        nth = (i - first) // M
        before, begins = [], first
        last = min(first + (nth + 1) * M - 1, first + WINDOW)  # of the chunk, whose tokens are scored together
        if nth and rival == "longer-context":
            begins = max(0, first - 2 * M * K)
        elif nth:
            of_chunk = found.neighbors[first // M + nth - 1, :K]
            for o in reversed(of_chunk.tolist()):
                before += all_tokens[o : min(o + 2 * M, int(corpus.ends_of(o)))]
            before = before[len(before) % M :]
        while last - begins + len(before) > room and begins < first + nth * M:
            begins += M
        tokens = torch.tensor(before + all_tokens[start + begins : start + i])[None]
        ret = torch.full((1, tokens.shape[1] // M, K, 2 * M), -1)
        if rival == "both":
            n_before, u = len(before) // M, begins // M
            n_whole = tokens.shape[1] // M - n_before
            values = index.values(found.neighbors[u : u + n_whole, :K])
            ret[0, n_before : n_before + n_whole] = torch.from_numpy(values)
        with torch.no_grad():
            logits = model(tokens, ret if ret.numel() else None)[0, -1]
        expected = F.cross_entropy(logits, torch.tensor(int(corpus.tokens[start + i])))
        assert found.nats[rival][i] == pytest.approx(float(expected), rel=1e-4, abs=1e-5), i
        n_read += bool(before) or begins < first
    assert n_read > WINDOW // 2
    assert found.summary()["gain"][f"over {rival}"]["value"] is not None


@pytest.mark.parametrize("rival", IN_WORDS)
def test_no_rival_sees_a_token_that_it_has_yet_to_predict(index, rival):
    model, corpus = roomy(index, 40), index.corpus
    found = evaluate(model, corpus, index, config=CONFIG, others=())
    read, cut = found.neighbors[:, :K], windows(corpus, WINDOW, STRIDE, 3)
    before = rival_losses(rival, model, corpus, index, read, None, cut, WINDOW, STRIDE, 5, "cpu")
    first = int(corpus.starts[corpus.n_train])
    at = cut[1][0] - first + 5 * M + 3  # from here on the held-out text is another
    tokens = np.array(corpus.tokens)
    tokens[first + at :] = np.random.default_rng(0).permutation(tokens[first + at :])
    other = Corpus(tokens, corpus.documents, corpus.n_train, corpus.tokenizer, groups=corpus.groups)
    # What was retrieved with that text: chunk 5 and those after it.
    changed = read.copy()
    changed[at // M :] = np.roll(changed[at // M :], 7, axis=0)
    after = rival_losses(rival, model, other, index, changed, None, cut, WINDOW, STRIDE, 5, "cpu")
    np.testing.assert_allclose(after[:at], before[:at], rtol=1e-5, atol=1e-6)
    assert not np.allclose(after[at : at + M], before[at : at + M])


@pytest.mark.parametrize("rival", ["in-context", "both"])
def test_without_neighbors_a_rival_is_the_model_alone(index, rival):
    model, corpus = roomy(index, 40), index.corpus
    cut = windows(corpus, WINDOW, STRIDE, 3)
    none = np.full((math.ceil((corpus.end_of_valid - corpus.n_train_tokens) / M), K), -1)
    alone = losses(model, corpus, index, None, cut, 8, "cpu", "off")
    found = rival_losses(rival, model, corpus, index, none, alone, cut, WINDOW, STRIDE, 8, "cpu")
    np.testing.assert_allclose(found, alone, rtol=1e-4, atol=1e-5)
    assert (found > 0).sum() == (alone > 0).sum() > 200


def test_a_window_is_cut_into_one_for_each_chunk_and_each_token_is_scored_once(index):
    corpus = index.corpus
    cut = windows(corpus, WINDOW, STRIDE, 3)
    none = np.full((math.ceil((corpus.end_of_valid - corpus.n_train_tokens) / M), K), -1)
    found = pieces("in-context", corpus, index, none, cut, 1 << 20)
    targets = [t for p in found for t in range(p.window[2], p.window[1] + 1)]
    assert targets == [t for _, end, scored in cut for t in range(scored, end + 1)]
    assert all((p.window[1] - p.window[0]) // M == (p.window[2] - p.window[0]) // M for p in found)


def test_a_model_without_room_and_a_rival_that_there_is_not_are_named(index):
    model = roomy(index, None)
    config = EvaluateConfig(n_neighbors=2, window=4 * M)
    with refused(InvalidOption, "--against in-context would leave 0 of the 64 tokens that the model reads to the text"):
        evaluate(model, index.corpus, index, config=config, against=("in-context",))
    plain = model_of(index, ca_layers=())
    plain.max_chunks = 4
    with refused(InvalidOption, "would leave 0 of the 64 tokens"):  # of the one that goes with it
        evaluate(roomy(index, 40), index.corpus, index, config=config, baseline=plain, against=("in-context",))
    with refused(InvalidOption, "--against in-contxt is not one of in-context, longer-context, both, knn-lm"):
        evaluate(model, index.corpus, index, config=config, against=("in-contxt",))


# kNN-LM.


@pytest.mark.parametrize("shape", [{}, {"tied": True, "init_std": 0.02, "norm": "rms", "final_norm": True}])
def test_knn_lm_is_the_articles_formula(index, of_two, shape):
    model, database = model_of(index, **shape), index.corpus
    cut = windows(of_two, 64, 32)
    alone = losses(model, of_two, index, None, cut, 8, "cpu", "off")
    found = knn_lm_losses(model, of_two, index, alone, cut, 64, 32, 8, "cpu")

    def state(corpus, start, i):
        with torch.no_grad():
            captured = []
            hook = model.norm.register_forward_hook(lambda *arguments: captured.append(arguments[2][0, -1]))
            logits = model(torch.from_numpy(corpus.tokens[start:i].astype(np.int64))[None])[0, -1]
            hook.remove()
        return captured[0].double().numpy(), logits

    def first_window(start, i):
        return start + max(0, math.ceil((i - start - 64) / 32)) * 32

    keys, followed_by = [], []
    for number in database.in_database:
        start, end = int(database.starts[number]), int(database.starts[number + 1])
        for i in range(start + 1, min(end, start + 200)):
            keys.append(state(database, first_window(start, i), i)[0])
            followed_by.append(int(database.tokens[i]))
    keys, followed_by = np.array(keys), np.array(followed_by)
    memory = Memory(model, database, database.in_database, 64, 32, 8, "cpu")
    assert memory.index.ntotal == sum(d.n_tokens - 1 for d in (database.documents[i] for i in database.in_database))
    # The nearest of some states, and what they say.
    query, _ = state(of_two, 0, 40)
    target = int(of_two.tokens[40])
    distances, agrees = memory.votes(query.astype(np.float32)[None], np.array([target]), 64)
    nearest = np.sort(((keys - query) ** 2).sum(axis=1))
    assert (distances[0] <= nearest[:64] * (1 + 1e-3) + 1e-3).all(), "the loop has seen only the beginnings"
    near = np.argsort(((keys - query) ** 2).sum(axis=1))[:1]
    assert distances[0, 0] == pytest.approx(nearest[0], rel=1e-3) or distances[0, 0] < nearest[0]
    assert bool(agrees[0, 0]) == (followed_by[near[0]] == target) or distances[0, 0] < nearest[0] * 0.999
    T = 3.0
    weights = [math.exp(-float(d) / T) for d in distances[0]]
    expected = sum(w for w, a in zip(weights, agrees[0], strict=True) if a) / sum(weights)
    assert knn_probability(distances, agrees, T)[0] == pytest.approx(expected, rel=1e-5)
    # Each half with what serves the other: the whole again, from its parts.
    votes = []
    for s in (0, 150):
        of_text = [state(of_two, first_window(s, i), i)[0] for i in range(s + 1, s + 150)]
        targets = of_two.tokens[s + 1 : s + 150].astype(np.int64)
        votes.append(memory.votes(np.array(of_text, np.float32), targets, 64))
    for mine, other in ((0, 1), (1, 0)):
        of_other, of_mine = (slice(150 * half + 1, 150 * half + 150) for half in (other, mine))
        share, temperature = chosen(alone[of_other], *votes[other])
        p = share * knn_probability(*votes[mine], temperature) + (1 - share) * np.exp(-alone[of_mine])
        np.testing.assert_allclose(found[of_mine], -np.log(p), rtol=2e-3, atol=1e-3)
        assert share > 0.3, "these texts are in the database"
    assert found[0] == found[150] == 0 and found.sum() < 0.8 * alone.sum()


def test_a_share_of_nothing_is_the_model_alone_bit_for_bit():
    alone = np.array([0.3, 7.0, 0.1])
    assert mixed(alone, np.ones(3), 0.0) is alone
    # Neighbors that never agree have no say, and those that always do have as much as they may.
    distances = np.ones((3, 4), dtype=np.float32)
    assert chosen(alone, distances, np.zeros((3, 4), dtype=bool))[0] == 0
    assert chosen(alone, distances, np.ones((3, 4), dtype=bool))[0] == 0.9


def test_what_serves_a_document_is_chosen_on_others(index, of_two, monkeypatch):
    model, cut = model_of(index), windows(of_two, 64, 32)
    alone = losses(model, of_two, index, None, cut, 8, "cpu", "off")
    seen = []
    monkeypatch.setattr(knn_lm, "chosen", lambda of, *_: seen.append(of) or (0.0, 1.0))
    found = knn_lm_losses(model, of_two, index, alone, cut, 64, 32, 8, "cpu")
    assert np.array_equal(found, alone)
    assert np.array_equal(seen[0], alone[151:300]) and np.array_equal(seen[1], alone[1:150])
    with refused(InvalidOption, "--against knn-lm needs two held-out documents"):
        evaluate(model, index.corpus, index, config=CONFIG, against=("knn-lm",))
    monkeypatch.setattr(knn_lm, "memory_of_machine", lambda: 1 << 20)
    with refused(InvalidOption, r"--against knn-lm has to keep [\d,]+ states of 128 bytes, 0.0023 GB; name a smaller"):
        Memory(model, index.corpus, index.corpus.in_database, 64, 32, 8, "cpu")


def test_the_rivals_of_retrieval_are_the_baselines_if_there_is_one(index):
    model, baseline = roomy(index, 40), model_of(index, ca_layers=())
    torch.nn.init.normal_(baseline.read.weight)
    baseline.max_chunks = 40
    options = {"config": CONFIG, "others": ("off",), "against": ("in-context", "both")}
    alone = evaluate(model, index.corpus, index, **options)
    found = evaluate(model, index.corpus, index, baseline=baseline, **options)
    assert not np.allclose(found.nats["in-context"], alone.nats["in-context"], rtol=0.01)
    assert np.array_equal(found.nats["both"], alone.nats["both"])
    text = slice(0, CHUNK_LEN)  # before any neighbor is there
    np.testing.assert_allclose(found.nats["in-context"][text], found.nats["baseline"][text], rtol=1e-4, atol=1e-5)


def test_a_mistaken_rival_is_named_before_anything_is_measured(index, monkeypatch):
    monkeypatch.setattr("retro.evaluate.losses", lambda *_: pytest.fail("an hour's work"))
    for rival in ("in-contxt", "knn-lm"):
        with pytest.raises(InvalidOption, match="against"):
            evaluate(model_of(index), index.corpus, index, config=CONFIG, against=(rival,))
