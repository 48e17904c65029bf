"""The benchmark's arithmetic, that its table is made of its figures, and that it can still take them."""

import json
import os
import sys
import time
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


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize(("name", "variant"), [*OURS, ("growth", "1"), ("curve", "fp32 0")])
def test_every_stage_of_this_library_can_be_measured(folder, name, variant, monkeypatch):
    monkeypatch.setattr(measure, "CURVE_STEPS", 2)
    monkeypatch.setattr(measure, "BATCH", 1)
    monkeypatch.setattr(measure, "N_PROMPTS", 2)
    result = measure.STAGES[name](variant, folder)
    assert result["seconds"] > 0 and result["units"] > 0
    assert ("flop" in result) == (name in ("embed16", "embed256", "database", "dataset", "train", "paper"))
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


@pytest.mark.slow
def test_what_a_gpu_is_to_do_can_be_done_small_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import gpu
    import gpu_stages

    assert set(gpu.LIMITS) == set(gpu_stages.STAGES) >= set(gpu.EXPECTED)
    found = {}
    setting = gpu_stages.Setting("cpu", True, tmp_path)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")  # so that what a stage sets does not stay, as with precision
    for name in ("environment", "step", "large", "embedding", "sampling", "devices", "parity", "curve"):
        gpu_stages.STAGES[name](setting, found.setdefault(name, {}).__setitem__)

    for kind in ("bf16", "fp32", "fp32, labml-nn"):  # 2 samples of 3 chunks of 16 tokens
        rates = found["step"][f"batch 2, {kind}"]
        assert rates["tokens/s"] == pytest.approx(96 * rates["steps/s"])
    # On one device the same weights give the same, and another precision does not.
    parity = found["parity"]
    assert parity["logits in fp32"]["largest"] == parity["gradients in fp32"]["mean"] == 0
    assert 0 < parity["logits of the cached decoder"]["largest"] < 1e-6
    assert 1e-3 < parity["logits in bf16"]["largest"] < 0.1 and 1e-3 < parity["gradients in bf16"]["mean"] < 0.1
    losses = found["curve"]["losses, cpu"]
    assert losses[-1] < losses[0] - 0.3 and found["curve"]["largest difference"] == {"nats": 0, "at step": 1}
    for kind in ("greedy tokens", "drawn tokens"):
        assert found["sampling"][kind]["the same"] and found["sampling"][kind]["up to"] == 40
    sizes = found["embedding"]["16 characters"]
    assert sizes["chunks"] == 300 >= sizes["of different tokens"] > 200
    assert found["large"]["batch"] == 2 and found["large"]["operations"]["share of the peak"] is None


def test_differences_and_the_share_of_a_gpus_peak_are_as_by_hand(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import gpu_stages
    import torch

    # Differences of 0, 2 and 1 from values of 4, -2 and 3: 2 of 4 at most, 3 of 9 in the mean.
    found, reference = [torch.tensor([4.0, 0.0]), torch.tensor([4.0])], [torch.tensor([4.0, -2.0]), torch.tensor([3.0])]
    assert gpu_stages.difference(found, reference) == {"largest": 0.5, "mean": pytest.approx(1 / 3)}
    # 494.5 of 989 TFLOP/s.
    shares = {
        name: gpu_stages.utilisation(989e12, 2.0, name)["share of the peak"]
        for name in ("NVIDIA H100 80GB HBM3", "NVIDIA H200", "NVIDIA H100 PCIe", "")
    }
    assert list(shares.values()) == [0.5, 0.5, None, None]


@pytest.mark.slow
def test_a_stage_that_fails_is_recorded_with_what_it_had_measured_and_the_next_one_runs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import gpu

    gpu.main(["environment", "curve", "--device", "cuda:99", "--tiny", "--out", str(tmp_path)])
    stages = json.loads((tmp_path / "gpu.json").read_text())["stages"]
    assert list(stages) == ["environment", "curve"]
    assert all(stage["status"] == "failed with status 1" and "Error" in stage["output"] for stage in stages.values())
    assert stages["environment"]["result"]["cores"] > 0 and len(stages["curve"]["result"]["losses, cpu"]) == 5
    assert "losses, device" not in stages["curve"]["result"]
    assert gpu.run_stage("environment", "cpu", True, tmp_path, limit=60)["status"] == "done"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="processes are looked for in /proc")
def test_a_stage_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import gpu

    stage = gpu.run_stage("demo", "cpu", False, tmp_path, limit=5)  # starts `retro train` in this folder
    assert stage["status"] == "stopped after 5 s" and stage["seconds"] < 8
    time.sleep(0.1)
    assert [p for p in Path("/proc").glob("[0-9]*/cwd") if os.path.realpath(p) == str(tmp_path.resolve())] == []
    assert gpu.run_stage("demo", "cpu", False, tmp_path, limit=4) == {"status": "not run: the time was up"}


def test_what_is_brought_to_a_gpu_is_what_everything_was_tested_with():
    pins = (FOLDER.parent / "constraints.txt").read_text().splitlines()
    brought = (FOLDER / "requirements-gpu.txt").read_text().splitlines()
    assert {line for line in brought if not line.startswith("#")} < set(pins)
