"""The published results: their tables are made of their figures, and shares of documents are nested."""

import json
from pathlib import Path

import pytest
from conftest import load_script

from retro.evaluation.intervals import judged

pytest.importorskip("matplotlib", reason="the plots need it: pip install matplotlib")
FOLDER = Path(__file__).parent.parent / "results"
run, report = load_script(FOLDER / "run.py"), load_script(FOLDER / "report.py")


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
