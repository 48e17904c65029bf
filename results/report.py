"""`RESULTS.md` and its plots, from the figures that `run.py` measured: first a page to read, then all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from memory import NEIGHBORS
from nothing import BATCH_SIZE, LEVERS

from retro.evaluation.figures import behind, plot, plot_costs
from retro.evaluation.intervals import Gain, Interval, counted, format_interval, format_p, judged, ratio_of_sums
from retro.evaluation.result import saved_bits
from retro.storage.sample_file import retriever_of

Part = dict[str, Any]  # what was measured on a corpus


class Way(NamedTuple):
    """A way to use a database, or to do without, and where its figures are."""

    text: str
    evaluation: str
    variant: str
    run: str | None = None  # what was trained for it
    # The variant that costs as much. What LoRA learns can be added to the weights, where it costs nothing.
    cost: str | None = None


MEMORY = (
    Way("the base alone", "lora", "off", None, "off"),
    Way("256 more tokens of context", "rivals", "longer-context", None, "longer-context"),
    Way("kNN-LM", "rivals", "knn-lm", None, "knn-lm"),
    Way("what it finds, before its text, untrained", "rivals", "in-context", None, "in-context"),
    Way("LoRA, trained for as long", "lora", "baseline", "lora", "off"),
    Way("LoRA, trained for four times as long", "longer", "baseline", "longer", "off"),
    Way("all weights, trained for as long", "all", "baseline", "all", "off"),
    Way("LoRA for as long, what it finds before its text", "tuned, in-context", "in-context", "lora", "in-context"),
    Way("**reads what it finds**", "lora", "on", "memory", "on"),
    Way("reads what it finds, and has it before its text", "together", "both", "memory", "both"),
    Way("**reads what it finds, while LoRA learns**", "both", "on", "both", "on"),
    Way("reads random neighbors", "lora", "random", "memory"),
)
PLOTTED = [way.text.strip("*") for way in MEMORY]  # each in its color
NOTHING = (
    Way("without retrieval, equal steps", "equal-steps", "baseline", "equal-steps"),
    Way("without retrieval, equal time", "equal-time", "baseline", "equal-time"),
    Way("**with retrieval**", "equal-steps", "on", "retro"),
    Way("the same, retrieval off", "equal-steps", "off", "retro"),
    Way("the same, random neighbors", "equal-steps", "random", "retro"),
)
WAYS = {"memory": MEMORY, "nothing": NOTHING}
HEADS = {
    "memory": "*SmolLM2-135M, pretrained*",
    "nothing": "*1.3 million weights, 1.8 with those that read, from nothing*",
}
# What is trained by each name, where that is another one.
KIND_OF = {"longer": "lora", "equal-steps": "plain", "equal-time": "plain"}
ABOUT_TABLE = """\
Bits per byte of held-out documents, and what a generated token costs on the first corpus: operations of the networks
and of kNN-LM's search; time, in which neighbors are searched too; memory of all weights, and of what is kept of a text;
and what is searched, on the disk or in memory. The base is measured on windows in the middle of parts of each document,
models from nothing on all of it, and on other shares of the corpora. *For as long* counts steps of training, not what
finds neighbors."""
COSTS: dict[str, Callable[[dict[str, float]], str]] = {
    "operations": lambda cost: f"{cost['operations'] / 1e9:.2f} billion",
    "time": lambda cost: f"{1e3 * cost['seconds']:.0f} ms",
    "memory": lambda cost: f"{(cost['weights'] + cost['kept']) / 1e6:,.0f} MB",
    "searched": lambda cost: f"{cost['searched'] / 1e6:,.1f} MB" if cost["searched"] else "",
}
CONDITIONS = """\
* The base is SmolLM2-135M-Instruct with the weights of its package, which had 4 bits. What it was pretrained on may
  have had some of these texts, the older ones above all; held out is what is not trained on *here*.
* Neighbors are found by {retriever}, in a database of the documents that are trained on.
* What is put before the text, more context and kNN-LM are measured on the base as it is; what reads was trained on
  the corpus, and so were LoRA and all weights. *Reads random neighbors* tells what that training alone is worth. In
  its context the base has the neighbors of the last whole chunk; what reads them has seen those of all before too.
* Learning rates of LoRA and of all weights were chosen on held-out modeling files, on which the first claims are made;
  those of what reads, and its layers, on other modeling files (docs/a_memory.md); nothing on the other corpora.
* kNN-LM searches exactly, which its authors do not, with the states before the head as keys and the 64 nearest of
  them, whose search is in its operations and its time.
* What LoRA adds to the operations of a token, 2% of the base's, is left out, and so is its time."""
TESTED = """\
Bits per byte that are saved, with 95% intervals of the difference in pairs, over documents, and over seeds where there
are several; with one seed they are about that one training (`retro/evaluation/intervals.py`). Intervals are not
corrected, p-values and verdicts are, for the number of claims in this table (Holm): with nothing gained anywhere, any
would say yes or no in some 5% of such tables, or more often where a few documents gain far more than the others. Three
seeds say little of how far seeds spread, so with them a verdict takes a difference some 30 times as large as the error
that is theirs."""
LOW = "on chunks with r(C) up to 12.5%"


class Claim(NamedTuple):
    """Something that is said of a corpus: that one thing takes fewer bits than another."""

    kind: str  # memory or nothing
    text: str
    worse: tuple[str, str]  # evaluation and variant
    better: tuple[str, str]
    low: bool = False  # of the chunks alone that have least in common with the database

    def bits(self, evaluations: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bits of each document without and with what the claim is about, (d) or (s, d), and bytes (d)."""
        (a, without), (b, having) = self.worse, self.better
        of, by = (evaluations[name]["filtered"][0] if self.low else evaluations[name] for name in (a, b))
        bits = np.array(of["by_document"][without]), np.array(by["by_document"][having])
        if bits[0].ndim == bits[1].ndim == 2:  # one may have been measured with the first seeds only
            n_seeds = min(map(len, bits))
            bits = bits[0][:n_seeds], bits[1][:n_seeds]
        return *bits, np.array(by["by_document"]["bytes"])


def over(kind: str, evaluation: str, variant: str, text: str, low: bool = False) -> Claim:
    """That retrieval takes fewer bits than a variant."""
    return Claim(kind, text, (evaluation, variant), ("lora" if kind == "memory" else evaluation, "on"), low)


def between(worse: str, better: str, text: str) -> Claim:
    """That one database or number of neighbors takes fewer bits than another, with the first seed."""
    return Claim("memory", f"{text}, first seed", (worse, "on"), (better, "on"))


BASE = over("memory", "lora", "off", "A base that reads a memory needs fewer bits than the base alone")
RANDOM = over("memory", "lora", "random", "It is what it finds: fewer than with random neighbors")
TUNED = over("memory", "lora", "baseline", "To read beats to learn for as long: fewer than with LoRA")
IN_CONTEXT = over("memory", "rivals", "in-context", "Fewer than with what it finds put before its text, untrained")
EQUAL_TIME = over(
    "nothing", "equal-time", "baseline", "Trained from nothing, retrieval pays for the time that its steps take"
)
FIRST = (BASE, RANDOM, TUNED, IN_CONTEXT, EQUAL_TIME)
LOW_RANDOM = over("memory", "lora", "random", f"A memory beats random neighbors {LOW}", low=True)
ALL_TUNED = over("memory", "all", "baseline", "It beats all weights trained for as long")
EQUAL_STEPS = over(
    "nothing",
    "equal-steps",
    "baseline",
    "Trained from nothing, retrieval beats none at equal steps (by a recipe chosen on held-out modeling files)",
)
BOTH = Claim("memory", "To read while LoRA learns beats LoRA trained for as long", ("both", "baseline"), ("both", "on"))
BOTH_ALL = Claim(
    "memory", "To read while LoRA learns beats all weights trained for as long", ("all", "baseline"), ("both", "on")
)
FURTHER = (
    LOW_RANDOM,
    BOTH,
    BOTH_ALL,
    Claim("memory", "To read while LoRA learns beats to read alone", ("lora", "on"), ("both", "on")),
    Claim("memory", f"To read while LoRA learns beats LoRA {LOW}", ("both", "baseline"), ("both", "on"), low=True),
    over("memory", "lora", "baseline", f"It beats LoRA trained for as long {LOW}", low=True),
    ALL_TUNED,
    Claim(
        "memory", "It beats LoRA trained for four times as long, first seed", ("longer", "baseline"), ("longer", "on")
    ),
    over("memory", "rivals", "longer-context", "It beats 256 more tokens of context, untrained"),
    over("memory", "rivals", "knn-lm", "It beats kNN-LM, untrained"),
    Claim(
        "memory",
        "It beats LoRA with what it finds before its text, first seed",
        ("tuned, in-context", "in-context"),
        ("tuned, in-context", "on"),
    ),
    Claim(
        "memory",
        "To read what is before its text as well beats to have it there, untrained, first seed",
        ("rivals", "in-context"),
        ("together", "both"),
    ),
    EQUAL_STEPS,
    over(
        "nothing",
        "equal-steps",
        "random",
        "Trained from nothing, it beats random neighbors, which it was not trained with",
    ),
    between("database a tenth", "neighbors 2", "A database of all documents beats one of a tenth"),
    between(
        "neighbors 2", "database ten times", "A database of all other modeling files, some ten times as much, beats it"
    ),
    Claim(
        "memory",
        "With so large a database it beats the base that has the same before its text, first seed",
        ("database ten times", "in-context"),
        ("database ten times", "on"),
    ),
    between(
        "database right removed",
        "neighbors 2",
        "Without the documents from which most neighbors come it needs more bits",
    ),
    between("neighbors 1", "neighbors 8", "8 neighbors beat 1"),
    between(
        "database bert reranked", "neighbors 2", "BM25 beats BERT, both re-ranked, for a model trained with the first"
    ),
    between("database bert compressed", "database bert", "Exact search beats a compressed index"),
)


def judge(record: dict[str, Any]) -> dict[tuple[Claim, str], Gain]:
    """Every claim, of every corpus on which it was measured, corrected together."""
    bits = {}
    for claim in FIRST + FURTHER:
        for corpus, part in record[claim.kind].items():
            try:
                without, having, n_bytes = claim.bits(part["evaluations"])
            except KeyError:
                continue  # not measured on this corpus
            bits[claim, corpus] = without - having, n_bytes
    return judged(bits)


def figure(part: Part | None, way: Way) -> Interval | None:
    """Bits per byte of a way, if it was measured."""
    evaluation = part and part["evaluations"].get(way.evaluation)
    return evaluation["bits_per_byte"].get(way.variant) if evaluation else None


def costs_of(part: Part) -> dict[Way, dict[str, float]]:
    """What a generated token costs, by each way that was measured; with the weights that the way has.

    It was measured of a model that reads, also where it did not read.
    """
    found, reads = {}, part["runs"]["memory"][0]
    alone = reads["n_parameters"] - reads["n_trained_parameters"]
    for way in MEMORY:
        if way.cost in part["costs"] and figure(part, way):
            cost, n = part["costs"][way.cost], part["runs"][way.run][0]["n_parameters"] if way.run else alone
            found[way] = cost | {"weights": cost["weights"] / reads["n_parameters"] * n}
    return found


def share_saved(part: Part, claim: Claim) -> float:
    """What a claim says is saved, as a share of what there is without."""
    without, having, _ = (np.atleast_2d(x).mean(axis=0).sum() for x in claim.bits(part["evaluations"]))
    return float(1 - having / without)


def first_page(record: dict[str, Any], gains: dict[tuple[Claim, str], Gain]) -> Iterator[str]:
    """Five sentences, one table, one plot."""
    names, first = list({**record["memory"], **record["nothing"]}), next(iter(record["memory"].values()))
    titles = [(record["memory"].get(name) or record["nothing"][name])["title"] for name in names]
    yield "# What retrieval brings, and beside what else could be done"
    yield ""
    yield f"`{record['command']}`, {'; '.join(made_on(record['machines']))}."
    if left := [*not_measured(record)]:
        yield f"Not measured yet: {', '.join(left)}."
    yield ""
    for claim in FIRST:
        said = [
            f"**{gains[claim, name]['verdict']}** ({name}: {100 * share_saved(record[claim.kind][name], claim):+.0f}%)"
            for name in names
            if (claim, name) in gains
        ]
        if said:
            yield f"* {claim.text}: {', '.join(said)}"
    yield ""
    yield "*Yes* and *no* are decided by p-values that are corrected for all claims of this page and the next section;"
    yield "in parentheses are the bits that are saved, of those that there are without."
    yield ""
    yield ABOUT_TABLE
    yield ""
    yield f"| | {' | '.join(titles)} | {' | '.join(COSTS)} |"
    yield "|---|" + "---|" * (len(titles) + len(COSTS))
    costs = costs_of(first)
    for kind, ways in WAYS.items() if record["nothing"] else [("memory", MEMORY)]:
        yield f"| {HEADS[kind]} |" + " |" * (len(titles) + len(COSTS))
        for way in ways:
            cells = [figure(record[kind].get(name), way) for name in names]
            if any(cells):
                shown = [f"{cell['value']:.3f}" if cell else "" for cell in cells]
                shown += [said(costs[way]) if way in costs else "" for said in COSTS.values()]
                yield f"| {way.text} | {' | '.join(shown)} |"
    yield ""
    yield "![Bits per byte against what a generated token costs](costs.png)"
    yield ""
    yield CONDITIONS.format(retriever=retriever_of(first["evaluations"]["lora"]["database"]))
    if any(precisions(record["memory"])):
        yield "* Bases computed in two precisions ([which, and what that changes](#in-another-precision))."


def made_on(machines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """When and on what figures were made, machines that differ by date and precision alone being told once."""
    alike: dict[str, list[dict[str, Any]]] = {}
    for m in machines:
        versions = ", ".join(f"{package} {version}" for package, version in m["versions"].items())
        name = f"{m['processor']}, {m['cores']} cores, no GPU, Python {m['python']}, {versions}"
        alike.setdefault(name, []).append(m)
    for machine, of in alike.items():
        days = sorted({day for m in of for day in (m["date"], m["last"])})
        bases = " and ".join(sorted({m["bases"] for m in of if "bases" in m}))
        yield f"{' to '.join([days[0], *days[1:][-1:]])} on {machine}{bases and f', bases in {bases}'}"


def precisions(parts: dict[str, Part]) -> Iterator[str]:
    """Which evaluations of bases, and costs, are in another precision than the first, and what that changes."""
    evaluations: dict[str, dict[str, list[str]]] = {}
    for corpus, part in parts.items():
        for file, bases in part.get("bases", {}).items():
            kind, *name = file.split("-")[:-1]
            names = evaluations.setdefault(bases, {}).setdefault(corpus, []) if bases else []
            if kind in ("evaluation", "costs") and (said := " ".join(name) or kind) not in names:
                names.append(said)
    first = next(iter(parts))
    usual = next((bases for bases, of in evaluations.items() if "lora 0" in of.get(first, [])), None)
    for bases in [bases for bases in evaluations if bases != usual and any(evaluations[bases].values())]:
        yield f"Bases computed in {usual}, but on a processor that is faster so in {bases} for"
        yield ""
        yield from (f"* {corpus}: {', '.join(names)}" for corpus, names in evaluations[bases].items() if names)
        if "neighbors 2" in evaluations[bases].get(first, []):
            of = [parts[first]["evaluations"][name]["by_document"] for name in ("lora", "neighbors 2")]
            before, again = (np.atleast_2d(bits["on"])[0].sum() / sum(bits["bytes"]) for bits in of)
            yield ""
            yield f"The first reader, trained and evaluated in both: {before:.4f} in {usual}, {again:.4f} in {bases}."


def not_measured(record: dict[str, Any]) -> Iterator[str]:
    """What is planned, and left to a later session."""
    for kind, sizes in record["sizes"].items():
        for name, planned in sizes.items():
            measured = record["measured"][kind].get(name)
            if not measured:
                yield f"{kind} of {name}"
                continue
            if seeds := sorted(set(planned["seeds"]) - set(measured["seeds"])):
                yield f"{kind} of {name} with seeds {', '.join(map(str, seeds))}"
            others = [of for of in planned if of not in ("seeds", "both") and measured[of] != planned[of]]
            if others:
                yield f"{kind} of {name}: {', '.join(of.replace('_', ' ') for of in others)}"


def all_claims(record: dict[str, Any], gains: dict[tuple[Claim, str], Gain]) -> Iterator[str]:
    """Every claim with its figures."""
    yield "## The claims, tested"
    yield ""
    yield TESTED
    yield ""
    names, most = list({**record["memory"], **record["nothing"]}), max(gain["n_seeds"] for gain in gains.values())
    yield f"| claim | {' | '.join(names)} |"
    yield "|---|" + "---|" * len(names)
    for claim in FIRST + FURTHER:
        cells = [of_claim(gains[claim, name], most) if (claim, name) in gains else "" for name in names]
        if any(cells):
            yield f"| {claim.text} | {' | '.join(cells)} |"


def of_claim(gain: Gain, most: int) -> str:
    """A claim's cell: what the corrected p-value says of it, its figure, and its seeds where others have `most`."""
    fewer = f", {counted(gain['n_seeds'], 'seed')}" if gain["n_seeds"] < most else ""
    return f"**{gain['verdict']}**: {format_interval(gain, '+.3f')}, p {format_p(gain['p'])}{fewer}"


def goals(record: dict[str, Any], gains: dict[tuple[Claim, str], Gain]) -> Iterator[str]:
    """What was asked for, and what was reached."""
    memory, nothing = record["memory"].get("models"), record["nothing"]
    if not memory or "all" not in memory["evaluations"] or not nothing:
        return
    off, random, lora, tuned = (share_saved(memory, claim) for claim in (BASE, RANDOM, TUNED, ALL_TUNED))
    beaten = {"LoRA": BOTH, "all weights": BOTH_ALL} if "both" in memory["evaluations"] else {}
    with_lora = {what: share_saved(memory, claim) for what, claim in beaten.items()}
    e, costs = memory["evaluations"], {way.text: cost for way, cost in costs_of(memory).items()}
    reads, before = costs["**reads what it finds**"], costs["what it finds, before its text, untrained"]
    bits = {way.text: cell["value"] for way in MEMORY if (cell := figure(memory, way))}
    alone = bits["the base alone"]
    of_in_context = (alone - bits["**reads what it finds**"]) / (
        alone - bits["what it finds, before its text, untrained"]
    )
    without, having, n_bytes = LOW_RANDOM.bits(e)
    low = ratio_of_sums(without - having, n_bytes)
    steps, times = (
        {name: share_saved(part, claim) for name, part in nothing.items()} for claim in (EQUAL_STEPS, EQUAL_TIME)
    )
    best_steps, best_time = max(steps, key=steps.__getitem__), max(times, key=times.__getitem__)
    yield "## What was asked for"
    yield ""
    yield "| on modeling files, or on the corpus that is named | asked | measured | reached |"
    yield "|---|---|---|---|"
    for text, asked, measured, reached in (
        ("fewer bits than the base alone", "35%", f"{off:.1%}", off >= 0.35),
        ("fewer than with random neighbors", "25%", f"{random:.1%}", random >= 0.25),
        ("fewer than LoRA trained for as long", "15%", f"{lora:.1%}", lora >= 0.15),
        ("fewer than all weights trained for as long", "15%", f"{tuned:.1%}", tuned >= 0.15),
        *(
            (f"fewer than {what} trained for as long, while LoRA learns too", "15%", f"{saved:.1%}", saved >= 0.15)
            for what, saved in with_lora.items()
        ),
        (f"fewer than with random neighbors {LOW}", "an interval above 0", format_interval(low), (low["low"] or 0) > 0),
        ("of what in-context saves", "two thirds", f"{of_in_context:.1%}", of_in_context >= 2 / 3),
        *(
            (
                f"of the {what} of in-context",
                "a quarter",
                f"{reads[of] / before[of]:.1%}",
                reads[of] / before[of] <= 0.25,
            )
            for of, what in (("operations", "operations"), ("seconds", "time"))
        ),
        (
            f"from nothing, equal steps, the best of {len(steps)} ({best_steps})",
            "10%",
            f"{steps[best_steps]:.1%}",
            steps[best_steps] >= 0.1,
        ),
        (
            f"from nothing, equal time, the best of {len(times)} ({best_time})",
            "above 0, decided",
            f"{times[best_time]:.1%}, {gains[EQUAL_TIME, best_time]['verdict']}",
            gains[EQUAL_TIME, best_time]["verdict"] == "yes",
        ),
    ):
        yield f"| {text} | {asked} | {measured} | {'yes' if reached else '**no**'} |"
    yield ""
    if "both, most neighbors" in e:
        yield from with_more_neighbors(memory)
        yield ""


def with_more_neighbors(part: Part) -> Iterator[str]:
    """What the first seed saves, trained as it was, where it reads more than it was trained with."""
    e, cost, n = part["evaluations"], part["costs"]["on, most neighbors"], NEIGHBORS[-1]
    rivals = {
        name: np.atleast_2d(e[of]["by_document"]["baseline"])[0].sum()
        for name, of in (("LoRA", "lora"), ("all weights", "all"))
    }
    saved = []
    for evaluation in (f"neighbors {n}", "both, most neighbors"):
        bits = np.sum(e[evaluation]["by_document"]["on"])
        saved.append(" and ".join(f"{1 - bits / without:.1%} fewer than {name}" for name, without in rivals.items()))
    yield f"With {n} neighbors to read in place of two, trained as before, first seed: {saved[0]};"
    yield f"while LoRA learns too, {saved[1]}."
    yield f"A token then takes {COSTS['operations'](cost)} operations and {COSTS['time'](cost)}."


def of_memory(name: str, part: Part) -> Iterator[str]:
    """All that was measured with a base on a corpus."""
    e = part["evaluations"]
    main, copyable = e["lora"], e["lora"]["copyable_tokens"]
    yield f"## A base with a memory: {part['title']}"
    yield ""
    yield from sizes(part, main)
    yield ""
    yield "| | bits per byte | steps | of a pass over the text | time of a step, of one that reads (rounds) | seeds |"
    yield "|---|---|---|---|---|---|"
    for way in MEMORY:
        if cell := figure(part, way):
            trained = [""] * 4
            if run := way.run:
                steps, kind = part["runs"][run][0]["steps"], KIND_OF.get(run, run)
                ratios = [of[kind] / of["memory"] for of in part["timed"]["rounds"]]
                shown = f"{part['ratios'][kind]:.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
                of_a_pass = f"{1024 * steps / part['tokens']['train']:.0%}"
                trained = [f"{steps:,}", of_a_pass, shown if kind != "memory" else "1", str(cell["n_seeds"])]
            yield f"| {way.text} | {format_interval(cell, '.4f')} | {' | '.join(trained)} |"
    yield ""
    yield f"Copyable: of the chunks that read neighbors, {shares(copyable)} or more in a row with them. {FILTERED}"
    yield ""
    yield from filtered(part, MEMORY, main, "LoRA")
    yield ""
    yield f"![Filtered by overlap](filtered-{name}.png)"
    if swept := {k: v for k, v in e.items() if k.startswith(("database ", "neighbors "))}:
        yield ""
        yield "### Other databases, and other numbers of neighbors, the same model"
        yield ""
        yield "With the first seed; beside two neighbors from all that it was trained with. In the last column the base"
        yield "has what is found before its text, untrained."
        yield ""
        yield "| | documents | chunks | retrieved by | bits per byte | saved beside | before the text |"
        yield "|---|---|---|---|---|---|---|"
        for key, of in swept.items():
            d = of["database"]
            before = (e["rivals"] if key == "neighbors 2" else of)["bits_per_byte"].get("in-context")
            by = retriever_of(d) + (f" ({d['index']})" if d["index"] != d["retriever"] else "")
            saved = (
                "" if key == "neighbors 2" else format_interval(ratio_of_sums(*saved_bits(e["neighbors 2"], "on", of)))
            )
            cells = [
                f"{d['n_documents']:,}",
                f"{d['n_chunks']:,}",
                by,
                f"{of['bits_per_byte']['on']['value']:.4f}",
                saved,
                f"{before['value']:.4f}" if before else "",
            ]
            yield f"| {key} | {' | '.join(cells)} |"


def of_nothing(part: Part) -> Iterator[str]:
    """All that was measured of models that were trained from nothing on a corpus."""
    main, runs = part["evaluations"]["equal-steps"], part["runs"]
    yield f"## From nothing: {part['title']}"
    yield ""
    yield from sizes(part, main)
    yield ""
    yield "| | bits per byte | steps | weights | saved by retrieval over it |"
    yield "|---|---|---|---|---|"
    for way in NOTHING:
        e = part["evaluations"][way.evaluation]
        run = runs[way.run][0]
        saved = "" if way.variant == "on" else format_interval(e["gain"][f"over {way.variant}"])
        cells = [format_interval(figure(part, way), ".4f"), f"{run['steps']:,}", f"{run['n_parameters']:,}", saved]
        yield f"| {way.text} | {' | '.join(cells)} |"
    yield ""
    yield f"In turns, a step with retrieval takes {part['time_ratio']:.2f} times as long as one without. {FILTERED}"
    yield ""
    yield from filtered(part, NOTHING, main, "no retrieval, equal steps")
    if part["longer"]:
        yield ""
        yield "Trained longer, first seed:"
        yield ""
        yield from trained_longer(part)
    if few := part.get("few"):
        main, others = (next(iter(few[of].values())) for of in ("longer", "of all"))
        d = others["database"]
        yield ""
        yield f"On little text, until neither learns more from it, first seed. {' '.join(sizes(few, main))}"
        yield "Then the same models read from all texts that are neither held out nor near to such:"
        yield f"{d['n_documents']:,} documents, {d['n_chunks']:,} chunks."
        yield ""
        yield from trained_longer(few)


def trained_longer(part: Part) -> Iterator[str]:
    """What more steps bring, with retrieval and without."""
    of_all = part.get("of all", {})
    more = " with more to read | saved |" if of_all else ""
    yield f"| steps | passes over the text | without retrieval | with it | saved |{more}"
    yield "|---|---|---|---|---|" + "---|" * 2 * bool(of_all)
    for n, e in part["longer"].items():
        bits = {variant: e["bits_per_byte"][variant]["value"] for variant in ("baseline", "on")}
        without, having = bits["baseline"], [bits["on"]]
        if n in of_all:
            having.append(of_all[n]["bits_per_byte"]["on"]["value"])
        passes = int(n) * BATCH_SIZE * e["window"] / part["tokens"]["train"]
        cells = [f"{x:.4f} | {1 - x / without:.1%}" for x in having]
        yield f"| {int(n):,} | {passes:.1f} | {without:.4f} | {' | '.join(cells)} |"


def levers() -> Iterator[str]:
    """How the recipe of models from nothing was chosen."""
    yield "## The recipe from nothing"
    yield ""
    yield "It was chosen on the same held-out modeling files, with one seed, from these; bits per byte in 40 windows of"
    yield "each, of a plain decoder trained alike, and with retrieval. What the paper's own recipe brings at this size,"
    yield "and the tutorial's choices, is in `results/ABLATIONS.md`, with three seeds."
    yield ""
    yield "| | steps | without | with | saved |"
    yield "|---|---|---|---|---|"
    for text, steps, without, having in LEVERS:
        yield f"| {text} | {steps:,} | {without:.3f} | {having:.3f} | {1 - having / without:.1%} |"


FILTERED = "r(C) is the longest run of tokens that a chunk shares with its ten nearest neighbors, over its length."


def sizes(part: Part, main: dict[str, Any]) -> Iterator[str]:
    """How much text trains and is held out."""
    d, n, tokens = main["database"], main["n_windows"], part["tokens"]["valid"]
    of_each = f", at most {counted(n, 'window')} of each, in the middle of as many parts" if n else ""
    yield (
        f"{part['share']:.1%} of it: {part['documents']['train']:,} documents train and fill the database "
        f"({part['bytes']['train'] / 1e6:.1f} MB, "
        f"{part['tokens']['train']:,} tokens, {d['n_chunks']:,} chunks of {d['chunk_len']}); "
        f"{main['n_bytes'] / 1e3:.0f} kB of {part['documents']['held out']:,} others are evaluated "
        f"({main['n_tokens'] / tokens:.0%} of their text), in windows of {main['window']} tokens, "
        f"{main['stride']} apart{of_each}. Behind each figure: {behind(main)}."
    )


def shares(copyable: dict[str, float]) -> str:
    return ", ".join(f"{share:.1%} share {k}" for k, share in copyable.items())


def filtered(part: Part, ways: Sequence[Way], main: dict[str, Any], baseline: str) -> Iterator[str]:
    """The chunks that have little in common with what is in the database."""
    rows = main["filtered"]
    thresholds = [f"{row['alpha']:.1%}" for row in rows]
    yield f"| r(C) up to | {' | '.join(thresholds)} |"
    yield "|---|" + "---|" * len(rows)
    for text, values in bits_of_filtered(part, ways).items():
        yield f"| {text} | {' | '.join('–' if v is None else f'{v:.3f}' for v in values)} |"
    yield ""
    yield f"| saved at r(C) up to | chunks | bytes | over random neighbors | over {baseline} |"
    yield "|---|---|---|---|---|"
    for threshold, row in zip(thresholds, rows, strict=True):
        cells = [format_interval(row["gain"][f"over {variant}"]) for variant in ("random", "baseline")]
        yield f"| {threshold} | {row['n_chunks']:,} | {row['share_of_bytes']:.1%} | {' | '.join(cells)} |"


def bits_of_filtered(part: Part, ways: Sequence[Way]) -> dict[str, list[float | None]]:
    """Bits per byte of each way that was measured, by the most that chunks have in common with the database."""
    return {
        way.text: [row["bits_per_byte"][way.variant] for row in part["evaluations"][way.evaluation]["filtered"]]
        for way in ways
        if figure(part, way)
    }


def plot_filtered(part: Part, path: Path) -> None:
    """Draw the bits of all ways by r(C), and what reading saves over the base, over LoRA, and over random neighbors."""
    main, bits = part["evaluations"]["lora"], bits_of_filtered(part, MEMORY)
    over = {
        f"over {way.text}": f"over {way.variant}" for way in MEMORY if way.evaluation == "lora" and way.variant != "on"
    }
    rows = [
        row
        | {"bits_per_byte": {text.strip("*"): values[i] for text, values in bits.items()}}
        | {"gain": {name: row["gain"][variant] for name, variant in over.items()}}
        for i, row in enumerate(main["filtered"])
    ]
    plot({"bits_per_byte": rows[0]["bits_per_byte"], "gain": over, "filtered": rows}, path, PLOTTED)


def spent(record: dict[str, Any]) -> Iterator[str]:
    """What building and training took."""
    yield "## What it takes"
    yield ""
    parts = [part for kind in ("memory", "nothing") for part in record[kind].values()]
    seconds = {file: of for part in parts for file, of in part.get("processor_seconds", {}).items()}
    known = [of for of in seconds.values() if of is not None]
    yield "Seconds: of what is built, those of one core; of a training, its steps times what one takes in turns with"
    yield "others, on all cores."
    if known:
        yield f"{len(known)} of {len(seconds)} figures say what they took: {sum(known) / 3600:.1f} hours of one core,"
        yield "without what was done in sessions that were cut off."
    yield ""
    yield "| | database and neighbors | training |"
    yield "|---|---|---|"
    for kind in ("memory", "nothing"):
        for name, part in record[kind].items():
            building = sum(seconds for command, seconds in part["seconds"].items() if "database-" not in command)
            training = (
                f"{run} {made[0]['steps'] * part['timed']['seconds'][KIND_OF.get(run, run)]:,.0f}"
                for run, made in part["runs"].items()
            )
            yield f"| {kind}: {name} | {building:,.0f} | {', '.join(training)} |"


def write(record: dict[str, Any], out: Path) -> None:
    """Write `RESULTS.md` and its plots into `out`."""
    gains = judge(record)
    lines = [*first_page(record, gains), "", *all_claims(record, gains), "", *goals(record, gains)]
    for name, part in record["memory"].items():
        lines += [*of_memory(name, part), ""]
        plot_filtered(part, out / f"filtered-{name}.png")
    for part in record["nothing"].values():
        lines += [*of_nothing(part), ""]
    lines += [*levers(), "", *spent(record)]
    if others := [*precisions(record["memory"])]:
        lines += ["", "## In another precision", "", *others]
    (out / "RESULTS.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    first = next(iter(record["memory"].values()))
    found = {way.text.strip("*"): (figure(first, way), cost) for way, cost in costs_of(first).items()}
    bits, costs = ({text: of[i] for text, of in found.items()} for i in (0, 1))
    plot_costs({"bits_per_byte": bits, "costs": costs}, out / "costs.png", PLOTTED)
