"""The benchmark's arithmetic, and that its table is made of its figures."""

import importlib.util
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "benchmarks"
spec = importlib.util.spec_from_file_location("bench", FOLDER / "bench.py")
bench = sys.modules["bench"] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
spec.loader.exec_module(bench)


def test_a_ratio_compares_the_rates_of_one_round():
    # 100 units in 2 s against 10 units in 1 s: 50 a second against 10; then 100 in 4 s against 10 in 2 s.
    ours = [{"seconds": 2.0, "units": 100}, {"seconds": 4.0, "units": 100}]
    theirs = [{"seconds": 1.0, "units": 10}, {"seconds": 2.0, "units": 10}]
    stage = bench.STAGES["embed16"]
    assert bench.ratios(stage, ours, theirs) == [5.0, 5.0]
    assert [bench.rate(stage, r) for r in ours] == [50.0, 25.0]
    assert [bench.rate(bench.STAGES["database"], r) for r in ours] == [2.0, 4.0]


def test_a_share_of_the_ceiling_is_counted_operations_over_time_and_rate():
    run = {"seconds": 2.0, "units": 1, "flop": 300e9, "precision": "fp32"}  # 150 of 200 GFLOP/s
    results = {"retro": [run], "labml-nn": [{"seconds": 8.0, "units": 1}]}
    (row,) = bench._rows(bench.STAGES["database"], results, {"fp32": {"large": 200.0}})
    assert "**4.0** (4.0)" in row and "| 75% of fp32 |" in row


def test_the_published_table_is_made_of_the_published_figures():
    record = json.loads((FOLDER / "results.json").read_text())
    assert bench.report(record) == (FOLDER / "RESULTS.md").read_text()
    assert set(bench.STAGES) == set(record["stages"])
