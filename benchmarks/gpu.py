"""Measure what this library does on one GPU: `make gpu`; `make gpu ARGS=--tiny` runs all of it small, on any machine.

Every stage is a process of its own (`gpu_stages.py`) with a limit of its own. One that fails, or takes too long, is
recorded as text, with what it had measured until then, and the next one starts. `OUT/gpu.json` is written after each
stage; a table of it is printed at the end, with what was expected before anything was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LAST_LINES = 30  # of what a stage or a command printed
# The most seconds of each stage, in the order of what should not be missed.
LIMITS = {
    "environment": 60,
    "parity": 60,
    "curve": 60,
    "step": 80,
    "large": 80,
    "embedding": 90,
    "sampling": 75,
    "demo": 90,
    "devices": 30,
    "large compiled": 120,
    "step compiled": 120,
    "tests": 60,
}
# Estimates from before this was measured, for it to refute; of stages that were measured before, with what was changed.
EXPECTED = {
    "parity": "of the largest: fp32 below 1e-5, TF32 about 1e-3, bf16 about 1e-2; the cached decoder as fp32",
    "curve": "the losses of 50 steps differ by less than 1e-3 nats in fp32",
    "devices": "both losses, which differ by less than 1e-3: accelerate begins anew on another kind of device",
    "step": "batch 4: 34 steps/s, bf16 25; batch 64: 8.6 and 12.5, with rotations made once a step a tenth more",
    "embedding": "16 characters: 44,000 chunks/s, 256: 8,000, as before",
    "sampling": "420 tokens/s, as before; 16 prompts at once 7 times as fast as one by one",
    "large": "paper-172m: bf16 27% of the device's peak, in 20 GB, as before",
    "large compiled": "paper-172m: 11.7 steps/s, 39% of the peak, as before",
    "step compiled": "batch 4: 60 steps/s (37 before, when Inductor left out the rotations); batch 64: 20",
    "demo": "half a minute, most of it tokenizing, embedding and starting",
    "tests": "all pass",
}


def last_lines(text: str, n: int = LAST_LINES) -> str:
    """The last lines of what was printed; of a progress bar, its last state."""
    lines = [line.rstrip().rsplit("\r", 1)[-1] for line in text.split("\n")]
    return "\n".join([line for line in lines if line][-n:])


def result_of(folder: Path, name: str) -> dict[str, Any]:
    """What a stage has measured, as far as it got."""
    file = folder / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else {}


def run_stage(name: str, device: str, tiny: bool, folder: Path, limit: float) -> dict[str, Any]:
    """Run a stage for at most `limit` seconds: what became of it, what it measured, and the last lines it printed."""
    if limit < 5:
        return {"status": "not run: the time was up"}
    command = [sys.executable, str(HERE / "gpu_stages.py"), name, "--device", device, "--folder", str(folder)]
    path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
    # labml writes to ~/.labml, and there may be no network.
    environ = os.environ | {"PYTHONPATH": path, "HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    log, start = folder / f"{name}.log", time.perf_counter()
    with open(log, "w") as out:
        child = subprocess.Popen(
            command + ["--tiny"] * tiny, stdout=out, stderr=subprocess.STDOUT, env=environ, process_group=0
        )
        try:
            code = child.wait(limit)
            status = "done" if code == 0 else f"failed with status {code}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {limit:.0f} s"
        finally:  # with all that it started
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
    return {
        "status": status,
        "seconds": time.perf_counter() - start,
        "result": result_of(folder, name),
        "output": last_lines(log.read_text(errors="replace")),
    }


def table(record: dict[str, Any]) -> str:
    """All that was measured, a line for each figure, under what was expected of its stage."""
    lines = []
    for name, stage in record["stages"].items():
        lines += ["", f"== {name}: {stage['status']}, {stage.get('seconds', 0):.0f} s"]
        lines += [f"   expected: {EXPECTED[name]}"] if name in EXPECTED else []
        lines += [f"   {label:<58} {value}" for label, value in figures(stage.get("result", {}))]
        lines += [f"   | {line}" for line in stage.get("output", "").splitlines()]
    return "\n".join(lines)


def figures(value: Any, label: str = "") -> Iterator[tuple[str, str]]:
    """Each figure of a result with its label."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from figures(inner, f"{label}: {name}" if label else name)
    elif isinstance(value, list):
        shown = [number(x) for x in value]
        yield label, ", ".join(shown if len(shown) < 5 else [*shown[:2], "...", *shown[-2:]])
    elif isinstance(value, str):
        for line in value.splitlines() or [""]:
            yield label, line
            label = ""
    else:
        yield label, number(value)


def number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if type(value) is int else str(value)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help=f"of {', '.join(LIMITS)} (default: all)")
    parser.add_argument("--out", type=Path, default=Path("logs"), help="folder for gpu.json (default: logs)")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, cpu (default: the GPU, if there is one)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try it all")
    parser.add_argument("--limit", type=float, default=460, help="the most seconds of all stages (default: 460)")
    args = parser.parse_args(argv)
    if unknown := set(args.stages) - set(LIMITS):
        parser.error(f"no stage {', '.join(unknown)}; there are {', '.join(LIMITS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    record: dict[str, Any] = {"date": time.strftime("%Y-%m-%d"), "tiny": args.tiny, "expected": EXPECTED, "stages": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.stages or LIMITS:
            left = args.limit - (time.perf_counter() - started)
            stage = run_stage(name, args.device, args.tiny, Path(folder), min(left, LIMITS[name]))
            record["stages"][name] = stage
            record["seconds"] = time.perf_counter() - started
            (args.out / "gpu.json").write_text(json.dumps(record, indent=1) + "\n")
            print(f"  {name:<16} {stage['status']}, {stage.get('seconds', 0):.0f} s", flush=True)
    print(table(record))
    print(f"\ntook {record['seconds']:.0f} s; written to {args.out / 'gpu.json'}")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage is ended as well
    main()
