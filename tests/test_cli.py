"""One command: options come from the configs, from files and from presets, and errors come with what repairs them."""

import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import CHUNK_LEN

import retro
from retro import config as configs
from retro.bert_embeddings import BERTChunkEmbeddings
from retro.cli import COMMANDS, main
from retro.cli.building import database_config
from retro.cli.options import add_config, comments_of, config_from, new_parser, parse_with_preset, the_other_of
from retro.cli.repair import explain, repair_of
from retro.cli.training import _parser
from retro.config import CorpusConfig, DatabaseConfig, DatasetConfig, EvaluateConfig, RetroConfig, SampleConfig
from retro.dataset import DATASET_FILE, Dataset
from retro.errors import (
    ArtifactError,
    CannotWrite,
    DamagedFile,
    FolderInUse,
    InvalidOption,
    MissingArtifact,
    RetroError,
    StaleArtifact,
)
from retro.runs.run import latest_run, read_run
from retro.search.building import database_cache_key
from retro.storage.sample_file import read_header
from retro.text.build import corpus_cache_key
from retro.text.corpus import Corpus
from retro.train import TrainConfig, train

ROOT = Path(__file__).parent.parent
SHAPE = ["--d-model", "16", "--n-layers", "2", "--ca-layers", "[1]", "--n-heads", "2", "--d-k", "8", "--d-ff", "32"]
SHAPE += ["--n-encoder-layers", "1", "--encoder-ca-layers", "[0]"]
OPTIONS = [*SHAPE, "--steps", "4", "--batch-size", "2", "--interval", "2", "--device", "cpu"]


@pytest.fixture
def workplace(data, tmp_path, monkeypatch):
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "of"),
    [
        ("database", (CorpusConfig, DatabaseConfig)),
        ("dataset", (DatasetConfig,)),
        ("train", (CorpusConfig, DatabaseConfig, DatasetConfig, RetroConfig, TrainConfig)),
        ("sample", (SampleConfig,)),
        ("evaluate", (EvaluateConfig,)),
        ("plan", (CorpusConfig, DatabaseConfig)),
    ],
)
def test_every_field_of_a_config_is_an_option_with_its_comment_and_its_default(command, of, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code in (0, None)
    said = " ".join(capsys.readouterr().out.split())
    for config in of:
        for field in dataclasses.fields(config):
            if field.name in ("n_vocab",) or (config is RetroConfig and field.name == "chunk_len"):
                continue  # the data's
            assert f"--{field.name.replace('_', '-')}" in said, field.name
            comment = comments_of(config)[field.name]
            assert comment and comment in said, (field.name, comment)
    assert said.count("default: ") >= sum(len(dataclasses.fields(config)) for config in of) - len(of) - 1


def test_the_command_line_goes_before_a_file_and_a_file_before_a_preset(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"preset": "tutorial", "lr": 0.5, "d_model": 64, "ca_layers": [0, 2]}))
    options, given, named = parse_with_preset(_parser, ["--d-model", "32", "--config", str(file), "text.txt"])
    assert (options.d_model, options.lr, options.ca_layers) == (32, 0.5, (0, 2))
    tutorial = configs.PRESETS["tutorial"]
    assert options.tokenizer == "char" and options.embedder == tutorial.database.embedder
    assert config_from(TrainConfig, options) == dataclasses.replace(tutorial.train, lr=0.5)
    assert (
        given == {"config", "preset", "lr", "d_model", "ca_layers", "texts"}
        and named == {"config", "d_model"}
        and options.texts == ["text.txt"]
    )
    demo, _, _ = parse_with_preset(_parser, [])
    assert config_from(TrainConfig, demo) == configs.PRESETS["demo"].train and demo.d_model == 128


def test_options_that_exclude_each_other_are_refused_and_the_command_line_decides(tmp_path, capsys):
    assert main(["train", "--epochs", "3", "--steps", "9"]) == 1
    assert "--steps and --epochs exclude each other" in capsys.readouterr().err
    assert main(["database", "x", "--recall", "0.9", "--n-probe", "4"]) == 1
    assert "--n-probe and --recall exclude each other" in capsys.readouterr().err
    both, given, named = ("steps", "epochs"), {"steps", "epochs"}, {"epochs"}
    assert the_other_of(both, given, named) == "steps", "a file has both, the command line says epochs"
    assert the_other_of(both, given, set()) == "epochs" and the_other_of(both, set(), set()) is None
    options, given, named = parse_with_preset(_parser, ["--n-centeroids", "32", "--recall", "0.8"])
    assert database_config(options, given, named).factory == "IVF32,PQ64"
    assert database_config(options, given, named).search == 0.8
    with pytest.raises(SystemExit):
        main(["add"])
    assert "TEXT" in capsys.readouterr().err
    options, _, _ = parse_with_preset(_parser, ["--prompt", "# Title", "--name", "007"])
    assert (options.prompt, options.name) == ("# Title", "007")


def test_a_file_with_an_option_that_does_not_exist_is_refused(tmp_path, capsys):
    (tmp_path / "run.yaml").write_text("learning_rate: 1\n")
    with pytest.raises(SystemExit) as ended:
        main(["train", "--config", str(tmp_path / "run.yaml")])
    assert ended.value.code == 2 and "learning_rate" in capsys.readouterr().err


def test_a_config_adds_its_options_alone_and_gives_itself_back():
    parser = new_parser("x", "X.")
    add_config(parser, SampleConfig, SampleConfig(top_k=3))
    options = parser.parse_args(["--temperature", "0.5", "--top-p", "0.9"])
    assert config_from(SampleConfig, options) == SampleConfig(0.5, 3, 0.9, 0)
    assert config_from(SampleConfig, options, {"top_k": None}).top_k is None


def test_a_command_that_does_not_exist_is_named_with_what_is_near(capsys):
    assert main(["trian"]) == 2
    said = capsys.readouterr().err
    assert "there is no command 'trian'; is it 'train'?" in said and all(name in said for name in COMMANDS)
    assert main(["--help"]) == 0 and main([]) == 0
    overview = capsys.readouterr().out
    assert all(f"\n  {name}" in overview for name in COMMANDS) and "retro train --preset demo" in overview
    assert max(map(len, overview.splitlines())) <= 80
    assert main(["--version"]) == 0 and retro.__version__ in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_fits_a_terminal(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_a_run_is_named_after_its_text_and_its_file_repeats_it(workplace, plays, capsys):
    assert main(["train", *OPTIONS]) == 0
    said = capsys.readouterr().out
    (run,) = (workplace / "logs" / plays.name).iterdir()
    corpus = Corpus.load("data/corpus")
    beginning = " ".join(corpus.text(corpus.n_train_tokens, 2 * CHUNK_LEN).split())
    assert f"sample: {beginning}" in said, "the prompt is the beginning of held-out text"
    assert "step 2 of 4: train " in said and "valid without neighbors " in said and " tokens/s, " in said
    assert "step 4 of 4" in said and "0 s left" in said
    before = sorted(p for p in workplace.rglob("*") if "logs" in p.parts)
    assert main(["train", "--config", str(run / "run.yaml"), "--device", "cpu"]) == 0
    assert sorted(p for p in workplace.rglob("*") if "logs" in p.parts) == before
    assert "step " not in capsys.readouterr().out.partition("model ")[0], "nothing was trained again"
    # The file has all that shaped the run: without the run itself, it is made again.
    weights = (run / "checkpoints" / "00000004" / "model.safetensors").read_bytes()
    shutil.move(run, workplace / "before")
    assert main(["train", "--config", str(workplace / "before" / "run.yaml"), "--device", "cpu"]) == 0
    assert (run / "checkpoints" / "00000004" / "model.safetensors").read_bytes() == weights


def test_without_a_run_the_latest_of_the_data_is_taken(workplace, capsys):
    shutil.copytree("data", "other")
    runs = []
    for data_path, seed in (("data", "1"), ("data", "0"), ("other", "2")):
        before = set(workplace.glob("logs/*/*"))
        assert main(["train", *OPTIONS, "--data-path", data_path, "--seed", seed, "--name", f"n{seed}"]) == 0
        runs += set(workplace.glob("logs/*/*")) - before
    assert [run.parent.name for run in runs] == ["n1", "n0", "n2"]
    assert latest_run(Path("data")).resolve() == runs[1] and latest_run(Path("other")).resolve() == runs[2]
    capsys.readouterr()
    assert main(["sample", "To be", "--length", "4", "--device", "cpu"]) == 0
    assert "run: logs/n0/" in capsys.readouterr().out
    newer = time.time() + 100  # a run that goes on is the latest again
    for checkpoint in runs[0].glob("checkpoints/*"):
        os.utime(checkpoint, (newer, newer))
    assert latest_run(Path("data")).resolve() == runs[0]
    with pytest.raises(MissingArtifact, match="no trained run of the data in elsewhere"):
        latest_run(Path("elsewhere"))


def test_a_baseline_is_not_taken_for_a_run_that_retrieves(workplace):
    assert main(["train", *OPTIONS, "--no-retrieval"]) == 0
    (baseline,) = workplace.glob("logs/*_no_retrieval/*")
    assert read_run(baseline)["model"]["ca_layers"] == []
    with pytest.raises(MissingArtifact):
        latest_run(Path("data"))
    assert latest_run(Path("data"), reads_neighbors=False).resolve() == baseline


def test_epochs_go_before_a_presets_steps_and_recall_before_its_n_probe(workplace, monkeypatch):
    seen = {}

    def fake(**arguments):
        seen.update(arguments)
        raise ValueError("seen")

    monkeypatch.setattr("retro.train.train", fake)
    assert main(["train", "--epochs", "3", "--device", "cpu"]) == 1
    assert (seen["config"].epochs, seen["config"].steps) == (3, None)
    assert main(["train", "--device", "cpu"]) == 1
    assert seen["config"] == configs.PRESETS["demo"].train
    assert TrainConfig(steps=5).steps == 5 and TrainConfig().epochs == 32


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InvalidOption("chunk_len", 0, "is not at least 1"), "--chunk-len 0 is not at least 1"),
        (MissingArtifact(Path("d/corpus")), "d/corpus does not exist. Make it: retro database TEXT ... --data-path d"),
        (
            DamagedFile(Path("d/corpus/tokens.bin"), "is torn"),
            "is torn. Rebuild it: retro database TEXT ... --data-path d",
        ),
        (
            StaleArtifact(
                Path("my data/retro.index.json"),
                {"chunk_len": (16, 32)},
                {"chunk_len": 32, "index_wanted": "auto", "search": 0.9, "corpus_sha256": "a"},
            ),
            "Rebuild it: retro database TEXT ... --chunk-len 32 --index auto --recall 0.9 --data-path 'my data', or",
        ),
        (
            StaleArtifact(
                Path("d/retro_train_dataset.jsonl"),
                {"n_neighbors": (2, 4), "index_sha256": ("a", "b")},
                {"n_neighbors": 4, "exclude": "sample", "index_sha256": "b"},
            ),
            "n_neighbors=2, but n_neighbors=4 is wanted; index_sha256='a', but index_sha256='b' is wanted. "
            "Rebuild it: retro dataset --n-neighbors 4 --exclude sample --data-path d",
        ),
        (
            DamagedFile(Path("logs/n/r/checkpoints/00000004/model.safetensors"), "is torn"),
            "older checkpoint: mv logs/n/r/checkpoints/00000004 logs/n/r/checkpoints/00000004.damaged",
        ),
        (
            DamagedFile(Path("logs/n/r/summary.json"), "is torn"),
            "rm logs/n/r/summary.json; retro train --resume logs/n/r",
        ),
        (MissingArtifact(Path("logs/n/r/run.json")), "logs/n/r/run.json does not exist. Make it: retro train"),
        (CannotWrite(Path("d/x"), "cannot write d/x: full"), "free some space or choose another --data-path"),
        (
            CannotWrite(Path("logs/n/r/checkpoints/00000004"), "cannot write it"),
            "free some space, then continue: retro train --resume logs/n/r",
        ),
        (
            FolderInUse(Path("d"), "d is being written by process 7"),
            "process 7; wait for it, or use another --data-path",
        ),
        (ValueError("as it is"), "as it is"),
    ],
)
def test_an_error_is_told_with_the_command_that_repairs_it(error, said):
    assert said in explain(error)


@pytest.mark.parametrize("name", ["corpus/manifest.json", "retro.index.json", "retro_train_dataset.jsonl"])
def test_the_command_that_repairs_takes_the_options_that_it_is_given(name, data, index, monkeypatch):
    corpus = index.corpus
    wanted = corpus_cache_key("a", CorpusConfig(keep_near_held_out=True, hold_out="folders"))
    wanted |= database_cache_key(corpus, DatabaseConfig(chunk_len=8, index="auto", n_probe=None))
    if name.endswith(".jsonl"):
        wanted |= read_header(data / name) | {"exclude": "sample"}
    error = StaleArtifact(Path("my data") / name, {"seed": (1, 2)}, wanted)
    command = repair_of(error).partition(": retro ")[2].partition(", or keep")[0]
    seen = []

    def parsed(kind, options, *_):
        seen.append(vars(options))
        raise ValueError("parsed")

    monkeypatch.setattr("retro.cli.building.config_from", parsed)
    assert main(shlex.split(command)) == 1
    expected = {"data_path": "my data"}
    if command.startswith("dataset"):
        expected |= {"exclude": "sample", "chunks_per_sample": 4, "n_neighbors": 2}
    else:
        expected |= {"keep_near_held_out": True, "hold_out": "folders", "chunk_len": 8, "recall": 0.9, "index": "auto"}
    assert {key: seen[0][key] for key in expected} == expected


def test_errors_can_be_caught_as_what_they_are_and_as_pythons_own():
    for kind in (InvalidOption, StaleArtifact, DamagedFile):
        assert issubclass(kind, RetroError) and issubclass(kind, ValueError)
    for kind in (MissingArtifact, CannotWrite, FolderInUse):
        assert issubclass(kind, ArtifactError) and issubclass(kind, OSError)
    assert MissingArtifact(Path("a")).path == Path("a") and str(MissingArtifact(Path("a"))) == "a does not exist"


def test_public_names_come_when_they_are_asked_for():
    code = "import sys, time; t = time.perf_counter(); import retro; seconds = time.perf_counter() - t\n"
    code += "assert seconds < 0.2 and not {'torch', 'numpy', 'faiss'} & set(sys.modules)\n"
    code += "from retro import RetroModel; assert 'torch' in sys.modules and 'faiss' not in sys.modules\n"
    code += "assert all(getattr(retro, name) is not None for name in retro.__all__)\n"
    code += "try: retro.nothing\nexcept AttributeError as error: assert 'nothing' in str(error)\n"
    code += "from retro.train import train; assert callable(train)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_scripts_of_the_stages_are_the_commands(tmp_path):
    root = Path(retro.__file__).parent
    for command in ([root / "train.py"], ["-m", "retro.database"], ["-m", "retro"]):
        result = subprocess.run(
            [sys.executable, *map(str, command), "--help"], capture_output=True, text=True, cwd=tmp_path
        )
        assert result.returncode == 0 and "usage: retro" in result.stdout, result.stderr


def test_a_library_call_without_options_is_the_tutorials(data, monkeypatch, tmp_path):
    """`train()` of a finished run returns it; what a run is called without a name is what its text is called."""
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    shape = {"d_model": 16, "n_layers": 1, "ca_layers": (0,), "n_heads": 2, "d_k": 8, "d_ff": 16}
    shape |= {"n_encoder_layers": 1, "encoder_ca_layers": (0,)}
    run, summary = train(config=TrainConfig(steps=1), model_shape=shape, device="cpu")
    assert run.parent.name == Corpus.load("data/corpus").name and summary["steps"] == 1
    assert train(config=TrainConfig(steps=1), model_shape=shape, device="cpu") == (run, summary)


def test_a_stage_says_what_to_run_next_and_finds_what_is_there(plays, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    database = ["database", str(plays), "--tokenizer", "bpe:400", "--data-path", "mine", "--device", "cpu"]
    dataset = ["dataset", "--chunks-per-sample", "4", "--data-path", "mine", "--device", "cpu"]
    for command, following in ((database, "retro dataset"), (dataset, "retro train")):
        assert main(command) == 0
        said = capsys.readouterr().out
        assert f"next: {following} --data-path mine\n" in said
    share = re.search(r"samples predict ([\d.]+)% of ([\d,]+) tokens", said)
    corpus = Corpus.load("mine/corpus")
    n_targets = Dataset(tmp_path / "mine" / DATASET_FILE["train"], corpus).header["n_targets"]
    assert float(share[1]) == pytest.approx(100 * n_targets / corpus.n_train_tokens, abs=0.051) and n_targets > 1000
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}
    monkeypatch.setattr(BERTChunkEmbeddings, "of_tokens", lambda *_: pytest.fail("something was embedded"))
    assert main(database) == main(dataset) == 0
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*") if p.is_file() and p.name != ".lock"}


def test_a_traceback_is_shown_to_who_asks_for_one():
    command = ["-m", "retro", "train", "--epochs", "3", "--steps", "9"]
    for options, wanted in (([], False), (["-X", "dev", "-W", "ignore"], True)):
        result = subprocess.run([sys.executable, *options, *command], capture_output=True, text=True, cwd=ROOT)
        assert result.returncode == 1 and "exclude each other" in result.stderr
        assert ("Traceback" in result.stderr) == wanted
