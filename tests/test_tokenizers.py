"""Every kind of tokenizer gives the text and the bytes of slices as Hugging Face gives those of the whole."""

import numpy as np
import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from retro.text.tokenizer import CharTokenizer, SubwordTokenizer, train_tokenizer

TEXT = "The amber anchor of a brave captain, don't you see?  Unbelievable weather!\nTwo lines of it - no more.\n"
ODD = "naïve café, 3 € — 日本語 🎭🎭 x\ufffdy \ufffd"


def word_piece() -> SubwordTokenizer:
    """As BERT's: `##` before what continues a word, lower case, blanks made one."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=70, special_tokens=["[UNK]"], show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
    return SubwordTokenizer(backend)


def unigram() -> SubwordTokenizer:
    """As T5's: `▁` for a blank, also before the first word."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=60, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False)
    backend.train_from_iterator([TEXT], trainer)
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
    "char": lambda: train_tokenizer("char", [TEXT, ODD]),
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


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("text", [TEXT, ODD, ODD + TEXT + ODD * 3])
def test_slices_that_follow_each_other_join_to_the_text_of_the_whole(tokenizer, text, length):
    ids = tokenizer.encode(text if tokenizer.kind == "char" or tokenizer.context else TEXT)  # bytes are cut below
    slices = [tokenizer.decode_after(ids[:i], ids[i : i + length]) for i in range(0, len(ids), length)]
    assert "".join(slices) == whole_text(tokenizer, ids)
    assert len(ids) > 4
