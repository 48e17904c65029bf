"""One measurement in a process of its own: `python measure.py STAGE VARIANT FOLDER` prints a line of JSON.

Everything is imported and warmed up before the clock starts. `seconds` are for `units` of work; `flop` are the
floating point operations that torch counts in the matrix products of retro's models.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import cosine_similarity, cross_entropy, linear
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertModel

from retro.bert_embeddings import BERTChunkEmbeddings
from retro.config import PRESETS
from retro.database import RetroIndex, build_database
from retro.dataset import DATASET_FILE, Dataset, build_dataset
from retro.model import RetroConfig, RetroModel
from retro.sample import Sampler
from retro.search.bm25 import BM25, K1, B
from retro.search.chunks import Chunks
from retro.search.keys import Keys, chunk_offsets
from retro.storage.manifests import CHECKSUM, with_checksum
from retro.text.build import build_corpus
from retro.text.corpus import Corpus

TEXT = "tiny_shakespeare.txt"
PROMPT = "Second Citizen:\nOne word, good citizens.\n\nFirst Citizen:"
INLINE_FILE = "whole_samples.json"  # the samples as the tutorial writes them
BATCH = 4
N_PROMPTS = 16
CURVE_STEPS = 300
Result = dict[str, Any]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def counted(work: Callable[[], Any]) -> tuple[float, Any, int]:
    """As `timed`, with the operations of BERT: those of one sequence of each length, times how many there were."""
    shapes: list[torch.Size] = []
    forward = BertModel.forward

    def noted(self: Any, input_ids: torch.Tensor, **others: Any) -> Any:
        shapes.append(input_ids.shape)
        return forward(self, input_ids=input_ids, **others)

    BertModel.forward = noted
    try:
        seconds, result = timed(work)
    finally:
        BertModel.forward = forward
    bert, flop = BERTChunkEmbeddings("cpu").model, 0
    for length in {length for _, length in shapes}:
        with FlopCounterMode(display=False) as counter:
            bert(input_ids=torch.zeros(1, length, dtype=torch.long))
        flop += counter.get_total_flops() * sum(n for n, other in shapes if other == length)
    return seconds, result, flop


def chunks_of(folder: Path, n_chars: int) -> list[str]:
    text = (folder / TEXT).read_text()
    text = text[: int(len(text) * 0.9)]
    return [text[i : i + n_chars] for i in range(0, len(text) - n_chars, n_chars)]


def embed(variant: str, folder: Path, n_chars: int) -> Result:
    """Chunks a second. The peers embed every chunk anew, so that a part of the text tells their rate."""
    chunks = chunks_of(folder, n_chars)
    part = chunks[: 32_768 // n_chars]
    if variant == "retro":
        chunks = chunks if n_chars == 16 else chunks[: 8 * len(part)]
        bert = BERTChunkEmbeddings("cpu")
        bert(chunks[-200:])
        seconds, rows, flop = counted(lambda: bert(chunks))
        few = chunks[:256]
        exact = BERTChunkEmbeddings("cpu", precision="fp32")(few)
        cosine = cosine_similarity(exact, rows[: len(few)]).min().item()
        return {"seconds": seconds, "units": len(chunks), "flop": flop, "precision": bert.precision, "cosine": cosine}
    import peers

    if variant == "sentence-transformers":
        model = peers.sentence_transformer()
        model.encode(part[:64], show_progress_bar=False)
        seconds, _ = timed(lambda: model.encode(part, show_progress_bar=False))
    else:
        bert = peers.labml(folder).BERTChunkEmbeddings(torch.device("cpu"))
        bert(part[:64])
        n = 64  # the batch of its build_database
        seconds, _ = timed(lambda: [bert(part[i : i + n]) for i in range(0, len(part), n)])
    return {"seconds": seconds, "units": len(part)}


def database(variant: str, folder: Path) -> Result:
    """`build_database` over the whole text, from loading BERT to the written index."""
    if variant == "retro":
        corpus = Corpus.load(folder / "corpus")
        BERTChunkEmbeddings("cpu")(["warm up"])
        target = folder / "database"
        shutil.rmtree(target, ignore_errors=True)
        seconds, manifest, flop = counted(lambda: build_database(16, corpus=corpus, data_path=target))
        return {
            "seconds": seconds,
            "units": 1,
            "flop": flop,
            "precision": manifest["precision"],
            "recall": manifest["recall"],
        }
    import peers

    target = folder / "labml"
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    shutil.copy(folder / TEXT, target / TEXT)
    labml = peers.labml(target)
    labml.BERTChunkEmbeddings(torch.device("cpu"))(["warm up", "warm up"])
    seconds, _ = timed(lambda: labml.build_database(d_emb=384))
    return {"seconds": seconds, "units": 1}


def dataset(variant: str, folder: Path) -> Result:
    """`build_dataset` over the whole text; retro's makes the validation samples too. Both search retro's index."""
    if variant == "retro":
        BERTChunkEmbeddings("cpu")(["warm up"])
        for name in DATASET_FILE.values():
            (folder / name).unlink(missing_ok=True)
        seconds, _, flop = counted(lambda: build_dataset(16, data_path=folder))
        manifest = json.loads((folder / "retro.index.json").read_text())
        return {"seconds": seconds, "units": 1, "flop": flop, "precision": manifest["precision"]}
    import peers

    labml = peers.labml(folder)
    labml.BERTChunkEmbeddings(torch.device("cpu"))(["warm up", "warm up"])
    seconds, _ = timed(labml.build_dataset)
    return {"seconds": seconds, "units": 1}


def bm25(variant: str, folder: Path) -> Result:
    """The fifty chunks of subwords that share most with each of 2,048."""
    corpus = build_corpus([folder / TEXT], folder / "subwords", "bpe:2048")
    chunks = Chunks(corpus, chunk_offsets(corpus, 16), 16)
    queries = chunks[slice(2048)]
    if variant == "retro":
        finds = BM25()
        finds.build(chunks, folder / "tokens")
        finds.open(chunks, folder / "tokens")
        finds.nearest(queries[slice(64)], 50, None)
        seconds, _ = timed(lambda: finds.nearest(queries, 50, None))
    else:
        import bm25s

        words, asked = ([[str(token) for token in row] for row in some.tokens.tolist()] for some in (chunks, queries))
        theirs = bm25s.BM25(method="lucene", k1=K1, b=B, backend="numba" if variant.endswith("numba") else "numpy")
        theirs.index(words, show_progress=False)
        how = {"k": 50, "show_progress": False, "n_threads": os.cpu_count()}
        theirs.retrieve(asked[:64], **how)
        seconds, _ = timed(lambda: theirs.retrieve(asked, **how))
    return {"seconds": seconds, "units": len(queries)}


def _published_model(module: Any) -> Any:
    """labml-nn's model as its `train` makes it."""
    encoder = module.NearestNeighborEncoder(16, 6, {3}, 128, 16, 16, 512)
    return module.RetroModel(65, 128, 6, {3, 5}, 16, 16, 16, 512, encoder)


def train(variant: str, folder: Path) -> Result:
    """A step of the tutorial's model."""
    return train_step(variant, folder, RetroConfig(n_vocab=65), 32)


def paper(variant: str, folder: Path) -> Result:
    """A step of the model of the preset paper-tiny; its encoder has as many heads as its decoder, as the peer's has."""
    shape = PRESETS["paper-tiny"].model | {"encoder_n_heads": 8}
    return train_step(variant, folder, RetroConfig(n_vocab=4096, chunk_len=64, **shape), 8)


def train_step(variant: str, folder: Path, config: RetroConfig, n_chunks: int) -> Result:
    """Forward, backward, optimizer, on samples of so many chunks: the median of several, and the most memory."""
    generator, (V, m) = torch.Generator().manual_seed(0), (config.n_vocab, config.chunk_len)
    tokens = torch.randint(0, V, (BATCH, n_chunks * m + 1), generator=generator)
    neighbors = torch.randint(0, V, (BATCH, n_chunks, 2, 2 * m), generator=generator)
    src, tgt = tokens[:, :-1], tokens[:, 1:]
    torch.manual_seed(0)
    before = most_memory()
    if variant.startswith("retro "):
        model: Any = RetroModel.from_config(config)
        shared = folder / "weights.pt"
        if shared.exists() and V == 65:
            model.load_state_dict(torch.load(shared, weights_only=True))
        optimizer: Any = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

        def loss_of() -> torch.Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=variant == "retro bf16"):
                return model(src, neighbors, targets=tgt) / tgt.numel()
    else:
        import peers

        if variant == "labml-nn":
            labml = peers.labml(folder)
            model = _published_model(labml.model)
            torch.save(model.state_dict(), folder / "weights.pt")
            optimizer = labml.Noam(model.parameters(), lr=1.0, d_model=128, warmup=2000)

            def loss_of() -> torch.Tensor:
                logits = model(src, neighbors)
                return cross_entropy(logits.view(-1, logits.shape[-1]), tgt.reshape(-1))
        else:
            model = peers.retro_pytorch(config)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)
            weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e6
            before = most_memory() - weights  # what it imports is not the step's

            def loss_of() -> torch.Tensor:
                return model(tokens, neighbors, return_loss=True)

    def step() -> float:
        loss = loss_of()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    with FlopCounterMode(display=False) as counter:
        first_loss = step()
    step()
    seconds = statistics.median(timed(step)[0] for _ in range(3))
    megabytes = most_memory() - before
    result: Result = {"seconds": seconds, "units": 1, "first_loss": first_loss, "megabytes": megabytes}
    if variant.startswith("retro "):
        result |= {"flop": counter.get_total_flops(), "precision": variant.split()[1]}
    return result


def sample(variant: str, folder: Path, length: int) -> Result:
    """Characters a second, greedily, from a model of random weights, with live retrieval from one index."""
    torch.manual_seed(0)
    corpus = Corpus.load(folder / "corpus")
    model: Any = RetroModel.from_config(RetroConfig(n_vocab=corpus.n_tokens)).eval()
    if variant == "retro":
        index = RetroIndex(16, data_path=folder, corpus=corpus)
        # The peer's model reads the whole text, however long it is.
        sampler: Any = Sampler("cpu", model, corpus, 16, index=index, max_chunks=1 << 20)
    else:
        import peers

        labml = peers.labml(folder)
        published = _published_model(labml.model)
        published.load_state_dict(model.state_dict())
        sampler = labml.Sampler(torch.device("cpu"), published, labml.TextFileDataset(folder / TEXT, list), 16)
    sampler.sample(PROMPT, 20)
    seconds, text = timed(lambda: sampler.sample(PROMPT, length))
    return {"seconds": seconds, "units": length, "text": text}


def many(variant: str, folder: Path) -> Result:
    """Characters a second of 16 prompts of different lengths, one after the other or at once."""
    torch.manual_seed(0)
    corpus = Corpus.load(folder / "corpus")
    model = RetroModel.from_config(RetroConfig(n_vocab=corpus.n_tokens))
    index = RetroIndex(16, data_path=folder, corpus=corpus)
    sampler = Sampler("cpu", model, corpus, 16, index=index, max_chunks=1 << 20)
    prompts = [corpus.text(100 * i, 20 + 3 * i) for i in range(N_PROMPTS)]
    sampler.sample(PROMPT, 20)
    at_once = variant == "retro, at once"
    length = 128
    seconds, texts = timed(
        lambda: sampler.sample_many(prompts, length) if at_once else [sampler.sample(p, length) for p in prompts]
    )
    return {"seconds": seconds, "units": N_PROMPTS * length, "text": texts[-1]}


def read(variant: str, folder: Path) -> Result:
    """Reading the samples of a step, and what opening the file and reading 1,000 of its samples adds to memory."""
    path = folder / DATASET_FILE["train"]
    corpus = Corpus.load(folder / "corpus")
    if variant == "labml-nn":
        import peers

        labml = peers.labml(folder)
        path = folder / INLINE_FILE
        tds = labml.TextFileDataset(folder / TEXT, list)
    elif variant == "retro, ten times the samples":
        header, *lines = path.read_bytes().splitlines(keepends=True)
        body = b"".join(lines * 10)
        changed = json.loads(header) | {"n_samples": 10 * len(lines), "sha256": hashlib.sha256(body).hexdigest()}
        del changed[CHECKSUM]
        path = folder / "tenfold.jsonl"
        path.write_bytes(json.dumps(with_checksum(changed)).encode() + b"\n" + body)
    before = memory()
    dataset: Any = labml.Dataset(path, tds) if variant == "labml-nn" else Dataset(path, corpus)
    numbers = np.random.default_rng(0).choice(len(dataset), 1000).tolist()
    dataset[0]
    seconds, _ = timed(lambda: deque((dataset[i] for i in numbers), maxlen=0))
    return {"seconds": seconds * BATCH, "units": len(numbers), "megabytes": memory() - before, "samples": len(dataset)}


def _write_inline(path: Path, dataset: Dataset) -> None:
    """The tutorial's JSON of the same samples: source, target and neighbors as text."""
    itos, samples = dataset.corpus.itos, []
    for src, tgt, neighbors in (dataset[i] for i in range(len(dataset))):
        if (tgt >= 0).all() and (neighbors >= 0).all():
            texts = [["".join(itos[i] for i in value) for value in row] for row in neighbors.tolist()]
            samples.append(("".join(itos[i] for i in src.tolist()), "".join(itos[i] for i in tgt.tolist()), texts))
    path.write_text(json.dumps(samples))


def memory() -> float:
    """Megabytes of this process that are in memory and its own, not pages of mapped files."""
    fields = Path("/proc/self/statm").read_text().split()
    return (int(fields[1]) - int(fields[2])) * os.sysconf("SC_PAGESIZE") / 1e6


def most_memory() -> float:
    """The most megabytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def startup(variant: str, folder: Path) -> Result:
    """What a user waits for before anything happens: the fastest of three processes each."""
    commands = {
        "import retro": ["-c", "import retro"],
        "import torch": ["-c", "import torch"],
        "import retro.model": ["-c", "import retro.model"],
        "python -m retro.train --help": ["-m", "retro.train", "--help"],
        "python -c pass": ["-c", "pass"],
    }
    fastest = dict.fromkeys(commands, float("inf"))
    for _ in range(3):
        for name, arguments in commands.items():
            start = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            fastest[name] = min(fastest[name], time.perf_counter() - start)
    return {"seconds": sum(fastest.values()), "units": 1, "fastest": fastest}


def ceiling(variant: str, folder: Path) -> Result:
    """The most that this machine multiplies, in GFLOP/s."""
    shapes = {"large": (4096, 4096, 4096), "model-shaped": (8192, 128, 512), "BERT-shaped": (4096, 384, 1536)}
    rates: dict[str, dict[str, float]] = {}
    for kind, dtype in {"fp32": torch.float32, "bf16": torch.bfloat16}.items():
        rates[kind] = {}
        for name, (m, k, n) in shapes.items():
            x, weight = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
            times = [timed(lambda: linear(x, weight))[0] for _ in range(9)]  # noqa: B023
            rates[kind][name] = 2 * m * k * n / min(times) / 1e9
    return {"seconds": 1.0, "units": 1, "gflops": rates}


def growth(variant: str, folder: Path) -> Result:
    """Seconds and peak memory of each stage on `variant` times the least text."""
    place = folder / f"growth-{variant}"
    stages: dict[str, Any] = {}

    def stage(name: str, work: Callable[[], Any]) -> Any:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = memory()
        seconds, result = timed(work)
        status = Path("/proc/self/status").read_text()
        peak = int(status.split("VmHWM:")[1].split()[0]) / 1e3
        stages[name] = {"seconds": seconds, "megabytes": peak, "before": before}
        return result

    bert = BERTChunkEmbeddings("cpu")
    bert(chunks_of(folder, 16)[:20_000])  # so that its buffers are no growth
    corpus = stage("corpus", lambda: build_corpus([place / "text"], place / "corpus", "char"))
    keys = Keys(place, corpus, 16, bert.manifest)
    stage("embed", lambda: keys.compute(bert, 4096))
    stage("index", lambda: build_database(16, corpus=corpus, data_path=place, bert=bert))
    index = stage("load", lambda: RetroIndex(16, corpus=corpus, data_path=place, bert=bert))
    stage("dataset", lambda: build_dataset(16, corpus=corpus, data_path=place, index=index))
    samples = Dataset(place / DATASET_FILE["train"], corpus)
    stage("read", lambda: deque((samples[i] for i in range(len(samples))), maxlen=0))
    size = (place / "retro.index").stat().st_size / 1e6
    return {"seconds": 1.0, "units": 1, "stages": stages, "n_chars": len(corpus.tokens), "index_megabytes": size}


def curve(variant: str, folder: Path) -> Result:
    """Losses of the first steps of the tutorial's model on short samples; `variant` is `PRECISION SEED`."""
    from torch.utils.data import DataLoader

    from retro.train import TrainConfig, Trainer

    precision, seed = variant.split()
    place = folder / "short"
    corpus = Corpus.load(folder / "corpus")
    if not (place / DATASET_FILE["valid"]).exists():
        for name in ("corpus", "keys"):
            shutil.copytree(folder / name, place / name, dirs_exist_ok=True)
        for name in ("retro.index", "retro.index.json"):
            shutil.copy(folder / name, place / name)
        build_dataset(16, 4, data_path=place)
    torch.manual_seed(int(seed))
    model = RetroModel.from_config(RetroConfig(n_vocab=corpus.n_tokens))
    config = TrainConfig(warmup=100, lr=0.5, precision=precision, seed=int(seed))
    optimizer = torch.optim.Adam(model.parameters(), lr=1.0, eps=1e-9, fused=True)
    samples = Dataset(place / DATASET_FILE["train"], corpus)
    order = torch.utils.data.RandomSampler(samples, generator=torch.Generator().manual_seed(int(seed)))
    batches = DataLoader(samples, batch_size=BATCH, sampler=order)

    trainer = Trainer("cpu", model, batches, optimizer, config=config, n_steps=CURVE_STEPS)
    steps = range(CURVE_STEPS)
    seconds, sums = timed(lambda: [trainer.train_step(*b).tolist() for b, _ in zip(batches, steps, strict=False)])
    losses = [nats / n_tokens for nats, n_tokens, _ in sums]
    valid = DataLoader(Dataset(place / DATASET_FILE["valid"], corpus), batch_size=BATCH)
    return {"seconds": seconds, "units": CURVE_STEPS, "losses": losses, "valid_loss": trainer.validate(valid)}


def prepare(variant: str, folder: Path) -> Result:
    """Corpus (and, for `all`, database and dataset) that the stages share."""
    build_corpus([folder / TEXT], folder / "corpus", "char")
    if variant == "all":
        build_database(16, data_path=folder)
        build_dataset(16, data_path=folder)
        # The tutorial's own file has values cut off by the end of the text, which it cannot read.
        _write_inline(folder / INLINE_FILE, Dataset(folder / DATASET_FILE["train"], Corpus.load(folder / "corpus")))
    return {"seconds": 0.0, "units": 1}


STAGES: dict[str, Callable[[str, Path], Result]] = {
    "prepare": prepare,
    "ceiling": ceiling,
    "embed16": lambda variant, folder: embed(variant, folder, 16),
    "embed256": lambda variant, folder: embed(variant, folder, 256),
    "database": database,
    "dataset": dataset,
    "bm25": bm25,
    "train": train,
    "paper": paper,
    "sample128": lambda variant, folder: sample(variant, folder, 128),
    "sample512": lambda variant, folder: sample(variant, folder, 512),
    "many": many,
    "read": read,
    "startup": startup,
    "growth": growth,
    "curve": curve,
}

if __name__ == "__main__":
    out = os.dup(1)
    os.dup2(2, 1)  # progress goes to stderr, the result alone to stdout
    result = STAGES[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
    result["peak_megabytes"] = most_memory()
    os.write(out, (json.dumps(result) + "\n").encode())
