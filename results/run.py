"""What retrieval brings, and beside what else could be done: `make results [QUICK=1] [TEXT=FOLDER]`.

On each of four corpora a pretrained base learns to read a memory, beside its rivals (`memory.py`), and small models are
trained from nothing with and without retrieval (`nothing.py`), all of it with several seeds. Whatever is finished is
kept under `results/cache/` and found again. After each corpus it writes `RESULTS.md`, the figures as JSON and the plots
beside this file (under `results/cache/` for QUICK=1 and for a folder of one's own).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

import memory
import nothing
from common import HERE, write_json
from corpora import SOURCES, own
from report import write

SEEDS = (0, 1, 2)
MEASURES = {"memory": memory.measure, "nothing": nothing.measure}
ALL_RIVALS = ("in-context", "longer-context", "knn-lm")
TIMED = ("on", "off", "in-context")
FULL: dict[str, dict[str, Any]] = {
    "memory": {
        name: memory.Size(60, SEEDS, 1, searches=True)
        if name != "models"
        else memory.Size(
            100,
            SEEDS,
            1,
            tuned=("lora", "all"),
            rivals=ALL_RIVALS,
            both=SEEDS,
            costs=("on", "off", *ALL_RIVALS, "both"),
            searches=True,
            sweeps=True,
            longer=True,
        )
        for name in SOURCES
    },
    "nothing": {
        name: nothing.Size(450, SEEDS) if name != "models" else nothing.Size(1600, SEEDS, doublings=1, few=100)
        for name in SOURCES
    },
}
QUICK_SHARE = 0.06  # of the modeling files, for a memory
QUICK: dict[str, dict[str, Any]] = {
    "memory": {"models": memory.Size(20, (0,), 1, both=(), costs=TIMED, n_timed=2)},
    "nothing": {name: nothing.Size(60, (0,), n_windows=4) for name in ("models", "plays")},
}
OWN: dict[str, dict[str, Any]] = {
    "memory": {"own": memory.Size(100, (0,), 2, costs=TIMED)},
    "nothing": {"own": nothing.Size(600, (0,))},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a size that takes minutes, and shows nothing but how")
    parser.add_argument("--text", type=Path, metavar="FOLDER", help="a folder of your own in place of the corpora")
    args = parser.parse_args()
    sources, sizes, out, command = SOURCES, FULL, HERE, "make results"
    if args.quick:
        sources = SOURCES | {"models": replace(SOURCES["models"], share=QUICK_SHARE)}
        sizes, out, command = QUICK, HERE / "cache" / "quick", f"{command} QUICK=1"
    if args.text:
        sources, sizes = {"own": own(args.text.resolve())}, OWN
        out, command = HERE / "cache" / "own", f"{command} TEXT={args.text}"
    record: dict[str, Any] = {"command": command, "machines": [], "memory": {}, "nothing": {}}
    record["sizes"] = {kind: {name: asdict(size) for name, size in of.items()} for kind, of in sizes.items()}
    record["measured"] = {kind: {} for kind in sizes}
    started = time.perf_counter()
    # First every corpus with one seed, then the rest of one after the other.
    for name, number, kind in [*product(sources, [0], MEASURES), *product(sources, [1, 2], MEASURES)]:
        if name in sizes[kind]:
            place, size = Path(kind) / name, sizes[kind][name].rounds()[number]
            folders = out / "measured" / place, HERE / "cache" / place
            part, machines = MEASURES[kind](*folders, sources[name], size)
            record[kind][name] = published(part)
            record["measured"][kind][name] = asdict(size)
            record["machines"] = together([*record["machines"], *machines])
            write_json(out / "results.json", record, indent=None)
            write(record, out)
            minutes = (time.perf_counter() - started) / 60
            print(f"\nwritten: {out}/RESULTS.md and its plots, with {kind} of {name}; {minutes:.0f} minutes so far")


def published(part: dict[str, Any]) -> dict[str, Any]:
    """What was measured on a corpus, without what no page is made of and `measured/` has: bits of each document at all
    thresholds of r(C) but the first, which were half of it.
    """
    few = part.get("few", {})
    longer = [of for made in (part, few) for of in made.get("longer", {}).values()]
    for evaluation in [*part["evaluations"].values(), *longer, *few.get("of all", {}).values()]:
        for row in evaluation["filtered"][1:]:
            row.pop("by_document", None)
    return part


def together(machines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each machine once, with the first and the last date on which it measured."""
    dates: dict[str, list[str]] = {}
    for machine in machines:
        same = json.dumps({k: v for k, v in machine.items() if k not in ("date", "last")}, sort_keys=True)
        dates[same] = sorted([*dates.get(same, []), machine["date"], machine.get("last", machine["date"])])
    return [{"date": of[0], "last": of[-1]} | json.loads(same) for same, of in dates.items()]


if __name__ == "__main__":
    main()
