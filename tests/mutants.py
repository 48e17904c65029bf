"""`make mutants`: mistakes put into the code on purpose, and whether a test notices each of them.

`mutants.toml` is a list of mistakes that somebody could make: each changes one place of one file, and names what it
breaks and the tests that should fail. Every mistake is made alone, in a copy of the project, and those tests are run:
a mistake is *killed* if they fail, and *survives* if they pass.

    python tests/mutants.py                 all of them, on all cores
    python tests/mutants.py clip shuffl     those whose file or `breaks` holds one of these words
    python tests/mutants.py --page docs/mutants.md     all of them, and the page that tells what came of it
"""

from __future__ import annotations

import argparse
import datetime
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COPIED = ("retro", "tests", "docs", "examples", "benchmarks", "results", "pyproject.toml", "README.md", "Makefile")
SECONDS = 600  # for the tests of one mistake; one that takes longer is noticed too
OTHERS = "\n## "  # in the page, from the first such heading on, is what others wrote
PAGE = """\
# Mistakes put into the code on purpose

That tests pass says little if they would pass for wrong code as well. So mistakes that somebody could make are made on
purpose, one at a time: the gradient is not clipped, a token reads the token after it, held-out text is in the database.
Each is a changed line in a copy of the project, and tests that are named beforehand have to fail. A mistake that no
test notices means that one is missing; it is then written.

**{noticed} of {total} are noticed**, in {minutes:.0f} minutes on {cores} cores, {day.day} {day:%B %Y}.

`make mutants` makes them all again. The list is `tests/mutants.toml`; this table is written by
`tests/mutants.py --page docs/mutants.md`. Files are below `retro/`, tests below `tests/`.

| file | what the mistake breaks | the test that notices it |
|---|---|---|
{rows}
"""


@dataclass(frozen=True)
class Mutant:
    """A mistake: `old` becomes `new` in `file`, which `breaks` something that `tests` should notice."""

    file: str  # below retro/
    breaks: str
    old: str  # stands once in the file
    new: str
    tests: str  # files or tests below tests/, separated by blanks

    def made(self, source: str) -> str:
        """The file's source with the mistake in it."""
        if (found := source.count(self.old)) != 1:
            raise ValueError(f"retro/{self.file} has {self.old!r} {found} times, where once is wanted")
        return source.replace(self.old, self.new)


def listed(words: list[str]) -> list[Mutant]:
    """The mistakes of the list, or those that hold one of the words."""
    every = [Mutant(**entry) for entry in tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutants"]]
    return [m for m in every if not words or any(word in f"{m.file} {m.breaks}" for word in words)]


def tests_fail(tree: Path, tests: str, seconds: float = SECONDS) -> bool:
    """Whether these tests fail in a copy of the project, or cannot even begin, or end with a crash."""
    names = [str(tree / "tests" / name) for name in tests.split()]
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-m", "", "-p", "no:cacheprovider", *names]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree)}
    try:
        result = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    if result.returncode == pytest.ExitCode.NO_TESTS_COLLECTED:
        raise RuntimeError(f"there is no test in {tests}:\n{result.stdout[-2000:]}")
    return result.returncode != 0


def page_of(killed: dict[Mutant, bool], minutes: float, cores: int) -> str:
    """The page: how many mistakes are noticed, and by which tests."""

    def in_words(name: str) -> str:
        file, _, test = name.partition("::")
        return f"{file}: {test.removeprefix('test_').partition('[')[0].replace('_', ' ')}"

    rows = [
        f"| {m.file} | {m.breaks} | {'; '.join(map(in_words, m.tests.split())) if noticed else 'none'} |"
        for m, noticed in killed.items()
    ]
    noticed, day = sum(killed.values()), datetime.date.today()
    return PAGE.format(noticed=noticed, total=len(killed), minutes=minutes, cores=cores, day=day, rows="\n".join(rows))


def try_all(mutants: list[Mutant], n_workers: int) -> dict[Mutant, bool]:
    """Whether each mistake is killed, in the order of the list."""
    files = {name.partition("::")[0] for mutant in mutants for name in mutant.tests.split()}
    if missing := [file for file in sorted(files) if not (ROOT / "tests" / file).exists()]:
        raise FileNotFoundError(f"there are no tests {', '.join(missing)}")  # whose failure would be taken for notice
    tests = " ".join(sorted({name for mutant in mutants for name in mutant.tests.split()}))
    print(f"first the tests without a mistake: {tests}", flush=True)
    if tests_fail(ROOT, tests, 10 * SECONDS):
        raise SystemExit("some of the tests fail without any mistake: mend that first")
    waiting: queue.SimpleQueue[Mutant] = queue.SimpleQueue()
    for mutant in mutants:
        waiting.put(mutant)
    killed: dict[Mutant, bool] = {}
    errors: list[Exception] = []

    def work(tree: Path) -> None:
        for name in COPIED:
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
            copy(ROOT / name, tree / name)
        while not errors:
            try:
                mutant = waiting.get_nowait()
            except queue.Empty:
                return
            path, started = tree / "retro" / mutant.file, time.perf_counter()
            whole = path.read_text()
            try:
                path.write_text(mutant.made(whole))
                killed[mutant] = tests_fail(tree, mutant.tests)
            except Exception as error:
                errors.append(error)
            finally:
                path.write_text(whole)
            if mutant in killed:
                what = "killed  " if killed[mutant] else "SURVIVES"
                took = f"{len(killed):3}/{len(mutants)} {what} {time.perf_counter() - started:3.0f} s"
                print(f"{took}  {mutant.file}: {mutant.breaks}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        trees = [Path(folder) / str(number) for number in range(n_workers)]
        threads = []
        for tree in trees:
            tree.mkdir()
            threads.append(threading.Thread(target=work, args=(tree,)))
            threads[-1].start()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]
    return {mutant: killed[mutant] for mutant in mutants}


def main() -> int:
    parser = argparse.ArgumentParser(description="Put mistakes into the code and see whether the tests notice.")
    parser.add_argument("words", nargs="*", help="only mistakes whose line holds one of these")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="how many are tried at once")
    parser.add_argument("--page", type=Path, help="write what came of all of them into this file")
    options = parser.parse_args()
    if options.page and options.words:
        parser.error("--page is about all of them: name no words")
    mutants = listed(options.words)
    for mutant in mutants:  # all of them, before the first test
        mutant.made((ROOT / "retro" / mutant.file).read_text())
    started = time.perf_counter()
    killed = try_all(mutants, options.workers)
    survivors = [mutant for mutant in mutants if not killed[mutant]]
    minutes = (time.perf_counter() - started) / 60
    print(f"\n{len(mutants) - len(survivors)} of {len(mutants)} mistakes are noticed; {minutes:.0f} minutes")
    if options.page:
        others = options.page.read_text().partition(OTHERS)[1:] if options.page.exists() else ()
        options.page.write_text("".join((page_of(killed, minutes, options.workers), *others)))
    return 1 if survivors else 0


if __name__ == "__main__":
    raise SystemExit(main())
