from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import refused

from retro.bert_embeddings import BERTChunkEmbeddings
from retro.errors import InvalidOption


@pytest.mark.parametrize(
    ("chunk", "trimmed"),
    [
        ("s a popular programming la", "a popular programming"),
        ("  s a  b c ", "a  b"),
        ("one", "one"),
        ("two words", "two words"),
        ("", ""),
        (" \n ", " \n "),
        ("😀 😃 😄", "😃"),
    ],
)
def test_partial_words_are_stripped_where_something_is_left(chunk, trimmed):
    assert BERTChunkEmbeddings._trim_chunk(chunk) == trimmed


def test_an_embedding_is_the_mean_of_its_tokens_states_whatever_its_batch(bert):
    texts = ["To be, or not to be", "that is the question:", "Whether", "To be, or not to be", "a " * 300]
    texts += ["or not to be", "that is the question"]  # in a batch with longer ones
    together = bert(texts)
    for text, row in zip(texts, together, strict=True):
        ids = bert.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = bert.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(row, states.mean(dim=0), rtol=1e-4, atol=1e-5)


def test_each_distinct_chunk_goes_through_bert_once_beside_chunks_of_its_length(bert, monkeypatch):
    seen, forward = [], bert.model.forward

    def spy(input_ids, attention_mask):
        seen.append((tuple(input_ids.shape), attention_mask is not None))
        return forward(input_ids=input_ids, attention_mask=attention_mask)

    monkeypatch.setattr(bert.model, "forward", spy)
    texts = ["the king", "The King", "my lord", "a horse, a horse", "", "the king"]  # the BERT knows no capitals
    texts += ["a horse, my horse", "a horse, a"]
    progress = []
    bert(texts, progress=progress.append)
    assert seen == [((3, 5), True), ((2, 2), False)]
    bert(texts, batch_size=1, progress=progress.append)
    assert seen[2:] == [((1, 5), False), ((1, 5), False), ((1, 4), False), ((1, 2), False), ((1, 2), False)]
    assert sum(progress) == 2 * len(texts)


def test_real_chunks_are_embedded_in_few_shapes_and_hardly_padded(bert, plays, monkeypatch):
    text = "".join(path.read_text() for path in sorted(plays.iterdir()))
    chunks = [text[i : i + 60] for i in range(0, len(text), 60)]
    shapes, n_tokens, lengths = [], 0, set()

    def spy(input_ids, attention_mask):
        nonlocal n_tokens
        shapes.append(tuple(input_ids.shape))
        present = input_ids != 0
        n_tokens += int(present.sum())
        lengths.update(present.sum(dim=1).tolist())
        return SimpleNamespace(last_hidden_state=torch.zeros(*input_ids.shape, bert.d_emb))

    monkeypatch.setattr(bert.model, "forward", spy)
    for some in (chunks, chunks[::2], chunks[1::2]):
        bert(some)
    assert sum(n * length for n, length in shapes) < 1.25 * n_tokens
    assert len(set(shapes)) <= len(lengths) + 3  # one for each length, and where each call ends


def test_bf16_keeps_directions_and_neighbors(bert, plays):
    text = "".join(path.read_text() for path in sorted(plays.iterdir()))
    chunks = [text[i : i + 60] for i in range(0, len(text), 60)]
    rounded_bert = BERTChunkEmbeddings("cpu", trim=False, precision="bf16")
    exact, rounded = bert(chunks), rounded_bert(chunks)
    assert (
        rounded_bert.manifest["embedder_sha256"] != bert.manifest["embedder_sha256"] and rounded.dtype == torch.float32
    )
    assert F.cosine_similarity(exact, rounded).min() >= 0.9996

    def mean_exact_distance(embeddings):
        distances = torch.cdist(embeddings[::5], embeddings)  # a chunk is its own nearest
        found = distances.topk(3, largest=False).indices[:, 1:]
        return (exact[found] - exact[::5, None]).square().sum(-1).mean()

    assert mean_exact_distance(rounded) <= 1.005 * mean_exact_distance(exact)


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="precision='fp8' is not one of auto, fp32, bf16"):
        BERTChunkEmbeddings("cpu", precision="fp8")


def test_text_without_bert_tokens_gets_a_finite_embedding(bert):
    embeddings = bert(["", "   ", "\u200b", "\x00", "word", "😀"])
    assert embeddings.shape == (6, 384) and embeddings.isfinite().all()
    assert (embeddings[:4] == 0).all() and embeddings[4].norm() > 1
    assert bert([]).shape == (0, 384)


def test_a_missing_bert_is_named_with_the_option_that_helps():
    with refused(InvalidOption, r"--embedder no/such-bert is no BERT: .*Name a local folder, or the packaged BERT"):
        BERTChunkEmbeddings("cpu", "no/such-bert")
