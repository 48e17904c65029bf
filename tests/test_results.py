"""The published results: their tables are made of their figures, and shares of documents are nested."""

import json
from pathlib import Path

import pytest
from conftest import load_script

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


def test_a_verdict_follows_the_interval():
    figure = {"value": 0.5, "low": 0.1, "high": 0.9}
    assert report.verdict(figure) == "yes"
    assert report.verdict(figure | {"low": -0.1}) == "undecided"
    assert report.verdict({"value": -0.5, "low": -0.9, "high": -0.1}) == "no: a loss"
    assert report.verdict({"value": 0.5, "low": None, "high": None}) == "not measurable"


def test_the_corpora_are_plays_and_sources_without_tests():
    plays, sources = dict(run.plays()), dict(run.stdlib())
    assert len(plays) == 38 and all(len(text) > 50_000 for text in plays.values())
    assert {"os.py", "json/decoder.py", "encodings/utf_8.py"} <= set(sources)
    assert not [name for name in sources if "test" in Path(name).parts[:-1]]
