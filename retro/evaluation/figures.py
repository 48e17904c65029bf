"""Figures of an evaluation: as text for a terminal, and as curves."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from retro.evaluation.intervals import Gain, Interval, counted, format_interval, format_p
from retro.evaluation.result import VARIANTS
from retro.progress import aligned
from retro.storage.sample_file import retriever_of

# Of variants, as matplotlib has them.
COLORS = ("C0", "C1", "C7", "C2", "C4", "C3", "C5", "C6", "C8", "C9", "k", "navy")
MOST_INSIDE = 5  # variants of a plot whose legend is in it


def table(summary: dict[str, Any], width: int | None = None) -> str:
    """The figures as text for a terminal.

    * `width` is that of its lines; where that is too little, tables lack columns, and the text says so
    """
    d, over = summary["database"], next(iter(summary["gain"]), None)
    lines = [
        f"held out  {len(summary['documents']):,} documents, {summary['n_bytes']:,.0f} bytes predicted, "
        f"{summary['n_chunks']:,} chunks; windows of {summary['window']} tokens, {summary['stride']} apart",
        f"database  {d['n_documents']:,} documents, {d['n_chunks']:,} chunks in {d['index']}; "
        f"{summary['n_neighbors']} neighbors by {retriever_of(d)}",
        f"behind each number: {behind(summary)}",
        "",
    ]
    rows = [["", "bits per byte", "interval", "gain over it", "interval", "p", "gain?"]]
    for variant, value in summary["bits_per_byte"].items():
        gain = summary["gain"].get(f"over {variant}")
        rows.append([VARIANTS.get(variant, variant), *_apart(value, ".3f"), *_tested(gain)])
    lines += aligned(rows, "<><><><", width, (2, 5, 4))
    variants = list(summary["bits_per_byte"])
    rows = [
        ["r(C) up to", "chunks", "documents", *variants, *([f"gain {over}", "interval", "p", "gain?"] if over else [])]
    ]
    for row in summary["filtered"]:
        values = [row["bits_per_byte"][v] for v in variants]
        cells = [f"{row['alpha']:.1%}", f"{row['n_chunks']:,}", f"{row['n_documents']:,}"]
        cells += ["–" if v is None else f"{v:.3f}" for v in values]
        rows.append([*cells, *(_tested(row["gain"][over]) if over else [])])
    n = 3 + len(variants)
    sides, spared = "<" + ">" * (n - 1), [2, *range(n - 1, 4, -1)]  # of the variants on and off stay
    if over:
        sides, spared = sides + "><><", [n + 1, n + 2, *spared]
    lines += ["", *aligned(rows, sides, width, spared)]
    if over:
        lines += ["", "intervals of 95%; p is corrected for the number of gains in a table (Holm), and decides"]
    lines += _costs(summary.get("costs", {}), width)
    shares = ", ".join(f"{share:.1%} share {k}" for k, share in summary["copyable_tokens"].items())
    if not shares:
        return "\n".join([*lines, "no chunk reads neighbors"])
    return "\n".join([*lines, f"of the chunks that read neighbors, {shares} or more in a row with them"])


def _costs(costs: dict[str, Any], width: int | None) -> list[str]:
    """A table of what a generated token costs; the memory is that of the weights, and of what is kept of a text."""
    if not costs:
        return []
    rows = [["a generated token", "million operations", "ms", "memory, MB", "searched, MB"]]
    for variant, c in costs.items():
        memory = f"{c['weights'] / 1e6:,.1f} + {c['kept'] / 1e6:,.1f}"
        operations, searched = f"{c['operations'] / 1e6:,.1f}", f"{c['searched'] / 1e6:,.1f}"
        rows.append([VARIANTS.get(variant, variant), operations, f"{1e3 * c['seconds']:,.1f}", memory, searched])
    explained = "memory: weights, and what is kept of one text; operations of the networks, and of kNN-LM's search"
    return ["", *aligned(rows, "<>>>>", width, (4,)), "", explained]


def _apart(figure: Interval | None, form: str = "+.4f") -> list[str]:
    """A figure, and its interval."""
    value, _, interval = format_interval(figure, form).partition(" ")
    return [value, interval]


def _tested(gain: Gain | None) -> list[str]:
    return [*_apart(gain), format_p(gain["p"]), gain["verdict"]] if gain else [""] * 4


def behind(summary: dict[str, Any]) -> str:
    """How many documents, seeds and shuffles stand behind the figures, in words."""
    n_documents = len(summary["documents"])
    said = counted(n_documents, "document")
    if n_documents > 1:
        said += f" (worth {summary['n_effective_documents']:.1f} of equal size)"
    said += f" and {counted(summary['n_seeds'], 'seed')} of the weights"
    if summary["n_shuffles"]:
        said += f"; random neighbors: the mean of {counted(summary['n_shuffles'], 'shuffle')}"
    return said


def plot_costs(summary: dict[str, Any], path: Path, names: Iterable[str] = VARIANTS) -> None:
    """Draw bits per byte against what a token costs into a PNG. Raises `ImportError` without matplotlib.

    * `names` are all variants that there may be: each has the same color in every plot
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colors = dict(zip(names, COLORS, strict=False))
    figure, both = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained", sharey=True)
    for axes, kind, unit, label in (
        (both[0], "operations", 1e9, "billion operations"),
        (both[1], "seconds", 1e-3, "milliseconds"),
    ):
        for variant, cost in summary["costs"].items():
            bits = summary["bits_per_byte"][variant]["value"]
            axes.plot(cost[kind] / unit, bits, "o", color=colors[variant], label=variant)
        axes.set(xlabel=f"a generated token, {label}", xlim=(0, None), ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    both[0].set(ylabel="bits per byte")
    both[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot(summary: dict[str, Any], path: Path, names: Iterable[str] = VARIANTS) -> None:
    """Draw the figures of the filtered chunks into a PNG. Raises `ImportError` without matplotlib.

    * `names` are as in `plot_costs`
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = [row for row in summary["filtered"] if row["n_chunks"]]
    alphas = [100 * row["alpha"] for row in rows]
    colors, variants = dict(zip(names, COLORS, strict=False)), summary["bits_per_byte"]
    are_many = len(variants) > MOST_INSIDE
    figure, (left, right) = plt.subplots(1, 2, figsize=(12 if are_many else 9, 3.6), layout="constrained")
    for variant in variants:
        bits = [row["bits_per_byte"][variant] for row in rows]
        left.plot(alphas, bits, marker="o", label=variant, color=colors[variant])
    left.set(title="Chunks filtered by overlap", ylabel="bits per byte")
    for name in summary["gain"]:
        gains, color = [row["gain"][name] for row in rows], colors[name.removeprefix("over ")]
        right.plot(alphas, [gain["value"] for gain in gains], marker="o", label=name, color=color)
        if all(gain["low"] is not None for gain in gains):
            ends = [gain["low"] for gain in gains], [gain["high"] for gain in gains]
            right.fill_between(alphas, *ends, color=color, alpha=0.15, linewidth=0)
    right.axhline(0, color="grey", linewidth=0.8)
    right.set(title="Gain of retrieval, with 95% intervals", ylabel="bits per byte saved")
    for axes in (left, right):
        axes.set(xlabel="r(C) up to, %")
        axes.spines[["top", "right"]].set_visible(False)
        if not are_many:
            axes.legend(frameon=False, fontsize=8)
    if are_many:  # what is gained over one has its color
        figure.legend(*left.get_legend_handles_labels(), loc="outside right center", frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
