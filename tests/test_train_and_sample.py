"""Training, checkpoints, sampling, and the command lines, as a user meets them."""

import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from conftest import CHUNK_LEN, CHUNKS_PER_SAMPLE, refused
from labml_nn.optimizers.noam import Noam
from labml_nn.transformers.retro import model as reference
from safetensors.torch import load_file

from retro.cli import main
from retro.config import DatasetConfig, SampleConfig
from retro.dataset import build_dataset
from retro.errors import DamagedFile, StaleArtifact
from retro.model import RetroConfig, RetroModel
from retro.runs.checkpoints import load_model, newest_checkpoint
from retro.sample import Sampler, choose
from retro.train import TrainConfig, learning_rate, train

SHAPE = {"d_model": 32, "n_layers": 2, "ca_layers": (1,), "n_heads": 2, "d_k": 16, "d_ff": 64}
SHAPE |= {"n_encoder_layers": 1, "encoder_ca_layers": (0,)}
CONFIG = TrainConfig(steps=12, interval=4, lr=3e-3, schedule="cosine", warmup=2, n_valid_batches=2, clip=1.0)


@pytest.fixture
def workplace(data, tmp_path, monkeypatch):
    """A working folder with a copy of the data."""
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights(run):
    return load_file(newest_checkpoint(run) / "model.safetensors")


def test_a_resumed_run_gives_the_numbers_of_an_uninterrupted_one(workplace, monkeypatch):
    whole, summary = train(config=CONFIG, model_shape=SHAPE, device="cpu", name="whole")
    steps = 0
    from retro.train import Trainer

    train_step = Trainer.train_step

    def interrupted(self, *batch):
        nonlocal steps
        steps += 1
        if steps == 7:  # in the middle of the second interval
            raise KeyboardInterrupt
        return train_step(self, *batch)

    monkeypatch.setattr(Trainer, "train_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(config=CONFIG, model_shape=SHAPE, device="cpu", name="cut")
    run = next((workplace / "logs" / "cut").iterdir())
    # What was done is kept: the last interval's checkpoint, and one of where it was stopped.
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["00000004", "00000006"]
    again, resumed = train(resume=run, device="cpu")
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(again).items())
    assert {k: v for k, v in resumed.items() if k != "tokens_per_second"} == {
        k: v for k, v in summary.items() if k != "tokens_per_second"
    }
    # The same call again finds the finished run and trains nothing.
    n = steps
    assert train(config=CONFIG, model_shape=SHAPE, device="cpu", name="whole") == (whole, summary) and steps == n


def test_ctrl_c_ends_training_after_a_step_with_a_checkpoint(workplace, monkeypatch):
    from retro.train import Trainer

    shape = SHAPE | {"d_ff": 48}
    whole, summary = train(config=CONFIG, model_shape=shape, device="cpu", name="whole")
    train_step, finished = Trainer.train_step, []

    def pressed(self, *batch):
        if self.progress.step == 5:
            os.kill(os.getpid(), signal.SIGINT)  # in the middle of the sixth step, which is made all the same
        loss = train_step(self, *batch)
        finished.append(self.progress.step)
        return loss

    monkeypatch.setattr(Trainer, "train_step", pressed)
    with pytest.raises(KeyboardInterrupt):
        train(config=CONFIG, model_shape=shape, device="cpu", name="cut")
    assert finished == [1, 2, 3, 4, 5, 6]
    (run,) = (workplace / "logs" / "cut").iterdir()
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["00000004", "00000006"]
    again, resumed = train(resume=run, device="cpu")
    assert finished[6:] == [7, 8, 9, 10, 11, 12], "no step is made twice"
    expected = weights(whole)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(again).items())
    assert {k: v for k, v in resumed.items() if k != "tokens_per_second"} == {
        k: v for k, v in summary.items() if k != "tokens_per_second"
    }
    # What an uninterrupted run keeps is what is kept.
    kept = [sorted(p.name for p in (r / "checkpoints").iterdir()) for r in (whole, again)]
    assert kept[0] == kept[1] == ["00000008", "00000012"]


@pytest.mark.parametrize("stopped_at", [4, 12])
def test_a_run_that_is_stopped_at_the_last_step_of_an_interval_closes_it(workplace, monkeypatch, capsys, stopped_at):
    from retro.train import Trainer

    shape = SHAPE | {"d_ff": 56}
    _, summary = train(config=CONFIG, model_shape=shape, device="cpu", name="whole")
    train_step = Trainer.train_step

    def pressed(self, *batch):
        loss = train_step(self, *batch)
        if self.progress.step == stopped_at:
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    monkeypatch.setattr(Trainer, "train_step", pressed)
    with pytest.raises(KeyboardInterrupt):
        train(config=CONFIG, model_shape=shape, device="cpu", name="cut")
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    capsys.readouterr()
    (run,) = (workplace / "logs" / "cut").iterdir()
    resumed = train(resume=run, device="cpu")[1]
    assert f"step {stopped_at} of 12: train " in capsys.readouterr().out
    different = {k for k in summary if summary[k] != resumed[k]}
    assert different <= {"tokens_per_second"} and resumed["tokens_per_second"] > 0


def test_ctrl_c_twice_saves_nothing_half_done(workplace, monkeypatch):
    from retro.runs.tracking import InterruptedInStep
    from retro.train import Trainer

    def pressed(self, *_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the step went on")

    monkeypatch.setattr(Trainer, "train_step", pressed)
    with pytest.raises(InterruptedInStep):
        train(config=CONFIG, model_shape=SHAPE | {"d_ff": 40}, device="cpu", name="twice")
    assert not list(workplace.glob("logs/twice/*/checkpoints/*"))


def test_a_run_is_continued_without_its_summary_but_not_on_another_dataset(workplace, index):
    run, summary = train(config=CONFIG, model_shape=SHAPE, device="cpu", name="moved")
    (run / "summary.json").write_text("{")
    with refused(DamagedFile, r"rm .*summary.json; retro train --resume"):
        train(resume=run, device="cpu")
    (run / "summary.json").unlink()
    again = train(resume=run, device="cpu")[1]  # from the last checkpoint, which made all its steps
    assert {k: v for k, v in again.items() if k != "tokens_per_second"}.items() <= summary.items()
    build_dataset(
        None, CHUNKS_PER_SAMPLE, corpus=index.corpus, data_path="data", index=index, config=DatasetConfig(seed=1)
    )
    with refused(StaleArtifact, r"run\.json was made with .*seed=0, but seed=1"):
        train(resume=run, device="cpu")


def test_the_noam_schedule_is_the_tutorials():
    theirs = Noam([torch.nn.Parameter(torch.zeros(1))], lr=1.0, d_model=128, warmup=2000)
    for step in (0, 10, 1999, 2000, 50_000):
        expected = theirs.get_lr({"step": step + 1}, theirs.param_groups[0])
        assert learning_rate(step, 10**6, TrainConfig(), 128) == pytest.approx(expected)


def test_a_damaged_checkpoint_is_named(workplace):
    run, _ = train(config=CONFIG, model_shape=SHAPE, device="cpu")
    file = newest_checkpoint(run) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    with refused(DamagedFile, r"model\.safetensors has sha256 .*older checkpoint: mv logs/\S+ logs/\S+\.damaged"):
        load_model(run)


def untrained(index):
    torch.manual_seed(5)
    return RetroModel.from_config(RetroConfig(index.corpus.n_tokens, chunk_len=CHUNK_LEN, **SHAPE)).eval()


@pytest.mark.parametrize("n_prompt", [1, CHUNK_LEN - 1, CHUNK_LEN, 3 * CHUNK_LEN + 5])
def test_cached_greedy_sampling_is_the_references_loop(index, n_prompt):
    model, corpus = untrained(index), index.corpus
    c = SHAPE
    encoder = reference.NearestNeighborEncoder(CHUNK_LEN, 1, {0}, c["d_model"], c["n_heads"], c["d_k"], c["d_ff"])
    theirs = reference.RetroModel(
        corpus.n_tokens, c["d_model"], 2, {1}, CHUNK_LEN, c["n_heads"], c["d_k"], c["d_ff"], encoder
    )
    theirs.load_state_dict(model.state_dict(), strict=True)
    prompt = corpus.text(100, n_prompt)
    ids = corpus.tokenizer.encode(prompt)
    n_ids, neighbors = len(ids), []
    with torch.no_grad():
        for _ in range(40):
            while len(neighbors) < len(ids) // CHUNK_LEN:
                u = len(neighbors) * CHUNK_LEN
                text = corpus.tokenizer.decode(ids[u : u + CHUNK_LEN])
                neighbors.append(torch.from_numpy(index.values(index.search(index.embed([text]), 2)[1][0])))
            x = torch.tensor([ids])
            # The reference cannot do without neighbors, nor without tokens in them.
            missing = bool(neighbors) and any((n < 0).any() for n in neighbors)
            run = theirs if neighbors and not missing else model
            logits = run(x, torch.stack(neighbors)[None] if neighbors else None)
            ids.append(int(logits[0, -1].argmax()))
    sampler = Sampler("cpu", model, corpus, CHUNK_LEN, index=index, max_chunks=8)
    written = list(sampler.stream(prompt, 40))
    assert "".join(written) == corpus.tokenizer.decode(ids[n_ids:]) and len(written) > 20
    assert len(sampler.neighbors) == (len(ids) - 1) // CHUNK_LEN or len(sampler.neighbors) == len(ids) // CHUNK_LEN
    for chunk in sampler.neighbors:
        for n in chunk:
            document = [d.name for d in corpus.documents].index(n.document)
            assert corpus.text(int(corpus.starts[document]) + n.offset, 2 * CHUNK_LEN).startswith(n.text)


def test_drawing_keeps_to_its_options():
    logits = torch.tensor([4.0, 3.0, 2.0, 1.0]).log()  # probabilities .4 .3 .2 .1

    def draws(**options):
        generator = torch.Generator().manual_seed(0)
        config = SampleConfig(**{"temperature": 1.0} | options)
        return [choose(logits, config, generator) for _ in range(400)]

    assert set(draws()) == {0, 1, 2, 3} and draws() == draws()
    assert set(draws(temperature=0.0)) == {0}
    assert set(draws(top_k=2)) == {0, 1}
    assert set(draws(top_p=0.65)) == {0, 1}  # .4 alone is too little, .7 is enough
    assert set(draws(top_p=0.4)) == {0}


def test_wrong_sampling_options_are_refused(index):
    sampler = Sampler("cpu", untrained(index), index.corpus, CHUNK_LEN, index=index)
    for options, message in [
        ({"temperature": -1}, "temperature=-1 is negative"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_p": 1.5}, r"top_p=1\.5"),
    ]:
        with pytest.raises(ValueError, match=message):
            sampler.sample("To be", 4, SampleConfig(**options))
    with pytest.raises(ValueError, match="the prompt is empty"):
        sampler.sample("", 4)


@pytest.mark.parametrize("module", ["database", "dataset", "train", "sample", "evaluate", "add", "remove", "plan"])
def test_help_answers_at_once_and_without_torch(module):
    code = f"import sys; from retro.cli import main\ntry: main(['{module}', '--help'])\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules and 'faiss' not in sys.modules"
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "--data-path" in said


def run_module(module, *arguments, cwd):
    result = subprocess.run(
        [sys.executable, "-m", f"retro.{module}", *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )
    assert "Traceback" not in result.stderr, result.stderr
    return result


@pytest.mark.slow
def test_the_scripts_one_after_the_other(plays, tmp_path, monkeypatch, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for play in plays.iterdir():
        (texts / play.name).write_text(play.read_text()[:2000])
    for module, arguments, said in [
        ("database", [texts, "--tokenizer", "bpe:400", "--chunk-len", 16], "recall 100.0% @1"),
        ("dataset", ["--chunks-per-sample", 4], "0 neighbors overlap text still to be predicted"),
        ("train", ["--steps", 3, "--batch-size", 2], "bits per byte"),
    ]:
        result = run_module(module, *arguments, cwd=tmp_path)
        assert result.returncode == 0 and said in result.stdout, result.stderr
    run = next((tmp_path / "logs" / "texts").iterdir())
    options = ["--length", "20", "--temperature", "1", "--top-p", "0.9", "--seed", "1", "--show-neighbors"]
    command = ["Enter the ghost of the king, and", "--run", str(run), *options]
    first = run_module("sample", *command, cwd=tmp_path).stdout
    assert "distance" in first and ".md, token" in first
    # With the same seed another process, this one, writes the same.
    monkeypatch.chdir(tmp_path)
    assert main(["sample", *command]) == 0
    here = capsys.readouterr().out
    assert first.split("--- sample")[1].splitlines() == here.split("--- sample")[1].splitlines()
    # Another chunk_len: training does not replace what is there, the stage itself does.
    assert main(["train", "texts", "--tokenizer", "bpe:400", "--chunk-len", "8"]) == 1
    assert "chunk_len=16, but chunk_len=8 is wanted. Rebuild it: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("module", "arguments", "message"),
    [
        ("database", ["missing.txt"], "missing.txt does not exist"),
        ("dataset", [], "data/corpus does not exist. Make it: retro database TEXT"),
        ("train", [], "data/corpus does not exist. Make it: retro database TEXT"),
        ("train", ["--preset", "tutorial", "--data-path", "d"], "Name a local copy as TEXT"),
        ("sample", ["--run", "nowhere", "x"], "nowhere/run.json does not exist"),
        ("train", ["--device", "cuda:9"], "--device cuda:9 cannot be used here"),
        ("database", ["--chunk-len", "0", "x"], "--chunk-len 0 is not at least 1"),
        ("train", ["--steps", "0"], "--steps 0 is not at least 1"),
    ],
)
def test_bad_input_ends_with_a_message_and_a_status(tmp_path, monkeypatch, capsys, module, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main([module, *arguments]) == 1
    assert message in capsys.readouterr().err.replace("\n", " ")


def test_a_file_that_cannot_be_written_leaves_the_old_one(workplace):
    before = (workplace / "data" / "retro.index").read_bytes()
    # A limit on the size of a file makes real writes fail, as a full disk does.
    code = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (350_000, 350_000))\n"
    code += "from retro.cli import main\n"
    code += "sys.exit(main(['database', '--index', 'SQ8', '--chunk-len', '16']))"
    result = subprocess.run([sys.executable, "-c", code], cwd=workplace, capture_output=True, text=True)
    assert result.returncode == 1 and "cannot write" in result.stderr and "Traceback" not in result.stderr
    assert (workplace / "data" / "retro.index").read_bytes() == before
