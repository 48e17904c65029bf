"""Runs are what they say: one folder has one run of one length, its numbers are of what it did, and nothing is lost."""

import copy
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from accelerate.tracking import GeneralTracker
from conftest import CHUNK_LEN, refused
from labml import tracker
from labml_nn.optimizers.noam import Noam
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from retro import parallel
from retro.cli import main
from retro.config import (
    CorpusConfig,
    DatabaseConfig,
    DatasetConfig,
    EvaluateConfig,
    RetroConfig,
    RetrofitConfig,
    SampleConfig,
)
from retro.database import RetroIndex, build_database
from retro.dataset import DATASET_FILE, Dataset, build_dataset
from retro.errors import DamagedFile, InvalidOption, MissingArtifact
from retro.evaluate import evaluate
from retro.model import RetroModel
from retro.runs import curves, loop, tracking
from retro.runs import run as run_files
from retro.runs.checkpoints import load_model, newest_checkpoint, save_model
from retro.runs.curves import recorded
from retro.runs.data import Batches, TrainingData
from retro.runs.engine import require_fits, start_engine
from retro.runs.optimizers import new_optimizer
from retro.runs.run import find_run, latest_run, read_run, run_in, write_run
from retro.runs.tracking import InterruptedInStep
from retro.sample import Sampler
from retro.storage.manifests import read_manifest, sha256_of_json, write_manifest
from retro.text.build import build_corpus
from retro.text.corpus import Corpus
from retro.train import TrainConfig, Trainer, learning_rate, train

SHAPE = {"d_model": 16, "n_layers": 2, "ca_layers": (1,), "n_heads": 2, "d_k": 8, "d_ff": 32}
SHAPE |= {"n_encoder_layers": 1, "encoder_ca_layers": (0,)}
OFF = "valid without neighbors"
CONFIG = TrainConfig(
    batch_size=8, steps=6, interval=3, lr=1e-2, schedule="cosine", warmup=2, clip=1.0, n_valid_batches=1
)


@pytest.fixture
def workplace(data, tmp_path, monkeypatch):
    shutil.copytree(data, tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Sampler, "sample", lambda *_: "")  # the tests that need one say so
    return tmp_path


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """A run of six steps; do not write into it."""
    place = tmp_path_factory.mktemp("finished")
    shutil.copytree(data, place / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        patch.setattr(Sampler, "sample", lambda *_: "")
        run, _ = train(config=CONFIG, model_shape=SHAPE, device="cpu", name="a", prompt="To be, or")
    return place / run


@pytest.fixture
def run(workplace, finished):
    """A copy of it, in the current folder."""
    return shutil.copytree(finished, workplace / "logs" / "a" / finished.name).relative_to(workplace)


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def spoil(checkpoint):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"?")


def watched(monkeypatch, at=None):
    """The step, the learning rate and the first weight of each step that is made; `at` one, Ctrl-C is pressed."""
    made, train_step = [], Trainer.train_step

    def step(self, *batch):
        if self.progress.step == at:
            raise KeyboardInterrupt
        number, before = self.progress.step, self.model.emb.weight.detach().clone()
        sums = train_step(self, *batch)
        made.append((number, self.optimizer.param_groups[0]["lr"], before))
        return sums

    monkeypatch.setattr(Trainer, "train_step", step)
    return made


def a_model(index, **options):
    torch.manual_seed(3)
    return RetroModel.from_config(RetroConfig(index.corpus.n_tokens, chunk_len=CHUNK_LEN, **SHAPE | options))


# What lies in a run's folder.


def test_a_config_in_a_runs_folder_does_not_make_it_a_checkpoint(run, index):
    config = RetroConfig(index.corpus.n_tokens, chunk_len=CHUNK_LEN, **SHAPE)
    save_model(run, a_model(index), config)
    assert newest_checkpoint(run) == run / "checkpoints" / "00000006"
    assert load_model(run).emb.weight.equal(load_model(run / "checkpoints" / "00000006").emb.weight)
    (run / "summary.json").unlink()
    before = content(run)
    assert train(resume=run, device="cpu")[1]["steps"] == 6
    assert content(run).keys() >= before.keys(), "something was deleted"
    shutil.copytree(run / "checkpoints" / "00000003", "model")  # the folder of a model, which is no run's
    assert newest_checkpoint(run / ".." / ".." / ".." / "model").name == "model"


def test_a_damaged_checkpoint_is_renamed_and_nothing_is_lost(run, capsys):
    newest, older = (run / "checkpoints" / name for name in ("00000006", "00000003"))
    whole = (newest / "model.safetensors").read_bytes()
    spoil(newest)
    spoiled = content(newest)
    (run / "checkpoints" / "00000009").mkdir()
    (run / "checkpoints" / "2024-notes").mkdir()
    for _ in range(2):
        (run / "summary.json").unlink()
        train(resume=run, device="cpu")
        assert content(newest)[(newest / "model.safetensors").relative_to(newest)] == whole
    assert content(newest.with_name("00000006.damaged")) == spoiled and older.exists()
    names = {p.name for p in (run / "checkpoints").iterdir()}
    assert names == {"00000003", "00000006", "00000006.damaged", "00000009.damaged", "2024-notes"}
    assert "00000006 is renamed to 00000006.damaged" in capsys.readouterr().out
    spoil(newest)  # a second one of the same step does not take the first one's place
    (run / "summary.json").unlink()
    train(resume=run, device="cpu")
    assert content(newest.with_name("00000006.damaged")) == spoiled
    assert newest.with_name("00000006.damaged1").exists()


# One folder, one length, one schedule.


def test_another_length_makes_a_run_of_its_own_that_goes_on_from_the_first(run, monkeypatch, capsys):
    before, weights = content(run), load_model(run).emb.weight
    made = watched(monkeypatch)
    longer, summary = train(resume=run, config=TrainConfig(steps=10), device="cpu")
    assert content(run) == before, "the first run was written into"
    assert longer.parent == run.parent and longer != run and summary["steps"] == 10
    assert read_manifest(longer / "run.json")["continues"] == {"run": f"a/{run.name}", "step": 6, "n_steps": 6}
    # Peak .01, warm-up 2: step 6 has t = 7, is 5/8 down, .01 * (.55 + .45 cos(5/8 pi)) = .00377793; the last is .001.
    assert [step for step, *_ in made] == [6, 7, 8, 9]
    assert made[0][1] == pytest.approx(0.00377793, rel=1e-5) and made[-1][1] == pytest.approx(0.001)
    assert made[0][2].equal(weights)
    said = capsys.readouterr().out
    assert f"{longer} goes on from step 6 of {run}" in said and "was 0.001 there, and is 0.00378 in a run of 10" in said
    # The commands find their runs again: the longer one by what it goes on from, the first by what made it.
    assert train(resume=run, config=TrainConfig(steps=10), device="cpu") == (longer, summary)
    assert train(resume=longer, device="cpu") == (longer, summary)
    again, first = train(config=CONFIG, model_shape=SHAPE, device="cpu", name="a")
    assert again == run and first["steps"] == 6 and len(made) == 4
    assert first["tokens_per_second"] != summary["tokens_per_second"]
    state = read_manifest(longer / "checkpoints" / "00000010" / "state.json")
    assert 0 < state["tokens"] < read_manifest(run / "checkpoints" / "00000006" / "state.json")["tokens"]
    assert summary["tokens_per_second"] == pytest.approx(state["tokens"] / state["seconds"], abs=0.06), "its own steps"


def test_a_run_that_is_named_by_a_link_elsewhere_is_continued_where_it_lies(run, workplace):
    link = workplace / "mine"
    link.symlink_to(run.resolve(), target_is_directory=True)
    found = find_run(TrainingData(Path("data")), None, TrainConfig(steps=10), {}, link)
    assert found.folder.parent == run.resolve().parent and found.origin == run.resolve()


def test_a_longer_run_that_is_stopped_ends_as_if_it_had_not_been(run, monkeypatch):
    longer, summary = train(resume=run, config=TrainConfig(steps=10), device="cpu")
    expected = load_model(longer).state_dict()
    tokens = read_manifest(longer / "checkpoints" / "00000010" / "state.json")["tokens"]
    shutil.rmtree(longer)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        watched(patch, at=8)
        train(resume=run, config=TrainConfig(steps=10), device="cpu")
    assert read_manifest(run / "summary.json")["steps"] == 6 and newest_checkpoint(run).name == "00000006"
    made = watched(monkeypatch)
    again, resumed = train(resume=run, config=TrainConfig(steps=10), device="cpu")
    assert again == longer and [step for step, *_ in made] == [8, 9]
    assert {k: v for k, v in resumed.items() if k != "tokens_per_second"}.items() <= summary.items()
    assert read_manifest(longer / "checkpoints" / "00000010" / "state.json")["tokens"] == tokens
    assert all(weight.equal(expected[name]) for name, weight in load_model(again).state_dict().items())


def test_checkpoints_within_an_interval_change_nothing_and_are_gone_on_from(run, monkeypatch):
    """`save_minutes` so few that each step is saved."""
    config, written = replace(CONFIG, save_minutes=1e-9), []

    def spy(*arguments):
        save(*arguments)
        written.append((arguments[4].step, sorted(p.name for p in run.parent.parent.glob("b/*/checkpoints/*"))))

    save = loop.save_checkpoint
    monkeypatch.setattr(loop, "FEW_STEPS", 1)
    monkeypatch.setattr(loop, "save_checkpoint", spy)
    with monkeypatch.context() as patch, pytest.raises(InterruptedInStep):
        patch.setattr(Trainer, "validate", lambda *_: pytest.fail("an interval has not ended"))
        made = watched(patch)
        step = Trainer.train_step

        def killed(self, *batch):
            if len(made) == 2:
                raise InterruptedInStep  # which saves nothing
            return step(self, *batch)

        patch.setattr(Trainer, "train_step", killed)
        train(config=config, model_shape=SHAPE, device="cpu", name="b")
    made = watched(monkeypatch)
    folder, summary = train(config=config, model_shape=SHAPE, device="cpu", name="b")
    assert [step for step, *_ in made] == [2, 3, 4, 5]
    assert folder.name == run.name, "it is the run without them"
    names = [f"{step:08d}" for step in range(7)]
    assert written == [
        (1, names[1:2]), (2, names[2:3]), (3, names[3:4]),
        (4, names[3:5]), (5, [names[3], names[5]]), (6, [names[3], names[6]]),
    ]  # fmt: skip
    speed = {"tokens_per_second"}
    assert {k: v for k, v in summary.items() if k not in speed}.items() <= read_manifest(run / "summary.json").items()
    expected = load_model(run).state_dict()
    assert all(weight.equal(expected[name]) for name, weight in load_model(folder).state_dict().items())


def test_the_curves_of_a_run_are_what_was_said_of_it_also_if_it_was_stopped(workplace, monkeypatch):
    said = []
    report = loop.report_progress
    monkeypatch.setattr(loop, "report_progress", lambda *line: said.append(line) or report(*line))
    config = replace(CONFIG, interval=2)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        watched(patch, at=5)
        train(config=config, model_shape=SHAPE, device="cpu", name="b")
    folder = run_in(Path("logs/b"))
    with open(folder / "log.jsonl", "a") as log:
        log.write('{"track": {"bpb.valid": [[16, [NaN]]]}}\n{"track": {"bpb.tr')  # killed while it was written
    assert not (folder / "curves.png").exists()
    with open(folder / "log.jsonl", "a") as log:
        log.write("\n")
    train(config=config, model_shape=SHAPE, device="cpu", name="b")
    found, samples = recorded(folder), [16, 32, 48]
    assert [step for step, *_ in said] == [2, 4, 6]
    for name, of in (("valid", "bpb.valid"), ("train", "bpb.train"), ("valid without neighbors", f"bpb.{OFF}")):
        expected = {n: losses[name] for n, (_, _, losses, *_) in zip(samples, said, strict=True)}
        assert found[of] == pytest.approx(expected)
    speeds, rates = ([line[i] for line in said] for i in (3, 5))
    assert found["tokens per second"] == pytest.approx(dict(zip(samples, speeds, strict=True)))
    assert found["learning rate"] == pytest.approx(dict(zip(samples, rates, strict=True))) and len({*rates}) == 3
    with Image.open(folder / "curves.png") as picture:
        assert picture.width > 1000 and len(np.unique(np.asarray(picture.convert("L").resize((100, 40))))) > 3


@pytest.mark.parametrize("error", [ImportError("no matplotlib"), OSError("No space left on device")])
def test_a_picture_that_cannot_be_drawn_ends_no_training(workplace, monkeypatch, capsys, error):
    def fails(run):
        raise error

    monkeypatch.setattr(curves, "_draw", fails)
    folder, summary = train(config=replace(CONFIG, steps=3), model_shape=SHAPE, device="cpu", name="b")
    assert summary["steps"] == 3 and "not drawn: " in capsys.readouterr().out and not (folder / "curves.png").exists()


def test_tensorboard_has_the_same_curves(workplace):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder, _ = train(config=CONFIG, model_shape=SHAPE, device="cpu", name="b", log=("tensorboard",))
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    of_samples = recorded(folder)
    for name in ("bpb.valid", "bpb.train", f"bpb.{OFF}", "learning rate", "tokens per second"):
        found = {point.step: point.value for point in events.Scalars(name)}
        assert [*found] == [3, 6] and [*found.values()] == pytest.approx([*of_samples[name].values()])


def test_any_tracker_of_accelerate_is_told_and_ended_also_by_ctrl_c(workplace, monkeypatch):
    told = []

    class Mine(GeneralTracker):
        name, requires_logging_directory, main_process_only = "mine", False, True

        def __init__(self, run_name, name):
            super().__init__()
            told.append((run_name, name))

        def start(self):
            told.append("start")

        tracker = property(lambda self: None)

        def log(self, values, step):
            told.append((step, sorted(values)))

        def finish(self):
            told.append("finish")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mine", Mine)
    with pytest.raises(KeyboardInterrupt):
        watched(monkeypatch, at=4)
        train(config=CONFIG, model_shape=SHAPE, device="cpu", name="b", log=("mine",))
    names = sorted(["bpb.train", "bpb.valid", f"bpb.{OFF}", "learning rate", "tokens per second"])
    assert told == [("b", run_in(Path("logs/b")).name), "start", (3, names), "finish"]
    told.clear()
    monkeypatch.undo()
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(Sampler, "sample", lambda *_: "")
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "mine", Mine)
    train(config=replace(CONFIG, steps=12, interval=12), model_shape=SHAPE, device="cpu", name="d", log=("mine",))
    assert told[2:] == [(10, ["loss.train"]), (12, names), "finish"]  # the loss of every tenth step
    told.clear()
    train(config=replace(CONFIG, steps=1, interval=1), model_shape=SHAPE, device="cpu", name="c")
    assert told == []


def test_a_tracker_that_is_not_there_is_named_before_anything_is_written(workplace, monkeypatch):
    for name in ("nothing", "mlflow"):  # which wants to be told the run's name otherwise
        with refused(InvalidOption, f"--log {name} is not one of tensorboard, wandb, trackio"):
            tracking.require_trackers([name])
    with refused(InvalidOption, "--log nothing is not one of tensorboard, wandb, trackio"):
        train(config=CONFIG, model_shape=SHAPE, device="cpu", name="b", log=("nothing",))
    monkeypatch.setattr(tracking, "get_available_trackers", lambda: ["tensorboard"])
    with refused(InvalidOption, "--log wandb is not installed: pip install wandb"):
        train(config=CONFIG, model_shape=SHAPE, device="cpu", name="b", log=("wandb",))
    assert not Path("logs/b").exists()


def test_a_longer_run_is_the_latest_one_as_soon_as_it_is_there(run, monkeypatch):
    def killed(*_):
        raise InterruptedInStep  # which saves nothing

    monkeypatch.setattr(Trainer, "train_step", killed)
    with pytest.raises(InterruptedInStep):
        train(resume=run, config=TrainConfig(steps=10), device="cpu")
    (longer,) = set(run.parent.iterdir()) - {run}
    assert [p.name for p in (longer / "checkpoints").iterdir()] == ["00000006"]
    assert latest_run(Path("data")) == longer


def test_a_longer_run_without_a_whole_checkpoint_begins_where_it_began(run, monkeypatch):
    longer, summary = train(resume=run, config=TrainConfig(steps=8), device="cpu")
    for checkpoint in (longer / "checkpoints").iterdir():
        spoil(checkpoint)
    (longer / "summary.json").unlink()
    made = watched(monkeypatch)
    assert train(resume=longer, device="cpu")[1]["valid_bpb"] == summary["valid_bpb"]
    assert [step for step, *_ in made] == [6, 7]
    for checkpoint in (longer / "checkpoints").iterdir():
        shutil.rmtree(checkpoint)
    (longer / "summary.json").unlink()
    (run / "checkpoints" / "00000006").rename(run / "elsewhere")
    with refused(MissingArtifact, r"00000006, from which \S+ goes on, does not exist\. Make it: retro train"):
        train(resume=longer, device="cpu")


def test_fewer_steps_than_were_made_are_refused_and_a_run_that_made_none_goes_nowhere(run):
    before = content(run.parent)
    with refused(InvalidOption, rf"--steps 4 makes 4 steps, but {run} has made 6"):
        train(resume=run, config=TrainConfig(steps=4), device="cpu")
    assert content(run.parent) == before
    shutil.rmtree(run / "checkpoints")
    with refused(MissingArtifact, "holds no whole checkpoint to go on from"):
        train(resume=run, config=TrainConfig(steps=8), device="cpu")


def test_the_same_length_goes_on_in_the_same_folder_however_it_is_said(run, workplace):
    data = TrainingData(workplace / "data")
    per_epoch = data.n_batches("train", CONFIG.batch_size)

    def resumed(**length):
        return find_run(data, None, TrainConfig(**length), {}, run)

    assert resumed(steps=6, epochs=3) == find_run(data, None, None, {}, run) and resumed(steps=6).folder == run
    assert resumed(epochs=1).folder != run and resumed(epochs=1).n_steps == per_epoch > 6
    assert resumed(steps=9, epochs=3) == resumed(steps=9), "where steps are given, epochs say nothing"
    write_run(longer := resumed(epochs=1), data, "")
    assert find_run(data, None, TrainConfig(steps=per_epoch), {}, longer.folder) == longer


def test_the_file_of_a_longer_run_repeats_it_and_its_prompt(run, monkeypatch, capsys):
    assert main(["train", "--resume", str(run), "--steps", "8", "--device", "cpu"]) == 0
    (longer,) = set(run.parent.iterdir()) - {run}
    said = [(r / "run.yaml").read_text().partition("prompt:")[2].partition("\n")[0] for r in (run, longer)]
    assert said[0] == said[1] == " To be, or"
    made = watched(monkeypatch)
    shutil.rmtree(longer / "checkpoints")
    (longer / "summary.json").unlink()
    assert main(["train", "--config", str(longer / "run.yaml"), "--device", "cpu"]) == 0
    assert len(list(run.parent.iterdir())) == 2 and [step for step, *_ in made] == [6, 7]


@pytest.mark.parametrize("origin", [7, {}, {"run": "a/..", "step": 6, "n_steps": 6}, {"run": "a/b", "step": -1}])
def test_a_run_that_goes_on_from_nothing_that_could_be_is_damaged(run, origin):
    manifest = json.loads((run / "run.json").read_text())
    write_manifest(run / "run.json", {k: v for k, v in manifest.items() if k != "checksum"} | {"continues": origin})
    with pytest.raises(DamagedFile):
        read_run(run)


# Numbers of a run.


def test_tokens_per_second_are_of_tokens_that_were_predicted(run, data, index, monkeypatch):
    dataset = Dataset(data / DATASET_FILE["train"], index.corpus)
    targets, samples = [int((dataset[i][1] >= 0).sum()) for i in range(len(dataset))], len(dataset)
    config = replace(CONFIG, batch_size=16, steps=math.ceil(samples / 16) + 2, interval=5)
    assert samples % 16 and sum(targets) < samples * len(dataset[0][0]), "partial batches, padding"
    lines, steps = [], {"add": 0}
    monkeypatch.setattr(loop, "report_progress", lambda *line: lines.append(line))
    monkeypatch.setattr(tracker, "set_global_step", lambda n: steps.update(set=n))
    monkeypatch.setattr(tracker, "add_global_step", lambda n=1: steps.update(add=steps["add"] + n))
    folder, summary = train(config=config, model_shape=SHAPE, device="cpu", name="speed")
    state = read_manifest(newest_checkpoint(folder) / "state.json")
    batches = list(Batches(samples, 16, config.seed, 0, config.steps))
    assert state["tokens"] == sum(targets[i] for batch in batches for i in batch)
    assert summary["tokens_per_second"] == pytest.approx(state["tokens"] / state["seconds"], abs=0.06)
    assert steps == {"set": 0, "add": samples + 32}, "an epoch and two batches"
    step, n_steps, _, speed, left, _ = lines[0]
    assert (step, n_steps) == (5, config.steps)
    # 5 steps have been made in the time in which `state['tokens']` of 5 steps were predicted.
    first = sum(targets[i] for batch in batches[:5] for i in batch)
    assert left == pytest.approx((n_steps - 5) * (first / speed) / 5)
    assert TrainingData(data).n_samples_before(config.steps, 16) == samples + 32


def test_samples_and_tokens_of_all_processes_are_counted(index, monkeypatch):
    class Two:
        """An accelerator of two processes, of which the other has a batch of 3 samples and 9 targets at 2 nats."""

        num_processes = 2
        backward = staticmethod(lambda loss: loss.backward())
        reduce = staticmethod(lambda sums: sums + torch.tensor([9.0, 3.0] if len(sums) == 2 else [18.0]))

    model = a_model(index)
    trainer = Trainer("cpu", model, None, torch.optim.SGD(model.parameters(), lr=0.0))
    trainer.accelerator = Two()
    src, tgt = torch.zeros(2, CHUNK_LEN, dtype=torch.long), torch.full((2, CHUNK_LEN), -100)
    tgt[0, :7] = 1  # the second sample is blank
    trainer.dataloader, steps = [(src, tgt, None)] * 3, []
    monkeypatch.setattr(tracker, "add_global_step", steps.append)
    own = trainer.loss(src, tgt, None).item()
    assert trainer() == pytest.approx((7 * own + 18) / 16) and trainer.progress.tokens == 3 * 16
    assert sum(steps) == 3 * 4
    # The gradient is averaged over both: that of a mean over 16 targets, 7 of them here, has to be twice as large here.
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    trainer.loss(src, tgt, None).backward()
    for name, grad in found.items():
        torch.testing.assert_close(grad, dict(model.named_parameters())[name].grad * 2 * 7 / 16)


def test_the_loss_is_a_mean_over_predicted_tokens_and_not_over_steps(index):
    """The tutorial's call: nothing but device, model, batches and optimizer; its schedule is the optimizer's."""
    model = a_model(index)
    src = torch.arange(2 * CHUNK_LEN).view(2, CHUNK_LEN) % index.corpus.n_tokens
    few = torch.full_like(src, -100)
    few[0, 3] = 5
    batches = [(src, src + 1, None), (src, few, None)]
    with torch.no_grad():
        log_p = model(src, None).log_softmax(-1)
    one = -log_p.gather(2, (src + 1)[..., None])
    expected = (one.sum() - log_p[0, 3, 5]) / (2 * CHUNK_LEN + 1)
    trainer = Trainer("cpu", model, batches, torch.optim.SGD(model.parameters(), lr=0.0))
    assert [trainer(), trainer.validate(batches)] == pytest.approx([expected.item()] * 2, rel=1e-5)
    optimizer = Noam(model.parameters(), lr=1.0, d_model=16, warmup=4)
    trainer = Trainer("cpu", model, [(src, src + 1, None)] * 20, optimizer)
    first = trainer()
    assert trainer() < 0.7 * first and trainer.progress.step == 40 and optimizer.param_groups[0]["lr"] == 1.0


def test_a_model_that_is_called_with_tokens_and_neighbors_alone_can_be_trained(index):
    class Other(torch.nn.Module):
        """A model of anyone's; every chunk of it reads the same."""

        ca_layers, chunk_len = (0,), CHUNK_LEN

        def __init__(self):
            super().__init__()
            self.emb = torch.nn.Embedding(index.corpus.n_tokens, index.corpus.n_tokens)

        def forward(self, x, ret):
            return self.emb(x) + self.emb(ret.clamp(min=0)).mean((1, 2, 3))[:, None]

    model = Other()
    src = torch.arange(CHUNK_LEN)[None]
    batches = [(src, src + 1, torch.zeros(1, 1, 2, 2 * CHUNK_LEN, dtype=torch.long))]
    trainer = Trainer("cpu", model, batches, torch.optim.Adam(model.parameters(), lr=0.1), config=TrainConfig())
    first = trainer()
    assert trainer() < first


@pytest.mark.parametrize("name", ["train", "valid"])
def test_bits_per_byte_are_of_the_bytes_of_predicted_tokens(data, name):
    found = TrainingData(data)
    corpus, dataset = found.corpus, found.datasets[name]
    n_bytes = n = 0
    for batch in list(Batches(len(dataset), 2, 0, 1, 3)):
        targets = [t for i in batch for t in dataset[i][1].tolist() if t >= 0]
        n += len(targets)
        n_bytes += sum(int(corpus.tokenizer.n_bytes[t]) for t in targets)  # this tokenizer keeps every byte
    assert found.bits_per_nat(name, replace(CONFIG, batch_size=2), 1, 3) == pytest.approx(n / n_bytes / math.log(2))


def test_bytes_of_tokens_sum_to_their_documents_though_a_tokenizer_drops_some(index):
    corpus = index.corpus
    half = Corpus(corpus.tokens, [replace(d, n_bytes=2 * d.n_bytes) for d in corpus.documents], 2, corpus.tokenizer)
    for number, document in enumerate(corpus.documents):
        start, end = (int(offset) for offset in corpus.starts[number : number + 2])
        assert corpus.n_bytes_of(start, end) == document.n_bytes
        assert half.n_bytes_of(start + 5, end) == pytest.approx(2 * corpus.n_bytes_of(start + 5, end))


def test_the_run_and_the_evaluation_measure_the_same_text_alike(plays, bert, tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    for play in plays.iterdir():
        (tmp_path / "texts" / play.name).write_text(play.read_text()[:500])
    monkeypatch.chdir(tmp_path)
    corpus = build_corpus([tmp_path / "texts"], tmp_path / "data" / "corpus", "bpe:300")
    build_database(CHUNK_LEN, corpus=corpus, data_path="data", config=DatabaseConfig(index="Flat"), bert=bert)
    index = RetroIndex(CHUNK_LEN, corpus=corpus, data_path="data", bert=bert)
    config = DatasetConfig(chunks_per_sample=30, skip_range=1)
    build_dataset(corpus=corpus, data_path="data", index=index, config=config)
    monkeypatch.setattr(Sampler, "sample", lambda *_: "")
    run, summary = train(config=replace(CONFIG, steps=4), model_shape=SHAPE, device="cpu")
    assert len(Dataset(tmp_path / "data" / DATASET_FILE["valid"], corpus)) == 1
    model = load_model(run)
    evaluation = evaluate(model, corpus, index, config=EvaluateConfig(window=30 * CHUNK_LEN), others=("off",))
    for name, figure in (("on", "valid_bpb"), ("off", "valid_bpb_without_retrieval")):
        bits = evaluation.nats[name].sum() / math.log(2)
        assert bits / evaluation.n_bytes.sum() == pytest.approx(summary[figure], abs=1e-4)


# What ends a run, and what does not.


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), IndexError("token 700 of 512"), FileNotFoundError()])
def test_a_sample_that_cannot_be_written_ends_no_run(workplace, monkeypatch, capsys, error):
    there = []

    def fail(*_):
        there.append(sorted(p.name for p in workplace.glob("logs/*/*/checkpoints/*")))
        raise error

    monkeypatch.setattr(Sampler, "sample", fail)
    assert train(config=CONFIG, model_shape=SHAPE, device="cpu", name="b")[1]["steps"] == 6
    assert there == [["00000003"], ["00000003", "00000006"]], "the checkpoint comes first"
    assert capsys.readouterr().out.count(f"no sample: {error}") == 2


def test_ctrl_c_while_a_sample_is_written_ends_training(workplace, monkeypatch):
    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Sampler, "sample", press)
    with pytest.raises(KeyboardInterrupt):
        train(config=CONFIG, model_shape=SHAPE, device="cpu", name="b")


def test_neighbors_are_shown_and_suggested_only_where_the_model_reads_them(workplace, capsys):
    options = [f"--{name.replace('_', '-')}={list(v) if isinstance(v, tuple) else v}" for name, v in SHAPE.items()]
    options += ["--steps=2", "--batch-size=2", "--device=cpu"]
    assert main(["train", *options]) == 0
    said = capsys.readouterr().out
    assert "--show-neighbors" in said and "neighbors of chunk 1" in said
    assert main(["train", *options, "--no-retrieval"]) == 0
    said = capsys.readouterr().out
    assert "--show-neighbors" not in said and "neighbors of chunk" not in said and "  retro sample --run logs/" in said


# Options.


@pytest.mark.parametrize(
    ("of", "name", "value", "reason"),
    [
        (TrainConfig, "lr", float("nan"), "is not a finite number"),
        (TrainConfig, "lr", float("inf"), "is not a finite number"),
        (TrainConfig, "lr", -1.0, "is negative"),
        (TrainConfig, "lr", 0.0, "would leave the weights"),
        (TrainConfig, "clip", -1.0, "is negative"),
        (TrainConfig, "clip", 0, "would leave the weights"),
        (TrainConfig, "clip", float("nan"), "is not a finite number"),
        (TrainConfig, "n_valid_batches", 0, "is not at least 1"),
        (TrainConfig, "seed", -1, "is negative"),
        (TrainConfig, "steps", 2.5, "is not a whole number"),
        (TrainConfig, "steps", True, "is not a whole number"),
        (TrainConfig, "epochs", None, "is not a whole number"),
        (TrainConfig, "compile", 1, "is neither true nor false"),
        (CorpusConfig, "valid_fraction", float("nan"), "is not a"),
        (CorpusConfig, "seed", -2, "is negative"),
        (DatabaseConfig, "recall", float("nan"), "is not a"),
        (DatabaseConfig, "n_train", 1.5, "is not a whole number"),
        (DatabaseConfig, "seed", -1, "is negative"),
        (DatasetConfig, "chunks_per_sample", 2.0, "is not a whole number"),
        (DatasetConfig, "seed", -1, "is negative"),
        (SampleConfig, "temperature", float("nan"), "is not a finite number"),
        (SampleConfig, "top_p", float("nan"), "is not a"),
        (SampleConfig, "top_k", 2.5, "is not a whole number"),
        (SampleConfig, "seed", -1, "is negative"),
        (EvaluateConfig, "stride", 16.0, "is not a whole number"),
        (EvaluateConfig, "batch_size", True, "is not a whole number"),
    ],
)
def test_a_number_that_makes_no_sense_is_refused(of, name, value, reason):
    with pytest.raises(InvalidOption, match=f"{name}=.* {reason}"):
        of(**{name: value})


def test_numbers_that_make_sense_are_taken():
    assert (TrainConfig(lr=1, clip=2, steps=None, interval=None).lr, SampleConfig(temperature=0).top_k) == (1, None)


# Steps.


def test_learning_rates_at_the_first_step_at_the_end_of_the_warm_up_and_at_the_end():
    cosine = TrainConfig(lr=2e-3, schedule="cosine", warmup=10)
    rates = [learning_rate(step, 110, cosine, 64) for step in (0, 4, 9, 59, 109, 500)]
    # A tenth of the peak after 1 of 10 steps, half after 5, the peak after 10; half-way down (.1 + 1) / 2; a tenth.
    assert rates == pytest.approx([2e-4, 1e-3, 2e-3, 1.1e-3, 2e-4, 2e-4])
    constant = TrainConfig(lr=2e-3, schedule="constant", warmup=10)
    rates = [learning_rate(step, 100, constant, 64) for step in (0, 4, 9, 80, 81, 90, 99)]
    # Up as above; the peak, with 20 of 100 steps left too; then half of it with 10 left, and a twentieth in the last.
    assert rates == pytest.approx([2e-4, 1e-3, 2e-3, 2e-3, 1.9e-3, 1e-3, 1e-4])
    noam = TrainConfig(lr=0.5, warmup=4)
    # .5 / 8 times t / 8 up to t = 4, where that is 1/2 = 4 ** -.5; then t ** -.5: 1/4 at t = 16.
    assert [learning_rate(t - 1, 0, noam, 64) for t in (1, 2, 4, 16)] == [0.0078125, 0.015625, 0.03125, 0.015625]


def test_a_cosine_schedule_has_to_know_how_many_steps_there_will_be_and_one_is_enough(index):
    model = a_model(index)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with pytest.raises(ValueError, match="n_steps=0, but the cosine schedule needs to know"):
        Trainer("cpu", model, None, optimizer, config=TrainConfig(schedule="cosine"))
    for schedule, n_steps in (("cosine", 1), ("constant", 1), ("noam", 0)):
        Trainer("cpu", model, None, optimizer, config=TrainConfig(schedule=schedule), n_steps=n_steps)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_a_step_in_parts_is_the_step_of_one_batch_and_exchanges_gradients_once(index, micro_batch, monkeypatch):
    def weights(micro_batch: int | None) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        model = a_model(index)
        src = torch.randint(index.corpus.n_tokens, (5, 4 * CHUNK_LEN))
        tgt = src.roll(-1, dims=1)
        for row, n_left_out in enumerate((0, 40, 3, 64, 17)):  # one sample has nothing to predict
            tgt[row, 64 - n_left_out :] = -100
        ret = torch.randint(index.corpus.n_tokens, (5, 4, 2, 2 * CHUNK_LEN))
        config = TrainConfig(micro_batch=micro_batch, lr=0.1, warmup=1, clip=1.0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer("cpu", model, None, optimizer, config=config)
        alone, without = trainer.accelerator.no_sync, []
        monkeypatch.setattr(trainer.accelerator, "no_sync", lambda net: without.append(net) or alone(net))
        sums = trainer.train_step(src, tgt, ret)
        assert without == [trainer.net] * (math.ceil(5 / (micro_batch or 5)) - 1)
        return model.state_dict() | {"sums": sums}

    whole, parts = weights(None), weights(micro_batch)
    assert whole["sums"][1:].tolist() == parts["sums"][1:].tolist() == [5 * 64 - 124, 4]
    for name, weight in whole.items():
        torch.testing.assert_close(parts[name], weight, rtol=1e-5, atol=1e-6)


def test_validation_computes_as_few_samples_at_once_and_gives_the_same(index):
    model, batch = a_model(index), torch.randint(index.corpus.n_tokens, (5, 2, 2 * CHUNK_LEN))
    seen, losses = [], []
    model.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    batch[1, 1, 7:] = -100
    for micro_batch in (None, 2):
        config = TrainConfig(micro_batch=micro_batch)
        trainer = Trainer("cpu", model, None, torch.optim.SGD(model.parameters(), lr=0.1), config=config)
        losses.append(trainer.validate([(batch[:, 0], batch[:, 1], None)]))
    assert seen == [5, 2, 2, 1] and losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_recomputing_layers_keeps_less_and_gives_the_same_gradients(workplace):
    data, found, kept = TrainingData(Path("data")), [], []
    batch = next(iter(data.batches("train", TrainConfig(), 0, 1, False)))
    for recompute in (False, True):
        config = TrainConfig(steps=1, recompute=recompute)
        run = find_run(data, "recomputes", config, SHAPE, None)
        engine, sizes = start_engine(run, torch.device("cpu"), False), {}

        def keep(x, sizes=sizes):
            sizes[x.data_ptr()] = x.numel()
            return x

        trainer = Trainer("cpu", engine.model, None, engine.optimizer, config=config, n_steps=1, engine=engine)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = trainer.loss(*batch)
        own = {weight.data_ptr() for weight in engine.model.parameters()}
        kept.append(sum(size for pointer, size in sizes.items() if pointer not in own))
        loss.backward()
        found.append([weight.grad for weight in engine.model.parameters() if weight.grad is not None])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-8)
    assert kept[1] < 0.5 * kept[0]


def test_weight_decay_is_of_matrices_alone_and_adam_forgets_as_told(index):
    model = a_model(index)
    optimizer = new_optimizer(model, TrainConfig(weight_decay=0.25, beta2=0.75), fused=False)
    assert {id(w) for group in optimizer.param_groups for w in group["params"]} == set(map(id, model.parameters()))
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    for weight in model.parameters():
        weight.grad = torch.zeros_like(weight)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()  # without a gradient all that changes a weight is decay, by 1 - 0.5 * 0.25
    for name, weight in model.state_dict().items():
        decays = weight.dim() > 1 and name != "emb.weight"
        torch.testing.assert_close(weight, before[name] * (0.875 if decays else 1.0))
    model = a_model(index)
    optimizer, bias = new_optimizer(model, TrainConfig(beta2=0.75), fused=False), model.read.bias
    bias.data.zero_()
    optimizer.param_groups[0]["lr"] = 1.0
    for gradient in (1.0, 0.0):
        bias.grad = torch.full_like(bias, gradient)
        optimizer.step()
    # Means of gradients .1 * .9 and of squares .25 * .75, divided by 1 - .9^2 and 1 - .75^2; the first step is 1.
    expected = -1 - (0.09 / 0.19) / math.sqrt(0.1875 / 0.4375)
    torch.testing.assert_close(bias.data, torch.full_like(bias, expected))


def test_what_there_was_no_choice_of_once_does_not_name_a_run_so_that_earlier_ones_are_found(run, monkeypatch):
    """The names of the fields that name a run: a new one belongs here only if all earlier runs are to be lost."""
    hashed = []
    monkeypatch.setattr(run_files, "sha256_of_json", lambda value: hashed.append(value) or sha256_of_json(value))
    found = find_run(TrainingData(Path("data")), "a", CONFIG, SHAPE, None)
    assert found.folder.name == run.name
    names = """batch_size micro_batch epochs steps lr schedule warmup clip beta2 weight_decay precision compile
        recompute interval missing_neighbors random_neighbors n_valid_batches n_final_batches seed"""
    assert list(hashed[0]["train"]) == names.split()
    assert "retriever" not in hashed[0]["dataset"]
    for other in (replace(CONFIG, optimizer="muon"), replace(CONFIG, lr=0.5)):
        assert find_run(TrainingData(Path("data")), "a", other, SHAPE, None).folder.name != run.name


def orthogonal_near(matrix):
    """What five of Muon's Newton-Schulz steps make of a matrix, in 64 bits, by its singular values."""
    u, values, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return u @ values.diag() @ v


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has it")
def test_muon_takes_matrices_along_their_orthogonal_gradients_and_adam_the_rest(index):
    model, other = a_model(index), a_model(index)
    optimizer = new_optimizer(model, TrainConfig(optimizer="muon", weight_decay=0.25), fused=False)
    adam = new_optimizer(other, TrainConfig(weight_decay=0.25), fused=False)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    torch.manual_seed(0)
    for weight, same in zip(model.parameters(), other.parameters(), strict=True):
        weight.grad = torch.randn_like(weight)
        same.grad = weight.grad.clone()
    for group in (*optimizer.param_groups, *adam.param_groups):
        group["lr"] = 0.5
    optimizer.step()
    adam.step()
    inside = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    inside -= {"read.weight"}
    assert len(inside) > 20 and not any(model.get_parameter(name).dim() < 2 for name in inside)
    for name, weight in model.named_parameters():
        if name not in inside:
            assert weight.equal(other.get_parameter(name)), name
            continue
        # Nesterov's momentum of a first gradient: (1 - 0.95) (1 + 0.95) of it, of which only the direction counts.
        size = 0.2 * math.sqrt(max(weight.shape))
        expected = before[name] * 0.875 - 0.5 * size * orthogonal_near(weight.grad).float()
        torch.testing.assert_close(weight.data, expected, rtol=0, atol=0.03 * size)  # it computes in bf16
        assert (weight.data - before[name]).abs().max() > 0.1 * size


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has it")
def test_a_run_by_muon_that_is_stopped_ends_as_if_it_had_not_been(run, monkeypatch):
    config = replace(CONFIG, optimizer="muon", lr=0.01, schedule="constant", warmup=2)
    whole, _ = train(config=config, model_shape=SHAPE, device="cpu", name="whole")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        watched(patch, at=4)
        train(config=config, model_shape=SHAPE, device="cpu", name="b")
    made = watched(monkeypatch)
    again, _ = train(config=config, model_shape=SHAPE, device="cpu", name="b")
    assert [step for step, *_ in made] == [4, 5]
    expected = load_model(whole).state_dict()
    assert all(weight.equal(expected[name]) for name, weight in load_model(again).state_dict().items())
    assert not load_model(run).state_dict()["attn.0.query.weight"].equal(expected["attn.0.query.weight"])


def test_what_needs_several_processes_is_refused_before_there_is_a_run(workplace):
    with refused(ValueError, "fsdp shards a model over processes; start several: torchrun"):
        train(config=CONFIG, model_shape=SHAPE, device="cpu", name="sharded", fsdp=True)
    assert not Path("logs/sharded").exists()


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch 2.9 has it")
def test_muon_is_refused_where_it_cannot_be(run, index, monkeypatch):
    config = replace(CONFIG, optimizer="muon")
    run = find_run(TrainingData(Path("data")), "sharded", config, SHAPE, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel, "n_processes", lambda: 2)
        with refused(InvalidOption, "--optimizer muon needs whole matrices"):
            require_fits(run, fsdp=True)
        with refused(InvalidOption, "--micro-batch 2 does not go with fsdp"):
            require_fits(replace(run, config=replace(CONFIG, micro_batch=2)), fsdp=True)
        with refused(InvalidOption, "--base tiny is read through hooks, which fsdp, compile and recompute do not take"):
            require_fits(replace(run, config=CONFIG, shape=RetrofitConfig("tiny", CHUNK_LEN)), fsdp=True)
    with refused(InvalidOption, "--optimizer muon is for models that are trained from nothing"):
        new_optimizer(torch.nn.Linear(2, 2), config, fused=False)
    with refused(InvalidOption, "--optimizer sgd is not one of adam, muon"):
        TrainConfig(optimizer="sgd")
    monkeypatch.delattr(torch.optim, "Muon")
    with refused(InvalidOption, "--optimizer muon needs torch 2.9"):
        new_optimizer(a_model(index), config, fused=False)


def test_a_gradient_is_clipped_to_its_largest_norm_and_not_stretched(index):
    src = torch.arange(2 * CHUNK_LEN).view(2, CHUNK_LEN) % index.corpus.n_tokens
    norms = {}
    for clip in (None, 0.01, 1e6):
        model = a_model(index)
        optimizer = torch.optim.Adam(model.parameters())
        Trainer("cpu", model, None, optimizer, config=TrainConfig(clip=clip)).train_step(src, src + 1, None)
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norms[clip] = math.sqrt(sum(float(grad.double().square().sum()) for grad in grads))
    assert norms[None] > 0.5 and norms[0.01] == pytest.approx(0.01, rel=1e-3) and norms[1e6] == norms[None]


def test_a_step_has_a_gradient_of_its_own(index):
    model, src = a_model(index), torch.arange(2 * CHUNK_LEN).view(2, CHUNK_LEN) % index.corpus.n_tokens
    trainer, norms = Trainer("cpu", model, None, torch.optim.SGD(model.parameters(), lr=0.0)), []
    for _ in range(3):
        trainer.train_step(src, src + 1, None)
        norms.append(sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None))
    assert norms[0] > 0 and norms == pytest.approx([norms[0]] * 3)


def test_processes_share_each_batch_out(monkeypatch):
    whole, shares = list(Batches(23, 4, 0, 0, 6)), []
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        shares.append(list(Batches(23, 4, 0, 0, 6)))
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(batch) == sorted(i for part in parts for i in part) and max(map(len, parts)) <= 2


def test_each_epoch_has_every_sample_once_in_an_order_of_its_own():
    def samples(seed, start, stop):
        return [i for batch in Batches(23, 4, seed, start, stop) for i in batch]

    epochs = [samples(0, 0, 6), samples(0, 6, 12), samples(1, 0, 6)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(23))] * 3
    assert all(epoch != list(range(23)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != epochs[2] and epochs[1] != epochs[2]
    assert [len(batch) for batch in Batches(23, 4, 0, 4, 8)] == [4, 3, 4, 4]
    assert samples(0, 2, 6) == epochs[0][8:], "begun anywhere, it goes on alike"


def test_nothing_of_a_trainer_needs_a_device_with_float64(index, data):
    class NoFloat64(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            assert not (isinstance(result, torch.Tensor) and result.dtype == torch.float64), function
            return result

    batches = list(DataLoader(Dataset(data / DATASET_FILE["train"], index.corpus), batch_size=2))[:3]
    model = a_model(index)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    trainer = Trainer("cpu", model, batches, optimizer, config=TrainConfig(clip=1.0))
    with NoFloat64():
        loss = trainer()
        held_out = trainer.validate(batches)
    assert np.isfinite(loss) and held_out < loss


@pytest.mark.parametrize("n_processes", [1, 2])
def test_a_trainer_on_the_cpu_can_follow_one_on_a_gpu_in_the_same_process(index, monkeypatch, n_processes):
    model = a_model(index)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    src = torch.arange(CHUNK_LEN)[None]
    earlier = Trainer("cpu", model, [(src, src + 1, None)], optimizer)
    assert PartialState().device.type == "cpu"
    for state in (PartialState, AcceleratorState):  # as a GPU would have left them
        monkeypatch.setitem(state._shared_state, "device", torch.device("cuda", 0))
    monkeypatch.setattr(parallel, "n_processes", lambda: n_processes)
    if n_processes > 1:  # the group that they joined is of one kind of device
        with pytest.raises(ValueError, match="AcceleratorState has already been initialized"):
            Trainer("cpu", model, None, optimizer)
        return
    later = Trainer("cpu", model, [(src, src + 1, None)], optimizer)
    assert PartialState().device.type == later.accelerator.device.type == "cpu"
    before = later()
    assert earlier() < before, "the earlier one goes on as well"


def test_a_step_of_the_optimizer_is_the_tutorials(data):
    """torch's Adam with an eps of 1e-9 against labml's, whose own is 1e-16: the same update."""
    run = find_run(TrainingData(data), "none", TrainConfig(warmup=4), SHAPE, None)
    engine = start_engine(run, torch.device("cpu"), fsdp=False)
    model = copy.deepcopy(engine.model)
    theirs = Noam(model.parameters(), lr=1.0, d_model=SHAPE["d_model"], warmup=4)
    torch.manual_seed(0)
    for step in range(6):
        for ours, other in zip(engine.model.parameters(), model.parameters(), strict=True):
            ours.grad = torch.randn_like(ours) if ours.requires_grad else None
            other.grad = None if ours.grad is None else ours.grad.clone()
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(step, 0, run.config, SHAPE["d_model"])
            assert group["eps"] == 1e-9
        engine.optimizer.step()
        theirs.step()
    beginning = RetroModel.from_config(run.shape)
    moved = [(a - b).abs().max() for a, b in zip(engine.model.parameters(), beginning.parameters(), strict=True)]
    assert max(moved) > 0.1
    for ours, other in zip(engine.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-5)
