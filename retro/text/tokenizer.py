"""Tokenizers: text to integers and back.

The tutorial's tokens are characters. A model of words reads a hundred times less
text in the same time, so any subword tokenizer of Hugging Face works as well: one
trained on the corpus itself (`bpe:SIZE`, byte-level, so every text can be written in
it), or one that exists.

The text of a slice of tokens is not always what those tokens alone decode to. With
WordPiece a word continues with `##ing`, and with SentencePiece (Llama, T5) the space
before a word is left out where the tokens begin. So a slice is decoded after a few of
the tokens before it (`decode_after`), and slices that follow each other join to the
text of the whole.
"""

from __future__ import annotations

import codecs
import json
import os
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import takewhile
from operator import eq
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from retro.errors import DamagedFile, InvalidOption
from retro.progress import each
from retro.storage.manifests import read_manifest, sha256_of_json, write_manifest
from retro.text.base_model import find_base

# Tokens before a slice, without which some tokenizers cannot tell its text: one would do, but up to three at either
# end may be bytes of a character that is not all there.
CONTEXT = 8

N_CODE_POINTS = 0x110000  # of Unicode

N_SHOWN = 12  # characters of a text that a tokenizer loses

N_THREADS = os.cpu_count() or 1
# How byte-level BPE cuts a text into words (GPT-2's pattern; what does not look ahead stands together, as one part is
# quicker than five), and the letter that it writes each byte with: itself if it is printed, else the next one from 256.
WORDS = r"(?:'(?:[sdmt]|ll|ve|re)| ?(?:\p{L}+|\p{N}+|[^\s\p{L}\p{N}]+))|\s+(?!\S)|\s+"
LONG = 1000  # characters of a word, from which on it is not for tiktoken, which takes time in the square of them
BLANKS = re.compile(rf"\s{{{LONG}}}")
_PRINTED = (*range(33, 127), *range(161, 173), *range(174, 256))
_OTHERS = (byte for byte in range(256) if byte not in _PRINTED)
BYTES = {chr(byte): byte for byte in _PRINTED} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}

# What byte-level BPE cuts no further: letters, digits, other characters or blanks in a row. Learning from one takes
# time in the square of its length, so that longer ones are cut to this many characters.
MAX_RUN = 256


class Tokenizer(Protocol):
    """What the pipeline asks of a tokenizer."""

    kind: str  # "char" or "subword"

    @property
    def context(self) -> int:
        """Tokens before a slice that its text depends on; 0 if each slice can be decoded alone."""

    @property
    def n_tokens(self) -> int:
        """Size of the vocabulary: the largest token and 1, whether or not every number below it is a token."""

    @property
    def sha256(self) -> str:
        """Names the mapping, so that artifacts made with another one are noticed."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of each of several texts, as `encode` gives them, on all cores where that is quicker."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens that begin a text."""

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        """Text that the tokens `ids` add to a text whose tokens so far are `before`.

        Of those only the last `context` are read. A character that several byte tokens of a SentencePiece model
        stand for belongs to where it ends; of byte-level BPE each part of it is decoded as a replacement.
        """

    @property
    def loses_text(self) -> bool:
        """Whether there may be texts that their tokens do not give back."""

    @property
    def n_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for inside a text, of shape `[n_tokens]`; 0 for a number of no token."""

    def n_bytes_of(self, ids: np.ndarray) -> np.ndarray:
        """UTF-8 bytes `[n]` that each token of a text `[n]` adds to the text of those before it."""

    def save(self, path: Path) -> None:
        """Write the file that `load_tokenizer` reads."""


class CharTokenizer:
    """One token for each character, numbered in the order of `itos`, as in labml's `TextDataset`."""

    kind = "char"
    context = 0
    loses_text = False

    def __init__(self, itos: Sequence[str]) -> None:
        self.itos = list(itos)
        self.stoi = {text: i for i, text in enumerate(self.itos)}

    @property
    def n_tokens(self) -> int:
        return len(self.itos)

    @cached_property
    def sha256(self) -> str:
        return sha256_of_json(self.itos)

    @cached_property
    def _table(self) -> np.ndarray:
        """Token of each code point, -1 where there is none."""
        table = np.full(N_CODE_POINTS, -1, dtype=np.int32)
        for text, i in self.stoi.items():
            table[ord(text)] = i
        return table

    def encode(self, text: str) -> list[int]:
        return self._ids(text).tolist()

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self._ids(text) for text in texts]

    def _ids(self, text: str) -> np.ndarray:
        ids = self._table[_code_points(text)]
        if len(unknown := np.flatnonzero(ids < 0)):
            at = int(unknown[0])
            raise ValueError(
                f"{text[at]!r} (character {at} of the text) is not among the {self.n_tokens} characters of this "
                "corpus. Leave it out, or build the corpus with subwords, as bpe:4096"
            )
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.itos[i] for i in ids)

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        return self.decode(ids)

    @cached_property
    def n_bytes(self) -> np.ndarray:
        return np.array([len(text.encode()) for text in self.itos])

    def n_bytes_of(self, ids: np.ndarray) -> np.ndarray:
        return self.n_bytes[ids]

    def save(self, path: Path) -> None:
        write_manifest(path, {"itos": self.itos})


class SubwordTokenizer:
    """A Hugging Face tokenizer, without special tokens."""

    kind = "subword"

    def __init__(self, backend) -> None:  # type: ignore[no-untyped-def]  # tokenizers.Tokenizer, imported late
        self.backend = backend
        self.backend.no_padding()
        self.backend.no_truncation()

    @cached_property
    def n_tokens(self) -> int:
        return max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def sha256(self) -> str:
        return sha256_of_json(self.backend.to_str())

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        quick, others = list[int](), list[int]()
        for i, text in enumerate(texts):
            (others if self._quick is None or _has_long_words(text) else quick).append(i)
        encoded: dict[int, np.ndarray] = {}
        if quick:
            with ThreadPoolExecutor(N_THREADS) as pool:
                encoded |= zip(quick, pool.map(self._quick.encode_to_numpy, [texts[i] for i in quick]), strict=True)
        if others:
            given = self.backend.encode_batch_fast([texts[i] for i in others], add_special_tokens=False)
            encoded |= {i: np.array(text.ids, dtype=np.int64) for i, text in zip(others, given, strict=True)}
        return [encoded[i] for i in range(len(texts))]

    @cached_property
    def _quick(self) -> Any:
        """The same vocabulary in `tiktoken`, several times as fast; None for what it cannot be, as WordPiece.

        It joins any two pieces that make a token, earlier tokens first; the backend those that were joined when it was
        learnt. In a vocabulary that is in the order in which it was learnt, that is the same (tests).
        """
        import tiktoken
        from tokenizers import pre_tokenizers

        made = json.loads(self.backend.to_str())
        model, split = made["model"], self.backend.pre_tokenizer
        is_plain = isinstance(split, pre_tokenizers.ByteLevel) and not split.add_prefix_space and split.use_regex
        if model["type"] != "BPE" or not is_plain or made["normalizer"] or made["added_tokens"]:
            return None
        vocabulary, merges = model["vocab"], model["merges"]
        joined = [vocabulary.get("".join(pair), -1) for pair in merges]
        if joined != list(range(256, len(vocabulary))) or not set(BYTES).issubset(vocabulary):
            return None
        ranks = {bytes(BYTES[letter] for letter in token): number for token, number in vocabulary.items()}
        return tiktoken.Encoding("learnt", pat_str=WORDS, mergeable_ranks=ranks, special_tokens={})

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    def decode_after(self, before: Sequence[int], ids: Sequence[int]) -> str:
        if not self.context:
            return self.decode(ids)
        known = [*before[-self.context :]]
        text, longer = (self.decode(self._whole_characters(tokens)) for tokens in (known, [*known, *ids]))
        return longer[sum(takewhile(bool, map(eq, text, longer))) :]  # from the first letter on that differs

    @cached_property
    def context(self) -> int:
        from tokenizers import decoders

        return 0 if isinstance(self.backend.decoder, decoders.ByteLevel) else CONTEXT

    @property
    def loses_text(self) -> bool:
        """False for byte-level tokenizers that leave the text as it is, as those that are learnt here."""
        from tokenizers import pre_tokenizers

        split = self.backend.pre_tokenizer
        is_plain = isinstance(split, pre_tokenizers.ByteLevel) and not split.add_prefix_space
        return bool(self.context or not is_plain or self.backend.normalizer or self.backend.get_added_tokens_decoder())

    @cached_property
    def _byte_of(self) -> dict[int, int]:
        """The value of each token that is a byte, `<0x00>` to `<0xFF>`, if the decoder makes characters of them."""
        ids = [self.backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if None in ids or self.decode([ids[byte] for byte in "é".encode()]) != "é":
            return {}
        return {token: byte for byte, token in enumerate(ids)}

    def _whole_characters(self, ids: list[int]) -> list[int]:
        """The tokens without bytes at either end whose character is not all there.

        One such byte would spoil all bytes in a row: the decoder gives a replacement for each of them.
        """
        if not self._byte_of:
            return ids
        is_rest = (0x80 <= self._byte_of.get(token, 0) < 0xC0 for token in ids)  # of a character of several bytes
        start = sum(takewhile(bool, is_rest))
        last = [*takewhile(self._byte_of.__contains__, reversed(ids[start:][-3:]))]
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        decoder.decode(bytes(self._byte_of[token] for token in reversed(last)))
        return ids[start : len(ids) - len(decoder.getstate()[0])]

    @cached_property
    def n_bytes(self) -> np.ndarray:
        from tokenizers import pre_tokenizers

        if self.context:
            texts = (self.decode_after([i], [i]) for i in range(self.n_tokens))
            return np.array([1 if i in self._byte_of else len(text.encode()) for i, text in enumerate(texts)])
        # A letter of the byte-level alphabet stands for a byte. A token that was added may have other letters.
        tokens = [self.backend.id_to_token(i) or "" for i in range(self.n_tokens)]
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        return np.array([len(token if alphabet.issuperset(token) else token.encode()) for token in tokens])

    def n_bytes_of(self, ids: np.ndarray) -> np.ndarray:
        if not self.context:
            return self.n_bytes[ids]
        known, n = ids.tolist(), self.context
        texts = (self.decode_after(known[max(0, i - n) : i], known[i : i + 1]) for i in range(len(known)))
        return np.array([len(text.encode()) for text in texts])

    def save(self, path: Path) -> None:
        self.backend.save(str(path))


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)


def _has_long_words(text: str) -> bool:
    """Whether `LONG` characters in a row are no blanks, or nothing but blanks."""
    half = LONG // 2  # of any such row, one of these parts has nothing else
    parts = (text[start : start + half] for start in range(0, len(text) - half + 1, half))
    return any(part.split(None, 1) in ([], [part]) for part in parts) and (
        max(map(len, text.split()), default=0) >= LONG or BLANKS.search(text) is not None
    )


def lost_text(tokenizer: Tokenizer, text: str, ids: np.ndarray) -> str | None:
    """Where the tokens of a text first give another text back, in a few words; None if they give this one."""
    if not tokenizer.loses_text or (back := tokenizer.decode(ids.tolist())) == text:
        return None
    at = sum(takewhile(bool, map(eq, text, back)))
    return f"{text[at : at + N_SHOWN]!r} (character {at:,}) comes back as {back[at : at + N_SHOWN]!r}"


def train_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer called `name`: `char`, `bpe:SIZE`, that of the packaged base, or a Hugging Face name or folder.

    `texts` are read, one at a time, by the two kinds that are learnt from the corpus. The folder may
    be a corpus, whose tokenizer is then used again.
    """
    if name == "char":
        is_there = np.zeros(N_CODE_POINTS, dtype=bool)
        for text in each(texts, "Learn the tokenizer", "document"):
            is_there[_code_points(text)] = True
        return CharTokenizer([chr(point) for point in np.flatnonzero(is_there)])
    if name.startswith("bpe:"):
        return _train_bpe(name, texts)
    from tokenizers import Tokenizer as Backend

    if (file := Path(find_base(name, "tokenizer")) / "tokenizer.json").is_file():
        try:
            is_char = "itos" in json.loads(file.read_bytes())
        except (ValueError, TypeError, RecursionError) as error:
            raise DamagedFile(file, f"is no tokenizer ({error})") from None
        return load_tokenizer(file, "char" if is_char else "subword")
    try:
        return SubwordTokenizer(Backend.from_pretrained(name))
    except Exception as error:  # tokenizers raises bare Exception for whatever the hub answers
        reason = f"is not a folder with a tokenizer.json, and the hub did not give it ({str(error)[:200]})"
        raise InvalidOption("tokenizer", name, f"{reason}; use char, bpe:4096 or a local folder") from None


def _train_bpe(name: str, texts: Iterable[str]) -> SubwordTokenizer:
    """Byte-level byte-pair encoding: any text can be written, and decoding gives it back exactly."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Backend

    size = name.removeprefix("bpe:")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if not size.isdecimal() or int(size) < len(alphabet):
        raise InvalidOption("tokenizer", name, f"is not bpe:SIZE: SIZE is a number of at least {len(alphabet)}")
    backend = Backend(models.BPE())
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    runs = "|".join(f"{kind}{{{MAX_RUN}}}" for kind in (r"\p{L}", r"\p{N}", r"[^\s\p{L}\p{N}]", r"\s"))
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(runs), "isolated"), byte_level])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=int(size), initial_alphabet=sorted(alphabet), show_progress=False)
    backend.train_from_iterator(each(texts, "Learn the tokenizer", "document"), trainer)
    backend.pre_tokenizer = byte_level  # encoding takes long runs in its stride
    return SubwordTokenizer(backend)


def load_tokenizer(path: Path, kind: str) -> Tokenizer:
    """Read what `Tokenizer.save` wrote."""
    if kind == "char":
        itos = read_manifest(path, {"itos": list})["itos"]
        if not itos or not all(type(text) is str and len(text) == 1 for text in itos) or len(set(itos)) < len(itos):
            raise DamagedFile(path, f"has itos={itos!r:.80}, but different characters are wanted")
        return CharTokenizer(itos)
    from tokenizers import Tokenizer as Backend

    try:
        return SubwordTokenizer(Backend.from_file(str(path)))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # tokenizers raises bare Exception for a damaged file, or panics
        raise DamagedFile(path, f"cannot be read ({error})") from None
