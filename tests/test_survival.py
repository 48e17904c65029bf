"""Nothing is lost: processes are killed, disks are full, files are torn, and the same command ends as it should."""

import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import CHUNK_LEN, CHUNKS_PER_SAMPLE

from retro import dataset as dataset_module
from retro.bert_embeddings import BERTChunkEmbeddings
from retro.cli import main
from retro.cli.repair import explain
from retro.config import DatabaseConfig
from retro.database import RetroIndex, build_database
from retro.dataset import DATASET_FILE, build_dataset
from retro.errors import CannotWrite, MissingArtifact
from retro.search import filling, index_file
from retro.search import keys as keys_module
from retro.search.keys import Keys
from retro.storage import sample_file
from retro.storage.files import atomic_write, exclusive_lock
from retro.storage.manifests import write_manifest
from retro.storage.shards import Shards
from retro.text.build import build_corpus
from retro.text.corpus import Corpus

HERE = Path(__file__).parent


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_bytes():
    """Each stage at least once, ten kills in all; `make chaos` has other points."""
    result = subprocess.run(
        [sys.executable, HERE / "chaos.py", "--points", "10", "--seed", "11"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]
    stages = ("database", "dataset", "arrays", "train", "change")
    kills = re.search(r"(\d+) kills .*" + ", ".join(rf"'{stage}': (\d+)" for stage in stages), result.stdout)
    assert int(kills[1]) >= 10 and all(int(n) >= 1 for n in kills.groups()[1:]), result.stdout
    assert int(re.search(r"([\d,]+) files", result.stdout)[1].replace(",", "")) > 80


@pytest.fixture
def copy(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def sharded(data, bert, tmp_path_factory):
    """The data folder with its keys in shards of 64; do not write into it."""
    folder = tmp_path_factory.mktemp("sharded") / "data"
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("keys"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keys_module, "TOKENS_PER_SHARD", 64 * CHUNK_LEN)
        build_database(CHUNK_LEN, data_path=folder, config=DatabaseConfig(index="Flat"), bert=bert)
    return folder


@pytest.fixture
def small_shards(sharded, tmp_path, monkeypatch):
    """A copy of it, while shards are so small."""
    monkeypatch.setattr(keys_module, "TOKENS_PER_SHARD", 64 * CHUNK_LEN)
    return shutil.copytree(sharded, tmp_path / "data")


@pytest.mark.parametrize("damage", ["torn", "altered", "of another text"])
def test_a_damaged_shard_is_named_and_made_again(small_shards, bert, capsys, damage):
    copy, corpus = small_shards, Corpus.load(small_shards / "corpus")
    shards = sorted((copy / "keys").rglob("*.npy"))
    assert len(shards) > 5
    content = shards[3].read_bytes()
    if damage == "of another text":  # a whole shard, under the name that a shard of another number had
        shards[3].write_bytes(shards[2].read_bytes())
    else:
        shards[3].write_bytes(content[:-100] if damage == "torn" else content[:500] + b"\xff" + content[501:])
    index = (copy / "retro.index").read_bytes()
    capsys.readouterr()
    build_database(CHUNK_LEN, corpus=corpus, data_path=copy, config=DatabaseConfig(index="Flat"), bert=bert)
    assert f"{shards[3]} is damaged" in capsys.readouterr().out.replace("\n", "")
    assert shards[3].read_bytes() == content and (copy / "retro.index").read_bytes() == index


def test_a_damaged_key_decides_nothing_and_the_same_command_mends_it(plays, bert, tmp_path, capsys, monkeypatch):
    arguments = [str(plays), "--tokenizer", "bpe:400", "--chunk-len", "16", "--index", "IVF8,PQ16"]
    arguments += ["--data-path", str(tmp_path)]
    assert main(["database", *arguments]) == 0
    expected = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    (shard,) = (tmp_path / "keys").rglob("*.npy")
    shard.write_bytes(expected[shard][:-1] + b"?")
    manifest = RetroIndex(data_path=tmp_path).manifest
    rounded = BERTChunkEmbeddings("cpu", trim=False, precision=manifest["precision"])
    index = RetroIndex(data_path=tmp_path, bert=rounded)
    with pytest.raises(MissingArtifact, match=r"keys/\w+ has no shard 0, or a damaged one") as missing:
        index.search(index.embed(["To be, or not to be"]), 2)
    capsys.readouterr()
    monkeypatch.setattr(filling, "_train", None)  # the index is whole: nothing is learnt again
    command = explain(missing.value).partition("Make it: retro ")[2]
    assert command.startswith("database ") and main(command.split()) == 0
    said = capsys.readouterr().out.replace("\n", "")
    assert "made again: " in said and f"{shard} is damaged" in said
    assert expected == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_a_build_with_other_chunks_leaves_a_working_database_until_it_is_done(copy, bert, monkeypatch):
    corpus = Corpus.load(copy / "corpus")
    build_database(CHUNK_LEN, corpus=corpus, data_path=copy, config=DatabaseConfig(index="IVF8,PQ16"), bert=bert)
    queries = bert([corpus.text(40 * i, CHUNK_LEN) for i in range(9)]).numpy()
    before = [x.tolist() for x in RetroIndex(data_path=copy, bert=bert).search(queries, 3)]

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(index_file, "write_index", die)
    with pytest.raises(KeyboardInterrupt):
        build_database(
            2 * CHUNK_LEN, corpus=corpus, data_path=copy, config=DatabaseConfig(index="IVF8,PQ16"), bert=bert
        )
    assert before == [x.tolist() for x in RetroIndex(data_path=copy, bert=bert).search(queries, 3)]
    monkeypatch.undo()
    build_database(2 * CHUNK_LEN, corpus=corpus, data_path=copy, config=DatabaseConfig(index="IVF8,PQ16"), bert=bert)
    assert len(list((copy / "keys").iterdir())) == 1
    assert len(RetroIndex(data_path=copy, bert=bert).keys.offsets) < len(corpus.tokens) / CHUNK_LEN


def test_shards_of_other_texts_or_of_no_work_at_all_are_thrown_away(tmp_path):
    def finished(manifest, label):
        shards = Shards(tmp_path / "s", {"of": manifest}, [label, "b"], ".txt")
        shards.open()
        for number in shards.missing():
            with shards.written(number) as temporary:
                temporary.write_text(f"{manifest} {label} {number}")
        return [shards.path(number).read_text() for number in (0, 1)]

    assert finished("x", "a") == ["x a 0", "x a 1"]
    (tmp_path / "s" / "000009-0123456789abcdef.txt").write_text("beyond the last")
    (tmp_path / "s" / "left.part").write_text("half")
    assert finished("x", "c") == ["x c 0", "x a 1"], "only the shard with another input is made again"
    assert len(list((tmp_path / "s").iterdir())) == 3
    assert finished("y", "c") == ["y c 0", "y c 1"]


def test_a_shard_is_prepared_for_while_the_one_before_is_made(tmp_path):
    shards = Shards(tmp_path / "s", {}, list("abcd"), ".txt")
    shards.open()
    with shards.written(1) as temporary:
        temporary.write_text("1: there already")
    begun = [threading.Event() for _ in range(4)]

    def prepare(number):
        begun[number].set()
        if number == 3:
            raise ValueError("nothing to prepare")
        return f"for {number}"

    def make(number, prepared, path, done):
        following = {0: 2, 2: 3}[number]  # shard 1 needs nothing
        assert begun[following].wait(10), "the next one is not prepared for before this one is made"
        path.write_text(f"{number}: {prepared}")

    with pytest.raises(ValueError, match="nothing to prepare"):
        shards.make_missing("Make", "letter", [1] * 4, make, prepare)
    assert [shards.path(i).read_text() for i in (0, 1, 2)] == ["0: for 0", "1: there already", "2: for 2"]
    assert shards.missing() == [3] and not begun[1].is_set()


@pytest.mark.parametrize("stage", ["database", "dataset"])
def test_a_second_process_in_one_folder_says_so_and_stops(copy, capsys, stage):
    before = {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name != ".lock"}
    command = (
        ["database", "--index", "SQ8", "--chunk-len", "16"] if stage == "database" else [stage, "--skip-range", "3"]
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", f"from pathlib import Path; from retro.storage.files import exclusive_lock\n"
         f"with exclusive_lock(Path({str(copy)!r})): print('held', flush=True); input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    assert main([*command, "--data-path", str(copy)]) == 1
    assert f"{copy} is being written by process {holder.pid}; wait for it" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in copy.rglob("*") if p.is_file() and p.name != ".lock"}
    holder.kill()  # the lock goes with its holder
    holder.wait()
    with exclusive_lock(copy):
        pass


def test_what_a_killed_process_left_is_swept_up(tmp_path):
    (tmp_path / ".tokens.bin.123.tmp").write_bytes(b"half")
    with exclusive_lock(tmp_path):
        assert [p.name for p in tmp_path.iterdir()] == [".lock"]


def test_a_folder_that_cannot_be_written_is_named(plays, capsys):
    folder = "/proc/retro" if os.path.exists("/proc") else "/dev/null/retro"
    assert main(["database", str(plays), "--data-path", folder]) == 1
    assert f"cannot write {folder}" in capsys.readouterr().err


def test_a_corpus_torn_between_its_files_is_made_again_by_the_same_command(plays, tmp_path, capsys):
    arguments = [str(plays), "--tokenizer", "bpe:400", "--chunk-len", "16", "--data-path", str(tmp_path)]
    assert main(["database", *arguments]) == 0
    expected = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    tokens = tmp_path / "corpus" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2] + b"\0\0")
    capsys.readouterr()
    assert main(["database", *arguments]) == 0
    assert "made again: " in (said := capsys.readouterr().out) and "tokens.bin has sha256 " in said
    assert expected == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_an_index_is_the_same_whether_filled_at_once_or_in_parts_on_disk_or_in_memory(
    small_shards, bert, monkeypatch, tmp_path
):
    corpus = Corpus.load(small_shards / "corpus")
    found = {}
    for name, per_shard, on_disk in (("whole", 1 << 20, 1.0), ("shards", 100, 1.0), ("disk", 100, 0.0)):
        monkeypatch.setattr(filling, "KEYS_PER_SHARD", per_shard)
        monkeypatch.setattr(filling, "ON_DISK_ABOVE", on_disk)
        shutil.copytree(small_shards, tmp_path / name)
        build_database(
            CHUNK_LEN, corpus=corpus, data_path=tmp_path / name, config=DatabaseConfig(index="IVF8,PQ16"), bert=bert
        )
        assert (tmp_path / name / "retro.ivfdata").exists() == (name == "disk")
        index = RetroIndex(data_path=tmp_path / name, bert=bert)
        queries = index.embed([corpus.text(40 * i, CHUNK_LEN) for i in range(30)])
        found[name] = [x.tolist() for x in index.search(queries, 5)]
        assert not (tmp_path / name / "index.shards").exists()
    assert found["whole"] == found["shards"] == found["disk"]
    whole, shards = ((tmp_path / name / "retro.index").read_bytes() for name in ("whole", "shards"))
    assert whole == shards
    # Lists on disk are found beside their index, wherever the folder is moved, and nowhere else.
    (tmp_path / "disk").rename(tmp_path / "moved")
    assert [x.tolist() for x in RetroIndex(data_path=tmp_path / "moved", bert=bert).search(queries, 5)] == found["disk"]


@pytest.mark.parametrize("died", ["before its manifest", "after its manifest"])
def test_an_index_and_its_manifest_change_at_one_moment(copy, bert, monkeypatch, died):
    before = (copy / "retro.index").read_bytes()

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(index_file, "promote_new_index" if died.startswith("after") else "write_manifest", die)
    with pytest.raises(KeyboardInterrupt):
        build_database(CHUNK_LEN, data_path=copy, config=DatabaseConfig(index="SQ8"), bert=bert)
    assert (copy / "retro.index").read_bytes() == before and (copy / "retro.index.new").exists()
    monkeypatch.undo()
    index = RetroIndex(data_path=copy, bert=bert)
    assert index.manifest["index"] == ("SQ8" if died.startswith("after") else "Flat")
    assert (copy / "retro.index").read_bytes() == before  # who reads renames nothing
    build_database(CHUNK_LEN, data_path=copy, config=DatabaseConfig(index="SQ8"), bert=bert)
    assert (copy / "retro.index").read_bytes() != before and not (copy / "retro.index.new").exists()


def test_an_index_whose_writer_was_killed_at_the_end_is_put_in_its_place_by_the_same_command(
    plays, tmp_path, monkeypatch
):
    command = ["database", str(plays / "hamlet.md"), "--tokenizer", "bpe:400", "--chunk-len", "16", "--device", "cpu"]
    command += ["--data-path", str(tmp_path), "--index"]

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(filling, "ON_DISK_ABOVE", 0.0)
    assert main([*command, "IVF2,Flat"]) == 0 and (tmp_path / "retro.ivfdata").exists()
    with monkeypatch.context() as patch:
        patch.setattr(index_file, "promote_new_index", die)
        assert main([*command, "Flat"]) == 130
    new = (tmp_path / "retro.index.new").read_bytes()
    monkeypatch.setattr(index_file, "write_index", None)  # it is written already
    assert main([*command, "Flat"]) == 0
    assert (tmp_path / "retro.index").read_bytes() == new
    assert not list(tmp_path.glob("*.new")) and not (tmp_path / "retro.ivfdata").exists(), "the old lists are left"


def test_keys_are_found_by_number_across_shards_few_of_them_open(small_shards, bert, monkeypatch):
    monkeypatch.setattr("retro.storage.shards.MOST_OPEN", 2)
    keys = Keys(small_shards, Corpus.load(small_shards / "corpus"), CHUNK_LEN, bert.manifest)
    blocks = np.concatenate([block for _, block in keys.each_shard()])
    numbers = np.array([0, 63, 64, 65, 200, len(blocks) - 1, 5])
    assert len(keys.firsts) > 4 and (keys.rows(numbers) == blocks[numbers]).all()
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

    monkeypatch.setattr(sample_file, "_join", full)
    with pytest.raises(OSError, match="No space left"):
        build_dataset(None, CHUNKS_PER_SAMPLE, 5, data_path=copy, corpus=index.corpus, index=index)
    assert (copy / DATASET_FILE["train"]).read_bytes() == before


def test_a_run_goes_back_to_the_checkpoint_before_a_damaged_one(copy, monkeypatch, capsys):
    from retro.runs.checkpoints import newest_whole_checkpoint
    from retro.train import TrainConfig, train

    monkeypatch.chdir(copy.parent)
    shape = {"d_model": 16, "n_layers": 2, "ca_layers": (1,), "n_heads": 2, "d_k": 8, "d_ff": 32, "n_encoder_layers": 1}
    config = TrainConfig(batch_size=2, steps=6, interval=2)
    run, _ = train(config=config, model_shape=shape | {"encoder_ca_layers": (0,)}, device="cpu")
    last = run / "checkpoints" / "00000006"
    expected = (last / "model.safetensors").read_bytes()
    optimizer = last / "optimizer.safetensors"
    optimizer.write_bytes(optimizer.read_bytes()[:-1] + b"\x7f")
    (run / "summary.json").unlink()
    capsys.readouterr()
    train(resume=run, device="cpu")
    assert "optimizer.safetensors has sha256 " in capsys.readouterr().out.replace("\n", "")
    assert (last / "model.safetensors").read_bytes() == expected
    # A checkpoint that cannot be used is passed over, and stays where it is: reading deletes nothing.
    state = last / "state.json"
    state.write_text(state.read_text().replace('"step": 6', '"step": 7'))
    assert newest_whole_checkpoint(run).name == "00000004" and state.exists()
    shutil.rmtree(run / "checkpoints")
    assert newest_whole_checkpoint(run) is None


def test_a_run_that_was_killed_at_its_end_removes_the_checkpoints_that_it_would_have(copy, monkeypatch):
    from retro.runs import checkpoints
    from retro.train import TrainConfig, train

    monkeypatch.chdir(copy.parent)
    shape = {"d_model": 16, "n_layers": 2, "ca_layers": (1,), "n_heads": 2, "d_k": 8, "d_ff": 32, "n_encoder_layers": 1}
    config = TrainConfig(batch_size=2, steps=6, interval=2)
    remove = checkpoints.remove_earlier

    def killed(run, step, interval):
        if step == 6:
            raise KeyboardInterrupt
        remove(run, step, interval)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "remove_earlier", killed)
        train(config=config, model_shape=shape | {"encoder_ca_layers": (0,)}, device="cpu")
    (run,) = (copy.parent / "logs").glob("*/*")
    names = [f"{step:08d}" for step in (2, 4, 6)]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names
    train(resume=run, device="cpu")
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == names[1:]


def test_what_cannot_be_read_while_something_is_written_is_what_is_named(copy, tmp_path):
    with pytest.raises(MissingArtifact, match="no shard 3"), atomic_write(tmp_path / "x"):
        raise MissingArtifact(copy / "keys" / "51f9a2c7", "no shard 3")
    with (
        pytest.raises(CannotWrite, match=f"cannot write {tmp_path / 'x'}: No space left"),
        atomic_write(tmp_path / "x"),
    ):
        raise OSError(28, "No space left")
    assert not list(tmp_path.glob("*x*"))


def test_an_older_corpus_stays_whole_when_a_new_one_fails(plays, tmp_path):
    build_corpus([plays], tmp_path / "corpus", "bpe:400")
    before = {p.name: p.read_bytes() for p in (tmp_path / "corpus").iterdir()}
    with pytest.raises(ValueError, match="SIZE is a number"):
        build_corpus([plays], tmp_path / "corpus", "bpe:3")
    # What was found out of the texts serves the next attempt, which removes it.
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "corpus").iterdir() if p.is_file()}
    assert build_corpus([plays], tmp_path / "corpus", "bpe:400").sha256 == Corpus.load(tmp_path / "corpus").sha256
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "corpus").iterdir()}
    write_manifest(tmp_path / "x.json", {"n": 3})
    assert not list(tmp_path.glob(".*.tmp"))
