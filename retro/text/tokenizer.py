"""Tokenizers: text to integers and back.

The tutorial's tokens are characters. A model of words reads a hundred times less
text in the same time, so any subword tokenizer of Hugging Face works as well: one
trained on the corpus itself (`bpe:SIZE`, byte-level, so every text can be written in
it), or one that exists.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from retro.errors import DamagedFile, InvalidOption
from retro.storage.manifests import read_manifest, sha256_of_json, write_manifest


class Tokenizer(Protocol):
    """What the pipeline asks of a tokenizer."""

    kind: str  # "char" or "subword"

    @property
    def n_tokens(self) -> int:
        """Size of the vocabulary."""

    @property
    def sha256(self) -> str:
        """Names the mapping, so that artifacts made with another one are noticed."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text."""

    def decode(self, ids: Sequence[int]) -> str:
        """Text of tokens."""

    @property
    def n_bytes(self) -> np.ndarray:
        """UTF-8 bytes that each token stands for, of shape `[n_tokens]`."""

    def save(self, path: Path) -> None:
        """Write the file that `load_tokenizer` reads."""


class CharTokenizer:
    """One token for each character, numbered in the order of `itos`, as in labml's `TextDataset`."""

    kind = "char"

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
        table = np.full(0x110000, -1, dtype=np.int32)
        for text, i in self.stoi.items():
            table[ord(text)] = i
        return table

    def encode(self, text: str) -> list[int]:
        ids = self._table[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)]
        if len(unknown := np.flatnonzero(ids < 0)):
            at = int(unknown[0])
            raise ValueError(
                f"{text[at]!r} (character {at} of the text) is not among the {self.n_tokens} characters of this "
                "corpus. Leave it out, or build the corpus with subwords, as bpe:4096"
            )
        return ids.tolist()

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(self.itos[i] for i in ids)

    @cached_property
    def n_bytes(self) -> np.ndarray:
        return np.array([len(text.encode()) for text in self.itos])

    def save(self, path: Path) -> None:
        write_manifest(path, {"itos": self.itos})


class SubwordTokenizer:
    """A Hugging Face tokenizer, without special tokens."""

    kind = "subword"

    def __init__(self, backend) -> None:  # type: ignore[no-untyped-def]  # tokenizers.Tokenizer, imported late
        self.backend = backend
        self.backend.no_padding()
        self.backend.no_truncation()

    @property
    def n_tokens(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def sha256(self) -> str:
        return sha256_of_json(self.backend.to_str())

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self.backend.decode(list(ids), skip_special_tokens=False)

    @cached_property
    def n_bytes(self) -> np.ndarray:
        from tokenizers import decoders

        if isinstance(self.backend.decoder, decoders.ByteLevel):  # one letter of its alphabet for each byte
            return np.array([len(self.backend.id_to_token(i) or "") for i in range(self.n_tokens)])
        return np.array([len(self.decode([i]).encode()) for i in range(self.n_tokens)])

    def save(self, path: Path) -> None:
        self.backend.save(str(path))


def train_tokenizer(name: str, texts: Iterable[str]) -> Tokenizer:
    """The tokenizer called `name`: `char`, `bpe:SIZE`, or a Hugging Face name or folder.

    `texts` are read, one at a time, by the two kinds that are learnt from the corpus. The folder may
    be a corpus, whose tokenizer is then used again.
    """
    if name == "char":
        characters: set[str] = set()
        for text in texts:
            characters.update(text)
        return CharTokenizer(sorted(characters))
    if name.startswith("bpe:"):
        return _train_bpe(name, texts)
    from tokenizers import Tokenizer as Backend

    if (file := Path(name) / "tokenizer.json").is_file():
        kind = "char" if "itos" in json.loads(file.read_text(encoding="utf-8")) else "subword"
        return load_tokenizer(file, kind)
    try:
        return SubwordTokenizer(Backend.from_pretrained(name))
    except Exception as error:  # tokenizers raises bare Exception for whatever the hub answers
        reason = f"is not a folder with a tokenizer.json, and the hub did not give it ({str(error)[:200]})"
        raise InvalidOption("tokenizer", name, f"{reason}; use char, bpe:4096 or a local folder") from None


def _train_bpe(name: str, texts: Iterable[str]) -> SubwordTokenizer:
    """Byte-level byte-pair encoding: any text can be written, and decoding gives it back exactly."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    size = name.removeprefix("bpe:")
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if not size.isdigit() or int(size) < len(alphabet):
        raise InvalidOption("tokenizer", name, f"is not bpe:SIZE: SIZE is a number of at least {len(alphabet)}")
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=int(size), initial_alphabet=sorted(alphabet), show_progress=False)
    backend.train_from_iterator(texts, trainer)
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
