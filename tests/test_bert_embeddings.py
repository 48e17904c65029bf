import pytest
import torch

from retro.bert_embeddings import BERTChunkEmbeddings


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
    together = bert(texts)
    for text, row in zip(texts, together, strict=True):
        ids = bert.tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            states = bert.model(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(row, states.mean(dim=0), rtol=1e-4, atol=1e-5)


def test_text_without_bert_tokens_gets_a_finite_embedding(bert):
    embeddings = bert(["", "   ", "\u200b", "\x00", "word", "😀"])
    assert embeddings.shape == (6, 384) and embeddings.isfinite().all()
    assert (embeddings[:4] == 0).all() and embeddings[4].norm() > 1
    assert bert([]).shape == (0, 384)


def test_a_missing_bert_is_named_with_the_option_that_helps():
    with pytest.raises(ValueError, match=r"no BERT 'no/such-bert'.*--embedder FOLDER"):
        BERTChunkEmbeddings("cpu", "no/such-bert")
