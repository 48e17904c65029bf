"""Large files are read whole once, and again when they may have changed; `retro verify` reads all of them."""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import CHUNK_LEN

from retro.cli import main
from retro.config import DatabaseConfig, TrainConfig
from retro.database import RetroIndex, build_database
from retro.dataset import build_dataset
from retro.storage import files, known, shards
from retro.storage.files import sha256_of_file
from retro.storage.shards import Shards
from retro.text import corpus as corpus_file
from retro.text.build import build_corpus
from retro.text.corpus import Corpus
from retro.train import train


@pytest.fixture(autouse=True)
def memory(tmp_path, monkeypatch):
    """A cache of its own, into which everything goes at once, whatever its size and age."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(known, "SETTLED", 0)
    monkeypatch.setattr(known, "LARGE", 1)
    return tmp_path / "cache" / "retro"


def digest(data):
    return hashlib.sha256(data).hexdigest()


def entry_of(memory, file):
    (found,) = [e for e in memory.rglob("*.json") if e.stem == digest(os.fsencode(os.path.realpath(file)))[:32]]
    return found


@pytest.fixture
def reads(monkeypatch):
    """The files that are read whole."""
    found, real = [], files._sha256_of_file
    monkeypatch.setattr(files, "_sha256_of_file", lambda path, *rest: found.append(path.name) or real(path, *rest))
    return found


def test_a_file_is_read_once_and_each_part_of_it_is_something_else(tmp_path, reads):
    file, data = tmp_path / "a", b"first line\n" + b"x" * 1000
    file.write_bytes(data)
    for _ in range(3):
        assert sha256_of_file(file) == digest(data)
        assert sha256_of_file(file, 500) == digest(data[:500])
        assert sha256_of_file(file, skip_line=True) == digest(data[11:])
    assert reads == ["a"] * 3


def change_bytes(file):
    data = file.read_bytes()
    middle = len(data) // 2
    file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])


def change_bytes_and_the_time_back(file):
    before = file.stat()
    change_bytes(file)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))


def take_another_of_the_same_size_and_time(file):
    before = file.stat()
    other = file.with_name("other")
    other.write_bytes(file.read_bytes()[:-1] + b"?")
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    os.replace(other, file)


def lengthen(file):
    with open(file, "ab") as opened:
        opened.write(b"?")


@pytest.mark.parametrize(
    "change", [change_bytes, change_bytes_and_the_time_back, take_another_of_the_same_size_and_time, lengthen]
)
def test_whatever_may_have_changed_is_read_again(tmp_path, change):
    file = tmp_path / "a"
    file.write_bytes(b"x" * 1000)
    assert sha256_of_file(file) == sha256_of_file(file) == digest(b"x" * 1000)
    change(file)
    assert sha256_of_file(file) == digest(file.read_bytes()) != digest(b"x" * 1000)


def test_what_was_just_written_and_what_is_small_is_read_each_time(tmp_path, reads, monkeypatch, memory):
    file = tmp_path / "a"
    file.write_bytes(b"x" * 1000)
    with monkeypatch.context() as patch:
        patch.setattr(known, "SETTLED", 60_000_000_000)
        for _ in range(2):
            sha256_of_file(file)
        patch.setattr(known, "SETTLED", 0)
        patch.setattr(known, "LARGE", 1001)
        for _ in range(2):
            sha256_of_file(file)
    assert len(reads) == 4 and not memory.exists()


@pytest.mark.parametrize("spoilt", ["", "{", "[]", '{"stamp": 7}', '{"stamp": {}, "values": {}}'])
def test_a_memory_that_is_torn_or_cannot_be_written_is_none(tmp_path, reads, memory, spoilt, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"x" * 1000)
    sha256_of_file(file)
    entry_of(memory, file).write_text(spoilt)
    assert sha256_of_file(file) == digest(b"x" * 1000) and len(reads) == 2
    assert sha256_of_file(file) == digest(b"x" * 1000) and len(reads) == 2
    (tmp_path / "no-folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-folder"))
    assert sha256_of_file(file) == digest(b"x" * 1000) and len(reads) == 3


def test_a_file_that_changes_while_it_is_read_is_read_again(tmp_path, monkeypatch):
    file, real = tmp_path / "a", files._sha256_of_file
    file.write_bytes(b"x" * 1000)

    def slow(*arguments):
        found = real(*arguments)
        change_bytes(file)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(files, "_sha256_of_file", slow)
        assert sha256_of_file(file) == digest(b"x" * 1000)
    assert sha256_of_file(file) == digest(b"x" * 500 + b"y" + b"x" * 499)


def test_shards_and_the_largest_token_are_known_too(tmp_path, data, monkeypatch):
    copy = shutil.copytree(data / "corpus", tmp_path / "corpus")
    looked = []
    largest = corpus_file.largest_token
    monkeypatch.setattr(corpus_file, "largest_token", lambda tokens: looked.append(1) or largest(tokens))
    for _ in range(3):
        Corpus.load(copy)
    assert len(looked) == 1

    def shards_of(what):
        return Shards(tmp_path / "shards", {"of": what}, ["", ""], ".npy")

    def make(number, _, path, __):
        np.save(open(path, "wb"), np.arange(number + 5))

    opened = []
    monkeypatch.setattr(shards, "open", lambda *a: opened.append(1) or open(*a), raising=False)
    made = shards_of("a")
    made.make_missing("", "", [1, 1], make)
    made_by = len(opened)
    first = [shards_of("a").path(number) for number in (0, 1)]
    assert [shards_of("a").path(number) for number in (0, 1)] == first and len(opened) <= made_by + 2
    change_bytes(first[0])
    assert shards_of("a").missing() == [0] and not first[0].exists()


# The command.


@pytest.fixture(scope="module")
def place(plays, bert, tmp_path_factory):
    """A folder with data by BERT and BM25, and a run."""
    folder = tmp_path_factory.mktemp("place")
    corpus = build_corpus([plays], folder / "data" / "corpus", "bpe:512")
    build_database(
        CHUNK_LEN,
        corpus=corpus,
        data_path=folder / "data",
        config=DatabaseConfig(retriever="hybrid", index="Flat"),
        bert=bert,
    )
    index = RetroIndex(CHUNK_LEN, corpus=corpus, data_path=folder / "data", bert=bert)
    build_dataset(None, 4, corpus=corpus, data_path=folder / "data", index=index)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shape = {"d_model": 16, "n_layers": 2, "ca_layers": (1,), "n_heads": 2, "d_k": 8, "d_ff": 32}
        shape |= {"n_encoder_layers": 1, "encoder_ca_layers": (0,)}
        train(
            config=TrainConfig(steps=2, interval=1, n_valid_batches=1, n_final_batches=1),
            model_shape=shape,
            device="cpu",
            name="a",
        )
    return folder


PARTS = ("corpus in", "database in", "samples in", "samples in", "checkpoint", "checkpoint")
SPOILT = {
    "data/corpus/tokens.bin": "corpus in",
    "data/corpus/signatures.bin": "corpus in",
    "data/retro.index": "database in",
    "data/keys/*/*.npy": "database in",
    "data/retriever/*/*-*": "database in",
    "data/retro_train_dataset.jsonl": "samples in",
    "logs/a/*/checkpoints/00000001/model.safetensors": "checkpoint",
    "logs/a/*/checkpoints/00000002/optimizer.safetensors": "checkpoint",
}


@pytest.mark.parametrize("pattern", SPOILT)
def test_verify_finds_what_nothing_else_would(place, tmp_path, monkeypatch, capsys, memory, pattern):
    """A byte is changed behind the back of everybody: the memory says that the file is as it was."""
    shutil.copytree(place, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    assert main(["verify"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [
        line.startswith(part) and line.endswith(": as it was written") for line, part in zip(said, PARTS, strict=True)
    ]
    file = next(Path().glob(pattern))
    entry = entry_of(memory, file)
    kept = json.loads(entry.read_text())
    change_bytes(file)
    entry.write_text(json.dumps(kept | {"stamp": known._stamp(file)}))
    what, value = next(iter(kept["values"].items()))
    assert known.known(file, what, lambda: pytest.fail("it is read")) == value
    assert main(["verify"]) == 1
    out, err = capsys.readouterr()
    bad = [line for line in out.splitlines() if not line.endswith(": as it was written")]
    repair = "mv logs/a" if "checkpoints" in pattern else "retro da"
    assert bad and bad[0].startswith(SPOILT[pattern]) and repair in bad[0].partition(": ")[2]
    assert re.search(r"\d of 6 (is|are) not as written; what to do is above", err)
    assert known.known(file, what, lambda: "") != value, "from now on everybody knows"


def test_verify_without_anything_says_what_to_make(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "--data-path", "none"]) == 1
    assert "there is nothing in none to look at. Make it: retro database TEXT" in capsys.readouterr().err
