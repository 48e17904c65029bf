"""A corpus is computed in shards: what was finished before an interruption is not computed again, nor believed."""

import numpy as np
import pytest

from retro.cli import main
from retro.storage import shards
from retro.storage.shards import Shards
from retro.text import build, in_shards, split
from retro.text.build import build_corpus
from retro.text.copies import signatures_of
from retro.text.documents import find_texts

WORDS = ["all", "the", "world", "is", "a", "stage", "men", "women", "merely", "players", "have", "their", "exits"]


class Interrupted(Exception):
    pass


@pytest.fixture
def texts(tmp_path, monkeypatch):
    """40 documents of which three or so are a shard."""
    folder, rng = tmp_path / "texts", np.random.default_rng(0)
    folder.mkdir()
    for number in range(40):
        (folder / f"{number:02d}.txt").write_text(" ".join(rng.choice(WORDS, 50)))
    (folder / "39.txt").write_text((folder / "00.txt").read_text() + " indeed")  # near to it, so beside it
    monkeypatch.setattr(in_shards, "BYTES_PER_SHARD", 600)
    monkeypatch.setattr(split, "by_processes", map)
    return folder


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def counted(monkeypatch, of, name, end=None):
    """The documents that a function is called with from now on; the call that would exceed `end` of them fails."""
    work, seen = getattr(of, name), []

    def watched(*arguments):
        if end is not None and len(seen) + len(arguments[-1]) > end:
            raise Interrupted
        seen.extend(document.name for document in arguments[-1])
        return work(*arguments)

    monkeypatch.setattr(of, name, watched)
    return seen


PARTS = {"signatures": (split, "_signed"), "tokens": (build._Tokenizing, "__call__")}


@pytest.mark.parametrize("part", PARTS)
def test_an_interrupted_corpus_goes_on_behind_the_last_shard_and_is_the_same(texts, tmp_path, monkeypatch, part):
    build_corpus([texts], tmp_path / "whole", "bpe:300")
    with monkeypatch.context() as patched:
        first = counted(patched, *PARTS[part], end=17)
        with pytest.raises(Interrupted):
            build_corpus([texts], tmp_path / "corpus", "bpe:300")
    again = counted(monkeypatch, *PARTS[part])
    build_corpus([texts], tmp_path / "corpus", "bpe:300")
    assert len(first) >= 12 and len(again) >= 12 and sorted(first + again) == sorted({*first, *again})
    assert files_of(tmp_path / "corpus") == files_of(tmp_path / "whole")


def test_shards_of_other_tokenizers_and_texts_and_damaged_ones_are_made_again(texts, tmp_path, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(build, "replace_table", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):  # when all shards are there
            build_corpus([texts], tmp_path / "corpus", "char")
    files = sorted((tmp_path / "corpus" / build.TOKENS_FOLDER).glob("*.npy"))
    damaged = bytearray(files[3].read_bytes())
    damaged[-1] ^= 1
    files[3].write_bytes(damaged)
    (texts / "05.txt").write_text((texts / "05.txt").read_text().replace("world", "wordl"))
    with monkeypatch.context() as patched:
        again = counted(patched, *PARTS["tokens"])
        corpus = build_corpus([texts], tmp_path / "corpus", "char")
    assert "05.txt" in again and 4 <= len(again) <= 20
    others = build_corpus([texts], tmp_path / "others", "char")
    assert files_of(tmp_path / "corpus") == files_of(tmp_path / "others")
    assert len(corpus.documents) + len(corpus.manifest["left_out"]) == 40
    for number, document in enumerate(corpus.documents):
        assert corpus.text(corpus.starts[number], document.n_tokens) == (texts / document.name).read_text()
    assert np.array_equal(others.signatures, signatures_of((texts / d.name).read_text() for d in others.documents))
    with monkeypatch.context() as patched:
        patched.setattr(build, "replace_table", lambda *_: (_ for _ in ()).throw(Interrupted))
        with pytest.raises(Interrupted):
            build_corpus([texts], tmp_path / "corpus", "char")
        everything = counted(patched, *PARTS["tokens"])
        with pytest.raises(Interrupted):
            build_corpus([texts], tmp_path / "corpus", "bpe:300")
    assert len(everything) == len(find_texts([texts])) == 40


def test_near_duplicates_follow_each_other_in_the_file_of_tokens(texts, tmp_path):
    corpus = build_corpus([texts], tmp_path / "corpus", "char", valid_fraction=0)
    assert [document.name for document in corpus.documents][:3] == ["00.txt", "39.txt", "01.txt"]


def test_shards_behind_the_first_thousand_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "PER_FOLDER", 3)

    def made(n):
        of = Shards(tmp_path / "shards", {"of": "this"}, [""] * n, ".npy")
        of.make_missing("Try", "shard", [1] * n, lambda number, _, path, done: path.write_bytes(b"%d" % number))
        return of

    made(3)
    (tmp_path / "shards/001").mkdir()
    left = [tmp_path / "shards/001" / name for name in ("000005-0123456789abcdef.npy", ".000004.part.9.tmp", "x.npy")]
    for file in left:
        file.write_bytes(b"left")
    eight = made(8)  # those that are there already stay where they are
    assert [eight.path(number).read_bytes() for number in range(8)] == [b"%d" % number for number in range(8)]
    assert [len(list((tmp_path / "shards" / folder).glob("*.npy"))) for folder in ("", "001", "002")] == [3, 3, 2]
    assert not any(file.exists() for file in left)
    again = Shards(tmp_path / "shards", {"of": "this"}, [""] * 8, ".npy")
    again.open()
    assert not again.missing() and again.path(7) == eight.path(7)


def test_what_a_finished_build_left_is_removed_by_the_next_command(texts, tmp_path):
    command = ["database", str(texts), "--retriever", "bm25", "--chunk-len", "4", "--tokenizer", "bpe:300"]
    command += ["--data-path", str(tmp_path / "data")]
    assert main(command) == 0
    left = [tmp_path / "data/corpus" / name for name in (build.TOKENS_FOLDER, split.SIGNATURES_FOLDER)]
    for folder in left:
        folder.mkdir()
        (folder / "000000-0123456789abcdef.npy").write_bytes(b"left")
    assert main(command) == 0
    assert not any(folder.exists() for folder in left)
