"""Runs of a pretrained base: trained, resumed, saved without it, measured against it; another base is refused."""

import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CHUNK_LEN, refused
from copier import copying_llama
from safetensors.torch import load_file
from test_retrofit import SHAPE
from transformers import LlamaConfig, LlamaForCausalLM

from retro.cli import main
from retro.config import EvaluateConfig, RetroConfig, RetrofitConfig, SampleConfig, TrainConfig
from retro.database import RetroIndex
from retro.decoding import RecomputingDecoder
from retro.errors import InvalidOption
from retro.evaluate import evaluate
from retro.evaluation.windows import windows
from retro.model import RetroModel
from retro.runs import loop
from retro.runs.checkpoints import load_model, newest_checkpoint
from retro.runs.data import Batches, TrainingData, VariedNeighbors
from retro.runs.engine import start_engine
from retro.runs.models import moved
from retro.runs.run import find_run, read_run
from retro.sample import Sampler
from retro.storage.manifests import read_manifest
from retro.text.base_model import base_sha256, load_base
from retro.text.tokenizer import train_tokenizer
from retro.train import Trainer, learning_rate, train

CONFIG = TrainConfig(
    batch_size=4, steps=6, interval=3, lr=1e-2, schedule="cosine", warmup=2, clip=1.0, n_valid_batches=1,
    missing_neighbors=0.3, random_neighbors=0.2,
)  # fmt: skip


def write_base(folder, tokenizer, seed: int = 0, **shape):
    """A folder with a tiny random Llama and a tokenizer of a corpus."""
    torch.manual_seed(seed)
    base = LlamaForCausalLM(LlamaConfig(**SHAPE | {"vocab_size": 520} | shape))
    for weight in base.parameters():
        if weight.dim() > 1:
            torch.nn.init.normal_(weight, std=0.2)
    base.save_pretrained(folder)
    shutil.copyfile(tokenizer, folder / "tokenizer.json")
    return folder


def write_place(data, place, **shape):
    """A folder with data and a base for them, of that shape."""
    shutil.copytree(data, place / "data")
    write_base(place / "base", data / "corpus" / "tokenizer.json", **shape)
    return place


@pytest.fixture(scope="module")
def place(data, tmp_path_factory):
    """A folder with data and a base for them; only runs may be written into it."""
    return write_place(data, tmp_path_factory.mktemp("retrofit"))


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def run(here):
    """A run of six steps: made by the first test that asks, and found again by the others."""
    return train(config=CONFIG, model_shape={"base": "base", "ca_layers": (1, 3)})[0]


def test_a_run_trains_what_was_added_and_saves_nothing_else(run, here):
    weights = load_file(newest_checkpoint(run) / "model.safetensors")
    assert {name.split(".")[0] for name in weights} == {"cca"}
    assert all((weights[f"cca.{i}.gate"] != 0).all() for i in range(2))
    summary, n_base = read_manifest(run / "summary.json"), sum(w.numel() for w in load_base("base").parameters())
    assert summary["n_trained_parameters"] == sum(w.numel() for w in weights.values()) < n_base / 4
    assert summary["n_parameters"] == n_base + summary["n_trained_parameters"]
    config = read_run(run)["model"]
    assert config["ca_layers"] == [1, 3] and config["base"] == "base" and config["chunk_len"] == CHUNK_LEN
    assert config["base_sha256"] == base_sha256(load_base("base"))
    model, x = load_model(run), torch.arange(40)[None]
    with torch.no_grad():
        assert torch.equal(model(x), load_base("base")(input_ids=x).logits)


def test_gates_learn_fifty_times_as_fast_as_weights(run, here):
    data = TrainingData(here / "data")
    found = find_run(data, None, None, {}, run)
    engine = start_engine(found, torch.device("cpu"), False)
    trainer = Trainer("cpu", engine.model, None, engine.optimizer, config=CONFIG, n_steps=6, engine=engine)
    trainer.progress.step = 2
    trainer.train_step(*next(iter(data.batches("train", CONFIG, 2, 3, False))))
    weights, vectors = engine.optimizer.param_groups
    assert weights["lr"] == pytest.approx(learning_rate(2, 6, CONFIG, 1))
    assert vectors["lr"] == pytest.approx(50 * weights["lr"])
    assert {w.dim() for w in vectors["params"]} == {1} and {w.dim() for w in weights["params"]} == {2}


def test_a_run_that_is_stopped_ends_as_if_it_had_not_been(run, here, monkeypatch):
    def stop(*args):
        raise KeyboardInterrupt

    other = {"config": CONFIG, "model_shape": {"base": "base", "ca_layers": (1, 3)}, "name": "stopped"}
    monkeypatch.setattr(loop, "report_progress", stop)
    with pytest.raises(KeyboardInterrupt):
        train(**other)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    again, summary = train(**other)
    assert summary["train_bpb"] == read_manifest(run / "summary.json")["train_bpb"]
    ours, theirs = (load_file(newest_checkpoint(r) / "model.safetensors") for r in (again, run))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_measured_as_off_is_the_base(run, here, index):
    model, base, corpus = load_model(run), load_base("base"), index.corpus
    config = EvaluateConfig(n_neighbors=3, window=64, stride=32, n_shuffles=1)
    found = evaluate(model, corpus, index, config=config)
    nats = np.zeros_like(found.nats["off"])
    for start, end, scored in windows(corpus, 64, 32):
        tokens = torch.from_numpy(corpus.tokens[start : end + 1].astype(np.int64))
        with torch.no_grad():
            logits = base(input_ids=tokens[None, :-1]).logits[0].double().log_softmax(dim=-1)
        losses = -logits[range(len(logits)), tokens[1:]]
        first = corpus.n_train_tokens
        nats[scored - first : end + 1 - first] = losses[scored - 1 - start :].numpy()
    np.testing.assert_allclose(found.nats["off"], nats, atol=1e-4)
    assert not np.allclose(found.nats["on"], nats, atol=1e-2)
    few = evaluate(model, corpus, index, config=replace(config, n_windows=2), others=("off",))
    chosen = []  # the middle ones of each half
    for d in corpus.split("valid"):
        of_d = [w for w in windows(corpus, 64, 32) if corpus.starts[d] <= w[0] < corpus.starts[d + 1]]
        assert len(of_d) > 8
        chosen += [of_d[len(of_d) // 4], of_d[3 * len(of_d) // 4]]
    assert few.summary()["n_tokens"] == sum(end + 1 - at for _, end, at in chosen) < found.summary()["n_tokens"]
    is_chosen = few.n_bytes > 0
    targets = np.concatenate([np.arange(at, end + 1) for _, end, at in chosen]) - corpus.n_train_tokens
    assert not is_chosen[np.setdiff1d(np.arange(len(is_chosen)), targets)].any() and is_chosen[targets].mean() > 0.9
    assert np.array_equal(few.nats["on"][is_chosen], found.nats["on"][is_chosen])
    bits = few.nats["off"][is_chosen].sum() / math.log(2) / few.n_bytes.sum()
    assert few.summary()["bits_per_byte"]["off"]["value"] == pytest.approx(bits)


def test_text_that_is_written_is_what_recomputing_everything_writes(run, index, monkeypatch):
    model, corpus = load_model(run), index.corpus
    prompt, config = corpus.beginning_of_held_out(37), SampleConfig(temperature=0.7, seed=3)
    sampler = Sampler("cpu", model, corpus, CHUNK_LEN, index=index, n_neighbors=3)
    text = sampler.sample(prompt, 40, config)
    assert (
        sampler.max_chunks == 128 // CHUNK_LEN and sum(map(len, sampler.neighbors)) == 3 * len(sampler.neighbors) == 12
    )
    monkeypatch.setattr("retro.sample.decoder_of", RecomputingDecoder)
    assert sampler.sample(prompt, 40, config) == text


def test_the_commands_take_a_base(here, capsys):
    text = str(here / "text")
    (here / "text").mkdir(exist_ok=True)
    for i in range(3):
        words = [f"{word}{i}" for word in ("the", "king", "and", "queen", "of")] * 60
        (here / "text" / f"{i}.txt").write_text(" ".join(words))
    options = ["--base", "base", "--data-path", "own", "--chunk-len", "8", "--chunks-per-sample", "4", "--steps", "2"]
    main(["train", text, *options, "--ca-layers", "[1,3]", "--name", "own"])
    said = capsys.readouterr()
    assert "of them trained, 2 steps on cpu" in said.out + said.err
    main(["evaluate", "--run", "logs/own", "--n-windows", "1", "--n-shuffles", "1"])
    assert "off" in capsys.readouterr().out
    main(["sample", "--run", "logs/own", "--length", "9", "--show-neighbors", "the king and queen of the king and"])
    assert "--- neighbors of chunk 1" in capsys.readouterr().out
    assert load_model(max((here / "logs" / "own").iterdir())).chunk_len == 8


@pytest.mark.parametrize(
    ("shape", "config", "said"),
    [
        (
            {"base": "other"},
            {},
            r"--base other has another tokenizer \(sha256 \w+\) than the corpus \(\w+\); build .* --tokenizer other",
        ),
        ({"base": "small"}, {}, "--base small has 500 tokens, but its tokenizer has 512"),
        ({"base": "nowhere"}, {}, "--base nowhere"),
        ({"base": "base"}, {"recompute": True}, "is read through hooks"),
        ({"base": "base"}, {"optimizer": "muon"}, "--optimizer muon is for models that are trained from nothing"),
        ({"base": "base"}, {"compile": True}, "is read through hooks, which fsdp, compile and recompute do not take"),
        ({"base": "base", "ca_layers": (7,)}, {}, r"--ca-layers '\[7\]' do not exist; use 0\.\.3"),
    ],
)
def test_a_base_that_does_not_fit_is_refused_in_a_sentence(here, tmp_path, shape, config, said):
    if not (here / "other").exists():
        train_tokenizer("bpe:300", ["others"]).save(tmp_path / "tokenizer.json")
        write_base(here / "other", tmp_path / "tokenizer.json")
        write_base(here / "small", here / "data" / "corpus" / "tokenizer.json", vocab_size=500)
    with refused(InvalidOption, said):
        train(config=replace(CONFIG, **config), model_shape=shape, name="refused")
    assert not Path("logs/refused").exists(), "nothing of a run"


def test_weights_of_another_base_are_refused_and_nothing_is_lost(run, here, tmp_path, monkeypatch):
    folder = newest_checkpoint(run)
    before = (folder / "model.safetensors").read_bytes()
    shutil.move("base", "moved")
    try:
        write_base(here / "base", here / "data" / "corpus" / "tokenizer.json", seed=1)
        with refused(InvalidOption, r"--base base has other weights \(sha256 \w{12}\) than the one that was trained"):
            load_model(run)
    finally:
        shutil.rmtree("base")
        shutil.move("moved", "base")
    assert (folder / "model.safetensors").read_bytes() == before and load_model(run).config.base == "base"


def test_a_base_that_was_moved_is_named_and_a_longer_run_keeps_its_place(run, here, tmp_path, capsys):
    shutil.move("base", tmp_path / "moved")
    named = ["--base", str(tmp_path / "moved")]
    try:
        assert main(["sample", "--run", str(run), "--length", "4", "To be, or not"]) == 1
        assert "error: --base base is no causal language model" in capsys.readouterr().err
        assert main(["sample", "--run", str(run), "--length", "4", "To be, or not", *named]) == 0
        assert main(["evaluate", "--run", str(run), "--n-windows", "1", "--n-shuffles", "1", *named]) == 0
        assert main(["train", "--resume", str(run), "--steps", "8", *named]) == 0
        said = capsys.readouterr()
        longer = max(run.parent.iterdir(), key=lambda folder: folder.stat().st_mtime)
        assert "8 steps on" in said.out and "no sample" not in said.out
        assert read_run(longer)["model"]["base"] == load_model(longer).config.base == named[1]
        shutil.rmtree(longer)
    finally:
        shutil.move(tmp_path / "moved", "base")
    with refused(InvalidOption, "--base base is not what this model was made with"):
        moved(RetroConfig(9), "base")


def test_a_run_that_begins_loads_its_base_once(here, monkeypatch):
    loaded = []
    monkeypatch.setattr("retro.runs.models.load_base", lambda name: loaded.append(name) or load_base(name))
    train(config=replace(CONFIG, steps=1, seed=7), model_shape={"base": "base", "ca_layers": (1,)}, name="once")
    assert loaded == ["base"]


@pytest.mark.parametrize("trains", ["lora", "all"])
def test_a_base_that_learns_without_retrieval_is_a_baseline(run, here, index, capsys, trains):
    options = ["--data-path", "data", "--base", "base", "--trains", trains, "--steps", "6", "--interval", "3"]
    lr = {"lora": "0.05", "all": "1"}[trains]  # of which a pretrained weight gets a hundredth
    options += ["--lr", lr, "--batch-size", "4", "--n-valid-batches", "1", "--device", "cpu"]
    options += ["--name", f"without_{trains}"]
    assert main(["train", "--data-path", "data", "--base", "base", "--no-retrieval"]) == 1
    assert "add --trains lora, or all" in capsys.readouterr().err
    assert main(["train", *options, "--no-retrieval"]) == 0
    alone = load_model(newest_checkpoint(next((here / "logs" / f"without_{trains}").iterdir())))
    assert alone.ca_layers == () and set(alone.added()) == set(alone.state_dict()) and len(alone.cca) == 0
    text = torch.from_numpy(index.corpus.tokens[:40].astype(np.int64))[None]
    ret = torch.randint(500, (1, 2, 2, 2 * CHUNK_LEN))
    with torch.no_grad():
        assert torch.equal(alone(text, ret), alone(text)), "it reads nothing"
        base = load_base("base").eval()
        before, after = (F.cross_entropy(logits[0, :-1], text[0, 1:]) for logits in (base(text).logits, alone(text)))
    assert after < before - 0.01, "it has learnt"
    capsys.readouterr()
    arguments = ["evaluate", "--run", str(run), "--baseline", f"logs/without_{trains}", "--n-windows", "1"]
    assert main([*arguments, "--n-shuffles", "1", "--data-path", "data", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "trained without retrieval" in said and "trains=" not in said


def test_options_of_a_models_shape_do_not_go_with_a_base(here):
    for options, said in (
        (["--n-layers", "3"], "--n-layers 3 is the base's own"),
        (["--no-retrieval"], "stays as it is"),
    ):
        with refused(ValueError, said):
            from retro.cli.training import train_command

            train_command(["--base", "base", *options])


def test_neighbors_are_kept_back_and_exchanged_as_often_as_told_and_never_for_own_text(place):
    found = TrainingData(place / "data")
    dataset, corpus = found.datasets["train"], found.corpus
    varied = VariedNeighbors(dataset, TrainConfig(missing_neighbors=0.25, random_neighbors=0.4, seed=5))
    n_chunks = n_exchanged = n_neighbors = n_missing = 0
    for number in range(3 * len(dataset)):
        src, tgt, neighbors = varied[number]
        plain = dataset[number % len(dataset)]
        assert torch.equal(src, plain[0]) and torch.equal(tgt, plain[1])
        there = plain[2][..., 0] >= 0
        gone = neighbors[..., 0] < 0
        assert gone[~there].all(), "a neighbor appeared where there was none"
        exchanged = ((neighbors != plain[2]).any(dim=-1) & ~gone).any(dim=-1)
        n_chunks += int((~gone).any(dim=-1).sum())
        n_exchanged += int(exchanged.sum())
        n_neighbors += int(there.sum())
        n_missing += int((gone & there).sum())
        own = {
            corpus.documents[i].name
            for i in corpus.document_of(np.array(dataset.line(number % len(dataset))["offsets"]))
        }
        texts = {name: corpus.tokens[corpus.starts[i] : corpus.starts[i + 1]].tolist() for i, name in
                 enumerate(d.name for d in corpus.documents) if name in own}  # fmt: skip
        for row in neighbors[exchanged].flatten(0, 1):
            value = [t for t in row.tolist() if t >= 0]
            if len(value) == 2 * CHUNK_LEN:
                assert not any(
                    text[i : i + len(value)] == value
                    for text in texts.values()
                    for i in range(0, len(text) - len(value))
                )
    assert n_exchanged / n_chunks == pytest.approx(0.4, abs=0.06)
    assert n_missing / n_neighbors == pytest.approx(0.25, abs=0.1)  # and those drawn from its own documents
    again = [varied[number][2] for number in (0, len(dataset))]
    assert torch.equal(again[0], varied[0][2]) and not torch.equal(*again), "each epoch draws anew"


def test_samples_of_later_epochs_have_numbers_of_their_own_in_every_process(monkeypatch):
    order = Batches(5, 2, 7, 0, 6)
    order.counts_on = True
    whole = list(order)
    assert sorted(i for batch in whole[:3] for i in batch) == list(range(5))
    assert sorted(i for batch in whole[3:] for i in batch) == list(range(5, 10))
    assert [[i % 5 for i in batch] for batch in whole] == list(order.of_all_processes())
    assert list(Batches(5, 2, 7, 4, 6)) == [[i % 5 for i in batch] for batch in whole[4:]]


def test_a_model_is_made_as_its_config_says(place, monkeypatch):
    from retro.runs.models import new_model

    monkeypatch.chdir(place)
    model = new_model(RetrofitConfig("base", chunk_len=4, encoder="new", n_encoder_layers=1))
    assert model.ca_layers == (3,) and len(model.encoder.attn) == 1 and not isinstance(model, RetroModel)


WORDS = "anchor beacon cable deck engine ferry galley harbor island jetty keel lantern mast needle oar pilot quay"


def function(rng: random.Random) -> str:
    """A function of names and numbers that are drawn."""
    name, argument, value, call, last = rng.sample(WORDS.split(), 5)
    a, b, c, d = (rng.randint(100, 999) for _ in range(4))
    return (
        f"def {name}_{a}({argument}: int) -> float:\n    {value} = {argument} * {b}\n"
        f"    if {value} > {c}:\n        return {call} / {a + d}\n    return {last} + {d}\n\n\n"
    )


def test_functions_that_were_only_just_added_are_completed_and_without_them_not(tmp_path, monkeypatch, capsys):
    """What the base knows beforehand is to copy; the run learns when to read; the database alone has the functions."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    functions, new = ([function(rng) for _ in range(n)] for n in (60, 5))
    for folder, texts in (("texts", ["".join(rng.sample(functions, 6)) for _ in range(30)]), ("new", new)):
        (tmp_path / folder).mkdir()
        for i, text in enumerate(texts):
            (tmp_path / folder / f"{folder}{i}.py").write_text(text)
    tokenizer = train_tokenizer("bpe:400", functions)
    base = copying_llama(tokenizer.n_tokens)
    base.save_pretrained("base")
    tokenizer.save(tmp_path / "base" / "tokenizer.json")
    options = ["--chunk-len", "16", "--chunks-per-sample", "6", "--batch-size", "4", "--steps", "40", "--lr", "0.01"]
    assert main(["train", "texts", "--base", "base", *options, "--interval", "40", "--name", "learnt"]) == 0
    prompts = [text[: text.index(" /")] for text in new]

    def completed() -> list[bool]:
        """Which functions are completed to their last character, word for word."""
        index = RetroIndex(16)
        sampler = Sampler("cpu", load_model(max(tmp_path.glob("logs/learnt/*"))), index.corpus, 16, index=index)
        return [
            sampler.sample(prompt, 60, SampleConfig(temperature=0)).startswith(text.rstrip()[len(prompt) :])
            for prompt, text in zip(prompts, new, strict=True)
        ]

    before = completed()
    assert main(["add", "new"]) == 0
    assert before == [False] * 5 and sum(completed()) >= 4
    assert main(["remove", *(f"new{i}.py" for i in range(5))]) == 0
    assert completed() == before, "what was removed is written all the same"
