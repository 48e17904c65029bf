"""The published results: their tables are made of their figures, and shares of documents are nested."""

import itertools
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CHUNK_LEN, CHUNKS_PER_SAMPLE, load_script

from retro.config import DatasetConfig
from retro.dataset import build_dataset
from retro.evaluation.intervals import judged

pytest.importorskip("matplotlib", reason="the plots need it: pip install matplotlib")
FOLDER = Path(__file__).parent.parent / "results"
run, report = load_script(FOLDER / "run.py"), load_script(FOLDER / "report.py")
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(FOLDER)  # for what they share
    ablations = load_script(FOLDER / "ablations.py")


def test_the_published_tables_are_made_of_the_published_figures(tmp_path):
    record = json.loads((FOLDER / "results.json").read_text())
    report.write(record, tmp_path, run.SHARES, run.NEIGHBORS)
    assert (tmp_path / "RESULTS.md").read_text() == (FOLDER / "RESULTS.md").read_text()
    for name in ("growth.png", *(f"filtered-{corpus}.png" for corpus in record["corpora"])):
        assert (FOLDER / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).exists()


def test_published_documents_were_held_out():
    record = json.loads((FOLDER / "results.json").read_text())
    assert set(record["corpora"]) == set(run.SOURCES)
    for part in record["corpora"].values():
        evaluated = {tuple(e["documents"]) for e in part["evaluations"].values()}
        assert evaluated == {tuple(part["held_out"])}, "evaluations of different documents"
        assert part["documents"]["held out"] == len(part["held_out"]) > 1


def test_a_larger_share_holds_a_smaller_one():
    names = [f"{i}.py" for i in range(100)]
    small, large = run.drawn(names, 0.1), run.drawn(names, 0.3)
    assert len(small) == 10 and len(large) == 30 and set(small) < set(large)
    assert run.drawn(names[::-1], 0.1) == small


def test_all_claims_of_both_corpora_are_corrected_together():
    record = json.loads((FOLDER / "results.json").read_text())
    claimed = [report.claims(part, run.SHARES, run.NEIGHBORS) for part in record["corpora"].values()]
    assert claimed[0].keys() == claimed[1].keys() and len(claimed[0]) == 8
    pairs = {(claim, number): bits for number, of_part in enumerate(claimed) for claim, bits in of_part.items()}
    together = judged(pairs)
    alone = {name: judged({name: bits})[name]["p"] for name, bits in pairs.items()}
    measured = [p for p in alone.values() if p is not None]
    smallest = min((name for name in pairs if alone[name] is not None), key=alone.get)
    assert together[smallest]["p"] == pytest.approx(len(measured) * alone[smallest], rel=1e-6)
    said = report.of_claim(together[smallest])
    assert said.startswith(f"**{together[smallest]['verdict']}**: {together[smallest]['value']:+.4f} (")
    shown = (FOLDER / "RESULTS.md").read_text()
    assert all(report.of_claim(gain) in shown for gain in together.values())


def test_published_figures_are_of_the_seeds_that_were_trained():
    record = json.loads((FOLDER / "results.json").read_text())
    n_seeds = len(record["size"]["seeds"])
    for part in record["corpora"].values():
        assert {e["n_seeds"] for e in part["evaluations"].values()} == {n_seeds}
        assert {len(summaries) for summaries in part["runs"].values()} == {n_seeds}
    assert len(set(run.FULL.seeds)) == 3
    assert run.config(10, seed=2).seed == 2 != run.config(10).seed


def test_the_corpora_are_plays_and_sources_without_tests():
    plays, sources = dict(run.plays()), dict(run.stdlib())
    assert len(plays) == 38 and all(len(text) > 50_000 for text in plays.values())
    assert {"os.py", "json/decoder.py", "encodings/utf_8.py"} <= set(sources)
    assert not [name for name in sources if "test" in Path(name).parts[:-1]]


@pytest.fixture
def small_ablations(data, index, tmp_path, monkeypatch):
    """The ablations of models that are tiny, on the tests' data, prepared in the current folder."""
    monkeypatch.setattr(ablations, "CHUNK_LEN", CHUNK_LEN)
    monkeypatch.setattr(ablations, "WINDOW", 4 * CHUNK_LEN)
    monkeypatch.setattr(ablations, "STRIDE", 4 * CHUNK_LEN)
    tiny = {"d_model": 16, "n_layers": 2, "ca_layers": (1,), "n_heads": 2, "d_k": 8, "d_ff": 32, "n_encoder_layers": 1}
    monkeypatch.setattr(ablations, "PAPER", ablations.PAPER | tiny | {"encoder_ca_layers": (0,)})
    shutil.copytree(data, tmp_path / "data")
    config = DatasetConfig(chunks_per_sample=CHUNKS_PER_SAMPLE, n_neighbors=2)
    build_dataset(config=config, corpus=index.corpus, data_path=tmp_path / "data", index=index)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "measured").mkdir()
    ablations.retrieve_held_out()
    return ablations.Size(steps=2, seeds=(0, 1), n_windows=2)


def test_variants_of_one_seed_differ_in_one_thing_and_are_measured_on_the_same_bytes(small_ablations, tmp_path):
    size = small_ablations
    names = ("paper", "none", "N", "F")
    for name, seed in itertools.product(names, size.seeds):
        ablations.measure(name, size, seed)
    read = {
        (name, seed): json.loads((tmp_path / "measured" / ablations.name_of(name, size, seed)).read_text())[
            "by_document"
        ]
        for name, seed in itertools.product(names, size.seeds)
    }
    assert len({tuple(of["bytes"]) for of in read.values()}) == 1
    assert read["none", 0]["on"] == read["none", 0]["off"], "without retrieval neighbors change nothing"
    assert all(read[name, 0]["on"] != read[name, 0]["off"] for name in names if name != "none"), "they read neighbors"
    on = {tuple(read[name, 0]["on"]) for name in names}
    assert len(on) == len(names) and read["paper", 0]["on"] != read["paper", 1]["on"]


def test_of_a_neighbor_only_what_a_variant_reads_is_left():
    m, batch = ablations.CHUNK_LEN, (torch.zeros(1), torch.zeros(1), torch.ones(1, 2, 8, 2 * ablations.CHUNK_LEN))
    counts = {}
    for name, variant in ablations.VARIANTS.items():
        ((_, _, neighbors),) = ablations.of_variant([batch], variant)
        assert neighbors.shape[2] == variant.k
        counts[name] = [int((neighbors[0, 0, 0, part] == 1).sum()) for part in (slice(m), slice(m, None))]
    assert batch[2].min() == 1, "what others read stays"
    assert counts["N"] == [m, 0] and counts["F"] == [0, m] and counts["k=8"] == [m, m]
    assert {"k=1": 1, "paper": 2, "k=4": 4, "k=8": 8}.items() <= {n: v.k for n, v in ablations.VARIANTS.items()}.items()


def test_a_training_is_found_again_by_its_recipe_and_not_its_title(monkeypatch):
    size, variants = ablations.FULL, ablations.VARIANTS
    names = [ablations.name_of(name, size, seed) for name in variants for seed in size.seeds]
    assert len(set(names)) == len(variants) * len(size.seeds) >= 54
    before = ablations.name_of("N", size, 0)
    monkeypatch.setitem(variants, "N", replace(variants["N"], title="another"))
    assert ablations.name_of("N", size, 0) == before
    monkeypatch.setitem(variants, "N", replace(variants["N"], k=1))
    assert ablations.name_of("N", size, 0) != before


def test_a_variants_cost_is_what_it_needs_beside_the_one_it_is_compared_with(tmp_path, monkeypatch):
    """Ten documents of 100 bytes: the paper's model takes 100 bits in each, the variant number i takes i more."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "measured").mkdir()
    size = ablations.Size(1, (0, 1), None)
    for (number, name), seed in itertools.product(enumerate(ablations.VARIANTS), size.seeds):
        noise = 0.1 * np.sin(np.arange(10) + number + seed)
        by_document = {"bytes": [100.0] * 10, "on": (100 + number + noise).tolist(), "off": [150.0] * 10}
        content = {"n_parameters": 10**6, "train_nats": 1.0, "by_document": by_document}
        (tmp_path / "measured" / ablations.name_of(name, size, seed)).write_text(json.dumps(content))
    rows = ablations.gathered(size)
    order = list(ablations.VARIANTS)
    for number, name in enumerate(order):
        beside = order.index(ablations.VARIANTS[name].beside)
        assert rows[name]["on"]["value"] == pytest.approx(1 + number / 100, abs=2e-3)
        if name != "paper":
            assert rows[name]["cost"]["value"] == pytest.approx((number - beside) / 100, abs=3e-3)
    assert rows["none"]["cost"]["verdict"] == "yes" and "cost" not in rows["paper"]
    record = {
        "command": "make ablations", "machine": run.machine(), "size": asdict(size), "variants": rows,
        "documents": {"train": 5, "held out": 10}, "tokens": {"train": 1000, "held out": 100},
    }  # fmt: skip
    lines = ablations.page(record).splitlines()
    (row,) = (line for line in lines if line.startswith("| no retrieval |"))
    assert "| yes |" in row and "+0.01" in row and "1.5000" in row
    ablations.draw(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_published_page_of_ablations_is_made_of_the_published_figures():
    record = json.loads((FOLDER / "ablations.json").read_text())
    assert ablations.page(record) == (FOLDER / "ABLATIONS.md").read_text()
    assert list(record["variants"]) == list(ablations.VARIANTS) and len(record["size"]["seeds"]) == 3
    assert (FOLDER / "ablations.png").stat().st_size > 10_000
