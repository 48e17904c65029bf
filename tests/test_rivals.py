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
from retro.evaluation.rivals import RIVALS, pieces, rival_losses
from retro.evaluation.windows import losses, windows
from retro.text.corpus import Corpus

M, K, WINDOW, STRIDE = CHUNK_LEN, 2, 8 * CHUNK_LEN, 6 * CHUNK_LEN
CONFIG = EvaluateConfig(n_neighbors=K, window=WINDOW, stride=STRIDE, n_windows=3, batch_size=5)


def roomy(index, most):
    """A model that reads up to `most` chunks, or as many as a window has."""
    model = model_of(index)
    model.max_chunks = most
    return model


@pytest.mark.parametrize("most", [None, 9, 40])
@pytest.mark.parametrize("rival", RIVALS)
def test_a_rivals_losses_are_those_of_a_loop_over_tokens(index, rival, most):
    model, corpus = roomy(index, most), index.corpus
    found = evaluate(model, corpus, index, config=CONFIG, others=("off",), against=(rival,))
    (number,) = corpus.split("valid")
    start, all_tokens = int(corpus.starts[number]), corpus.tokens.tolist()
    room = (most or WINDOW // M) * M
    n_read = 0
    for i in range(1, 2 * WINDOW + 3):
        first = max(0, math.ceil((i - WINDOW) / STRIDE)) * STRIDE  # of the window that scores this token
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


@pytest.mark.parametrize("rival", RIVALS)
def test_no_rival_sees_a_token_that_it_has_yet_to_predict(index, rival):
    model, corpus = roomy(index, 40), index.corpus
    found = evaluate(model, corpus, index, config=CONFIG, others=())
    read, cut = found.neighbors[:, :K], windows(corpus, WINDOW, STRIDE, 3)
    before = rival_losses(rival, model, corpus, index, read, cut, 5, "cpu")
    at = 5 * M + 3  # from here on the held-out text is another
    first = int(corpus.starts[corpus.n_train])
    tokens = np.array(corpus.tokens)
    tokens[first + at :] = np.random.default_rng(0).permutation(tokens[first + at :])
    other = Corpus(tokens, corpus.documents, corpus.n_train, corpus.tokenizer, groups=corpus.groups)
    # What was retrieved with that text: chunk 5 and those after it.
    changed = read.copy()
    changed[at // M :] = np.roll(changed[at // M :], 7, axis=0)
    after = rival_losses(rival, model, other, index, changed, cut, 5, "cpu")
    np.testing.assert_allclose(after[:at], before[:at], rtol=1e-5, atol=1e-6)
    assert not np.allclose(after[at : at + M], before[at : at + M])


@pytest.mark.parametrize("rival", ["in-context", "both"])
def test_without_neighbors_a_rival_is_the_model_alone(index, rival):
    model, corpus = roomy(index, 40), index.corpus
    cut = windows(corpus, WINDOW, STRIDE, 3)
    none = np.full((math.ceil((corpus.end_of_valid - corpus.n_train_tokens) / M), K), -1)
    alone = losses(model, corpus, index, None, cut, 8, "cpu", "off")
    found = rival_losses(rival, model, corpus, index, none, cut, 8, "cpu")
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
    with refused(InvalidOption, "--against in-context needs more than the 64 tokens that the model reads"):
        evaluate(model, index.corpus, index, config=config, against=("in-context",))
    with refused(InvalidOption, "--against in-contxt is not one of in-context, longer-context, both"):
        evaluate(model, index.corpus, index, config=config, against=("in-contxt",))
