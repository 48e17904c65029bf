"""The table of documents: what is written is what is read, nothing is made of it that nobody asks for."""

import pickle
import random
import shutil

import numpy as np
import pytest
from conftest import refused

from retro.cli import main
from retro.errors import DamagedFile, StaleArtifact
from retro.search.updates import add_documents, remove_documents
from retro.storage.files import sha256_of_file
from retro.storage.manifests import read_manifest, write_manifest
from retro.text import corpus as corpus_module
from retro.text import table
from retro.text.build import build_corpus
from retro.text.corpus import Corpus, documents_file
from retro.text.documents import sha256_of_text
from retro.text.table import DocumentEntry, Documents, write_table

NAMES = ["a.txt", "", "späť/漢字.md", "x" * 300, "docs.jsonl:1", "\U0001f600"]
ENTRIES = [DocumentEntry(name, sha256_of_text(name), 3 * i + 1, i + 1) for i, name in enumerate(NAMES)]
GROUPS = np.array([0, 0, 2, 3, 2, 5])


def written(file, entries=ENTRIES, groups=GROUPS):
    write_table(file, entries, groups)
    return Documents(file, len(entries))


def test_entries_are_read_as_they_were_written_and_a_process_maps_them_itself(tmp_path):
    documents = written(tmp_path / "t.bin")
    assert list(documents) == ENTRIES == documents[:] and len(documents) == 6
    assert documents[-1] == ENTRIES[-1] and documents[1:4] == ENTRIES[1:4] and documents[::-2] == ENTRIES[::-2]
    with pytest.raises(IndexError):
        documents[6]
    assert documents.starts.tolist() == [0, 1, 3, 6, 10, 15, 21] and documents.groups.tolist() == GROUPS.tolist()
    sent = pickle.dumps(documents)
    assert len(sent) < 500 and list(pickle.loads(sent)) == ENTRIES


def test_documents_that_are_added_lie_behind_those_that_were_there(tmp_path):
    first = written(tmp_path / "first.bin", ENTRIES[:4], GROUPS[:4])
    write_table(tmp_path / "both.bin", ENTRIES[4:], GROUPS, first)
    written(tmp_path / "at once.bin")
    assert (tmp_path / "both.bin").read_bytes() == (tmp_path / "at once.bin").read_bytes()
    write_table(tmp_path / "none.bin", [], GROUPS[:4], first)
    assert (tmp_path / "none.bin").read_bytes() == (tmp_path / "first.bin").read_bytes()


COLUMN = {"starts": 0, "groups": 7 * 8, "sizes": 13 * 8, "ends": 19 * 8}


@pytest.mark.parametrize(
    ("column", "number", "value"),
    [
        ("starts", 0, 1), ("starts", 3, 3), ("starts", 6, 1 << 60), ("starts", 1, -1),
        ("groups", 1, 2), ("groups", 4, 1), ("groups", 0, -1),
        ("sizes", 2, -1), ("sizes", 2, 1 << 60),
        ("ends", 0, -1), ("ends", 1, 4), ("ends", 5, 10), ("ends", 5, 1 << 40), ("ends", 2, 8),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_is_refused(tmp_path, column, number, value):
    written(file := tmp_path / "t.bin")
    with open(file, "r+b") as opened:
        opened.seek(COLUMN[column] + 8 * number)
        opened.write(int(value).to_bytes(8, "little", signed=True))
    with refused(DamagedFile, "is no table of 6 documents"):
        Documents(file, 6)


def test_a_table_of_another_length_or_with_names_that_are_no_text_is_refused(tmp_path):
    written(file := tmp_path / "t.bin")
    for n in (0, 1, 5, 7, 1000, 1 << 60):
        with refused(DamagedFile, f"is no table of {n} documents"):
            Documents(file, n)
    whole = file.read_bytes()
    for other in (whole[:-1], whole + b"x", whole[:-1] + b"\xff", b"", b"x" * 7):
        file.write_bytes(other)
        with refused(DamagedFile, "is no table of 6 documents"):
            Documents(file, 6)


def test_opening_a_corpus_makes_no_entry_of_a_document(tmp_path, monkeypatch):
    drawn = random.Random(0)
    (tmp_path / "texts").mkdir()
    for i in range(40):
        (tmp_path / "texts" / f"{i}.txt").write_text(
            " ".join(drawn.choices(["to", "be", "or", "not", "that", "is"], k=60))
        )
    built = build_corpus([tmp_path / "texts"], tmp_path / "corpus", "bpe:300")
    entries = list(built.documents)
    assert entries[3].sha256 == sha256_of_text((tmp_path / "texts" / entries[3].name).read_text())
    monkeypatch.setattr(table, "DocumentEntry", lambda *_: pytest.fail("an entry is made"))
    corpus = Corpus.load(tmp_path / "corpus")
    corpus.barred_ranges(np.arange(5))
    assert corpus.sha256 == built.sha256 and corpus.document_of(int(corpus.starts[7])) == 7
    other = pickle.loads(pickle.dumps(corpus))
    assert np.array_equal(other.starts, built.starts) and np.array_equal(other.groups, built.groups)
    monkeypatch.undo()
    assert list(other.documents) == entries and len(pickle.dumps(corpus.documents)) < 500
    # Worked out anew, it is called the same.
    again = Corpus(corpus.tokens, entries, corpus.n_train, corpus.tokenizer)
    assert again.sha256 == corpus.sha256


def test_an_addition_that_is_killed_leaves_the_table_of_the_manifest(data, plays, bert, tmp_path, monkeypatch):
    copy = tmp_path / "data"
    shutil.copytree(data, copy)
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "b.txt").write_text("Blow, winds, and crack your cheeks, all of you, all night long. " * 3)
    (tmp_path / "new" / "a.txt").write_text("Something else altogether, which nobody has ever said before. " * 3)
    before, tokens = Corpus.load(copy / "corpus"), copy / "corpus" / "tokens.bin"
    inode, beginning = tokens.stat().st_ino, tokens.read_bytes()

    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("retro.search.updates.write_manifest", killed)
        with pytest.raises(Killed):
            add_documents([tmp_path / "new"], copy, bert=bert)
    assert len(list((copy / "corpus").glob("documents-*.bin"))) == 2
    assert list(Corpus.load(copy / "corpus").documents) == list(before.documents)
    add_documents([tmp_path / "new"], copy, bert=bert)
    after = Corpus.load(copy / "corpus")
    assert sorted(d.name for d in after.documents[len(before.documents) :]) == ["a.txt", "b.txt"]
    assert after.documents[: len(before.documents)] == list(before.documents) and after.sha256 == before.sha256
    assert tokens.stat().st_ino == inode and tokens.read_bytes().startswith(beginning), "they are not written again"
    assert tokens.stat().st_size == after.tokens.nbytes, "nor twice"
    remove_documents(["a.txt"], copy, bert=bert)
    (left,) = (copy / "corpus").glob("documents*.bin")
    assert left.name == documents_file(Corpus.load(copy / "corpus").manifest)


@pytest.mark.parametrize("moment", ["documents_file", "sha256_of_file"], ids=["looked for", "opened"])
def test_a_corpus_whose_table_is_replaced_while_it_is_opened_is_opened_as_it_is_then(
    data, bert, tmp_path, monkeypatch, moment
):
    folder = shutil.copytree(data, tmp_path / "data") / "corpus"
    (tmp_path / "new.txt").write_text("Something else altogether, which nobody has ever said before. " * 3)
    was, left = getattr(corpus_module, moment), [[tmp_path / "new.txt"]]

    def replaced(*args):
        found = was(*args)
        if left:
            add_documents(left.pop(), tmp_path / "data", bert=bert)
        return found

    monkeypatch.setattr(corpus_module, moment, replaced)
    assert "new.txt" in [document.name for document in Corpus.load(folder).documents] and not left
    next(folder.glob("documents-*.bin")).unlink()
    with refused(DamagedFile, "no file"):  # and not again and again
        Corpus.load(folder)


def test_a_corpus_of_an_older_version_is_made_again_and_a_forged_name_is_found(plays, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    argv = ["database", str(plays), "--tokenizer", "bpe:300", "--index", "Flat"]
    assert main(argv) == 0
    path = tmp_path / "data" / "corpus" / "manifest.json"
    manifest = read_manifest(path)
    old = {name: value for name, value in manifest.items() if name not in ("n_documents", "documents_sha256", "sha256")}
    write_manifest(path, old | {"documents": [], "groups": []})
    with refused(StaleArtifact, "n_documents"):
        Corpus.load("data/corpus")
    keys = {file: sha256_of_file(file) for file in (tmp_path / "data" / "keys").rglob("*.npy")}
    capsys.readouterr()
    assert main(argv) == 0
    assert "made again: " in capsys.readouterr().out and read_manifest(path) == manifest
    assert keys == {file: sha256_of_file(file) for file in keys}, "nothing is embedded again"
    write_manifest(path, manifest | {"sha256": "0" * 64})
    assert main(["verify"]) == 1
    assert "says that its sha256 is 000000" in capsys.readouterr().out
    write_manifest(path, manifest | {"documents_sha256": "../../x"})
    with refused(DamagedFile, "which is no hash"):
        Corpus.load("data/corpus")
