"""Nothing is lost: processes are killed, disks are full, files are torn, and the same command ends as it should."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import CHUNK_LEN, CHUNKS_PER_SAMPLE

from retro import dataset as dataset_module
from retro import keys as keys_module
from retro.artifacts import only_writer, write_json
from retro.bert_embeddings import BERTChunkEmbeddings
from retro.commands import database_command, dataset_command
from retro.corpus import Corpus, build_corpus
from retro.database import RetroIndex, build_database
from retro.dataset import DATASET_FILE, build_dataset
from retro.keys import Keys
from retro.shards import Shards

HERE = Path(__file__).parent


def test_killed_anywhere_it_ends_with_the_same_bytes():
    result = subprocess.run(
        [sys.executable, HERE / "chaos.py", "--points", "20", "--seed", "6"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    kills = re.search(
        r"(\d+) kills .*'database': (\d+), 'dataset': (\d+), 'train': (\d+), 'change': (\d+)", result.stdout
    )
    assert int(kills[1]) >= 20 and all(int(n) >= 2 for n in kills.groups()[1:]), result.stdout
    assert int(re.search(r"([\d,]+) files", result.stdout)[1].replace(",", "")) > 100


@pytest.fixture
def copy(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def small_pieces(monkeypatch):
    monkeypatch.setattr(keys_module, "TOKENS_PER_PIECE", 64 * CHUNK_LEN)


@pytest.mark.parametrize("damage", ["torn", "altered", "of another text"])
def test_a_damaged_shard_is_named_and_made_again(copy, bert, small_pieces, capsys, damage):
    corpus = Corpus.load(copy / "corpus")
    shutil.rmtree(copy / "keys")
    build_database(CHUNK_LEN, corpus=corpus, data_path=copy, index="Flat", bert=bert)
    shards = sorted((copy / "keys").rglob("*.npy"))
    assert len(shards) > 5
    content = shards[3].read_bytes()
    if damage == "of another text":  # a whole shard, under the name that a piece of another number had
        shards[3].write_bytes(shards[2].read_bytes())
    else:
        shards[3].write_bytes(content[:-100] if damage == "torn" else content[:500] + b"\xff" + content[501:])
    index = (copy / "retro.index").read_bytes()
    capsys.readouterr()
    build_database(CHUNK_LEN, corpus=corpus, data_path=copy, index="Flat", bert=bert)
    assert f"{shards[3]} is damaged" in capsys.readouterr().out.replace("\n", "")
    assert shards[3].read_bytes() == content and (copy / "retro.index").read_bytes() == index


def test_a_damaged_key_decides_nothing_and_the_same_command_mends_it(plays, bert, tmp_path, capsys, monkeypatch):
    arguments = [str(plays), "--tokenizer", "bpe:400", "--chunk-len", "16", "--index", "IVF8,PQ16"]
    arguments += ["--data-path", str(tmp_path)]
    assert database_command(arguments) == 0
    expected = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (shard,) = (tmp_path / "keys").rglob("*.npy")
    shard.write_bytes(expected[shard][:-1] + b"?")
    made_with = RetroIndex(data_path=tmp_path).made_with
    rounded = BERTChunkEmbeddings("cpu", trim=False, precision=made_with["precision"])
    index = RetroIndex(data_path=tmp_path, bert=rounded)
    with pytest.raises(FileNotFoundError, match=r"keys/\w+ has no shard 0, or a damaged one") as refused:
        index.search(index.embed(["To be, or not to be"]), 2)
    capsys.readouterr()
    monkeypatch.setattr("retro.faiss_index._trained", None)  # the index is whole: nothing is learnt again
    command = str(refused.value).partition("Make it again: python -m retro.database ")[2]
    assert database_command(command.split()) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert "made again: " in said and f"{shard} is damaged" in said
    assert expected == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_build_with_other_chunks_leaves_a_working_database_until_it_is_done(copy, bert, monkeypatch):
    corpus = Corpus.load(copy / "corpus")
    build_database(CHUNK_LEN, corpus=corpus, data_path=copy, index="IVF8,PQ16", bert=bert)
    queries = bert([corpus.text(40 * i, CHUNK_LEN) for i in range(9)]).numpy()
    before = [x.tolist() for x in RetroIndex(data_path=copy, bert=bert).search(queries, 3)]

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("retro.database.write_index", die)
    with pytest.raises(KeyboardInterrupt):
        build_database(2 * CHUNK_LEN, corpus=corpus, data_path=copy, index="IVF8,PQ16", bert=bert)
    assert before == [x.tolist() for x in RetroIndex(data_path=copy, bert=bert).search(queries, 3)]
    monkeypatch.undo()
    build_database(2 * CHUNK_LEN, corpus=corpus, data_path=copy, index="IVF8,PQ16", bert=bert)
    assert len(list((copy / "keys").iterdir())) == 1
    assert len(RetroIndex(data_path=copy, bert=bert).keys.offsets) < len(corpus.tokens) / CHUNK_LEN


def test_shards_of_other_texts_or_of_no_work_at_all_are_thrown_away(tmp_path):
    def finished(made_with, label):
        shards = Shards(tmp_path / "s", {"of": made_with}, [label, "b"], ".txt")
        shards.open()
        for number in shards.missing():
            with shards.written(number) as temporary:
                temporary.write_text(f"{made_with} {label} {number}")
        return [shards.path(number).read_text() for number in (0, 1)]

    assert finished("x", "a") == ["x a 0", "x a 1"]
    (tmp_path / "s" / "000009-0123456789abcdef.txt").write_text("beyond the last")
    (tmp_path / "s" / "left.part").write_text("half")
    assert finished("x", "c") == ["x c 0", "x a 1"], "only the piece with another label is made again"
    assert len(list((tmp_path / "s").iterdir())) == 3
    assert finished("y", "c") == ["y c 0", "y c 1"]


@pytest.mark.parametrize("stage", ["database", "dataset"])
def test_a_second_process_in_one_folder_says_so_and_stops(copy, capsys, stage):
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name != ".lock"}
    command = [database_command, ["--index", "SQ8", "--chunk-len", "16"]] if stage == "database" else [
        dataset_command, ["--skip-range", "3"]
    ]  # fmt: skip
    holder = subprocess.Popen(
        [sys.executable, "-c", f"from pathlib import Path; from retro.artifacts import only_writer\n"
         f"with only_writer(Path({str(copy)!r})): print('held', flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    assert command[0]([*command[1], "--data-path", str(copy)]) == 1
    assert f"{copy} is being written by process {holder.pid}; wait for it" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name != ".lock"}
    holder.kill()  # the lock goes with its holder
    holder.wait()
    with only_writer(copy):
        pass


def test_what_a_killed_process_left_is_swept_up(tmp_path):
    (tmp_path / ".tokens.bin.123.tmp").write_bytes(b"half")
    with only_writer(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_is_named(plays, capsys):
    folder = "/proc/retro" if os.path.exists("/proc") else "/dev/null/retro"
    assert database_command([str(plays), "--data-path", folder]) == 1
    assert f"cannot write {folder}" in capsys.readouterr().err


def test_a_corpus_torn_between_its_files_is_made_again_by_the_same_command(plays, tmp_path, capsys):
    arguments = [str(plays), "--tokenizer", "bpe:400", "--chunk-len", "16", "--data-path", str(tmp_path)]
    assert database_command(arguments) == 0
    expected = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    tokens = tmp_path / "corpus" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2] + b"\0\0")
    capsys.readouterr()
    assert database_command(arguments) == 0
    assert "made again: " in (said := capsys.readouterr().out) and "tokens.bin was made with sha256=" in said
    assert expected == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_an_index_is_the_same_whether_filled_at_once_or_in_parts_on_disk_or_in_memory(
    copy, bert, monkeypatch, tmp_path
):
    from retro import faiss_index as index_module

    corpus = Corpus.load(copy / "corpus")
    monkeypatch.setattr(keys_module, "TOKENS_PER_PIECE", 64 * CHUNK_LEN)
    found = {}
    for name, per_part, on_disk in (("whole", 1 << 20, 1.0), ("parts", 100, 1.0), ("disk", 100, 0.0)):
        monkeypatch.setattr(index_module, "KEYS_PER_PART", per_part)
        monkeypatch.setattr(index_module, "ON_DISK_ABOVE", on_disk)
        shutil.copytree(copy, tmp_path / name)
        build_database(CHUNK_LEN, corpus=corpus, data_path=tmp_path / name, index="IVF8,PQ16", bert=bert)
        assert (tmp_path / name / "retro.ivfdata").exists() == (name == "disk")
        index = RetroIndex(data_path=tmp_path / name, bert=bert)
        queries = index.embed([corpus.text(40 * i, CHUNK_LEN) for i in range(30)])
        found[name] = [x.tolist() for x in index.search(queries, 5)]
        assert not (tmp_path / name / "index.parts").exists()
    assert found["whole"] == found["parts"] == found["disk"]
    whole, parts = ((tmp_path / name / "retro.index").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    # Lists on disk are found beside their index, wherever the folder is moved, and nowhere else.
    (tmp_path / "disk").rename(tmp_path / "moved")
    assert [x.tolist() for x in RetroIndex(data_path=tmp_path / "moved", bert=bert).search(queries, 5)] == found["disk"]


@pytest.mark.parametrize("died", ["before its manifest", "after its manifest"])
def test_an_index_and_its_manifest_change_at_one_moment(copy, bert, monkeypatch, died):
    from retro import database as database_module

    before = (copy / "retro.index").read_bytes()

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(database_module, "take_place" if died.startswith("after") else "write_json", die)
    with pytest.raises(KeyboardInterrupt):
        build_database(CHUNK_LEN, data_path=copy, index="SQ8", bert=bert)
    assert (copy / "retro.index").read_bytes() == before and (copy / "retro.index.new").exists()
    monkeypatch.undo()
    index = RetroIndex(data_path=copy, bert=bert)
    assert index.made_with["index"] == ("SQ8" if died.startswith("after") else "Flat")
    assert ((copy / "retro.index").read_bytes() == before) == died.startswith("before")


def test_keys_are_found_by_number_across_shards_few_of_them_open(copy, bert, small_pieces, monkeypatch):
    monkeypatch.setattr(keys_module, "MOST_OPEN", 2)
    corpus = Corpus.load(copy / "corpus")
    keys = Keys(copy / "keys", corpus, CHUNK_LEN, bert.made_with)
    keys.compute(bert, 64)
    blocks = np.concatenate([block for _, block in keys.blocks()])
    numbers = np.array([0, 63, 64, 65, 200, len(blocks) - 1, 5])
    assert len(keys.pieces) > 3 and (keys.rows(numbers) == blocks[numbers]).all()
    queries, of = blocks[::50] + 0.1, np.array([0, 1, 1, 2, 0, 1, 2])
    by_hand = ((queries[of].astype(np.float64) - blocks[numbers]) ** 2).sum(axis=1)
    np.testing.assert_allclose(keys.distances(queries, of, numbers), by_hand, rtol=1e-5)


def test_a_dataset_killed_between_its_files_keeps_the_first(copy, index, monkeypatch):
    retrieve, retrieved = dataset_module.retrieve_samples, []
    train, valid = (copy / name for name in DATASET_FILE.values())
    before, both = train.stat().st_ino, valid.read_bytes()
    valid.unlink()

    def noted(offsets, header, index):
        retrieved.append(header["split"])
        return retrieve(offsets, header, index)

    monkeypatch.setattr(dataset_module, "retrieve_samples", noted)
    build_dataset(None, CHUNKS_PER_SAMPLE, data_path=copy, corpus=index.corpus, index=index)
    assert set(retrieved) == {"valid"} and train.stat().st_ino == before and valid.read_bytes() == both


def test_building_again_over_a_dataset_keeps_the_old_one_until_the_new_one_is_whole(copy, index, monkeypatch):
    before = (copy / DATASET_FILE["train"]).read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dataset_module, "_put_together", full)
    with pytest.raises(OSError, match="No space left"):
        build_dataset(None, CHUNKS_PER_SAMPLE, 5, data_path=copy, corpus=index.corpus, index=index)
    assert (copy / DATASET_FILE["train"]).read_bytes() == before


def test_a_run_goes_back_to_the_checkpoint_before_a_damaged_one(copy, monkeypatch, capsys):
    from retro.train import TrainConfig, newest_whole_checkpoint, train

    monkeypatch.chdir(copy.parent)
    shape = {"d_model": 16, "n_layers": 2, "ca_layers": (1,), "n_heads": 2, "d_k": 8, "d_ff": 32, "n_encoder_layers": 1}
    config = TrainConfig(batch_size=2, epochs=None, steps=6, interval=2)
    run, _ = train(config=config, model_shape=shape | {"encoder_ca_layers": (0,)}, device="cpu")
    last = run / "checkpoints" / "00000006"
    expected = (last / "model.safetensors").read_bytes()
    optimizer = last / "optimizer.safetensors"
    optimizer.write_bytes(optimizer.read_bytes()[:-1] + b"\x7f")
    (run / "summary.json").unlink()
    capsys.readouterr()
    train(resume=run, device="cpu")
    assert "optimizer.safetensors was made with sha256=" in capsys.readouterr().out.replace("\n", "")
    assert (last / "model.safetensors").read_bytes() == expected
    shutil.rmtree(run / "checkpoints")
    assert newest_whole_checkpoint(run) is None


def test_an_older_corpus_stays_whole_when_a_new_one_fails(plays, tmp_path):
    build_corpus([plays], tmp_path / "corpus", "bpe:400")
    before = {p.name: p.read_bytes() for p in (tmp_path / "corpus").iterdir()}
    with pytest.raises(ValueError, match="SIZE is a number"):
        build_corpus([plays], tmp_path / "corpus", "bpe:3")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "corpus").iterdir()}
    write_json(tmp_path / "x.json", {"format_version": 3})
    assert not list(tmp_path.glob(".*.tmp"))
