"""Check what a larger database takes and brings: `make scale`, or one of its three stages.

    python benchmarks/scale.py plan        # the planner against real builds, of 0.5, 2 and 8 million tokens
    python benchmarks/scale.py index       # the planner's indexes, filled with 2 million vectors
    python benchmarks/scale.py gigabyte    # a database of 1 GB of text, embedded by static embeddings

Writes `scale.json` and `SCALE.md` beside this file; a single stage replaces its part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from retro import cli
from retro.cli import stages
from retro.config import BERT, PACKAGED, DatabaseConfig
from retro.database import RetroIndex, chunk_offsets
from retro.planning.plan import index_bytes, plan
from retro.planning.rates import Rates, measure
from retro.search import building, filling
from retro.search.factory import KEYS_PER_LIST, choose_index, n_lists_of, set_n_probe
from retro.search.filling import memory_of_machine
from retro.search.index_file import read_database_manifest
from retro.search.keys import Keys
from retro.search.querying import CANDIDATES, search_and_rerank
from retro.search.recall import ExactNeighbors, choose_n_probe
from retro.text.corpus import Corpus
from retro.text.pretrained import find_embedder

HERE = Path(__file__).parent
TOKENIZER, CHUNK_LEN = "bpe:4096", 32
SIZES = {"1": 1_650_000, "4": 6_600_000, "16": 26_400_000}  # bytes of Python, 3.3 of which are a token

N_KEYS, N_QUERIES, N_CLUSTERS, D = 2_000_000, 1000, 10_000, 384
# Standard deviation of chunk embeddings (all-MiniLM-L6-v2, 32 tokens of plays) along their first, second, 4th, 8th, ...
# principal axis; the mean's length. Around its 100 nearest, a chunk's own variance is 0.59 of the whole.
AXES, SPREAD = (1, 2, 4, 8, 16, 32, 64, 128, 256, 384), (0.65, 0.57, 0.49, 0.42, 0.35, 0.29, 0.23, 0.165, 0.09, 0.01)
MEAN_LENGTH, WITHIN = 1.8, 0.6
RECALL = 0.9
GIGABYTE, TOKENIZER_OF_IT, CHUNK_LEN_OF_IT = 1_024_000_000, "bpe:32000", 64


def child(*arguments: str) -> dict[str, Any]:
    """One step in a process of its own; adds how many cores something else kept busy meanwhile."""
    used, busy, start = resource.getrusage(resource.RUSAGE_CHILDREN), _busy_seconds(), time.perf_counter()
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    own = after.ru_utime + after.ru_stime - used.ru_utime - used.ru_stime
    result = json.loads(done.stdout)
    return result | {"cores_busy_elsewhere": max(0.0, (_busy_seconds() - busy - own) / seconds)}


def _busy_seconds() -> float:
    """Seconds that the cores were neither idle nor waiting for a disk, since the machine started."""
    ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


# Stage plan: the same sample, the smallest text, is measured before each build.


def check_plan(folder: Path) -> Iterator[dict[str, Any]]:
    write_texts(folder)
    for size in SIZES:
        yield {"size": size} | foretold_and_real(
            folder / "texts-1", folder / f"texts-{size}", folder / "data", TOKENIZER, CHUNK_LEN
        )
        shutil.rmtree(folder / "data")


def foretold_and_real(
    sample: Path, texts: Path, data: Path, tokenizer: str, chunk_len: int, retriever: str = BERT
) -> dict[str, Any]:
    options = tokenizer, str(chunk_len), retriever
    rates = child("_measure", str(sample), *options)
    build = child("_build", str(texts), str(data), *options)
    busy = [result.pop("cores_busy_elsewhere") for result in (rates, build)]
    p = plan(build["n_tokens"], Rates(**rates))
    planned = {name: getattr(p, name) for name in ("n_chunks", "index", "files", "memory", "seconds")}
    return {"rates": rates, "planned": planned, "build": build, "cores_busy_elsewhere": max(busy)}


def write_texts(folder: Path) -> None:
    """Python sources of the installed packages, drawn at random; the smaller text is the beginning of the larger."""
    files = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    files = [files[i] for i in np.random.default_rng(0).permutation(len(files))]
    for size, n_bytes in SIZES.items():
        (folder / f"texts-{size}").mkdir()
        for number, file in enumerate(files):
            content = file.read_bytes()
            if 0 < len(content) <= 100_000 and b"\0" not in content and content.decode(errors="ignore").strip():
                (folder / f"texts-{size}" / f"{number:05d}.py").write_bytes(content)
                n_bytes -= len(content)
                if n_bytes <= 0:
                    break


def measure_rates(texts: str, tokenizer: str, chunk_len: str, retriever: str) -> dict[str, Any]:
    return asdict(measure([texts], tokenizer, int(chunk_len), retriever=retriever))


def build(texts: str, data: str, tokenizer: str, chunk_len: str, retriever: str) -> dict[str, Any]:
    """A database, by the command; seconds of its stages, bytes, and the most memory it held.

    Memory is the process's own, looked at ten times a second, and its libraries; not the pages of keys that are mapped.
    """
    memory = {"most": 0, "libraries": 0}

    def resident(kind: str) -> int:
        return 1024 * int(Path("/proc/self/status").read_text().split(f"Rss{kind}:")[1].split()[0])

    def look() -> None:
        while True:
            memory["most"] = max(memory["most"], resident("Anon"))
            time.sleep(0.1)

    threading.Thread(target=look, daemon=True).start()
    seconds = dict.fromkeys(("corpus", "embed", "train", "add", "merge", "recall"), 0.0)
    peak: dict[str, int] = {}  # bytes, up to the end of a stage

    def watch(owner: Any, name: str, stage: str, wrap: Callable[..., Any] = lambda work: work) -> None:
        work = getattr(owner, name)

        def watched(*arguments: Any, **options: Any) -> Any:
            taken, result = timed(lambda: work(*arguments, **options))
            seconds[stage] += taken
            if stage == "embed":
                memory["libraries"] = resident("File")
            peak[stage] = memory["most"] + memory["libraries"]
            return result

        setattr(owner, name, wrap(watched))

    watch(stages, "prepare_corpus", "corpus")
    watch(Keys, "compute", "embed")
    watch(filling, "_train", "train")
    watch(filling, "_add", "add")
    watch(filling, "_merge", "merge")
    watch(building, "write_database", "merge")
    watch(ExactNeighbors, "of", "recall", staticmethod)
    watch(ExactNeighbors, "recall", "recall")
    options = ["--tokenizer", tokenizer, "--chunk-len", chunk_len, "--retriever", retriever, "--index", "auto"]
    options += ["--data-path", data]
    total, status = timed(lambda: cli.main(["database", texts, *options]))
    if status:
        raise SystemExit(status)
    folder, corpus = Path(data), Corpus.load(Path(data) / "corpus")
    manifest = read_database_manifest(folder)
    return {
        "n_tokens": len(corpus.tokens),
        "n_chunks": manifest["n_chunks"],
        "index": manifest["index"],
        "recall": manifest["recall"],
        "n_probe": manifest["n_probe"],
        "files": {
            "text": int(corpus.documents.n_bytes.sum()),
            "tokens": (folder / "corpus" / "tokens.bin").stat().st_size,
            "signatures": (folder / "corpus" / "signatures.bin").stat().st_size,
            "documents": next((folder / "corpus").glob("documents-*.bin")).stat().st_size,
            "keys": sum(file.stat().st_size for file in (folder / "keys").rglob("*.*")),
            "index": sum(file.stat().st_size for file in folder.glob("retro.i*") if file.suffix != ".json"),
        },
        "memory": max(peak.values()),
        "peak": peak,
        "seconds": seconds | {"start": total - sum(seconds.values())},
    }


# Stage gigabyte: all of it, by a retriever that two cores can afford.


def check_gigabyte(folder: Path, n_bytes: int) -> Iterator[dict[str, Any]]:
    from ingest import write as write_lines

    lines, model, data = folder / "lines.jsonl", folder / "static", folder / "data"
    write_lines(lines, n_bytes)
    child("_distil", str(model))
    options = TOKENIZER_OF_IT, CHUNK_LEN_OF_IT, str(model)
    result = {"bytes": n_bytes} | foretold_and_real(lines, lines, data, *options)
    for _ in range(2):  # the second time, files are known
        result["search"] = child("_search", str(data))
    yield result


def distil(folder: str) -> dict[str, Any]:
    """Static embeddings of the packaged BERT: of each of its tokens one, to be averaged, of 256 features."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import StaticEmbedding

    static = StaticEmbedding.from_distillation(find_embedder(PACKAGED), device="cpu", pca_dims=256)
    SentenceTransformer(modules=[static], device="cpu").save(folder)
    return {}


def search(data: str) -> dict[str, Any]:
    """How long a database takes to be opened, and how many queries a second it answers, embedded already."""
    seconds, index = timed(lambda: RetroIndex(data_path=data))
    opened = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    chunks, rng = chunk_offsets(index.corpus, index.chunk_len), np.random.default_rng(0)
    queries = index.embed(index.corpus.texts(rng.choice(chunks, N_QUERIES) + index.chunk_len // 2, index.chunk_len))
    dense = index.dense
    assert dense is not None
    search_and_rerank(dense.index, dense.keys, queries, 10)  # keys are hashed when they are first read
    rates = {}
    for n_threads in (1, faiss.omp_get_max_threads()):
        faiss.omp_set_num_threads(n_threads)
        rates[n_threads] = N_QUERIES / timed(lambda: search_and_rerank(dense.index, dense.keys, queries, 10))[0]
    return {"open_seconds": seconds, "opened_memory": opened, "queries_per_second": rates}


# Stage index.


class Vectors(Keys):
    """Rows of a mixture of Gaussians, in the place of embeddings; the last ones are queries, in no index.

    The clusters' centers and the rows around them have the spread of chunk embeddings along random axes, divided
    between the two. Sizes of clusters are lognormal: most have less than the mean, few have many times of it.
    """

    def __init__(self, n: int, n_queries: int, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        axes = np.linalg.qr(rng.standard_normal((D, D)))[0].astype(np.float32)
        std = np.exp(np.interp(np.log(np.arange(1, D + 1)), np.log(AXES), np.log(SPREAD))).astype(np.float32)
        around = axes * (std * np.sqrt(WITHIN))  # the columns of `axes` are the axes
        mean = rng.standard_normal(D)
        centers = rng.standard_normal((N_CLUSTERS, D), dtype=np.float32) @ (axes * (std * np.sqrt(1 - WITHIN))).T
        centers += (mean / np.linalg.norm(mean) * MEAN_LENGTH).astype(np.float32)
        weights = rng.lognormal(size=N_CLUSTERS)
        self.n, self.d_emb = n, D
        self.all = np.empty((n + n_queries, D), dtype=np.float32)
        for start in range(0, len(self.all), 1 << 16):
            block = self.all[start : start + (1 << 16)]
            clusters = rng.choice(N_CLUSTERS, size=len(block), p=weights / weights.sum())
            block[:] = rng.standard_normal(block.shape, dtype=np.float32) @ around.T + centers[clusters]
        self.offsets = np.arange(len(self.all))
        self.in_database = self.offsets < n
        self.firsts = np.append(np.arange(0, len(self.all), 1 << 14), len(self.all))
        self.n_shards = len(self.firsts) - 1

    def _shard(self, number: int) -> np.ndarray:
        return self.all[self.firsts[number] : self.firsts[number + 1]]

    def exact_neighbors(self) -> ExactNeighbors:
        queries = self.all[self.n :]
        distances, _ = faiss.knn(queries, self.all[: self.n], 10)
        return ExactNeighbors(queries, np.zeros((len(queries), 1, 2), dtype=int), distances)  # nothing is barred


def check_indexes(n: int, n_queries: int = N_QUERIES) -> Iterator[dict[str, Any]]:
    vectors = Vectors(n, n_queries)
    taken, exact = timed(vectors.exact_neighbors)
    rng = np.random.default_rng(1)
    pairs = vectors.all[rng.integers(n, size=(2, 10_000))]
    random = float(np.median(((pairs[0] - pairs[1]) ** 2).sum(1)))
    near = {str(k): float(np.median(exact.distances[:, k - 1])) / random for k in (1, 2, 10)}
    length = float(np.linalg.norm(vectors.all[:10_000], axis=1).mean())
    yield {"n": n, "n_queries": n_queries, "near": near, "length": length, "truth_seconds": taken}
    for factory in ("Flat", choose_index(max(n, 50_001), D), choose_index(5_000_001, D)):
        yield check_index(factory, vectors, exact)


def check_index(factory: str, vectors: Vectors, exact: ExactNeighbors) -> dict[str, Any]:
    """An index that is learnt, filled and searched as `build_database` and `RetroIndex` do it."""
    n = vectors.n
    n_train = min(n, max(DatabaseConfig.n_train, KEYS_PER_LIST * n_lists_of(factory))) if n_lists_of(factory) else 0
    busy, used, start = _busy_seconds(), time.process_time(), time.perf_counter()
    train_seconds, index = timed(lambda: filling._train(factory, vectors, n_train, 0))
    add_seconds, _ = timed(lambda: filling._add(index, vectors, range(vectors.n_shards)))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "index"
        faiss.write_index(index, str(file))
        n_bytes = file.stat().st_size
    choose_seconds, (n_probe, note) = timed(lambda: choose_n_probe(index, vectors, exact, RECALL))
    set_n_probe(index, n_probe)
    recall = exact.recall(index, vectors)
    _, by_codes = index.search(exact.queries, 10)
    n_threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    search_seconds, _ = timed(lambda: search_and_rerank(index, vectors, exact.queries, 10))
    faiss.omp_set_num_threads(n_threads)
    elsewhere = (_busy_seconds() - busy - time.process_time() + used) / (time.perf_counter() - start)
    return {
        "index": factory,
        "n_train": n_train,
        "n_probe": n_probe if n_train else None,
        "note": note,
        "recall": recall,
        "recall_by_codes": {f"@{k}": share_of_true(by_codes[:, :k], vectors, exact) for k in (1, 2, 10)},
        "queries_per_second": len(exact.queries) / search_seconds,
        "bytes": n_bytes,
        "planned_bytes": index_bytes(factory, n, D),
        "train_seconds": train_seconds,
        "add_seconds": add_seconds,
        "choose_seconds": choose_seconds,
        "cores_busy_elsewhere": max(0.0, elsewhere),
    }


def share_of_true(found: np.ndarray, vectors: Vectors, exact: ExactNeighbors) -> float:
    """Of the first neighbors that come back, how many are as near as the true ones."""
    distances = ((vectors.all[found] - exact.queries[:, None]) ** 2).sum(-1)
    near = distances <= exact.distances[:, found.shape[1] - 1, None] * (1 + 1e-4)
    return float((near & (found >= 0)).mean())


# The page.


def off(planned: float, real: float) -> str:
    return f"{planned / real - 1:+.0%}"


def report(record: dict[str, Any]) -> str:
    """The whole of `SCALE.md`."""
    lines = [
        "# Measured: what larger databases take, and what their indexes find",
        "",
        "Made by `make scale` (`benchmarks/scale.py`), which says how.",
    ]
    for name, table in (("plan", _plan_tables), ("gigabyte", _gigabyte_tables), ("index", _index_tables)):
        if name in record:
            lines += ["", *table(record[name]["results"])]
    lines += ["", "## When and where", ""]
    for name, part in record.items():
        m, busy = part["machine"], [r["cores_busy_elsewhere"] for r in part["results"] if "cores_busy_elsewhere" in r]
        lines.append(
            f"- `python benchmarks/scale.py {name}`: {m['date']}, {part['minutes']:.0f} minutes, {m['processor']}, "
            f"{m['cores']} cores, {m['memory'] / 1e9:.0f} GB of memory, {m['threads']} threads, {m['python']}, "
            f"{', '.join(f'{k} {v}' for k, v in m['versions'].items())}; "
            f"cores busy with anything else: {', '.join(f'{b:.2f}' for b in busy)}"
        )
    return "\n".join(lines) + "\n"


def _plan_tables(results: list[dict[str, Any]]) -> list[str]:
    recalls = [f"{r['build']['recall']['@10']:.1%}" for r in results]
    return [
        "## The planner against real builds",
        "",
        "Python sources of installed packages, drawn at random, tokenizer bpe:4096, chunks of 32 tokens, index auto.",
        "Before each build, `retro plan` measured a sample, always the smallest of the three texts, and foretold what",
        "`python -m retro.database` would take for as many tokens as it then made. Wanted: bytes within 20%, time",
        "within 30%. Each cell: foretold, real, difference. Memory: without pages of mapped keys.",
        "",
        *_foretold_and_real(results),
        "",
        f"Recall at 10 of the three databases: {', '.join(recalls)}.",
    ]


def _gigabyte_tables(results: list[dict[str, Any]]) -> list[str]:
    (result,) = results
    build, found = result["build"], result["search"]
    one, (n_threads, most) = found["queries_per_second"]["1"], [*found["queries_per_second"].items()][-1]
    recall = ", ".join(f"{share:.1%} {at}" for at, share in build["recall"].items())
    return [
        "## A gigabyte",
        "",
        "JSON lines of Python code, over and over with one word in 20 changed, as for `make ingest`; tokenizer",
        f"{TOKENIZER_OF_IT}, chunks of {CHUNK_LEN_OF_IT} tokens, embedded by static embeddings of 256 features that",
        "model2vec distils from the packaged BERT in a quarter of a minute. Cells as above; the sample for the plan is",
        "the beginning of the same file.",
        "",
        *_foretold_and_real(results),
        "",
        f"Recall, of queries that begin anywhere in training documents: {recall}; {build['n_probe']} lists searched.",
        f"The database is opened in {found['open_seconds']:.1f} s by a process that then holds "
        f"{found['opened_memory'] / 1e9:.2f} GB, mapped pages too.",
        f"Of {N_QUERIES:,} queries that are embedded already it answers {one:,.0f} a second with one thread, "
        f"{most:,.0f} with {n_threads}.",
        *(["", *result["notes"]] if "notes" in result else []),
        "",
        *_reckoned(Rates(**result["rates"])),
    ]


def _reckoned(rates: Rates) -> list[str]:
    """What the planner says of much more of the same text."""
    plans = [
        plan(n * rates.tokens_per_chunk / (1 - rates.valid_fraction), rates, n_processes=n_processes, key_bits=16)
        for n in (1e9, 1e10)
        for n_processes in (1, 64)
    ]
    lines = [
        "Reckoned by the planner from these rates, for more of such text, keys of 16 bits, and so many processes that",
        "each have what this machine has:",
        "",
        "| chunks, processes | " + " | ".join(f"{p.n_chunks:,}, {p.n_processes}" for p in plans) + " |",
        "|---|" + "---|" * len(plans),
        "| index | " + " | ".join(p.index for p in plans) + " |",
    ]

    def row(label: str, values: Iterable[float]) -> None:
        lines.append(f"| {label} | " + " | ".join(f"{v:,.0f}" if v >= 10 else f"{v:.2g}" for v in values) + " |")

    for name in ("text", "tokens", "documents", "signatures", "keys", "index"):
        row(f"{name}, TB", [p.files[name] / 1e12 for p in plans])
    for name in ("building", "serving"):
        row(f"memory {name}, GB", [p.memory[name] / 1e9 for p in plans])
    for name in ("corpus", "embed", "train", "add", "merge", "recall"):
        row(f"{name}, hours", [p.seconds[name] / 3600 for p in plans])
    return lines


def _foretold_and_real(results: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| | " + " | ".join(f"{r['build']['n_tokens']:,} tokens" for r in results) + " |",
        "|---|" + "---|" * len(results),
    ]

    def row(label: str, cell: Callable[[dict[str, Any], dict[str, Any]], str]) -> None:
        lines.append(f"| {label} | " + " | ".join(cell(r["planned"], r["build"]) for r in results) + " |")

    def pair(planned: float, real: float, unit: float, digits: int) -> str:
        return f"{planned / unit:,.{digits}f}, {real / unit:,.{digits}f}, **{off(planned, real)}**"

    row("index", lambda p, b: p["index"] if p["index"] == b["index"] else f"{p['index']}, {b['index']}")
    row("chunks", lambda p, b: pair(p["n_chunks"], b["n_chunks"], 1, 0))
    for name in results[0]["build"]["files"]:
        row(f"{name}, MB", lambda p, b: pair(p["files"][name], b["files"][name], 1e6, 2))  # noqa: B023
    row("memory while building, MB", lambda p, b: pair(p["memory"]["building"], b["memory"], 1e6, 0))
    row("**time, s**", lambda p, b: pair(sum(p["seconds"].values()), sum(b["seconds"].values()), 1, 1))
    for stage in (stage for stage in results[0]["planned"]["seconds"] if stage in results[0]["build"]["seconds"]):
        row(f"{stage}, s", lambda p, b: f"{p['seconds'][stage]:.1f}, {b['seconds'][stage]:.1f}")  # noqa: B023
    return lines


def _index_tables(results: list[dict[str, Any]]) -> list[str]:
    about, *rows = results
    near = ", ".join(f"{near:.2f}" for near in about["near"].values())
    lines = [
        "## Indexes of millions of keys",
        "",
        f"{about['n']:,} vectors of {D} features, a mixture of {N_CLUSTERS:,} Gaussians of lognormal weights, with the",
        f"spread of real chunk embeddings along each axis, {WITHIN:.0%} of the variance within clusters; length "
        f"{about['length']:.1f},",
        f"as MiniLM's. {about['n_queries']:,} queries from the same mixture, in no index. The distance to the nearest,",
        f"second and tenth neighbor is {near} of that between random vectors (squared; 0.47 to the first and 0.56",
        f"to the tenth among 16,000 chunks of plays). Codes find {CANDIDATES} times as many neighbors as are wanted,",
        f"and whole keys decide; as many lists are searched as give a recall at 10 of {RECALL:.0%}, or 99% of what the",
        "codes allow. Indexes are learnt, filled and searched by the functions that `build_database` and `RetroIndex`",
        "use.",
        "",
        "| index | recall @1 | @2 | @10 | by codes alone @1 | @2 | @10 | lists searched | queries/s, 1 thread "
        "| bytes a chunk: foretold, real | learnt from | training | adding |",
        "|---" * 13 + "|",
    ]
    for r in rows:
        shares = " | ".join(f"{r[of][k]:.1%}" for of in ("recall", "recall_by_codes") for k in ("@1", "@2", "@10"))
        planned, real = (r[k] / about["n"] for k in ("planned_bytes", "bytes"))
        training = f"{r['n_train']:,} | {r['train_seconds']:,.0f} s" if r["n_train"] else "| "
        lines.append(
            f"| {r['index']} | {shares} | {r['n_probe'] or ''} | {r['queries_per_second']:,.0f} "
            f"| {planned:,.2f}, {real:,.2f} | {training} | {r['add_seconds']:,.0f} s |"
        )
    notes = [f"{r['index']}: {r['note']}." for r in rows if r["note"]]
    return [*lines, "", *notes, "Training and adding took all threads; the keys that decide were in memory."]


def machine() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor,
        "cores": os.cpu_count(),
        "memory": memory_of_machine(),
        "threads": faiss.omp_get_max_threads(),
        "python": f"Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("torch", "transformers", "faiss-cpu", "numpy")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help="plan, gigabyte, index (default: all)")
    parser.add_argument("--n", type=int, default=N_KEYS, help=f"vectors of stage index (default: {N_KEYS:,})")
    parser.add_argument("--bytes", type=int, default=GIGABYTE, help=f"of stage gigabyte (default: {GIGABYTE:,})")
    args = parser.parse_args()
    every = {
        "plan": check_plan,
        "gigabyte": lambda folder: check_gigabyte(folder, args.bytes),
        "index": lambda _: check_indexes(args.n),
    }
    if unknown := set(args.stages) - set(every):
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(every)}")
    file = HERE / "scale.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HOME"] = folder  # labml writes to ~/.labml
        os.environ["HF_HUB_OFFLINE"] = "1"
        for name in args.stages or every:
            started, results = time.perf_counter(), []
            for result in every[name](Path(folder)):
                results.append(result)
                print(json.dumps(result), flush=True)
            minutes = (time.perf_counter() - started) / 60
            record[name] = {"machine": machine(), "minutes": minutes, "results": results}
            record = {name: record[name] for name in every if name in record}
            file.write_text(json.dumps(record, indent=1) + "\n")
            (HERE / "SCALE.md").write_text(report(record))
    print((HERE / "SCALE.md").read_text())


if __name__ == "__main__":
    steps: dict[str, Callable[..., Any]] = {
        "_measure": measure_rates,
        "_build": build,
        "_distil": distil,
        "_search": search,
    }
    if sys.argv[1:] and sys.argv[1] in steps:
        out = os.dup(1)
        os.dup2(2, 1)  # progress goes to stderr, the result alone to stdout
        answer = steps[sys.argv[1]](*sys.argv[2:])
        os.write(out, (json.dumps(answer) + "\n").encode())
    else:
        main()
