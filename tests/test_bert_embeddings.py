import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import refused
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel, BertTokenizerFast, MPNetConfig, MPNetModel, RobertaConfig, RobertaModel

from retro.bert_embeddings import BERTChunkEmbeddings
from retro.errors import InvalidOption
from retro.text.pretrained import embedder_manifest


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


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "king", "my", "horse", "##s", "The"]
SHAPE = {
    "vocab_size": len(WORDS), "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 16, "max_position_embeddings": 16,
}  # fmt: skip


def saved(folder, kind=BertModel, config=BertConfig, words=WORDS, **options):
    """A small random model, saved with a vocabulary as its folder."""
    torch.manual_seed(0)
    kind(config(**SHAPE)).save_pretrained(folder)
    if words:
        folder.joinpath("words").write_text("\n".join(words) + "\n")
        vocabulary = {word: i for i, word in enumerate(words)}
        BertTokenizerFast(vocab=vocabulary, **options).save_pretrained(folder)
        folder.joinpath("words").rename(folder / "vocab.txt")
    return folder


def load(folder):
    return BERTChunkEmbeddings("cpu", str(folder), trim=False, precision="fp32")


def test_a_bert_of_a_folder_is_the_same_whenever_it_is_loaded(tmp_path):
    first, second = load(saved(tmp_path)), load(tmp_path)
    assert first.tokens_of(["The king s horses"]) == [(5, 6, 1, 8, 9)]
    assert first.manifest == second.manifest and first(["my horse"]).equal(second(["my horse"]))


@pytest.mark.parametrize(
    ("model", "config", "kind"), [(MPNetModel, MPNetConfig, "mpnet"), (RobertaModel, RobertaConfig, "roberta")]
)
def test_a_model_of_another_architecture_is_no_bert(tmp_path, model, config, kind):
    with refused(InvalidOption, rf"^--embedder \S+ is no BERT: its config has model_type='{kind}', not 'bert'$"):
        load(saved(tmp_path, model, config))


def test_a_bert_that_lacks_weights_or_words_is_refused_and_not_filled_up_at_random(tmp_path):
    folder = saved(tmp_path)
    weights = load_file(folder / "model.safetensors")
    lost = "encoder.layer.0.attention.self.query.weight"

    def write(changed):
        save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})

    write({name: weight for name, weight in weights.items() if name != lost})
    with refused(InvalidOption, rf"^--embedder \S+ is damaged: it lacks 1 weights, the first {lost}$"):
        load(folder)
    write(weights | {lost: torch.zeros(8, 16)})
    with refused(InvalidOption, rf"is damaged: {lost} is \[8, 16\], but by its config \[16, 16\]$"):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"not weights")
    with refused(InvalidOption, r"^--embedder \S+ is damaged: its weights cannot be read"):
        load(folder)
    write({name: weight for name, weight in weights.items() if not name.startswith("pooler")})
    load(folder)  # the pooling layer is not read
    with refused(InvalidOption, r"is damaged: it has token 11, but embeddings of 11 tokens"):
        load(saved(tmp_path / "more", words=[*WORDS, "crown"]))
    with refused(InvalidOption, r"is damaged: it has no vocabulary"):
        load(saved(tmp_path / "none", words=None))


def test_the_hash_of_a_bert_tells_whatever_changes_an_embedding(tmp_path):
    def sha256(name, **options):
        bert = load(saved(tmp_path / name, **options))
        return bert.manifest["embedder_sha256"]

    swapped = [*WORDS[:5], "king", "the", *WORDS[7:]]
    hashes = [sha256("one"), sha256("swapped", words=swapped), sha256("cased", do_lower_case=False)]
    config = json.loads((saved(tmp_path / "heads") / "config.json").read_text())
    (tmp_path / "heads" / "config.json").write_text(json.dumps(config | {"num_attention_heads": 4}))
    hashes.append(load(tmp_path / "heads").manifest["embedder_sha256"])
    assert len(set(hashes)) == 4 and sha256("again") == hashes[0]
    bert = load(tmp_path / "one")
    bert(["the king " * 20])  # which sets how its tokenizer truncates
    assert embedder_manifest("one", bert.tokenizer, bert.model)["embedder_sha256"] == hashes[0]
