"""The benchmark's arithmetic, that its table is made of its figures, and that it can still take them."""

import json
import sys
from pathlib import Path

import pytest
from conftest import load_script

FOLDER = Path(__file__).parent.parent / "benchmarks"
bench, measure = load_script(FOLDER / "bench.py"), load_script(FOLDER / "measure.py")


@pytest.fixture(scope="module")
def folder(plays, tmp_path_factory):
    """What all stages measure, of a small text."""
    folder = tmp_path_factory.mktemp("measured")
    (folder / "growth-1" / "text").mkdir(parents=True)
    for file in (folder / bench.TEXT, folder / "growth-1" / "text" / "000.txt"):
        file.write_text("".join(file.read_text() for file in sorted(plays.iterdir()))[:20_000])
    measure.prepare("all", folder)
    return folder


OURS = [
    (name, variant)
    for name, stage in bench.STAGES.items()
    for variant in stage.variants
    if variant.startswith("retro") and variant not in bench.PEERS
]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(("name", "variant"), [*OURS, ("growth", "1"), ("curve", "fp32 0")])
def test_every_stage_of_this_library_can_be_measured(folder, name, variant, monkeypatch):
    monkeypatch.setattr(measure, "CURVE_STEPS", 2)
    result = measure.STAGES[name](variant, folder)
    assert result["seconds"] > 0 and result["units"] > 0
    assert ("flop" in result) == (name in ("embed16", "embed256", "database", "dataset", "train"))
    assert result.get("flop", 1) > 0


def test_operations_are_counted_as_by_hand(char_bert):
    chunks = ["To be, or not to be: that", "Who's there? Nay, answer me: stand, and unfold yourself"]
    lengths, d = [len(ids) for ids in char_bert.tokens_of(chunks)], char_bert.d_emb
    assert lengths[0] < lengths[1] * 0.75  # no two of one batch
    # A layer has 4 products of d x d, 2 of d x 4d, and attention multiplies with keys and values.
    by_hand = sum(6 * (2 * n * (4 + 8) * d * d + 2 * 2 * n * n * d) for n in lengths)
    assert measure.counted(lambda: char_bert(chunks))[2] == by_hand


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
