"""The planner: its bytes are those of real files, its times follow from its rates, the rest it refuses."""

import itertools
import json
import shutil
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
from conftest import CHUNK_LEN, load_script

from retro.config import DatabaseConfig
from retro.database import build_database
from retro.planning import plan as planner
from retro.planning import rates
from retro.planning.plan import describe, index_bytes, plan
from retro.planning.rates import Rates, measure
from retro.search import bm25
from retro.search.factory import new_index, prepare_training
from retro.search.index_file import read_database_manifest
from retro.search.recall import N_RECALL_QUERIES
from retro.text.build import LEARNT_FROM
from retro.text.corpus import Corpus

RATES = Rates(
    chunk_len=32,
    valid_fraction=0.1,
    d_emb=384,
    bytes_per_token=3.0,
    token_bytes=2,
    tokens_per_chunk=36.0,  # so that 4e8 tokens, of which 3.6e8 are for training, are 1e7 chunks
    tokens_per_document=5000.0,
    document_bytes=200.0,
    base_memory=700_000_000,
    start_seconds=2.0,
    corpus_seconds=1e-6,
    learn_seconds=2e-6,
    embed_seconds=2e-3,
    file_bytes=5e8,
    kmeans_products=1e11,
    code_products=1e10,
    encode_seconds=5e-5,
    assign_products=1e11,
    link_seconds=1e-5,
    walk_seconds=2e-6,
    recall_products=2e10,
    n_kinds=4096,
    lexical_seconds=0.0,
    lexical_bytes=0.0,
)


@pytest.fixture(scope="module")
def measured(plays):
    """Rates of the plays, from shorter measurements than a user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "EMBED_SECONDS", 0.05)
        patch.setattr(rates, "N_SAMPLE_KEYS", 1 << 10)
        patch.setattr(rates, "N_CODE_TRAIN", 1 << 10)
        return measure([plays], "bpe:512", CHUNK_LEN)


def trained(factory: str, d: int, n: int) -> faiss.Index:
    index = new_index(d, factory)
    prepare_training(index)
    if isinstance(index, faiss.IndexPreTransform):
        rotation = faiss.downcast_VectorTransform(index.chain.at(0))
        rotation.niter, rotation.niter_pq, rotation.niter_pq_0 = 1, 1, 1
    keys = np.random.default_rng(0).standard_normal((max(n, 300), d), dtype=np.float32)
    index = faiss.IndexIDMap2(index) if factory == "Flat" else index
    if not index.is_trained:
        index.train(keys)
    index.add_with_ids(keys[:n], np.arange(n) * CHUNK_LEN)
    return index


@pytest.mark.parametrize(
    "factory",
    ["Flat", "IVF16,PQ8", "IVF16,Flat", "IVF256_HNSW32,PQ8", "OPQ8,IVF64_HNSW32,PQ8", "OPQ8_16,IVF64_HNSW32,PQ8"],
)
@pytest.mark.parametrize("n", [3000, 6000])
def test_the_bytes_of_an_index_are_those_of_its_file(tmp_path, factory, n):
    faiss.write_index(trained(factory, 32, n), str(tmp_path / "index"))
    assert index_bytes(factory, n, 32) == pytest.approx((tmp_path / "index").stat().st_size, rel=0.01)


def test_the_bytes_of_a_plan_are_those_of_a_build(data, measured, monkeypatch):
    monkeypatch.setattr(planner, "LEAST_TOKENS", 1)
    corpus = Corpus.load(data / "corpus")
    n_tokens = len(corpus.tokens)
    # A play in five is held out, because documents are whole.
    planned = plan(n_tokens, replace(measured, valid_fraction=1 - corpus.n_train_tokens / n_tokens))
    manifest = read_database_manifest(data)
    assert planned.index == manifest["index"] == "Flat"
    assert planned.n_chunks == pytest.approx(manifest["n_chunks"], rel=0.01)
    real = {
        "text": sum(document.n_bytes for document in corpus.documents),
        "tokens": (data / "corpus" / "tokens.bin").stat().st_size,
        "signatures": (data / "corpus" / "signatures.bin").stat().st_size,
        "documents": next((data / "corpus").glob("documents-*.bin")).stat().st_size,
        "keys": sum(file.stat().st_size for file in (data / "keys").rglob("*.npy")),
        "index": (data / "retro.index").stat().st_size,
    }
    assert {name: planned.files[name] for name in real} == pytest.approx(real, rel=0.02)
    assert planned.files["shards"] == 0 and planned.disk["building"] == planned.disk["after"]


def test_measured_rates_are_those_of_a_machine_and_add_up_to_hours_not_years(measured):
    assert measured.lexical_seconds == measured.lexical_bytes == 0  # embeddings alone were asked for
    assert measured.learn_seconds >= 0  # by a difference, which may be nothing
    for name, value in vars(replace(measured, lexical_seconds=1e-5, lexical_bytes=1, learn_seconds=1e-7)).items():
        assert 0 < value < (1e-1 if name.endswith("seconds") and name != "start_seconds" else 1e15), name
    assert all(seconds < 86_400 for seconds in plan(1e7, measured, "IVF1024,PQ64").seconds.values())


def test_seconds_are_products_over_their_rates():
    planned = plan(4e8, RATES)  # 1e7 chunks: 4 sqrt(1e7) = 12,649 lists, as a power of two 16,384
    assert planned.n_chunks == 10_000_000 and planned.index == "OPQ64,IVF16384_HNSW32,PQ64"
    assert planned.n_train == 32 * 16384
    keys = 1e7 * 384 * 4
    assert planned.seconds["corpus"] == pytest.approx(4e8 * 3 * 1e-6 + LEARNT_FROM * 2e-6)
    assert planned.seconds["embed"] == pytest.approx(1e7 * 2e-3 + keys / 5e8)
    assert planned.seconds["recall"] == pytest.approx(N_RECALL_QUERIES * 1e7 * 384 / 2e10 + keys / 5e8)
    kmeans, codes = 10 * 32 * 16384 * 16384 * 384 / 1e11, 10 * 65536 * 256 * 384 / 1e10
    codes += (40 + 49 * 4) * 16384 * 256 * 384 / 1e10  # for the rotation
    encoded, linked = 50 * 16384 * 5e-5, 16384 * 14 * 1e-5
    assert planned.seconds["train"] == pytest.approx(kmeans + codes + encoded + linked, rel=0.001)
    added, shards = 1e7 * (14 * 2e-6 + 5e-5) + keys / 5e8, planned.files["shards"] / 5e8
    assert planned.seconds["add"] == pytest.approx(added + shards)


def test_the_bytes_of_an_index_of_tokens_are_those_of_a_build(data, plays, tmp_path, monkeypatch):
    monkeypatch.setattr(planner, "LEAST_TOKENS", 1)
    for module in (planner, bm25):  # shards whose pointers are a third of them
        monkeypatch.setattr(module, "TOKENS_PER_SHARD", 1 << 9)
    shutil.copytree(data / "corpus", tmp_path / "corpus")
    corpus = Corpus.load(tmp_path / "corpus")
    build_database(CHUNK_LEN, data_path=tmp_path, config=DatabaseConfig(retriever="bm25"))
    measured = measure([plays], "bpe:512", CHUNK_LEN, retriever="bm25")
    n_tokens = len(corpus.tokens)
    planned = plan(n_tokens, replace(measured, valid_fraction=1 - corpus.n_train_tokens / n_tokens))
    real = sum(file.stat().st_size for file in (tmp_path / "retriever").rglob("*.npy"))
    assert planned.files["bm25"] == pytest.approx(real, rel=0.02)
    assert planned.files["keys"] == planned.files["index"] == planned.files["shards"] == 0
    assert [*planned.seconds] == ["start", "corpus", "bm25"] and 0 < planned.seconds["bm25"] < 10
    assert planned.memory["serving"] == measured.base_memory < planned.memory["building"]
    assert "index: tokens in common" in (said := describe(planned)) and "keys" not in said


def test_both_ways_to_find_chunks_take_what_each_takes():
    dense, both = plan(4e8, RATES), plan(4e8, replace(RATES, lexical_seconds=1e-5, lexical_bytes=300.0))
    n_shards = -(-10_000_000 // 16384)  # of 2**19 tokens
    assert both.files == dense.files | {"bm25": 1e7 * 300 + n_shards * 4 * 4096}
    assert both.seconds == dense.seconds | {"bm25": pytest.approx(1e7 * 1e-5)}
    half = plan(4e8, RATES, key_bits=16)
    assert half.files == dense.files | {"keys": 1e7 * 384 * 2}


def test_lists_of_whole_keys_have_no_codes_to_learn_or_to_make():
    planned = plan(4e8, RATES, "OPQ64,IVF1024,Flat", n_train=32 * 1024)
    keys, shards = 1e7 * 384 * 4 / 5e8, planned.files["shards"] / 5e8
    assert planned.seconds["add"] == pytest.approx(1e7 * 1024 * 384 / 1e11 + keys + shards)
    rotation = (40 + 49 * 4) * 16384 * 256 * 384 / 1e10 + 50 * 16384 * 5e-5
    kmeans = 10 * 32 * 1024 * 1024 * 384 / 1e11
    assert planned.seconds["train"] == pytest.approx(kmeans + rotation + planned.learnt_bytes / 5e8)


def test_processes_share_embedding_and_adding_and_nothing_else():
    one, eight = plan(1e10, RATES), plan(1e10, RATES, n_processes=8)
    for stage, seconds in one.seconds.items():
        expected = seconds / 8 if stage in ("embed", "add") else seconds
        assert eight.seconds[stage] == pytest.approx(expected, rel=0.01), stage
    # 3,000 chunks are a single shard, which a second process has no part in.
    assert plan(1.2e5, RATES, n_processes=8).seconds == plan(1.2e5, RATES).seconds
    assert eight.files == one.files


@pytest.mark.parametrize("index", ["auto", "IVF256,PQ64", "Flat"])
def test_ten_times_the_text_takes_more_of_everything_up_to_ten_trillion_tokens(index):
    plans = [plan(10.0**power, RATES, index) for power in range(6, 14)]
    assert plans[-1].n_chunks == 250_000_000_000
    for less, more in itertools.pairwise(plans):
        assert less.n_chunks < more.n_chunks and sum(less.seconds.values()) < sum(more.seconds.values())
        assert all(less.disk[when] < more.disk[when] for when in less.disk)
        assert less.memory["building"] < more.memory["building"]


def test_too_few_keys_for_the_lists_are_planned_as_they_are_built():
    planned = plan(1e5, RATES, "IVF65536,PQ64")
    assert planned.index == "Flat" and "65536 centroids" in planned.note and planned.note in describe(planned)


def test_a_plan_is_told_with_units():
    text = describe(plan(1e9, RATES, n_processes=4))
    assert "1e+09 tokens, 3 GB; 25,000,000 chunks of 32 tokens" in text
    assert "index: OPQ64,IVF16384_HNSW32,PQ64, learnt from 524,288 keys" in text
    keys = next(line.split() for line in text.splitlines() if line.startswith("  keys"))
    assert keys == ["keys", "38.4", "GB"]  # 25e6 * 384 * 4 bytes
    assert "in 4 processes" in text and "(split)" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_tokens": 10}, r"n_tokens=10 is not between 100000 and 1e\+13"),
        ({"n_tokens": float("nan")}, "n_tokens=nan is not between"),
        ({"n_tokens": 1e6, "n_processes": 0}, "n_processes=0 is not at least 1"),
        ({"n_tokens": 1e6, "index": "HNSW16"}, "index='HNSW16' cannot be planned, only Flat"),
        ({"n_tokens": 1e6, "index": "IVF"}, "index='IVF' is no FAISS index"),
    ],
)
def test_what_cannot_be_planned_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        plan(rates=RATES, **options)


def test_the_published_page_is_made_of_the_published_figures():
    folder = Path(__file__).parent.parent / "benchmarks"
    scale = load_script(folder / "scale.py")
    record = json.loads((folder / "scale.json").read_text())
    assert scale.report(record) == (folder / "SCALE.md").read_text()
