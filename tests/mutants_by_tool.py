"""`make mutants`, the second part: mistakes that a tool makes, in places drawn at random.

cosmic-ray knows mistakes of a few kinds (another operator or comparison, another number, `not` added, `break` for
`continue`, ...) and where in a file each can be made. Of all such places in the modules below, some are drawn with a
seed, one mistake for each, and the tests of the module are run with it. What can mean nothing (an operator in a type
annotation) is passed over, and what is no Python.

    python tests/mutants_by_tool.py --number 200
"""

from __future__ import annotations

import argparse
import ast
import os
import random
from collections import defaultdict
from pathlib import Path

from cosmic_ray.commands import init
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import use_db
from mutants import ROOT, Mutant, try_all

# For each module its tests, those first that are quick and near to it.
TESTS = {
    "model.py": "test_model.py test_samples.py test_sampling.py",
    "dataset.py": "test_samples.py test_retrieval.py test_copies.py",
    "database.py": "test_retrieval.py test_copies.py test_indexes.py",
    "search/factory.py": "test_indexes.py test_retrieval.py test_plan.py",
    "search/filling.py": "test_indexes.py test_retrieval.py test_living.py test_survival.py",
    "search/keys.py": "test_retrieval.py test_indexes.py test_living.py test_survival.py",
    "search/querying.py": "test_copies.py test_retrieval.py test_indexes.py",
    "search/recall.py": "test_indexes.py",
    "sample.py": "test_sampling.py test_train_and_sample.py",
    "evaluate.py": "test_evaluate.py",
    "evaluation/audit.py": "test_copies.py test_retrieval.py",
    "evaluation/intervals.py": "test_intervals.py test_evaluate.py",
    "evaluation/leakage.py": "test_evaluate.py test_copies.py",
    "evaluation/result.py": "test_evaluate.py test_intervals.py test_report.py",
    "evaluation/windows.py": "test_evaluate.py test_tokenizers.py",
    "train.py": "test_runs.py test_train_and_sample.py test_samples.py",
    "text/copies.py": "test_copies.py test_corpus.py",
    "text/split.py": "test_copies.py test_corpus.py",
}


def means_something(source: str, mutated: str) -> bool:
    """Whether a mistake can be run, and changes more than annotations, which nobody evaluates."""

    def without_annotations(text: str) -> str:
        tree = ast.parse(text)
        for node in ast.walk(tree):
            for name in ("annotation", "returns"):
                if getattr(node, name, None) is not None:
                    setattr(node, name, ast.Constant(None))
        return ast.dump(tree)

    try:
        return without_annotations(source) != without_annotations(mutated)
    except SyntaxError:  # `/` for a `*` that stands among the parameters of a function
        return False


def drawn(number: int, seed: int) -> list[Mutant]:
    """Mistakes in as many places, drawn with a seed."""
    paths = [ROOT / "retro" / file for file in TESTS]
    with use_db(":memory:") as found:
        init(paths, found, {})
        items = [item.mutations[0] for item in found.work_items]
    places = defaultdict(list)
    for item in items:
        places[item.module_path, item.start_pos].append(item)
    rng, mutants = random.Random(seed), list[Mutant]()
    for place in rng.sample(sorted(places), len(places)):
        item = rng.choice(sorted(places[place], key=lambda i: (i.operator_name, i.occurrence)))
        file = Path(item.module_path).relative_to(ROOT / "retro").as_posix()
        source = Path(item.module_path).read_text()
        mutated = mutate_code(source, get_operator(item.operator_name)(**item.operator_args), item.occurrence)
        if mutated and means_something(source, mutated):
            line = source.splitlines()[item.start_pos[0] - 1].strip()
            what = f"line {item.start_pos[0]}: {item.operator_name.removeprefix('core/')} in `{line}`"
            mutants.append(Mutant(file, what, source, mutated, TESTS[file]))
        if len(mutants) == number:
            break
    return mutants


def main() -> None:
    parser = argparse.ArgumentParser(description="Let a tool make mistakes, and see whether the tests notice.")
    parser.add_argument("--number", type=int, default=200, help="mistakes to make (default: 200, some hours)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="how many are tried at once")
    options = parser.parse_args()
    mutants = drawn(options.number, options.seed)
    killed = try_all(mutants, options.workers)
    print(f"\n{sum(killed.values())} of {len(killed)} mistakes are noticed")


if __name__ == "__main__":
    main()
