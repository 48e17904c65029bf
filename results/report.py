"""`RESULTS.md` and its plots from the figures that `run.py` measured."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from retro.evaluation.figures import behind, plot
from retro.evaluation.intervals import Gain, Interval, counted, format_interval, format_p, judged, ratio_of_sums
from retro.evaluation.result import VARIANTS, saved_bits

NAMES = VARIANTS | {
    "off": f"{VARIANTS['off']} (the same model)",
    "random": f"{VARIANTS['random']} (the same model)",
    "baseline": f"{VARIANTS['baseline']}, equal steps",
    "longer": f"{VARIANTS['baseline']}, equal time",
}


def saved(of: dict[str, Any], variant: str, by: dict[str, Any]) -> Interval:
    """Bits per byte that retrieval in one evaluation saves over a variant of another, in pairs of documents."""
    return ratio_of_sums(*saved_bits(of, variant, by))


def sweep(part: dict[str, Any], kind: str, shares: tuple[float, ...], counts: tuple[int, ...]) -> list[dict[str, Any]]:
    """Evaluations along one axis, in order; the main one stands where it belongs."""
    e = part["evaluations"]
    if kind == "database":
        return [e["main"] if share == 1 else e[f"database {share:.0%}"] for share in shares]
    return [e["main"] if k == 2 else e[f"{k} neighbors"] for k in counts]


def claims(part: dict[str, Any], shares: tuple[float, ...], counts: tuple[int, ...]) -> dict[str, tuple[Any, ...]]:
    """Each claim about a corpus with the bits that it says are saved, and the bytes, of each document."""
    main = part["evaluations"]["main"]
    low = main["filtered"][0]
    found = {
        f"retrieval beats {NAMES[variant]}": saved_bits(main, variant, main)
        for variant in ("off", "random", "baseline", "longer")
    }
    found |= {
        f"it still beats {name} on chunks with r(C) up to 12.5%": saved_bits(low, variant, low)
        for variant, name in (("random", "random neighbors"), ("baseline", "the baseline of equal steps"))
    }
    for kind, claim in (
        ("database", f"the whole database beats {shares[0]:.0%} of its documents"),
        ("neighbors", f"{counts[-1]} neighbors beat {counts[0]}"),
    ):
        evaluations = sweep(part, kind, shares, counts)
        found[claim] = saved_bits(evaluations[0], "on", evaluations[-1])
    return found


def of_claim(gain: Gain) -> str:
    """A claim's cell: what the corrected p-value says of it, and its figure."""
    return f"**{gain['verdict']}**: {format_interval(gain)}, p {format_p(gain['p'])}"


def write(record: dict[str, Any], out: Path, shares: tuple[float, ...], counts: tuple[int, ...]) -> None:
    """Write `RESULTS.md` and its plots into `out`."""
    m, parts = record["machine"], record["corpora"]
    window = next(iter(parts.values()))["evaluations"]["main"]
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    over_seeds = " and seeds" if window["n_seeds"] > 1 else ", which do not hold how much another seed would change"
    lines = [
        "# What retrieval brings: measured",
        "",
        f"Made by `{record['command']}` on {m['date']}: {m['processor']}, {m['cores']} cores, no GPU, Python "
        f"{m['python']}, {versions}. Figures are bits per byte on whole held-out documents, in windows of "
        f"{window['window']} tokens, {window['stride']} apart, the mean of "
        f"{counted(window['n_seeds'], 'seed')} of the weights;",
        f"in parentheses 95% intervals over documents{over_seeds}, of a gain in pairs,",
        "whose coverage was simulated (`retro/evaluation/intervals.py`). A positive gain: retrieval saves bits.",
        "Neighbors never come from the document of the query, and no held-out document is in the database or among the",
        "training documents, by name or by text. All models have the same decoder; those of a seed start from the same",
        "weights and read the same samples in the same order. The shape of the models and the",
        "learning rate were chosen on the other half of the library's files. The library is all of its source but its",
        "tests and generated files; it was chosen because its files repeat each other, those in `encodings` most: the",
        "question was whether retrieval pays where text repeats.",
        "",
        "## The claims, tested",
        "",
        "The p-values are corrected for the number of claims in this table (Holm), and decide: with no gain anywhere,",
        "any of them would say yes or no in at most 5% of such tables.",
        "",
        "| claim | " + " | ".join(part["title"] for part in parts.values()) + " |",
        "|---|" + "---|" * len(parts),
    ]
    claimed = {name: claims(part, shares, counts) for name, part in parts.items()}
    gains = judged({(claim, name): bits for name, of_part in claimed.items() for claim, bits in of_part.items()})
    lines += [
        f"| {claim} | " + " | ".join(of_claim(gains[claim, name]) for name in parts) + " |"
        for claim in next(iter(claimed.values()))
    ]
    for name, part in parts.items():
        lines += ["", *_of_corpus(name, part, shares, counts)]
        plot(part["evaluations"]["main"], out / f"filtered-{name}.png")
    _plot_sweeps(parts, shares, counts, out / "growth.png")
    lines += ["", "## Growing the database, and the number of neighbors", "", "![Gains](growth.png)"]
    (out / "RESULTS.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _of_corpus(name: str, part: dict[str, Any], shares: tuple[float, ...], counts: tuple[int, ...]) -> list[str]:
    main, runs = part["evaluations"]["main"], part["runs"]
    d, copyable = main["database"], main["copyable_tokens"]
    reads = ", ".join(f"{share:.1%} share {k}" for k, share in copyable.items())
    lines = [
        f"## {part['title']}",
        "",
        f"{part['documents']['train']:,} documents train and fill the database ({part['bytes']['train'] / 1e6:.1f} MB, "
        f"{part['tokens']['train']:,} tokens, {d['n_chunks']:,} chunks of {d['chunk_len']}); "
        f"{part['documents']['held out']:,} are held out ({part['bytes']['valid'] / 1e6:.2f} MB).",
        f"Behind each figure: {behind(main)}.",
        f"Copyable tokens: of the chunks that read neighbors, {reads} or more in a row with them.",
        "",
        "| model | steps | parameters | training | bits per byte | gain of retrieval over it |",
        "|---|---|---|---|---|---|",
    ]
    run_of = {"on": "retro", "off": "retro", "random": "retro"}
    for variant, value in main["bits_per_byte"].items():
        run, gain = runs[run_of.get(variant, variant)], main["gain"].get(f"over {variant}")
        train_bpb = statistics.fmean(of_seed["train_bpb"] for of_seed in run)
        lines.append(
            f"| {NAMES[variant]} | {run[0]['steps']:,} | {run[0]['n_parameters']:,} | {train_bpb:.3f} "
            f"| {format_interval(value, '.4f')} | {format_interval(gain)} |"
        )
    lines += [
        "",
        f"Measured in turns, a step with retrieval takes {part['time_ratio']:.2f} times as long as one without; equal",
        "time counts these steps, not the embedding and retrieving that precede them once. Training is the mean over",
        "the last interval of steps.",
        "",
        "Filtered by overlap: r(C) is the longest string of tokens that a chunk has in common with its ten nearest",
        "neighbors, over its length (section 2.6 of the paper).",
        "",
        "| r(C) up to | chunks | documents | bytes | "
        + " | ".join(main["bits_per_byte"])
        + " | gain over random | gain over baseline |",
        "|---|---|---|---|" + "---|" * (len(main["bits_per_byte"]) + 2),
    ]
    for row in main["filtered"]:
        values = ["–" if v is None else f"{v:.3f}" for v in row["bits_per_byte"].values()]
        values += [format_interval(row["gain"][f"over {variant}"]) for variant in ("random", "baseline")]
        counts_of = f"{row['n_chunks']:,} | {row['n_documents']:,} | {row['share_of_bytes']:.1%}"
        lines.append(f"| {row['alpha']:.1%} | {counts_of} | {' | '.join(values)} |")
    lines += ["", f"![Filtered by overlap](filtered-{name}.png)", ""]
    for kind, title, first in (
        ("database", "A growing database, the same model", "documents in the database"),
        ("neighbors", "A growing number of neighbors, the same model", "neighbors"),
    ):
        header = f"| {first} | chunks | on | saved over the first row | saved over random neighbors |"
        lines += [f"### {title}", "", header, "|---|---|---|---|---|"]
        evaluations = sweep(part, kind, shares, counts)
        for e in evaluations:
            value = e["database"]["n_documents"] if kind == "database" else e["n_neighbors"]
            over_first = format_interval(saved(evaluations[0], "on", e)) if e is not evaluations[0] else ""
            lines.append(
                f"| {value:,} | {e['database']['n_chunks']:,} | {e['bits_per_byte']['on']['value']:.4f} "
                f"| {over_first} | {format_interval(saved(main, 'random', e))} |"
            )
        lines.append("")
    lines += [
        "### Exact search against the compressed index",
        "",
        "| index | recall @1, @2, @10 | on | saved over random neighbors |",
        "|---|---|---|---|",
    ]
    compressed = next(e for key, e in part["evaluations"].items() if key.startswith("database IVF"))
    for e in (main, compressed):
        recall = ", ".join(f"{share:.1%}" for share in e["database"]["recall"].values())
        on, gain = e["bits_per_byte"]["on"], saved(main, "random", e)
        lines.append(f"| {e['database']['index']} | {recall} | {on['value']:.4f} | {format_interval(gain)} |")
    return [
        *lines,
        "",
        f"Exact search saves {format_interval(saved(compressed, 'on', main))} over the compressed index.",
    ]


def _plot_sweeps(parts: dict[str, Any], shares: tuple[float, ...], counts: tuple[int, ...], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for axis, kind, ticks in zip(axes, ("database", "neighbors"), (shares, counts), strict=True):
        for number, part in enumerate(parts.values()):
            main = part["evaluations"]["main"]
            gains = [saved(main, "random", e) for e in sweep(part, kind, shares, counts)]
            axis.plot(ticks, [g["value"] for g in gains], marker="o", label=part["title"], color=f"C{number}")
            if all(g["low"] is not None for g in gains):
                ends = [g["low"] for g in gains], [g["high"] for g in gains]
                axis.fill_between(ticks, *ends, color=f"C{number}", alpha=0.15, linewidth=0)
        axis.axhline(0, color="grey", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xticks(ticks, [f"{t:.0%}" if kind == "database" else str(t) for t in ticks])
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set(xlabel="of the documents in the database", ylabel="bits per byte saved over random neighbors")
    axes[1].set(xlabel="neighbors")
    axes[0].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
