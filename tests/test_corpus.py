import json

import numpy as np
import pytest
from conftest import refused
from labml_helpers.datasets.text import TextFileDataset

from retro.errors import DamagedFile
from retro.text.build import build_corpus, name_of
from retro.text.corpus import Corpus
from retro.text.documents import find_texts, read_documents, sha256_of_text
from retro.text.split import split_texts

TEXT = "Full fathom five thy father lies;\nOf his bones are coral made;\n" * 20


def test_one_file_gives_what_labmls_text_file_dataset_gives(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text(TEXT)
    ours, theirs = build_corpus([file], tmp_path / "corpus"), TextFileDataset(file, list)
    assert (ours.train, ours.valid, ours.itos, ours.stoi) == (theirs.train, theirs.valid, theirs.itos, theirs.stoi)
    assert ours.n_tokens == theirs.n_tokens and ours.text_to_i("coral").equal(theirs.text_to_i("coral"))
    adapted = Corpus.of(theirs)
    assert adapted.train == theirs.train and adapted.starts.tolist() == ours.starts.tolist()


@pytest.mark.parametrize("tokenizer", ["char", "bpe:300"])
def test_documents_come_back_whole_and_on_one_side_of_the_split(tmp_path, tokenizer):
    texts = {f"{i}.txt": f"Document {i}: {'ä😀' * i}\n" * 9 for i in range(8)} | {"copy.txt": "Document 3: ä\n"}
    texts["twin.txt"] = texts["copy.txt"]
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    corpus = build_corpus([tmp_path], tmp_path / "corpus", tokenizer, valid_fraction=0.3)
    side = {}
    for i, entry in enumerate(corpus.documents):
        start, end = corpus.starts[i : i + 2]
        assert corpus.text(start, end - start) == texts[entry.name]
        assert entry.n_bytes == len(texts[entry.name].encode())
        side[entry.name] = i < corpus.n_train
    left_out = dict(corpus.manifest["left_out"])
    assert set(side) | set(left_out) == set(texts) and set(side.values()) == {True, False}
    assert side["copy.txt"] == side.get("twin.txt", False) and set(left_out) <= {"twin.txt"}


def test_subwords_are_learnt_from_the_training_documents_alone(tmp_path):
    words = ["amaranth", "belvedere", "cormorant", "dulcimer", "eglantine", "filigree", "gossamer", "halcyon"]
    for word in words:
        (tmp_path / f"{word}.txt").write_text(f" {word}" * 40)
    corpus = build_corpus([tmp_path], tmp_path / "corpus", "bpe:400", valid_fraction=0.3)
    n_tokens = {word: len(corpus.tokenizer.encode(f" {word}")) for word in words}
    trained = {corpus.documents[i].name.removesuffix(".txt") for i in corpus.split("train")}
    assert {word for word in words if n_tokens[word] == 1} == trained and 0 < len(trained) < len(words)


@pytest.mark.parametrize("fraction", [0.001, 0.3, 0.7])
def test_no_more_is_held_out_than_the_share_in_whole_documents(tmp_path, fraction):
    texts = {f"{i}.txt": f"Document {i}" + "." * (i * i % 37) for i in range(200)}
    (tmp_path / "all.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts.values()))
    split, sizes = (
        split_texts(list(read_documents(find_texts([tmp_path]))), fraction),
        [len(text) for text in texts.values()],
    )
    held_out = [size for size, side in zip(sizes, split.sides, strict=True) if side == "valid"]
    assert sum(held_out) >= fraction * sum(sizes) > sum(held_out) - max(sizes)
    # As they were drawn: by the hash of seed and text.
    texts_sha256 = [sha256_of_text(text) for text in texts.values()]
    drawn = sorted(range(200), key=lambda i: sha256_of_text(f"0:{texts_sha256[i]}"))[: len(held_out)]
    assert {i for i, side in enumerate(split.sides) if side == "valid"} == set(drawn)
    assert sum(held_out) - sizes[drawn[-1]] < fraction * sum(sizes)


def test_values_end_with_their_document(tmp_path):
    (tmp_path / "a.txt").write_text("abcdefgh")
    (tmp_path / "b.txt").write_text("ijklmnop")
    corpus = build_corpus([tmp_path], tmp_path / "corpus")
    values = corpus.values(np.array([[0, 6], [8, -1]]), 4)
    # Offset 6 is two tokens before the end of the first document; -1 is no offset.
    assert (values[0, 0] >= 0).all() and (values[0, 1] >= 0).tolist() == [True, True, False, False]
    assert corpus.tokenizer.decode(values[0, 1][:2]) == corpus.text(6, 2)
    assert (values[1, 1] == -1).all()


def test_the_same_texts_give_the_same_bytes(plays, tmp_path):
    for folder in ("one", "two"):
        build_corpus([plays], tmp_path / folder, "bpe:300", seed=3)
    for name in ("tokens.bin", "tokenizer.json", "signatures.bin", "manifest.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_each_line_of_a_jsonl_file_is_a_document(tmp_path):
    file = tmp_path / "docs.jsonl"
    file.write_text("".join(json.dumps({"text": f"text {i} " * 5}) + "\n" for i in range(3)))
    corpus = build_corpus([file], tmp_path / "corpus")
    assert sorted(d.name for d in corpus.documents) == ["docs.jsonl:1", "docs.jsonl:2", "docs.jsonl:3"]
    file.write_text('{"text": "fine"}\n{"txt": "not"}\n')
    with pytest.raises(ValueError, match=r"docs\.jsonl, line 2"):
        build_corpus([file], tmp_path / "corpus")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"good \xff bad", r"bad\.txt is not UTF-8 text: byte 5 is 0xff"),
        (b"\x7fELF\x00", r"bad\.txt is binary.*byte 4"),
        (b"", "all of it is empty"),
        (b"x", "too few to hold some out"),
    ],
)
def test_text_that_cannot_be_used_is_named_and_the_old_corpus_stays(tmp_path, content, message):
    good, bad = tmp_path / "good.txt", tmp_path / "bad.txt"
    good.write_text(TEXT)
    before = build_corpus([good], tmp_path / "corpus").sha256
    bad.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build_corpus([bad], tmp_path / "corpus")
    assert Corpus.load(tmp_path / "corpus").sha256 == before


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.txt does not exist"):
        build_corpus([tmp_path / "nowhere.txt"], tmp_path / "corpus")
    with pytest.raises(ValueError, match="holds no text"):
        build_corpus([tmp_path], tmp_path / "corpus")


def test_a_damaged_corpus_is_refused_with_the_command_that_rebuilds_it(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    build_corpus([tmp_path / "a.txt"], tmp_path / "corpus")
    tokens = tmp_path / "corpus" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with refused(DamagedFile, r"tokens\.bin has sha256 .* says .*retro database"):
        Corpus.load(tmp_path / "corpus")
    (tmp_path / "corpus" / "manifest.json").write_text("{")
    with refused(DamagedFile, r"manifest\.json is not the JSON.*retro database"):
        Corpus.load(tmp_path / "corpus")


def test_an_unknown_character_is_named(tmp_path):
    (tmp_path / "a.txt").write_text(TEXT)
    corpus = build_corpus([tmp_path / "a.txt"], tmp_path / "corpus")
    with pytest.raises(ValueError, match=r"'é' \(character 3 of the text\)"):
        corpus.text_to_i("filé")


def test_a_corpus_is_called_as_what_it_was_made_of(tmp_path):
    notes, papers = tmp_path / "my notes", tmp_path / "papers.jsonl"
    notes.mkdir()
    for i in range(3):
        (notes / f"{i}.txt").write_text(TEXT * i + "x")
    papers.write_text(json.dumps({"text": TEXT}) + "\n")
    assert name_of([notes]) == "my_notes" and name_of([papers]) == "papers"
    assert name_of([notes / "0.txt", notes / "1.txt"]) == "my_notes" and name_of(["/"]) == "text"
    assert build_corpus([notes], tmp_path / "corpus").name == "my_notes"
    assert (
        build_corpus([notes], tmp_path / "corpus", name="mine").name == Corpus.load(tmp_path / "corpus").name == "mine"
    )
