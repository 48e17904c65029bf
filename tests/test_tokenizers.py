"""Every kind of tokenizer gives the text and the bytes of slices as Hugging Face gives those of the whole."""

import re

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from retro.evaluation.passages import text_spans
from retro.evaluation.windows import predicted_bytes
from retro.text.build import build_corpus
from retro.text.corpus import Corpus, DocumentEntry
from retro.text.tokenizer import MAX_RUN, SubwordTokenizer, lost_text, train_tokenizer

TEXT = "The amber anchor of a brave captain, don't you see?  Unbelievable weather!\nTwo lines of it - no more.\n"
ODD = "naïve café, 3 € — 日本語 🎭🎭 x\ufffdy \ufffd"


def word_piece() -> SubwordTokenizer:
    """As BERT's: `##` before what continues a word, lower case, blanks made one."""
    letters = sorted(set(TEXT.lower()) - {" ", "\n"})
    vocab = ["[UNK]", *letters, *(f"##{letter}" for letter in letters), "of", "am", "an", "##he", "##or", "##ain"]
    backend = Backend(models.WordPiece({token: i for i, token in enumerate(vocab)}, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    return SubwordTokenizer(backend)


def unigram() -> SubwordTokenizer:
    """As T5's: `▁` for a blank, also before the first word."""
    letters = sorted(set(TEXT) - {" "})
    vocab = [("<unk>", 0.0), ("▁", -2.0), *((letter, -4.0) for letter in letters)]
    vocab += [(token, -3.0) for token in ("▁of", "▁a", "▁an", "he", "or", "ain")]
    backend = Backend(models.Unigram(vocab, unk_id=0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return SubwordTokenizer(backend)


def byte_fallback() -> SubwordTokenizer:
    """As Llama's: `▁` for a blank, and a token for each byte of what has no other."""
    letters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *sorted(set(TEXT) - {" ", "\n"})]
    merges = [("h", "e"), ("▁", "o"), ("▁o", "f"), ("▁", "a"), ("▁", "▁")]
    vocab = {token: i for i, token in enumerate([*letters, *(a + b for a, b in merges)])}
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return SubwordTokenizer(backend)


def word_level() -> SubwordTokenizer:
    """Whole words, without a decoder: Hugging Face puts a blank between them."""
    words = ["[UNK]", *sorted(set(TEXT.split()))]
    backend = Backend(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return SubwordTokenizer(backend)


TOKENIZERS = {
    "char": lambda: train_tokenizer("char", [TEXT, ODD, "é"]),
    "byte-level": lambda: train_tokenizer("bpe:300", [TEXT]),
    "WordPiece": word_piece,
    "unigram": unigram,
    "byte fallback": byte_fallback,
    "words": word_level,
}
IN_CONTEXT = ("WordPiece", "unigram", "byte fallback", "words")


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def whole_text(tokenizer, ids):
    """Hugging Face's own decoding."""
    return tokenizer.decode(ids) if tokenizer.kind == "char" else tokenizer.backend.decode(ids, False)


def corpus_of(tokenizer, texts, n_train=1):
    """A corpus in memory, and the tokens of each of its documents."""
    documents = [tokenizer.encode(text) for text in texts]
    entries = [DocumentEntry(str(i), "", len(texts[i].encode()), len(ids)) for i, ids in enumerate(documents)]
    return Corpus(np.concatenate(documents).astype(np.uint16), entries, n_train, tokenizer), documents


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16])
@pytest.mark.parametrize(
    "text", [TEXT, ODD, ODD + TEXT + ODD * 3, "é" * 20 + "€🎭" * 9 + TEXT], ids=["plain", "odd", "both", "runs"]
)
def test_slices_that_follow_each_other_join_to_the_text_of_the_whole(tokenizer, text, length):
    ids = tokenizer.encode(text if tokenizer.kind == "char" or tokenizer.context else TEXT)  # bytes are cut below
    slices = [tokenizer.decode_after(ids[:i], ids[i : i + length]) for i in range(0, len(ids), length)]
    assert "".join(slices) == whole_text(tokenizer, ids)
    assert len(ids) > 4


@pytest.mark.parametrize("length", [1, 3, 16])
def test_the_text_of_a_slice_is_what_the_whole_text_has_there(tokenizer, length):
    corpus, documents = corpus_of(tokenizer, [TEXT, "a", TEXT * 2 + "the"])
    slices = [corpus.text(i, min(length, 10**9)) for i in range(0, len(corpus.tokens), length)]
    assert "".join(slices) == "".join(whole_text(tokenizer, ids) for ids in documents)
    assert corpus.train == whole_text(tokenizer, documents[0])
    offsets = np.arange(corpus.starts[2] + 1, corpus.starts[3])
    for offset, text in zip(offsets.tolist(), corpus.texts(offsets, length), strict=True):
        before = documents[2][: offset - corpus.starts[2]]
        whole = whole_text(tokenizer, documents[2][: len(before) + length])
        assert whole == whole_text(tokenizer, before) + text


def test_a_document_begins_without_the_one_before_it():
    corpus, documents = corpus_of(unigram(), [TEXT, "of of"])
    assert corpus.text(0, len(corpus.tokens)).endswith("no more.\nof of")
    assert corpus.text(int(corpus.starts[1]), 2) == corpus.tokenizer.decode(documents[1][:2])


def test_a_chunk_begins_neither_with_joined_words_nor_with_marks():
    for tokenizer in (word_piece(), unigram(), byte_fallback()):
        ids = tokenizer.encode("the amber anchor of a captain")
        at = next(i for i in range(len(ids)) if tokenizer.decode(ids[:i]).endswith("anchor"))
        assert tokenizer.decode_after(ids[:at], ids[at:]) == " of a captain"
        middle = next(i for i in range(len(ids)) if tokenizer.decode(ids[:i]).endswith("anch"))
        assert tokenizer.decode_after(ids[:middle], ids[middle:]) == "or of a captain"
        assert tokenizer.decode_after([], ids) == "the amber anchor of a captain"


@pytest.mark.parametrize("name", ["char", "byte-level"])
def test_slices_of_characters_and_of_byte_level_tokens_are_decoded_alone(name):
    tokenizer = TOKENIZERS[name]()
    ids = tokenizer.encode(ODD)
    for i in range(len(ids)):
        assert tokenizer.decode_after(ids[:i], ids[i : i + 5]) == tokenizer.decode(ids[i : i + 5])


@pytest.mark.parametrize("name", IN_CONTEXT)
def test_the_bytes_of_a_token_are_what_it_adds(name):
    tokenizer = TOKENIZERS[name]()
    corpus, (ids, _) = corpus_of(tokenizer, [TEXT, TEXT], n_train=0)
    lengths = [len(whole_text(tokenizer, ids[:n]).encode()) for n in range(len(ids) + 1)]
    found, scale = predicted_bytes(corpus), len(TEXT.encode()) / lengths[-1]
    expected = np.diff(lengths) * scale
    assert found[: len(ids)] == pytest.approx([0, *expected[1:]])
    assert found[len(ids) :] == pytest.approx([0, *expected[1:]]), "each document begins anew"


def test_a_character_of_several_tokens_counts_once():
    tokenizer = byte_fallback()
    for text in (ODD, "日本" * 30, "é" * 20, "🎭" * 10):
        n_bytes = tokenizer.n_bytes_of(np.array(tokenizer.encode(text)))
        assert n_bytes.sum() == len(text.encode()) and n_bytes.max() <= 4


def test_bytes_of_which_the_decoder_makes_no_characters_are_texts_of_their_own():
    tokenizer = byte_fallback()
    tokenizer.backend.decoder = decoders.Fuse()
    ids = tokenizer.encode("x日")
    assert tokenizer.decode(ids).endswith("<0xE6><0x97><0xA5>")
    assert tokenizer.n_bytes_of(np.array(ids))[-3:].tolist() == [6, 6, 6]


def test_counting_bytes_takes_time_in_proportion_to_the_text(monkeypatch):
    tokenizer = unigram()
    ids, read, decode = np.array(tokenizer.encode(TEXT * 20)), [], tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda part: read.append(len(part)) or decode(part))
    tokenizer.n_bytes_of(ids)
    assert len(ids) > 500 and sum(read) < 20 * len(ids)


def test_bytes_and_texts_of_single_tokens_are_those_inside_a_text():
    corpus, _ = corpus_of(word_piece(), [TEXT])
    id_of = corpus.tokenizer.backend.token_to_id
    word, rest = id_of("of"), id_of("##he")
    assert (corpus.itos[word], corpus.itos[rest]) == (" of", "he") and corpus.stoi["he"] == rest
    assert corpus.tokenizer.n_bytes[[word, rest]].tolist() == [3, 2]
    llama = byte_fallback()
    ids = [llama.backend.token_to_id(token) for token in ("<0xE6>", "<0x97>", "<0x0A>", "▁of")]
    assert llama.n_bytes[ids].tolist() == [1, 1, 1, 3]


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("length", [1, 4, 7])
def test_the_spans_of_stretches_that_follow_each_other_join_to_the_whole(name, length):
    tokenizer = TOKENIZERS[name]()
    corpus, (ids,) = corpus_of(tokenizer, [f"{TEXT}{ODD} {ODD}"])
    spans = [
        span
        for start in range(0, len(ids), length)
        for span in text_spans(corpus, start, min(start + length, len(ids)))
    ]
    assert "".join(span.text for span in spans) == whole_text(tokenizer, ids)
    assert [span.start for span in spans] == [0, *(span.end for span in spans[:-1])] and spans[-1].end == len(ids)
    if name in ("byte-level", "byte fallback"):
        mask = next(span for span in spans if span.text == "🎭")
        assert mask.end - mask.start == 4
    assert len(spans) > len(ids) / 2


def test_a_last_token_that_adds_nothing_belongs_to_the_one_before():
    backend = Backend(models.WordLevel({"a": 0, "b": 1, "": 2}, unk_token="a"))
    backend.decoder = decoders.Fuse()
    corpus = Corpus(np.array([0, 2, 1, 2]), [DocumentEntry("a", "a", 2, 4)], 1, SubwordTokenizer(backend))
    assert text_spans(corpus, 0, 4) == [(0, 1, "a"), (1, 4, "b")]


def test_numbers_need_not_be_tokens_and_tokens_need_not_fit_16_bits(tmp_path):
    backend = Backend(models.WordLevel({"[UNK]": 0, "amber": 1, "anchor": 70_000}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    SubwordTokenizer(backend).save(tmp_path / "tokenizer.json")
    (tmp_path / "a.txt").write_text("amber anchor anchor amber " * 9)
    corpus = build_corpus([tmp_path / "a.txt"], tmp_path / "corpus", str(tmp_path), valid_fraction=0)
    assert corpus.n_tokens == 70_001 and corpus.tokens[:4].tolist() == [1, 70_000, 70_000, 1]
    assert corpus.text(0, 3) == "amber anchor anchor"
    assert len(corpus.itos) == len(corpus.tokenizer.n_bytes) == corpus.n_tokens
    assert corpus.itos[2] == "" and corpus.tokenizer.n_bytes[2] == 0 and "" not in corpus.stoi
    assert corpus.itos[70_000] == " anchor" and corpus.tokenizer.n_bytes[70_000] == 7


def test_a_byte_level_vocabulary_may_have_holes_and_added_tokens():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE({letter: 2 * i for i, letter in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_tokens(["日本", "<of>"])
    tokenizer = SubwordTokenizer(backend)
    assert tokenizer.n_tokens > 2 * 255 and tokenizer.n_bytes[1] == 0 and tokenizer.decode([1]) == ""
    ids = np.array(tokenizer.encode(text := "é日本 <of>"))
    assert len(ids) == 5 and tokenizer.n_bytes_of(ids).tolist() == [1, 1, 6, 1, 4] and tokenizer.decode(ids) == text


@pytest.mark.parametrize("kind", ["a", "7", "-", " ", "\n"])
def test_nothing_longer_than_a_bounded_run_is_learnt(kind):
    tokenizer = train_tokenizer("bpe:300", ["so " + kind * 5000])
    assert MAX_RUN / 2 <= max(len(token) for token in tokenizer.backend.get_vocab()) <= MAX_RUN
    ids = tokenizer.encode(kind * 20_000)
    assert tokenizer.decode(ids) == kind * 20_000 and len(ids) < 20_000 / MAX_RUN * 4


def test_ordinary_text_gives_the_tokenizer_that_it_gives_without_bounds(plays):
    texts = [file.read_text() for file in sorted(plays.iterdir())]
    backend = Backend(models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=512, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    assert train_tokenizer("bpe:512", texts).backend.to_str() == backend.to_str()


@pytest.mark.parametrize("name", ["char", "bpe:300"])
def test_learning_shows_how_far_it_is(name, capsys):
    train_tokenizer(name, [TEXT] * 3)
    assert re.search(r"Learn the tokenizer: 100%.* 3/3 ", capsys.readouterr().err)


LOSSES = {
    "WordPiece": r"in b\.txt, 'The amber an' \(character 0\) comes back as 'the amber an'",
    "unigram": None,
    "byte fallback": None,
    "words": r"in b\.txt, ' Unbelievabl' \(character 52\) comes back as 'Unbelievable'",
    "byte-level": None,
}


@pytest.mark.parametrize("name", LOSSES)
def test_a_tokenizer_that_loses_text_is_told_of_once_with_the_first_place(name, tmp_path, capsys):
    TOKENIZERS[name]().save(tmp_path / "tokenizer.json")
    (tmp_path / "texts").mkdir()
    for file, text in {"a.txt": "of a", "b.txt": TEXT, "c.txt": f"it {TEXT}"}.items():
        (tmp_path / "texts" / file).write_text(text)
    build_corpus([tmp_path / "texts"], tmp_path / "corpus", str(tmp_path), valid_fraction=0)
    told = [line for line in capsys.readouterr().out.splitlines() if "does not keep all of the text" in line]
    assert len(told) == (LOSSES[name] is not None)
    assert not told or re.search(LOSSES[name], told[0])


def test_byte_level_tokenizers_that_change_the_text_are_told_of_too():
    plain = train_tokenizer("bpe:300", [TEXT])
    decomposed = "cafe\u0301"
    assert not plain.loses_text
    plain.backend.normalizer = normalizers.NFC()  # as Qwen's
    told = lost_text(plain, decomposed, np.array(plain.encode(decomposed)))
    assert told == "'e\u0301' (character 3) comes back as 'é'"
    spaced = train_tokenizer("bpe:300", [TEXT])
    spaced.backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert lost_text(spaced, "it", np.array(spaced.encode("it"))) == "'it' (character 0) comes back as ' it'"
    marked = train_tokenizer("bpe:300", [TEXT])
    marked.backend.add_tokens([AddedToken("<of>", lstrip=True)])
    assert (
        lost_text(marked, "it <of>", np.array(marked.encode("it <of>"))) == "' <of>' (character 2) comes back as '<of>'"
    )
