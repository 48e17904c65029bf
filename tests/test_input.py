"""Input of all kinds: every text is taken as what it is, or refused by name; and nothing is left out without a word."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from retro.cli import main
from retro.cli.repair import repair_of
from retro.dataset import DATASET_FILE, Dataset
from retro.errors import CannotRead, DamagedFile, InvalidOption, MissingArtifact
from retro.evaluation import report
from retro.runs.run import RUN_FILE, run_in
from retro.search import updates
from retro.search.index_file import MANIFEST_FILE as DATABASE_MANIFEST
from retro.search.updates import remove_documents
from retro.storage.manifests import FORMAT_VERSION, parse_manifest, write_manifest
from retro.storage.shards import Shards
from retro.text.build import build_corpus
from retro.text.corpus import Corpus, open_corpus
from retro.text.documents import find_texts, read_documents, search_texts
from retro.text.tokenizer import train_tokenizer

TEXT = "Full fathom five thy father lies;\nOf his bones are coral made;\n" * 20


def names(*paths):
    return [name for name, _ in find_texts(paths)]


@pytest.fixture
def notes(tmp_path):
    folder = tmp_path / "notes"
    for name in ("a.txt", "b/c.md"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(TEXT + name)
    return folder


# What is found in a folder, and what is not.


def test_what_retro_wrote_below_a_folder_of_texts_is_not_taken_for_text(notes, data, tmp_path):
    shutil.copytree(data, notes / "data")
    (notes / "data" / "report.html").write_text("x")
    write_manifest(notes / "logs" / "n" / "1" / RUN_FILE, {})
    (notes / "logs" / "n" / "1" / "sample.txt").write_text("x")
    build_corpus([notes / "a.txt"], notes / "only" / "corpus")  # a build that was ended after its first stage
    (notes / "only" / "tiny_shakespeare.txt").write_text("x")
    (notes / "old").mkdir()  # of another version
    (notes / "old" / DATABASE_MANIFEST).write_text(json.dumps({"format_version": 1, "checksum": "0"}))
    (notes / "old" / "x.txt").write_text("x")
    texts, passed_over = search_texts([notes])
    assert [name for name, _ in texts] == ["a.txt", "b/c.md"]
    own = [notes / "data", notes / "logs" / "n" / "1", notes / "old", notes / "only"]
    assert passed_over.own == own and "4 folders of retro's own artifacts (" in str(passed_over)


def test_a_folder_that_only_has_the_name_of_an_artifact_is_text(notes):
    for folder in ("data", "corpus", "runs"):
        (notes / folder).mkdir()
        (notes / folder / "d.txt").write_text(folder)
    (notes / "data" / DATABASE_MANIFEST).write_text('{"version": 1}')
    (notes / "corpus" / "manifest.json").write_text("{")
    (notes / "runs" / RUN_FILE).write_text('["format_version", "checksum"]')
    assert names(notes) == ["a.txt", "b/c.md", "corpus/d.txt", "data/d.txt", "runs/d.txt"]


def test_texts_that_lie_beside_the_artifacts_are_found_and_the_artifacts_are_not(notes, data):
    shutil.copytree(data, notes, dirs_exist_ok=True)
    shards = Shards(notes / "retro_valid_dataset.shards", {}, [""], ".jsonl")
    shards.open()
    (shards.folder / "000000-0.jsonl").write_text('{"offset": 0}\n')
    (notes / "papers.jsonl").write_text('{"text": "a paper", "format_version": 1}\n')
    texts, passed_over = search_texts([notes])
    assert [name for name, _ in texts] == ["a.txt", "b/c.md", "papers.jsonl"]
    assert {path.name for path in passed_over.own} >= {"corpus", "retro_train_dataset.jsonl", shards.folder.name}
    assert passed_over.kinds.keys() == {".json", ".index"}, "of the database"


def test_a_report_which_quotes_held_out_text_is_not_trained_on(notes):
    template = (Path(report.__file__).parent / "report.html.j2").read_text()
    head = template[template.index("<html") : template.index("<title>")]
    (notes / "report.html").write_text("<!DOCTYPE html>\n" + head + "x" * 10_000)
    (notes / "page.html").write_text("<!DOCTYPE html>\n" + head.replace("retro", "hugo"))
    assert names(notes) == ["a.txt", "b/c.md", "page.html"]


def test_folders_behind_links_are_read_once_and_never_in_circles(notes, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "d.txt").write_text("d")
    (notes / "a_link").symlink_to(notes / "b")  # comes before its folder, which names its files all the same
    (notes / "b" / "up").symlink_to("..")
    (elsewhere / "circle").symlink_to(elsewhere)
    for link in ("one", "two"):
        (notes / link).symlink_to(elsewhere)
    assert names(notes) == ["a.txt", "b/c.md", "one/d.txt"]


def test_what_is_passed_over_is_said_in_a_line(notes):
    for name in ("1.png", "2.PNG", "3.pdf", "Makefile", ".hidden.txt"):
        (notes / name).write_text("x")
    (notes / ".git").mkdir()
    (notes / ".git" / "x.txt").write_text("x")
    (notes / "gone.txt").symlink_to("nowhere")
    os.mkfifo(notes / "pipe.txt")
    said = str(search_texts([notes])[1])
    assert said == (
        "4 files of other kinds (.png 2, .pdf 1, without suffix 1), "
        "1 hidden folder, 1 hidden file, 1 broken link, 1 special file"
    )
    assert str(search_texts([notes / "b"])[1]) == ""
    for suffix in "uvwxyz":
        (notes / f"1.{suffix}").write_text("x")
    assert "10 files of other kinds (.png 2, " in str(search_texts([notes])[1])
    (notes / "none").mkdir()
    (notes / "none" / "a.pdf").write_text("x")
    with pytest.raises(ValueError, match=r"none holds no text: .*; passed over: 1 file of other kinds \(.pdf 1\)"):
        find_texts([notes / "none"])


@pytest.mark.parametrize("command", ["train", "add"])
def test_a_command_says_once_what_it_passed_over(command, notes, capsys, tmp_path, monkeypatch):
    (notes / "1.png").write_text("x")
    monkeypatch.setattr("retro.cli.stages.prepare_database", lambda *_, **__: (_ for _ in ()).throw(ValueError("seen")))
    assert main([command, str(notes), "--data-path", str(tmp_path / "data")]) == 1
    assert capsys.readouterr().out.count("passed over: 1 file of other kinds (.png 1)") == 1


def test_what_may_not_be_read_is_named_and_not_left_out(notes, monkeypatch):
    scandir, read_bytes = os.scandir, Path.read_bytes

    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", lambda path: denied(path) if Path(path).name == "b" else scandir(path))
        with pytest.raises(CannotRead, match=r"cannot read .*notes/b: Permission denied; make it readable, or leave"):
            find_texts([notes])
    monkeypatch.setattr(Path, "read_bytes", lambda path: denied(path) if path.name == "a.txt" else read_bytes(path))
    with pytest.raises(CannotRead, match=r"cannot read .*a\.txt: Permission denied") as error:
        list(read_documents(find_texts([notes])))
    assert error.value.path == notes / "a.txt" and isinstance(error.value, OSError)


def test_a_pipe_is_refused_because_texts_are_read_more_than_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe is neither a file nor a folder"):
        find_texts([tmp_path / "pipe"])


# What is in a file.


def test_a_name_that_is_not_utf_8_is_written_out_and_the_corpus_is_whole(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    for name in (b"caf\xe9.txt", "café.txt".encode()):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_text(TEXT + str(name))
    assert names(folder) == ["caf\\xe9.txt", "café.txt"]
    build_corpus([folder], tmp_path / "corpus")
    assert {d.name for d in Corpus.load(tmp_path / "corpus").documents} == {"caf\\xe9.txt", "café.txt"}
    assert names(folder / os.fsdecode(b"caf\xe9.txt")) == ["caf\\xe9.txt"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (r'{"text": "ab\ud800"}', r'character 3 of its "text" is \\ud800, half a surrogate pair'),
        ('{"text": "x", "n": ' + "[" * 10_000 + "]" * 10_000 + "}", "this is nested too deeply"),
        ("{" * 10_000, "this is no JSON"),
        ('{"text": "x"} {', r"this is no JSON \(Extra data, column 15\)"),
        ('["text"]', "this is a list"),
        ('"text"', "this is a string"),
        ("7", "this is a number"),
        ("NaN", "this is a number"),
        ('{"txt": "x"}', 'it has no "text"'),
        ('{"text": 7}', 'its "text" is a number'),
        ('{"text": NaN}', 'its "text" is a number'),
        ('{"text": null}', 'its "text" is null'),
        ('{"text": ["x"]}', 'its "text" is a list'),
    ],
)
def test_a_line_that_is_no_record_is_named_with_what_it_is(tmp_path, line, said):
    file = tmp_path / "docs.jsonl"
    file.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(
        ValueError, match=rf'docs\.jsonl, line 3: expected a JSON object with a "text" string, but {said}'
    ):
        list(read_documents([("docs.jsonl", file)]))


def test_a_record_is_taken_whatever_else_is_in_it(tmp_path):
    file = tmp_path / "docs.jsonl"
    lines = [
        '{"text": "one", "id": ' + "1" * 5000 + "}",
        '{"score": NaN, "text": "two", "least": -Infinity}',
        r'{"text": "three\r\nlines\rhere"}',
        '{"text": "\\ud83d\\ude00"}',
        '{"text": " "}',
        "",
    ]
    file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())  # as Windows writes
    found = [(document.name, document.text) for document in read_documents([("d", file)])]
    assert found == [("d:1", "one"), ("d:2", "two"), ("d:3", "three\nlines\nhere"), ("d:4", "😀")]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_utf_16_is_told_by_its_name_and_the_command_converts_it(tmp_path, encoding):
    file = tmp_path / "my notes.txt"
    file.write_bytes(("\ufeff" + TEXT).encode(encoding))
    with pytest.raises(ValueError, match=f"is {encoding[:6].upper()} text, but UTF-8 is wanted") as error:
        build_corpus([file], tmp_path / "corpus")
    subprocess.run(["sh", "-c", str(error.value).partition("Convert it: ")[2]], check=True)
    assert next(read_documents(find_texts([file]))).text == TEXT
    assert [file.name for file in tmp_path.iterdir()] == ["my notes.txt"]


def test_an_empty_file_is_no_document(tmp_path, notes):
    (notes / "empty.txt").write_text("")
    (notes / "empty.jsonl").write_bytes(b"\xef\xbb\xbf\r\n")
    texts, passed_over = search_texts([notes])
    assert [document.name for document in read_documents(texts)] == ["a.txt", "b/c.md"]
    assert str(passed_over) == "1 empty file"
    with pytest.raises(ValueError, match=r"no text in .*empty\.txt: all of it is empty"):
        build_corpus([notes / "empty.txt"], tmp_path / "corpus")


# What is wrong is said.


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["--help", "train --help", "plan 2>&1", "nothing 2>&1"])
def test_a_reader_that_has_seen_enough_is_no_error(command, unbuffered):
    code = "import sys; from retro.cli import main; sys.exit(main())"
    script = f"'{sys.executable}' -c '{code}' {command} | true; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, env=environment)
    assert done.stderr == "" and done.returncode in (141, 0)


def test_a_pipe_that_breaks_elsewhere_is_an_error_with_a_message(monkeypatch, capsys):
    def broken(*_):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("retro.cli.building.database_command", broken)
    assert main(["database"]) == 1 and "Broken pipe" in capsys.readouterr().err


def test_what_a_terminal_cannot_show_is_written_out(tmp_path, monkeypatch):
    (tmp_path / "é").mkdir()
    (tmp_path / "é" / "nö.txt").write_text(TEXT)
    write_manifest(tmp_path / "é" / "ü" / RUN_FILE, {})
    monkeypatch.chdir(tmp_path)
    screens = {name: io.TextIOWrapper(io.BytesIO(), encoding="ascii") for name in ("stdout", "stderr")}
    for name, screen in screens.items():
        monkeypatch.setattr(sys, name, screen)
    assert main(["add", "é", "--data-path", "ä"]) == 1
    screens["stderr"].flush()
    out, err = (screen.buffer.getvalue().decode() for screen in screens.values())
    assert "passed over: 1 folder of retro's own artifacts (\\xe9/\\xfc)" in out
    assert "error: \\xe4/corpus/manifest" in err


def test_without_a_text_the_commands_do_not_take_plays_without_a_word(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["database", "--data-path", "mine"]) == 1
    said = capsys.readouterr().err
    assert (
        "a TEXT is missing" in said and "--preset demo" in said and "retro database TEXT ... --data-path mine" in said
    )
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr("retro.planning.rates.measure", lambda *_: (_ for _ in ()).throw(ValueError("seen")))
    assert main(["plan", "--n-tokens", "1e9"]) == 1
    assert "no TEXT is named, so this is for text like that of --preset demo" in capsys.readouterr().out
    assert main(["plan", "--n-tokens", "1e9", "a.txt"]) == 1
    assert "no TEXT" not in capsys.readouterr().out


def test_a_stale_corpus_names_the_texts_that_changed(notes, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(7):
        (notes / f"gone{i}.txt").write_text(TEXT + str(i))
    build_corpus([notes], "data/corpus", "bpe:300")
    for i in range(7):
        (notes / f"gone{i}.txt").unlink()
    (notes / "a.txt").write_text("other")
    (notes / "new.txt").write_text("new")
    assert main(["train", "notes", "--tokenizer", "bpe:300"]) == 1
    said = capsys.readouterr().err
    gone = ", ".join(f"gone{i}.txt" for i in range(5))
    assert f"was made with other texts: 1 new (new.txt), 7 gone ({gone}, ...), 1 changed (a.txt). Rebuild it: " in said
    assert "retro database TEXT ... --tokenizer bpe:300" in said and "texts_sha256" not in said
    assert main(["train", "notes", "--tokenizer", "char"]) == 1
    assert "1 changed (a.txt); tokenizer_name='bpe:300', but tokenizer_name='char'" in capsys.readouterr().err


def test_a_single_text_that_changed_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(TEXT)
    build_corpus(["a.txt"], "data/corpus", "bpe:300")
    Path("a.txt").write_text(TEXT + "more")
    assert main(["train", "a.txt", "--tokenizer", "bpe:300"]) == 1
    assert "was made with other texts: 1 changed (a.txt). Rebuild" in capsys.readouterr().err


def test_a_first_call_says_which_text_it_looked_for(tmp_path):
    with pytest.raises(MissingArtifact, match=r"no .*data/tiny_shakespeare\.txt, and .*data/corpus does not exist"):
        open_corpus(tmp_path / "data")


# What a name means.


@pytest.fixture
def removable(tmp_path, monkeypatch):
    """A function that removes names from a corpus alone, and gives the names that are left in the database."""
    folder = tmp_path / "texts"
    (folder / "old").mkdir(parents=True)
    for name in ("old/a.txt", "old/b.txt", "older.txt", "p.jsonl:x"):
        (folder / name).write_text(TEXT + name)
    for name, n in (("p.jsonl", 4), ("xp.jsonl", 1), ("old/p.jsonl", 2)):
        (folder / name).write_text("".join(json.dumps({"text": f"{TEXT}{name} {i}"}) + "\n" for i in range(n)))
    data = tmp_path / "data"
    corpus = build_corpus([folder, folder / "p.jsonl:x"], data / "corpus", "bpe:300", 0.0)
    monkeypatch.setattr(updates, "update_index", lambda *_: {"done": True})

    def remove(*names):
        remove_documents(names, data)
        corpus = Corpus.load(data / "corpus")
        return sorted(corpus.documents[i].name for i in corpus.in_database)

    everything = sorted(d.name for d in corpus.documents)
    assert everything == [
        "old/a.txt", "old/b.txt", "old/p.jsonl:1", "old/p.jsonl:2", "older.txt", "p.jsonl:1", "p.jsonl:2", "p.jsonl:3",
        "p.jsonl:4", "p.jsonl:x", "xp.jsonl:1",
    ]  # fmt: skip
    return remove, everything


def test_a_file_of_records_is_removed_by_its_name_and_a_folder_by_its(removable):
    remove, everything = removable
    left = remove("p.jsonl")
    assert left == [name for name in everything if name not in {f"p.jsonl:{i}" for i in range(1, 5)}]
    assert remove("old/") == ["older.txt", "p.jsonl:x", "xp.jsonl:1"]
    assert remove("p.jsonl", "older.txt") == ["p.jsonl:x", "xp.jsonl:1"], "what is removed already stays so"


def test_a_name_of_nothing_or_of_two_things_removes_nothing(removable, tmp_path):
    remove, _ = removable
    with pytest.raises(ValueError, match="no document of the database is called 'old'"):
        remove("older.txt", "old")
    with pytest.raises(ValueError, match="no document of the database is called 'l/'"):
        remove("l/")
    (tmp_path / "texts" / "b").write_text(TEXT)
    (tmp_path / "texts" / "b:1").write_text(TEXT + "1")
    build_corpus(
        [tmp_path / "texts" / name for name in ("b", "b:1", "older.txt")], tmp_path / "data/corpus", "bpe:300", 0.0
    )
    with pytest.raises(ValueError, match="'b' is the name of a document, and of others besides: b:1"):
        remove("b")
    assert remove("b:1") == ["b", "older.txt"]


def test_held_out_records_are_told_by_the_name_of_their_file(tmp_path):
    for name in ("p.jsonl", "q.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": TEXT + name}) + "\n")
    corpus = build_corpus([tmp_path / "p.jsonl", tmp_path / "q.jsonl"], tmp_path / "data" / "corpus", "bpe:300")
    file = corpus.documents[corpus.split("valid")[0]].name.removesuffix(":1")
    with pytest.raises(ValueError, match=f"called '{file}', it is held out"):
        remove_documents([file], tmp_path / "data")


def test_many_removed_documents_are_counted(monkeypatch, capsys):
    manifest = {"removed": {str(i): f"p.jsonl:{i}" for i in range(8)}, "additions": [2], "n_chunks": 1, "chunk_len": 1}
    monkeypatch.setattr(updates, "remove_documents", lambda *_, **__: manifest | {"index": "Flat", "recall": {}})
    assert main(["remove", "p.jsonl"]) == 0
    assert "removed: p.jsonl:0, p.jsonl:1, p.jsonl:2, p.jsonl:3, p.jsonl:4 and 3 more" in capsys.readouterr().out


def test_a_folder_of_runs_stands_for_its_latest(tmp_path):
    for time, name in ((3, "aa"), (5, "bb"), (4, "cc")):
        write_manifest(tmp_path / "n" / name / RUN_FILE, {})
        (tmp_path / "n" / name / "checkpoints" / "00000004").mkdir(parents=True)
        os.utime(tmp_path / "n" / name / "checkpoints" / "00000004", (time, time))
    assert run_in(tmp_path / "n") == tmp_path / "n" / "bb" and run_in(tmp_path / "n" / "cc") == tmp_path / "n" / "cc"
    assert run_in(tmp_path / "none") == tmp_path / "none"


# What another process is sent.


def test_a_dataset_is_sent_to_another_process_without_the_files_that_it_reads(data):
    corpus = Corpus.load(data / "corpus")
    dataset = Dataset(data / DATASET_FILE["train"], corpus)
    sent = pickle.dumps(dataset)
    line = (data / DATASET_FILE["train"]).read_bytes().split(b"\n")[1]
    assert corpus.tokens[:100].tobytes() not in sent and line not in sent
    arrived = pickle.loads(sent)
    assert len(arrived) == len(dataset) and len(arrived.corpus.tokens) == len(corpus.tokens)
    for i in range(len(dataset)):
        assert all(torch.equal(a, b) for a, b in zip(arrived[i], dataset[i], strict=True))
    in_memory = Corpus(corpus.tokens[7:40].copy(), corpus.documents, 1, corpus.tokenizer)
    assert (pickle.loads(pickle.dumps(in_memory)).tokens == corpus.tokens[7:40]).all()


# JSON that is too deep.


def test_json_that_is_nested_too_deeply_is_a_damaged_file(tmp_path):
    for depth in [*range(700, 1000), 100_000]:  # around what can be read, and can not be written again
        text = f'{{"format_version": {FORMAT_VERSION}, "a": {"[" * depth}{"]" * depth}}}'
        with pytest.raises(DamagedFile, match=r"x\.json (was altered|is not the JSON)"):
            parse_manifest(tmp_path / "x.json", text, {})


def test_a_tokenizer_that_is_none_is_named(tmp_path):
    for text in ("[" * 100_000, "7", "{", '{"model": ' + "[" * 5000 + "]" * 5000 + "}"):
        (tmp_path / "tokenizer.json").write_text(text)
        with pytest.raises((DamagedFile, InvalidOption), match=r"tokenizer\.json"):
            train_tokenizer(str(tmp_path), [])
    (tmp_path / "retro.index.json").write_text("[" * 100_000)
    assert "retro database" in repair_of(DamagedFile(tmp_path / "retro.index", "is torn"))
