"""Files of many texts are read a row at a time, into the same corpus whatever their format is, and only once."""

import errno
import gzip
import json
import tempfile
import time
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from conftest import refused
from datasets import Dataset as HuggingFaceDataset
from datasets import DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers, pre_tokenizers

from retro.cli import main
from retro.errors import CannotWrite, InvalidOption
from retro.evaluation.held_out import held_out_texts
from retro.search.updates import split_new_and_restored
from retro.text import build, in_shards, records, tokenizer
from retro.text.build import build_corpus
from retro.text.corpus import Corpus
from retro.text.documents import find_texts, read_documents, search_texts
from retro.text.records import Columns, read_records
from retro.text.spool import Spool
from retro.text.tokenizer import SubwordTokenizer, _has_long_words, train_tokenizer

ROWS = [{"id": i, "title": f"text {i}", "body": f"Of text {i}: {'ä😀 and more. ' * (i + 3)}"} for i in range(12)]
COLUMNS = Columns("body", "title")


def write(path, rows=ROWS, row_group_size=5):
    """The rows in the format that a path's name tells; without one, as a dataset that `datasets` saves."""
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    kind = path.suffix.lower()
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    elif kind == ".zst":
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.CompressedOutputStream(file, "zstd") as packed:
            packed.write(lines)
    elif kind:
        path.write_bytes(gzip.compress(lines) if kind == ".gz" else lines)
    else:
        HuggingFaceDataset.from_list(rows).save_to_disk(path)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "A.JSONL.ZST", "a.parquet", "saved", "hf:"])
def test_every_format_gives_the_same_corpus(tmp_path, name):
    if name == "hf:":  # as load_dataset finds files in a folder, without the hub
        (tmp_path / "hub").mkdir()
        write(tmp_path / "hub" / "a.parquet")
        source = f"hf:{tmp_path / 'hub'}"
    else:
        source = write(tmp_path / name)
    corpus = build_corpus([source], tmp_path / "corpus", text_column="body", name_column="title", valid_fraction=0.2)
    found = {d.name: corpus.text(int(corpus.starts[i]), d.n_tokens) for i, d in enumerate(corpus.documents)}
    assert found == {row["title"]: row["body"] for row in ROWS}
    again = build_corpus(
        [write(tmp_path / "b.jsonl")], tmp_path / "b", text_column="body", name_column="title", valid_fraction=0.2
    )
    assert again.sha256 == corpus.sha256
    by_place = list(read_documents(find_texts([source]), Columns("body")))
    assert [document.name.rpartition(":")[2] for document in by_place] == [str(i + 1) for i in range(len(ROWS))]


def test_they_are_found_in_folders_and_what_else_is_packed_is_passed_over(tmp_path):
    for name in ("a.jsonl.gz", "b.parquet", "saved"):
        write(tmp_path / "texts" / name) if (tmp_path / "texts").mkdir(exist_ok=True) is None else None
    (tmp_path / "texts" / "photos.tar.gz").write_bytes(b"x")
    (tmp_path / "texts" / "run").mkdir()
    (tmp_path / "texts" / "run" / "state.json").write_text("{}")  # of someone else: no dataset
    (tmp_path / "texts" / "run" / "notes.txt").write_text("notes")
    texts, passed_over = search_texts([tmp_path / "texts"])
    assert [name for name, _ in texts] == ["a.jsonl.gz", "b.parquet", "run/notes.txt", "saved"]
    assert str(passed_over) == "2 files of other kinds (.gz 1, .json 1)"


def test_names_are_records_own_and_a_second_one_of_a_name_is_called_by_its_place_too(tmp_path):
    rows = [
        {"text": "one", "id": 7},
        {"text": " ", "id": 8},
        {"text": "two", "id": "7"},
        {"text": "three", "id": 10**30},
    ]
    file = write(tmp_path / "a.jsonl", rows)
    found = list(read_documents(find_texts([file]), Columns(name="id")))
    assert [(d.name, d.text) for d in found] == [("7", "one"), ("7 (a.jsonl:3)", "two"), ("1" + "0" * 30, "three")]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"body": "x"}, 'expected a "?.*body" string, but it has no "title"'),
        ({"body": "x", "title": ""}, 'its "title" is empty'),
        ({"body": "x", "title": None}, 'its "title" is null'),
        ({"body": None, "title": "x"}, 'its "body" is null'),
        ({"body": 7, "title": "x"}, 'its "body" is a number'),
        ({"body": "a\ud800", "title": "x"}, r'character 2 of its "body" is \\ud800'),
    ],
)
def test_a_row_that_cannot_be_used_is_named(tmp_path, row, said):
    file = write(tmp_path / "a.jsonl.gz", [*ROWS[:2], row])
    with pytest.raises(ValueError, match=rf"a\.jsonl\.gz, line 3: .*{said}"):
        list(read_records(file, COLUMNS))


def test_a_value_of_parquet_that_is_no_text_is_named_by_its_row_and_a_column_that_is_not_there_by_those_that_are(
    tmp_path,
):
    file = write(tmp_path / "a.parquet", [*ROWS[:6], {"id": 6, "title": "", "body": None}, ROWS[7]])
    assert [record.number for record in read_records(file, COLUMNS)] == [1, 2, 3, 4, 5, 6, 8]  # null is no text
    with pytest.raises(ValueError, match=r'row 1: expected a "id" string, but its "id" is a number'):
        list(read_records(file, Columns("id")))
    for path in (file, write(tmp_path / "saved")):
        with refused(InvalidOption, r"--text-column text is no column of .*, which has id, title, body"):
            list(read_records(path, Columns()))
        with refused(InvalidOption, "url.* is no column of .*, which has id, title, body"):
            list(read_records(path, Columns("body", "url")))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_torn_file_is_named_and_nothing_is_written(tmp_path, name):
    rows = [{"text": f"{i} " + "".join(chr(97 + (i * k) % 26) for k in range(900))} for i in range(2000)]
    file = write(tmp_path / name, rows)
    whole = file.read_bytes()
    corpus = build_corpus([file], tmp_path / "corpus", valid_fraction=0)
    for torn in (whole[: len(whole) // 2], b"no such file at all, whatever its name says"):
        file.write_bytes(torn)
        with pytest.raises(
            ValueError, match=rf"{name} is (torn or damaged behind line \d+|no whole Parquet file) \(.*\); get it again"
        ):
            build_corpus([file], tmp_path / "corpus", valid_fraction=0)
    assert Corpus.load(tmp_path / "corpus").sha256 == corpus.sha256
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([name, "corpus"])


def test_of_a_dataset_with_splits_one_is_to_be_named(tmp_path):
    DatasetDict(train=HuggingFaceDataset.from_list(ROWS), test=HuggingFaceDataset.from_list(ROWS[:2])).save_to_disk(
        tmp_path / "both"
    )
    with pytest.raises(ValueError, match=r"both holds train, test; name one of them: .*both/train"):
        list(read_documents(find_texts([tmp_path / "both"]), COLUMNS))
    assert len(list(read_documents(find_texts([tmp_path / "both" / "test"]), COLUMNS))) == 2


def test_a_dataset_that_the_hub_does_not_give_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"hf:no-one/nothing:test cannot be read as a dataset: "):
        list(read_documents(find_texts(["hf:no-one/nothing:test"])))


@pytest.mark.parametrize(
    ("name", "package"), [("a.jsonl.zst", "pyarrow"), ("a.parquet", "pyarrow"), ("saved", "datasets")]
)
def test_a_format_whose_package_is_missing_says_what_to_install(tmp_path, monkeypatch, name, package):
    file = write(tmp_path / name)

    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(records, "import_module", missing)
    with pytest.raises(
        ValueError, match=rf"is read by {package}, which is not installed: pip install 'retro-lm\[datasets\]'"
    ):
        list(read_records(file, COLUMNS))


def test_a_disk_that_is_full_while_texts_are_read_is_named_and_the_old_corpus_stays(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl")
    corpus = build_corpus([file], tmp_path / "corpus", text_column="body")
    real = tempfile.TemporaryFile

    class Full:
        def __init__(self, dir):
            self.file = real(dir=dir)

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", Full)
    with refused(CannotWrite, r"cannot write .*corpus: No space left on device.* was changed; free some space"):
        build_corpus([file], tmp_path / "corpus", "bpe:300", text_column="body")
    assert Corpus.load(tmp_path / "corpus").sha256 == corpus.sha256


def test_a_text_that_cannot_be_read_is_not_taken_for_a_disk_that_is_full(tmp_path):
    (tmp_path / "texts").mkdir()
    for name in "ab":
        (tmp_path / "texts" / f"{name}.txt").write_text(f"text {name}")
    texts = find_texts([tmp_path / "texts"])
    (tmp_path / "texts" / "b.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"b\.txt"):
        Spool(read_documents(texts), tmp_path)


def test_a_connection_that_is_lost_while_a_dataset_is_read_is_named(tmp_path, monkeypatch):
    folder = write(tmp_path / "saved")

    def lost(self, batch_size):
        yield {"body": ["one"], "title": ["a"]}
        raise ConnectionError("Server Disconnected")

    monkeypatch.setattr(HuggingFaceDataset, "iter", lost)
    with pytest.raises(ValueError, match=r"saved cannot be read to its end \(Server Disconnected\); try again"):
        list(read_documents(find_texts([folder]), COLUMNS))


def test_the_time_of_tokenizing_short_texts_grows_with_their_number_and_not_its_square(learnt):
    seconds = []
    for n in (5_000, 40_000):
        start = time.process_time()
        learnt[420].encode_batch(["the theme of it"] * n)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 24 * seconds[0] + 1  # of eight times as many; the square would be 64 times


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    file, held = tmp_path / name, [pyarrow.total_allocated_bytes()]
    write(
        file,
        [{"text": "".join(map(chr, np.random.default_rng(i).integers(97, 123, 9000)))} for i in range(3000)],
        10**6,
    )

    def watched():
        for document in read_documents([("a", file)]):
            held.append(pyarrow.total_allocated_bytes())
            yield document

    tracemalloc.start()
    with Spool(watched(), tmp_path) as documents:
        assert sum(len(document.text) for document in documents) == 27_000_000
        peak = tracemalloc.get_traced_memory()[1] + max(held) - held[0]  # Python's own, and Arrow's
    tracemalloc.stop()
    assert peak < 25e6  # which is the same for any file: of Parquet a few pages are unpacked at once


def test_texts_are_read_once_and_the_same_command_again_finds_the_corpus(tmp_path, monkeypatch, capsys):
    file, calls = write(tmp_path / "a.parquet"), []
    monkeypatch.setattr("retro.text.documents.read_records", lambda *args: calls.append(args[0]) or read_records(*args))
    words = ["--text-column", "body", "--name-column", "title", "--tokenizer", "bpe:300", "--valid-fraction", "0.2"]
    command = [
        "database",
        str(file),
        *words,
        "--retriever",
        "bm25",
        "--chunk-len",
        "4",
        "--data-path",
        str(tmp_path / "data"),
    ]
    assert main(command) == 0
    assert calls == [file]
    assert main(command) == 0
    assert calls == [file, file]  # to see that they are the same
    assert "text 3" in {d.name for d in Corpus.load(tmp_path / "data" / "corpus").documents}


def test_what_is_added_and_evaluated_later_is_read_from_the_same_columns(tmp_path):
    corpus = build_corpus(
        [write(tmp_path / "a.jsonl")],
        tmp_path / "corpus",
        text_column="body",
        name_column="title",
        valid_fraction=0.2,
        tokenizer="bpe:300",
    )
    columns = Columns.of(corpus.manifest)
    new = [{"title": "new", "body": "Nothing like it: text and more text, ä."}]
    documents = list(read_documents(find_texts([write(tmp_path / "b.parquet", new)]), columns))
    assert [document.name for document in split_new_and_restored(corpus, documents)[0]] == ["new"]
    assert held_out_texts([tmp_path / "b.parquet"], corpus.tokenizer, columns).documents[0].name == "new"
    assert Columns.of({}) == Columns("text", None)  # of a corpus that was made before there was a choice


# Tokens of many documents at once.


@pytest.fixture(scope="module")
def learnt():
    texts = [
        "the theme of their thesis, and then they; the 10th.\n\n  this\tand that is ä, 😀 and " * 9,
        "lorem ipsum dolor sit amet " * 9,
    ]
    return {size: train_tokenizer(f"bpe:{size}", texts) for size in (256, 300, 420)}


@settings(max_examples=100, deadline=None)
@given(
    texts=st.lists(
        st.text(alphabet="theismorandy' \n\t\r19.,_ä😀٣é\u0301", max_size=60) | st.text(max_size=30), max_size=4
    )
)
def test_tokens_of_many_texts_are_those_of_each(learnt, texts):
    for encoder in learnt.values():
        assert encoder._quick is not None
        assert [ids.tolist() for ids in encoder.encode_batch(texts)] == [encoder.encode(text) for text in texts]


@pytest.mark.parametrize("long", ["a" * 200_000, " " * 200_000, "the" * 70_000, "-" * 1000])
def test_a_word_of_any_length_takes_no_time_in_the_square_of_it(learnt, long):
    texts = ["the", long, "theme"]
    assert [ids.tolist() for ids in learnt[420].encode_batch(texts)] == [learnt[420].encode(text) for text in texts]


@pytest.mark.parametrize("letter", ["a", " ", "\n", "é"])
@pytest.mark.parametrize("length", [999, 1000, 1001, 1499])
def test_a_word_is_long_from_a_thousand_characters_on_wherever_it_stands(letter, length):
    border = "." if letter.isspace() else " "
    for before in (0, 1, 2, 250, 499, 500, 501, 998, 999, 1000):
        for behind in ("", border, border + "ab " * 300):
            text = ("ab" * 3 + " ") * (before // 7) + "." * (before % 7) + border + letter * length + behind
            assert _has_long_words(text) == (length >= 1000), (before, behind)
    assert not _has_long_words("") and not _has_long_words(("a" * 600 + "\t") * 9)


def test_a_tokenizer_that_tiktoken_cannot_be_keeps_its_own_way():
    text = "the theme of 1999: 'they'\n  there<x>"
    plain = train_tokenizer("bpe:300", [text * 9]).backend
    made = json.loads(plain.to_str())
    made["model"]["merges"] = made["model"]["merges"][::-1]  # learnt in another order than its numbers say
    with_another = Tokenizer.from_str(plain.to_str())
    with_another.add_tokens(["<x>"])
    with_digits = Tokenizer.from_str(plain.to_str())
    with_digits.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), plain.pre_tokenizer])
    lower = Tokenizer.from_str(plain.to_str())
    lower.normalizer = normalizers.Lowercase()
    for backend in (Tokenizer.from_str(json.dumps(made)), with_another, with_digits, lower):
        encoder = SubwordTokenizer(backend)
        assert encoder._quick is None and encoder.encode_batch([text])[0].tolist() == encoder.encode(text)
    assert SubwordTokenizer(plain)._quick is not None


def test_a_vocabulary_is_learnt_from_a_drawn_sample_of_stated_size(tmp_path, monkeypatch):
    words = [f"{a}{b}ling" for a in "bcdfghklmnpr" for b in "aeiou"]
    rows = [{"text": f" {word}" * 50} for word in words]
    file, learnt = write(tmp_path / "a.jsonl", rows), []
    monkeypatch.setattr(build, "LEARNT_FROM", 1000)
    monkeypatch.setattr(
        build, "train_tokenizer", lambda name, texts: learnt.append([*texts]) or train_tokenizer(name, learnt[-1])
    )
    first = build_corpus([file], tmp_path / "a", "bpe:300")
    second = build_corpus([file], tmp_path / "b", "bpe:300", seed=1)
    again = build_corpus([file], tmp_path / "c", "bpe:300")
    assert all(sum(map(len, texts)) == 1000 and len(texts) == 3 for texts in learnt)  # 350 + 350 + 300 characters
    assert learnt[0] == learnt[2] != learnt[1] and again.sha256 == first.sha256
    trained = {first.documents[i].name for i in first.split("train")}
    assert {f"a.jsonl:{words.index(text.split()[0]) + 1}" for text in learnt[0]} <= trained
    assert second.tokenizer.sha256 != first.tokenizer.sha256


def test_batches_of_documents_are_tokenized_as_they_are_one_at_a_time(tmp_path, monkeypatch):
    file = write(tmp_path / "a.jsonl")
    once = build_corpus([file], tmp_path / "a", "bpe:300", text_column="body")
    sizes = []
    encode = tokenizer.SubwordTokenizer.encode_batch
    monkeypatch.setattr(
        tokenizer.SubwordTokenizer, "encode_batch", lambda self, texts: sizes.append(len(texts)) or encode(self, texts)
    )
    monkeypatch.setattr(in_shards, "BYTES_PER_SHARD", 200)
    assert build_corpus([file], tmp_path / "b", "bpe:300", text_column="body").sha256 == once.sha256
    assert (
        max(sizes) > 1
        and len(sizes) > 3
        and (tmp_path / "a/tokens.bin").read_bytes() == (tmp_path / "b/tokens.bin").read_bytes()
    )
