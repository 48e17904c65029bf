"""The published results: all is measured as it is said, on texts that are held out, and the page is made of it."""

import itertools
import json
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHUNK_LEN, CHUNKS_PER_SAMPLE, load_script
from test_retrofit_runs import write_base

from retro.cli import main
from retro.config import DatasetConfig
from retro.database import RetroIndex
from retro.dataset import build_dataset
from retro.evaluation.figures import COLORS
from retro.evaluation.intervals import counted, judged
from retro.storage.manifests import read_manifest
from retro.text.corpus import Corpus
from retro.text.documents import find_texts, read_documents

pytest.importorskip("matplotlib", reason="the plots need it: pip install matplotlib")
FOLDER = Path(__file__).parent.parent / "results"
with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(FOLDER)  # for what they share
    import common
    import corpora
    import memory
    import nothing
    import report

    run, ablations = load_script(FOLDER / "run.py"), load_script(FOLDER / "ablations.py")


CLAIMS = report.FIRST + report.FURTHER

# What is published.


def published() -> dict:
    record = json.loads((FOLDER / "results.json").read_text())
    if "memory" not in record:
        pytest.skip("what is published was measured before there were four corpora: make results")
    return record


def test_the_published_page_is_made_of_the_published_figures(tmp_path):
    record = published()
    report.write(record, tmp_path)
    assert (tmp_path / "RESULTS.md").read_text() == (FOLDER / "RESULTS.md").read_text()
    assert len(report.MEMORY) <= len(COLORS), "each its own in a plot"
    for name in ("costs.png", *(f"filtered-{corpus}.png" for corpus in record["memory"])):
        assert (FOLDER / name).read_bytes().startswith(b"\x89PNG") and (tmp_path / name).exists()


def test_what_is_published_has_bits_of_documents_only_where_a_claim_is_made_of_them():
    def part(name: str) -> dict:
        rows = [{"alpha": alpha, "bits_per_byte": {name: alpha}, "by_document": {name: [1.0]}} for alpha in (1, 2, 3)]
        return {"by_document": {name: [1.0]}, "filtered": rows}

    few = {"longer": {8: part("c")}, "of all": {8: part("d")}}
    found = run.published({"evaluations": {"a": part("a")}, "longer": {8: part("b")}, "few": few, "costs": {}})
    made = [found["evaluations"]["a"], found["longer"][8], found["few"]["longer"][8], found["few"]["of all"][8]]
    for evaluation, name in zip(made, "abcd", strict=True):
        assert evaluation["by_document"] == {name: [1.0]} and len(evaluation["filtered"]) == 3
        assert ["by_document" in row for row in evaluation["filtered"]] == [True, False, False]
        assert [row["bits_per_byte"] for row in evaluation["filtered"]] == [{name: alpha} for alpha in (1, 2, 3)]
    record = published()
    for part in (part for kind in run.MEASURES for part in record[kind].values()):
        before = json.dumps(part)
        assert json.dumps(run.published(part)) == before, "nothing is left to leave out"
    assert (FOLDER / "results.json").stat().st_size < 1 << 20


def test_published_figures_are_of_held_out_documents_and_of_the_seeds_that_were_trained():
    record = published()
    for kind, parts in (("memory", record["memory"]), ("nothing", record["nothing"])):
        assert set(parts) <= set(run.SOURCES) == set(corpora.SOURCES)
        for name, part in parts.items():
            n_seeds = len(record["measured"][kind][name]["seeds"])
            of_all = {run: len(summaries) for run, summaries in part["runs"].items() if run != "longer"}
            assert of_all.pop("both", 0) == len(record["measured"][kind][name].get("both", ()))
            assert set(of_all.values()) == {n_seeds}
            evaluated = {tuple(e["documents"]) for e in part["evaluations"].values()}
            assert evaluated == {tuple(part["held_out"])} and len(part["held_out"]) == part["documents"]["held out"] > 1
            main_evaluation = part["evaluations"]["lora" if kind == "memory" else "equal-steps"]
            assert main_evaluation["n_seeds"] == n_seeds and {"on", "off", "random"} < set(
                main_evaluation["bits_per_byte"]
            )


def test_all_claims_are_corrected_together():
    record = published()
    gains = report.judge(record)
    alone = {}
    for claim, name in gains:
        without, having, n_bytes = claim.bits(record[claim.kind][name]["evaluations"])
        alone[claim, name] = judged({"alone": (without - having, n_bytes)})["alone"]["p"]
    measured = [p for p in alone.values() if p is not None]
    smallest = min((key for key in gains if alone[key] is not None), key=alone.get)
    assert gains[smallest]["p"] == pytest.approx(min(1, len(measured) * alone[smallest]), rel=1e-6)
    shown = (FOLDER / "RESULTS.md").read_text()
    most = max(gain["n_seeds"] for gain in gains.values())
    assert all(report.of_claim(gain, most) in shown for gain in gains.values())
    gain = gains[report.BASE, "models"]
    assert (
        report.of_claim(gain, gain["n_seeds"] + 1) == report.of_claim(gain, 1) + f", {counted(gain['n_seeds'], 'seed')}"
    )
    assert {claim for claim, _ in gains} <= set(report.FIRST + report.FURTHER) and len(report.FIRST) == 5


def test_the_page_tells_which_bases_computed_in_another_precision_and_what_that_changes():
    def part(bases: dict, **evaluations: list) -> dict:
        by_document = {name: {"by_document": {"on": bits, "bytes": [4, 6]}} for name, bits in evaluations.items()}
        files = {f"{name.replace(' ', '-')}-0123abcd.json": of for name, of in bases.items()}
        return {"bases": files, "evaluations": {name.replace("_", " "): of for name, of in by_document.items()}}

    of_seeds, again = [[3.0, 2.0], [9.0, 9.0]], [3.0, 2.5]
    same = {"evaluation lora 0": "float32", "evaluation rivals": None, "evaluation both 0": "float32"}
    models = part(same | {"evaluation neighbors 2": "float32"}, lora=of_seeds, neighbors_2=again)
    assert [*report.precisions({"models": models})] == [], "one precision is among the versions"
    costs = {"costs": "bfloat16", "time ratios": "bfloat16"}
    models = part(same | {"evaluation neighbors 2": "bfloat16"} | costs, lora=of_seeds, neighbors_2=again)
    models["bases"] |= {"costs-89abcdef.json": "bfloat16"}
    python = part({"training lora seed 1": "bfloat16", "evaluation lora 1": "bfloat16"}, lora=of_seeds)
    python["bases"] |= {"evaluation-both-0-89abcdef.json": "float32"}
    assert [*report.precisions({"models": models, "python": python})] == [
        "Bases computed in float32, but on a processor that is faster so in bfloat16 for",
        "",
        "* models: neighbors 2, costs",
        "* python: lora 1",
        "",
        "The first reader, trained and evaluated in both: 0.5000 in float32, 0.5500 in bfloat16.",
    ]
    models["bases"]["evaluation-lora-0-0123abcd.json"] = "bfloat16"
    said = [*report.precisions({"models": models, "python": python})]  # not of one that was trained once
    assert said[0].startswith("Bases computed in bfloat16, but") and said[0].endswith("so in float32 for")
    assert said[1:] == ["", "* models: both 0", "* python: both 0"]


def test_machines_that_differ_by_date_and_precision_alone_are_told_once():
    first = {"date": "2026-11-27", "last": "2026-11-27", "processor": "Xeon", "cores": 2, "python": "3.11"}
    first["versions"] = {"torch": "2.13", "numpy": "2.4"}
    machines = [
        first | {"bases": "float32"}, first, first | {"date": "2026-11-26", "last": "2026-11-28", "bases": "bfloat16"},
        first | {"processor": "EPYC"},
    ]  # fmt: skip
    what = "2 cores, no GPU, Python 3.11, torch 2.13, numpy 2.4"
    assert [*report.made_on(machines)] == [
        f"2026-11-26 to 2026-11-28 on Xeon, {what}, bases in bfloat16 and float32",
        f"2026-11-27 on EPYC, {what}",
    ]


# The corpora.


def test_a_larger_share_holds_a_smaller_one():
    texts = [(f"{i // 2}/{i}.py", str(i)) for i in range(200)]
    small, large = (corpora.drawn(texts, share) for share in (0.1, 0.3))
    assert len(small) == 20 and len(large) == 60 and set(small) < set(large)
    assert sorted(corpora.drawn(texts[::-1], 0.1)) == sorted(small)
    folders = corpora.drawn(texts, 0.1, "folders")
    assert len(folders) == 20 and len({name.split("/")[0] for name, _ in folders}) == 10, "whole ones"


def test_a_hundredth_of_a_text_are_documents_that_fit_into_it_in_the_order_of_a_larger_share():
    texts = [(f"{i}.py", "x" * 1000) for i in range(200)]
    hundredth = corpora.fitting(texts, 0.01)
    assert hundredth == corpora.drawn(texts, 0.01) and len(hundredth) == 2, "those that are drawn first"
    texts[-1] = (texts[-1][0], "x" * 100_000)
    longer = corpora.fitting([*texts, ("short.py", "y" * 900)], 0.01)
    assert {*hundredth} < {*longer} and 2000 < sum(len(text) for _, text in longer) <= 2999, "as many as fit"
    shortest = ("short.py", "y" * 900)
    assert corpora.fitting([*texts[:20], shortest], 0.01) == [shortest], "where none fits"


def test_the_corpora_are_whole_texts_without_tests():
    plays, sources, models = dict(corpora.plays()), dict(corpora.stdlib()), dict(corpora.models())
    assert len(plays) == 38 and all(len(text) > 50_000 for text in plays.values())
    assert {"os.py", "json/decoder.py", "encodings/utf_8.py"} <= set(sources)
    assert not [name for name in sources if "test" in Path(name).parts[:-1]]
    assert len(models) > 500 and "llama/modeling_llama.py" in models


def test_an_archive_of_other_content_is_not_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(corpora, "HERE", tmp_path)
    (tmp_path / "cache" / "django").mkdir(parents=True)
    (tmp_path / "cache" / "django" / f"django-{corpora.DJANGO}.tar.gz").write_bytes(b"another")
    with pytest.raises(SystemExit, match=f"but that of the published figures is {corpora.DJANGO_SHA256}"):
        corpora.manual()


def test_ones_own_texts_are_all_measured_also_those_that_are_lines_of_a_file(tmp_path):
    (tmp_path / "mine" / "b").mkdir(parents=True)
    (tmp_path / "mine" / "a.md").write_text("one text")
    (tmp_path / "mine" / "b" / "c.jsonl").write_text('{"text": "another"}\n\n{"text": "a third"}\n')
    source = corpora.own(tmp_path / "mine")
    assert source.title == "The texts in mine"
    common.write_texts(tmp_path / "texts", source.read())
    found = sorted(document.text for document in read_documents(find_texts([tmp_path / "texts"])))
    assert found == ["a third", "another", "one text"]


# All of it, with a tiny base and tiny models.

TINY = {"d_model": 16, "n_layers": 2, "n_heads": 2, "d_k": 8, "d_ff": 32, "n_encoder_layers": 1}


COMPRESSED = ["--retriever", "bert", "--index", "IVF2,PQ4x4", "--n-train", "200"]


@pytest.fixture(scope="module")
def measured(data, tmp_path_factory):
    """A record of a corpus of twelve texts with two seeds, as `run.py` makes it, and the folder where it was made.

    It is made of figures that are found, without any folder of models: those were measured right before.
    """
    place = tmp_path_factory.mktemp("results")
    base = write_base(place / "base", data / "corpus" / "tokenizer.json")
    texts = [(name, text[:6000]) for name, text in corpora.stdlib() if len(text) > 6000]
    of = {"models": texts[:24], "python": texts[24:30], "plays": texts[30:34]}
    sources = {n: corpora.Source(n, lambda some=some: some, share=0.5, valid_fraction=0.3) for n, some in of.items()}
    sizes = replace(run.FULL["memory"]["models"], steps=2, seeds=(0, 1), both=(0, 1))
    with pytest.MonkeyPatch.context() as patch:
        for module in (memory, nothing):
            patch.setattr(module, "CHUNK_LEN", CHUNK_LEN)
            patch.setattr(module, "CHUNKS_PER_SAMPLE", CHUNKS_PER_SAMPLE)
            patch.setattr(module, "WINDOW", 8 * CHUNK_LEN)
            patch.setattr(module, "STRIDE", 6 * CHUNK_LEN)
        for name, value in (("FEW", 0.25), ("DOUBLINGS_OF_FEW", 1)):
            patch.setattr(nothing, name, value)
        patch.setattr(memory, "BASE", str(base))
        patch.setitem(memory.BY_SEARCH, "bert compressed", COMPRESSED)
        patch.setattr(memory, "SOURCES", sources)
        reads = TINY | {"ca_layers": (1,), "encoder_ca_layers": (0,)}
        patch.setattr(nothing, "SHAPES", {"retro": reads, "plain": TINY | {"ca_layers": (), "encoder_ca_layers": ()}})
        without_process = SimpleNamespace(run=lambda command, check: main(command[3:]))
        patch.setattr(common, "subprocess", without_process)
        patch.chdir(place)
        all_sizes = {"memory": {"models": sizes}, "nothing": {"models": nothing.Size(4, (0, 1), 1, 1, few=2)}}
        for name, value in (("SOURCES", sources), ("FULL", all_sizes), ("HERE", place)):
            patch.setattr(run, name, value)
        patch.setattr("sys.argv", ["run.py"])
        run.main()
        record = json.loads((place / "results.json").read_text())
        patch.setattr(run, "HERE", place / "again")
        shutil.copytree(place / "measured", place / "again" / "measured")
        run.main()
    assert not (place / "again" / "cache").exists(), "nothing was trained or built again"
    assert (place / "again" / "RESULTS.md").read_text() == (place / "RESULTS.md").read_text()
    assert json.loads((place / "again" / "results.json").read_text()) == record
    return record, place / "cache"


def test_retrievers_are_measured_on_every_corpus_and_other_texts_on_the_first(monkeypatch):
    monkeypatch.setattr(memory, "evaluated", lambda measured, name, first, others, **given: [*others, *given])
    swept = {name: memory.sweeps(None, None, None, size, {}) for name, size in run.FULL["memory"].items()}
    retrievers = {f"database {name}" for name in memory.BY_SEARCH}
    for name, found in swept.items():
        assert set(found) == {*retrievers, "neighbors 2"} if name != "models" else set(found) > retrievers
    of_texts = {"a hundredth", "a tenth", "ten times", "python", "plays", "right removed"}
    assert set(swept["models"]) - retrievers == {
        *(f"database {name}" for name in of_texts), *(f"neighbors {k}" for k in (1, 2, 4, 8))
    }  # fmt: skip
    assert [name for name, given in swept["models"].items() if "against" in given] == ["database ten times"]
    for sizes in (run.QUICK, run.OWN):
        assert not any(memory.sweeps(None, None, None, size, {}) for size in sizes["memory"].values())
    *first, whole = run.FULL["memory"]["python"].rounds()
    assert whole.searches and not any(size.searches for size in first), "what is left, at last"


def test_eight_neighbors_are_compared_with_the_first_seed_of_what_has_more():
    def of(**bits):
        return {"by_document": bits}

    evaluations = {
        "neighbors 8": of(on=[30.0, 10.0]),
        "both, most neighbors": of(on=[15.0, 15.0]),
        "lora": of(baseline=[[40.0, 10.0], [90.0, 90.0]]),
        "all": of(baseline=[[25.0, 15.0], [70.0, 70.0]]),
    }
    costs = {"on, most neighbors": {"operations": 2.95e9, "seconds": 0.086}}
    said = " ".join(report.with_more_neighbors({"evaluations": evaluations, "costs": costs}))
    assert "20.0% fewer than LoRA and 0.0% fewer than all weights; while" in said
    assert "40.0% fewer than LoRA and 25.0% fewer than all weights. A token then takes 2.95 billion" in said


@pytest.mark.parametrize(("sizes", "first"), [("FULL", "models"), ("QUICK", "models"), ("OWN", "own")])
def test_a_token_is_timed_by_each_way_that_the_page_shows_and_by_no_other(sizes, first):
    size = getattr(run, sizes)["memory"][first]
    assert set(size.costs) == {"on", "off", *size.rivals, *(["both"] if size.sweeps else [])}


def test_the_quick_size_takes_less_of_the_modeling_files_and_the_others_as_they_are(monkeypatch, tmp_path):
    read = {}

    def measure(folder, place, source, size):
        read[folder.parts[-2:]] = source
        return {"evaluations": {}}, []

    monkeypatch.setattr(run, "HERE", tmp_path)
    monkeypatch.setattr(run, "MEASURES", {"memory": measure, "nothing": measure})
    monkeypatch.setattr(run, "write", lambda record, out: None)
    monkeypatch.setattr("sys.argv", ["run.py", "--quick"])
    run.main()
    assert set(read) == {("memory", "models"), ("nothing", "models"), ("nothing", "plays")}
    whole = corpora.SOURCES["models"]
    assert read["memory", "models"] == replace(whole, share=run.QUICK_SHARE) and whole.share > run.QUICK_SHARE
    assert read["nothing", "plays"] == corpora.SOURCES["plays"], "what is trained from nothing is not touched"
    assert read["nothing", "models"].share_from_nothing == whole.share_from_nothing
    assert (tmp_path / "cache" / "quick" / "results.json").exists() and not (tmp_path / "results.json").exists()


@pytest.mark.slow
def test_everything_is_measured_on_the_same_bytes_with_the_same_samples(measured):
    record, place = measured
    for kind in ("memory", "nothing"):
        part = record[kind]["models"]
        assert len({json.dumps(e["by_document"]["bytes"]) for e in part["evaluations"].values()}) == 1
        seeds = []
        for folder in (place / kind / "models").iterdir():  # all of the text, and little of it
            runs = [read_manifest(path) for path in folder.glob("logs/*/*/run.json")]
            assert len({json.dumps(r["dataset"], sort_keys=True) for r in runs}) == 1
            seeds.append({r["train"]["seed"] for r in runs})
            if seeds[-1] == {0}:
                kinds = sorted((r["train"]["steps"], bool(r["model"]["ca_layers"])) for r in runs)
                assert kinds == [(n, reads) for n in (2, 4) for reads in (False, True)]
        assert sorted(seeds, key=len) == ([{0}, {0, 1}] if kind == "nothing" else [{0, 1}])


@pytest.mark.slow
def test_a_fine_tuned_model_has_the_time_and_a_plain_one_the_steps_or_the_time_of_those_that_read(measured):
    record, place = measured
    part, nothing_part = record["memory"]["models"], record["nothing"]["models"]
    (file,) = (place.parent / "measured" / "memory").glob("time-ratios-*.json")
    ratios = json.loads(file.read_text())["value"]["ratios"]
    assert set(ratios) == {"memory", "lora", "all", "both"}
    assert part["ratios"] == ratios and ratios["memory"] == 1
    assert [s["steps"] for s in part["runs"]["longer"]] == [4 * part["runs"]["lora"][0]["steps"]]
    assert memory.LONGER == 4 and "four times as long" in " ".join(way.text for way in report.MEMORY)
    for name in ("lora", "all", "both"):
        assert {summary["steps"] for summary in part["runs"][name]} == {max(2, round(2 / ratios[name]))}
    steps = {name: {s["steps"] for s in made} for name, made in nothing_part["runs"].items()}
    assert steps == {"retro": {4}, "equal-steps": {4}, "equal-time": {round(4 * nothing_part["time_ratio"])}}
    of_kind = {n: nothing_part["runs"][n][0]["n_parameters"] for n in ("retro", "equal-steps", "equal-time")}
    assert of_kind["retro"] > of_kind["equal-steps"] == of_kind["equal-time"]
    few = nothing_part["few"]
    assert list(nothing_part["longer"]) == ["4", "8"] and list(few["longer"]) == ["2", "4"]
    assert 0 < sum(few["documents"].values()) == sum(nothing_part["documents"].values()) / 2
    for steps, of in few["longer"].items():
        others = few["of all"][steps]["database"]["n_documents"]
        n_train, n_all = few["documents"]["train"], 24 - few["documents"]["held out"]
        assert of["database"]["n_documents"] == n_train < others <= n_all, "no held-out document, nor one near to it"
        assert len(of["by_document"]["bytes"]) == few["documents"]["held out"] == len(few["held_out"])
        assert set(of["bits_per_byte"]) == {"on", "baseline"}


def test_a_step_that_takes_three_times_as_long_has_a_ratio_of_three(monkeypatch):
    now = iter(np.cumsum([0, 1, 0, 3, 0, 9, 0, 2, 0, 6, 0, 1, 0, 1, 0, 3, 0, 4]).tolist())
    monkeypatch.setattr(common.time, "perf_counter", lambda: float(next(now)))
    numbers = []
    steps = {"first": numbers.append, "slow": lambda _: None, "other": lambda _: None}
    found = common.in_turns(steps, n_rounds=2)
    assert found["ratios"] == {"first": 1.0, "slow": 3.0, "other": 2.25}
    assert numbers == [0, 1, 2] and len(found["rounds"]) == 2, "the first round warms up"


def test_a_figure_is_measured_once_for_a_key_and_other_texts_have_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []

    def of(texts, how="alike"):
        return common.Measured(tmp_path / "measured", tmp_path / "cache", texts, how, lambda: calls.append("prepared"))

    def figure(measured, key, value):
        return measured.figure("a figure", key, lambda: [value, Path("texts/a").read_text()])

    measured = of([("a", "one")])
    assert figure(measured, 1, "x") == figure(measured, 1, "y") == ["x", "one"] and figure(measured, 2, "z")[0] == "z"
    assert calls == ["prepared"], "once"
    assert figure(of([("a", "one")]), 1, "y") == ["x", "one"] and calls == ["prepared"], "found, nothing is prepared"
    assert figure(of([("a", "two")]), 1, "y") == ["y", "two"] and figure(of([("a", "one")], "others"), 1, "w")[0] == "w"
    for text, value in (("one", 5), ("two", 6)):
        assert of([("a", text)]).figure("the same", 1, lambda value=value: value, of_any_text=True) == 5
    monkeypatch.setattr(common, "package_versions", lambda: {"torch": "another"})
    assert figure(of([("a", "one")]), 1, "v")[0] == "v"
    (processor,) = {machine["processor"] for machine in measured.machines}
    assert len(measured.machines) == 3 and processor == common.machine()["processor"]


def test_pauses_do_not_count_as_work_and_that_of_commands_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_command = common.subprocess.run
    works = [sys.executable, "-c", "import time\nwhile time.process_time() < 0.4: pass\ntime.sleep(1)"]
    monkeypatch.setattr(common.subprocess, "run", lambda *_, **given: run_command(works, **given))
    measured = common.Measured(tmp_path / "measured", tmp_path, [("a", "text")], None, lambda: common.call("works"))
    measured.figure("a figure", None, lambda: time.sleep(1))
    (of_figure,) = measured.seconds.values()
    (of_command,) = json.loads(next(tmp_path.rglob("processor_seconds.json")).read_text()).values()
    assert 0.4 <= of_command < 0.9 and of_command - 0.05 <= of_figure < of_command + 0.5, "each with a second of sleep"


def test_machines_are_told_once_with_their_first_and_last_date():
    found = run.together([{"date": d, "cores": c} for d, c in (("02", 2), ("03", 4), ("01", 2), ("02", 2))])
    assert found == [{"date": "01", "last": "02", "cores": 2}, {"date": "03", "last": "03", "cores": 4}]
    assert run.together([*found, {"date": "04", "cores": 2}])[0] == {"date": "01", "last": "04", "cores": 2}


def test_each_claim_is_about_the_figures_that_it_names():
    """Every variant of every evaluation has bits of its own; each claim finds those of its two sides."""
    names = {
        "memory": {claim.worse[0] for claim in CLAIMS if claim.kind == "memory"},
        "nothing": {"equal-steps", "equal-time"},
    }
    names["memory"] |= {claim.better[0] for claim in CLAIMS if claim.kind == "memory"}
    variants = ("on", "off", "random", "baseline", "in-context", "longer-context", "both", "knn-lm")
    numbers = itertools.count(1)

    def evaluation():
        return {
            "by_document": of_variants(variants, numbers),
            "filtered": [{"by_document": of_variants(variants, numbers)}],
        }

    record = {
        kind: {"models": {"evaluations": {name: evaluation() for name in sorted(of_kind)}}}
        for kind, of_kind in names.items()
    }
    gains = report.judge(record)
    assert {claim for claim, _ in gains} == set(CLAIMS)

    def bits(kind, evaluation, variant, low=False):
        e = record[kind]["models"]["evaluations"][evaluation]
        return sum((e["filtered"][0] if low else e)["by_document"][variant])

    memory_on, low = bits("memory", "lora", "on"), bits("memory", "lora", "on", True)
    expected = {
        "needs fewer bits than the base alone": bits("memory", "lora", "off") - memory_on,
        "fewer than with random neighbors": bits("memory", "lora", "random") - memory_on,
        "for as long: fewer than with LoRA": bits("memory", "lora", "baseline") - memory_on,
        "what it finds put before its text": bits("memory", "rivals", "in-context") - memory_on,
        "the time that its steps take": bits("nothing", "equal-time", "baseline") - bits("nothing", "equal-time", "on"),
        f"A memory beats random neighbors {report.LOW}": bits("memory", "lora", "random", True) - low,
        f"It beats LoRA trained for as long {report.LOW}": bits("memory", "lora", "baseline", True) - low,
        "It beats all weights trained for as long": bits("memory", "all", "baseline") - memory_on,
        "LoRA learns beats LoRA trained for as long": bits("memory", "both", "baseline") - bits("memory", "both", "on"),
        "LoRA learns beats all weights": bits("memory", "all", "baseline") - bits("memory", "both", "on"),
        "to read alone": memory_on - bits("memory", "both", "on"),
        f"LoRA learns beats LoRA {report.LOW}": bits("memory", "both", "baseline", True)
        - bits("memory", "both", "on", True),
        "four times as long": bits("memory", "longer", "baseline") - bits("memory", "longer", "on"),
        "256 more tokens of context": bits("memory", "rivals", "longer-context") - memory_on,
        "kNN-LM": bits("memory", "rivals", "knn-lm") - memory_on,
        "LoRA with what it finds": bits("memory", "tuned, in-context", "in-context")
        - bits("memory", "tuned, in-context", "on"),
        "what is before its text as well": bits("memory", "rivals", "in-context") - bits("memory", "together", "both"),
        "none at equal steps": bits("nothing", "equal-steps", "baseline") - bits("nothing", "equal-steps", "on"),
        "one of a tenth": bits("memory", "database a tenth", "on") - bits("memory", "neighbors 2", "on"),
        "ten times as much": bits("memory", "neighbors 2", "on") - bits("memory", "database ten times", "on"),
        "the same before its text": bits("memory", "database ten times", "in-context")
        - bits("memory", "database ten times", "on"),
        "from which most neighbors come": bits("memory", "database right removed", "on")
        - bits("memory", "neighbors 2", "on"),
        "8 neighbors beat 1": bits("memory", "neighbors 1", "on") - bits("memory", "neighbors 8", "on"),
        "BM25 beats BERT": bits("memory", "database bert reranked", "on") - bits("memory", "neighbors 2", "on"),
        "a compressed index": bits("memory", "database bert compressed", "on") - bits("memory", "database bert", "on"),
    }
    for words, saved in expected.items():
        (gain,) = [gain for (claim, _), gain in gains.items() if words in claim.text] or pytest.fail(words)
        assert gain["value"] == pytest.approx(saved / 400), words
    assert len(expected) == len(CLAIMS) - 1, "all but that of models from nothing, beside random neighbors"


def test_what_has_fewer_seeds_is_compared_with_the_first_seeds_of_what_has_more():
    beside = next(claim for claim in CLAIMS if claim.text == "To read while LoRA learns beats to read alone")
    evaluations = {
        "lora": {"by_document": {"on": [[5.0, 6.0], [50.0, 60.0]], "bytes": [2, 3]}},
        "both": {"by_document": {"on": [[1.0, 3.0]], "bytes": [2, 3]}},
    }
    without, having, n_bytes = beside.bits(evaluations)
    assert (without - having).tolist() == [[4, 3]] and n_bytes.tolist() == [2, 3]
    assert report.share_saved({"evaluations": evaluations}, beside) == 1 - 4 / 11
    ((gain,),) = (judged({"both": (without - having, n_bytes)}).values(),)
    assert gain["n_seeds"] == 1 and gain["value"] == 7 / 5


def of_variants(variants, numbers):
    """Bits of four documents of 100 bytes, which no other variant has."""
    return {v: [float(n := next(numbers)), n + 7.0, n * 1.5, n + 3.0] for v in variants} | {"bytes": [100.0] * 4}


@pytest.mark.slow
def test_other_databases_hold_what_their_names_say(measured):
    record, place = measured
    (folder,) = (place / "memory").glob("*/*/data")
    corpus = Corpus.load(folder / "corpus")
    names = {split: {corpus.documents[i].name for i in corpus.split(split)} for split in ("train", "valid")}
    found = {}
    for texts in folder.parent.glob("database-*/texts"):
        found[texts.parent.name.removeprefix("database-").rpartition("-")[0]] = {
            str(f.relative_to(texts)) for f in texts.rglob("*.py")
        }
    assert len(found["a-hundredth"]) == 1 and found["a-hundredth"] < names["train"], "none fits, each being as long"
    assert len(found["a-tenth"]) == 2
    assert found["a-tenth"] < names["train"] < found["ten-times"] and not found["ten-times"] & names["valid"]
    assert found["right-removed"] < names["train"] and 1 <= len(names["train"] - found["right-removed"]) <= 7
    assert not found["python"] & names["train"] and not found["plays"] & found["python"]
    databases = {key: e["database"] for key, e in record["memory"]["models"]["evaluations"].items()}
    assert {databases[f"neighbors {k}"]["retriever"] for k in memory.NEIGHBORS} == {"bm25"}
    assert [databases[f"database {name}"]["retriever"] for name in ("bert", "hybrid reranked", "bm25")] == [
        "bert", "hybrid", "bm25",
    ]  # fmt: skip
    assert databases["database bert reranked"]["rerank"] == 50 > databases["database bm25"]["rerank"] == 0
    assert "IVF2" in databases["database bert compressed"]["index"]


@pytest.mark.slow
def test_the_right_document_is_the_one_from_which_most_of_a_document_comes(measured, monkeypatch):
    _, place = measured
    (folder,) = (place / "memory").glob("*/*/data")
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr(memory, "CHUNK_LEN", CHUNK_LEN)
    corpus, index = Corpus.load("data/corpus"), RetroIndex(data_path="data")
    expected = set()
    for i in corpus.split("valid"):
        offsets = np.arange(corpus.starts[i], corpus.starts[i + 1], CHUNK_LEN)
        texts = [corpus.text(int(o), min(CHUNK_LEN, int(corpus.starts[i + 1] - o))) for o in offsets]
        votes = Counter(int(corpus.document_of(np.array([index.nearest([t], 1)[1][0, 0]]))[0]) for t in texts)
        expected.add(corpus.documents[votes.most_common(1)[0][0]].name)
    found = memory.right_documents(corpus)
    assert len(found & expected) >= len(expected) - 1, "but for ties"


@pytest.mark.slow
def test_a_page_is_made_of_everything_and_tells_what_was_reached(measured, tmp_path):
    record, _ = measured
    report.write(record, tmp_path)
    page = (tmp_path / "RESULTS.md").read_text()
    assert all(claim.text in page for claim in report.FIRST + report.FURTHER)
    assert all(f"| {way.text} |" in page for way in report.MEMORY + report.NOTHING)
    assert "Not measured yet" not in page
    assert page.index("* A base that reads") < page.index("## The claims") < page.index("## What was asked for")
    e = record["memory"]["models"]["evaluations"]
    on, off = (np.mean(e["lora"]["by_document"][variant], axis=0).sum() for variant in ("on", "off"))
    assert f"(models: {100 * (1 - on / off):+.0f}%)" in page
    (row,) = (line for line in page.splitlines() if line.startswith("| kNN-LM | ") and "billion" in line)
    assert set(report.costs_of(record["memory"]["models"])) == {
        way for way in report.MEMORY if "random" not in way.text
    }
    cost = record["memory"]["models"]["costs"]["knn-lm"]
    assert f"{cost['operations'] / 1e9:.2f} billion | {1e3 * cost['seconds']:.0f} ms" in row
    counts = {name: made[0]["n_parameters"] for name, made in record["memory"]["models"]["runs"].items()}
    (reads, *_) = record["memory"]["models"]["runs"]["memory"]
    alone = counts["memory"] - reads["n_trained_parameters"]
    costs = {way.text: found for way, found in report.costs_of(record["memory"]["models"]).items()}
    weights = {text: round(found["weights"] / 4) for text, found in costs.items()}
    assert counts["both"] > counts["memory"] > alone == weights["kNN-LM"] == weights["the base alone"]
    assert weights["**reads what it finds**"] == counts["memory"]
    assert weights["**reads what it finds, while LoRA learns**"] == counts["both"]
    assert weights["LoRA, trained for as long"] == counts["lora"] > alone
    tuned = "LoRA for as long, what it finds before its text"
    assert weights[tuned] == counts["lora"]
    megabytes = (4 * alone + cost["kept"]) / 1e6, cost["searched"] / 1e6
    assert row.endswith(f"| {megabytes[0]:,.0f} MB | {megabytes[1]:,.1f} MB |") and megabytes[1] > 0
    assert f"{e['rivals']['bits_per_byte']['knn-lm']['value']:.3f}" in row
    for text, evaluation, variant in (("kNN-LM", "rivals", "knn-lm"), (tuned, "tuned, in-context", "in-context")):
        values = [filtered["bits_per_byte"][variant] for filtered in e[evaluation]["filtered"]]
        assert f"| {text} | {' | '.join('–' if v is None else f'{v:.3f}' for v in values)} |" in page, "of r(C)"
    of_seeds = {line.split(" | ")[0]: line.split(" | ")[-1] for line in page.splitlines() if " to " in line}
    assert of_seeds[f"| {tuned}"] == "1 |" and of_seeds["| LoRA, trained for as long"] == "2 |"
    (swept,) = [line for line in page.splitlines() if line.startswith("| database ten times |")]
    in_context = e["database ten times"]["bits_per_byte"]["in-context"]["value"]
    assert swept.endswith(f" | {in_context:.4f} |"), "beside the same in the prompt"
    assert e["both, most neighbors"]["n_neighbors"] == e["neighbors 8"]["n_neighbors"] == 8
    eight, all_tuned = (np.sum(e[name]["by_document"]["on"]) for name in ("neighbors 8", "both, most neighbors"))
    lora, every = (np.array(e[name]["by_document"]["baseline"])[0].sum() for name in ("lora", "all"))
    assert f"{1 - eight / lora:.1%} fewer than LoRA and {1 - eight / every:.1%} fewer than all weights;\n" in page
    assert f"too, {1 - all_tuned / lora:.1%} fewer than LoRA and {1 - all_tuned / every:.1%} fewer than all" in page
    more = record["memory"]["models"]["costs"]["on, most neighbors"]
    assert more["operations"] > record["memory"]["models"]["costs"]["on"]["operations"]
    assert f"A token then takes {more['operations'] / 1e9:.2f} billion operations" in page
    few = record["nothing"]["models"]["few"]
    on, without = (few["longer"]["4"]["bits_per_byte"][variant]["value"] for variant in ("on", "baseline"))
    more = few["of all"]["4"]["bits_per_byte"]["on"]["value"]
    assert more != on, "with another database"
    passes = 4 * 8 * CHUNK_LEN * 8 / few["tokens"]["train"]  # steps, samples, tokens of each
    cells = f"{without:.4f} | {on:.4f} | {1 - on / without:.1%} | {more:.4f} | {1 - more / without:.1%} |"
    assert f"| 4 | {passes:.1f} | {cells}" in page
    for file in ("costs.png", "filtered-models.png"):
        assert (tmp_path / file).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_is_not_measured_yet_is_left_out_of_the_page(measured, tmp_path):
    record = json.loads(json.dumps(measured[0]))
    part = record["memory"]["models"]["evaluations"]
    for name in [name for name in part if name not in ("lora", "rivals")]:
        del part[name]
    del record["memory"]["models"]["runs"]["all"], record["memory"]["models"]["costs"]["knn-lm"]
    record["nothing"], record["measured"]["nothing"] = {}, {}
    report.write(record | {"memory": measured[0]["memory"]}, tmp_path)  # with all that there is of a base
    report.write(record, tmp_path)
    page = (tmp_path / "RESULTS.md").read_text()
    assert report.BASE.text in page and report.EQUAL_TIME.text not in page and "From nothing" not in page
    assert "What was asked for" not in page and "Other databases" not in page
    assert "Not measured yet: nothing of models." in page
    first = run.FULL["memory"]["models"].rounds()[0]
    record["measured"]["memory"]["models"] = asdict(first)
    record["sizes"]["memory"]["models"] = asdict(run.FULL["memory"]["models"])
    left = ["memory of models with seeds 1, 2", "memory of models: searches, sweeps, longer", "nothing of models"]
    assert [*report.not_measured(record)] == left
    record["measured"]["memory"]["models"] = asdict(replace(first, seeds=run.SEEDS, both=run.SEEDS))
    assert [*report.not_measured(record)] == ["memory of models: searches, sweeps, longer", "nothing of models"]


# Ablations.


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
        "command": "make ablations", "machine": common.machine(), "size": asdict(size), "variants": rows,
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
