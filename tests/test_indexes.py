"""Indexes are what they say: tried before they are filled, measured as they are used, read while somebody writes."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import faiss
import numpy as np
import pytest
from conftest import CHUNK_LEN, refused

from retro.config import DatabaseConfig, DatasetConfig
from retro.database import RetroIndex, build_database, chunk_offsets
from retro.dataset import DATASET_FILE, Dataset, build_dataset
from retro.errors import DamagedFile, InvalidOption
from retro.planning.rates import plannable_index
from retro.search import index_file
from retro.search.factory import MOST_LISTS, choose_index, new_index, prepare_training
from retro.search.filling import memory_of_machine
from retro.search.index_file import merge_lists, read_database_manifest, write_lists
from retro.search.keys import ChunkOffsets, Keys
from retro.search.recall import (
    N_RECALL_QUERIES,
    ExactNeighbors,
    barred_in_training,
    choose_n_probe,
    nearest_distances,
    query_offsets,
)
from retro.search.trial import require_working_index, small
from retro.text.corpus import Corpus, DocumentEntry
from retro.text.tokenizer import CharTokenizer


@pytest.fixture
def keyed(data, tmp_path):
    """A data folder with the keys of `data`, and no index as yet."""
    for name in ("keys", "corpus"):
        shutil.copytree(data / name, tmp_path / name)
    return tmp_path


def build(folder, bert, **options):
    return build_database(CHUNK_LEN, data_path=folder, bert=bert, config=DatabaseConfig(**options))


# What is refused, before anything is embedded.


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("IVF16,PQ16,RFlat", "add_with_ids not implemented"),
        ("IDMap,Flat", "does not make sense with IndexIDMap"),
        ("IVF0,Flat", "cur_nprobe > 0"),
        ("LSH", "search params not supported"),
        ("PQ16,RFlat", "params"),
        ("IVF4,", "could not parse code description"),
        ("", "could not parse index string"),
        ("HNSW0", "assertion"),  # ends the process
        ("PCA0,Flat", "keys do not find themselves"),
        ("HNSW10000000", "bad_alloc"),
        (f"IVF{MOST_LISTS + 1},Flat", "more than"),
    ],
)
def test_an_index_that_cannot_serve_is_refused_in_one_sentence_before_anything_is_embedded(
    keyed, bert, monkeypatch, factory, message
):
    monkeypatch.setattr(Keys, "compute", lambda *_: pytest.fail("something was embedded"))
    with refused(InvalidOption, rf"^--index \S+ cannot be the index of a database: FAISS failed on it \(.*{message}"):
        build(keyed, bert, index=factory)
    assert not (keyed / "retro.index.json").exists()


@pytest.mark.parametrize(
    "factory", ["IVF1000000,PQ64", "OPQ64_256,IVF65536_HNSW32,PQ64", "IDMap2,Flat", "HNSW16", "IVF4,PQ16x4fs"]
)
def test_an_index_of_any_size_that_can_serve_is_let_through_after_a_quick_trial(factory):
    require_working_index(factory, 384)


def test_an_index_with_too_few_keys_to_learn_from_is_refused_in_one_sentence(keyed, bert):
    with refused(InvalidOption, r"^--index PCA64,Flat cannot learn from 20 keys of 384 features: .*PCA matrix"):
        build(keyed, bert, index="PCA64,Flat", n_train=20)


def test_a_trial_has_few_lists_and_short_codes():
    assert small("OPQ16,IVF65536_HNSW32,PQ16x12") == "OPQ16,IVF4_HNSW32,PQ16x8"
    assert small("IVF2,PQ8") == "IVF2,PQ8" and small("IVF0,Flat") == "IVF0,Flat" and small("IMI2x14") == "IMI2x8"


@pytest.mark.parametrize("factory", ["IVF0,Flat", "IVF4_HNSW0,Flat", "IVF4,PQ0", f"IVF{MOST_LISTS + 1},Flat"])
def test_a_plan_refuses_lists_that_there_cannot_be(factory):
    with pytest.raises(InvalidOption, match=r"^index=.*(planned|no FAISS index|more than)"):
        plannable_index(factory, 32)


# What `auto` chooses.


def test_an_index_is_exact_up_to_a_size_and_then_has_about_four_square_roots_of_lists():
    # 4 * 223.6 = 894 is nearest to 2^10 in its logarithm, 9.8; 4 * 1414 = 5657 to 2^12, 12.47; 4 * 2236 = 8944 to 2^13.
    for n_chunks, factory in [
        (50_000, "Flat"),
        (50_001, "IVF1024,PQ64"),
        (2_000_000, "IVF4096,PQ64"),
        (5_000_000, "IVF8192,PQ64"),
        (5_000_001, "OPQ64,IVF8192_HNSW32,PQ64"),
        (10**12, "OPQ64,IVF1048576_HNSW32,PQ64"),
    ]:
        assert choose_index(n_chunks, 384) == factory
    assert choose_index(2_000_000, 100) == "IVF4096,PQ50", "a code divides the features"


# How many lists to search.


def with_recalls(n_lists, recalls):
    """An empty index of so many lists, and queries whose recall with 1, 2, 4, ... lists is given."""
    index = new_index(8, f"IVF{n_lists},Flat")
    exact = SimpleNamespace(recall=lambda index, _: {"@1": 1.0, "@10": recalls[int(np.log2(index.nprobe))]})
    return choose_n_probe(index, None, exact, 0.9)


def test_lists_are_added_while_they_may_find_more():
    assert with_recalls(64, [0, 0, 0.1, 0.5, 0.95, 1, 1]) == (16, "")
    assert with_recalls(64, [0, 0, 0, 0, 0, 0, 0.91]) == (64, "")
    assert with_recalls(64, [0.3, 0.3, 0.3, 0.95, 1, 1, 1]) == (8, "")
    assert with_recalls(64, [0.9, 1, 1, 1, 1, 1, 1]) == (1, "")


def test_where_codes_end_short_of_the_target_the_note_tells_what_was_measured():
    chosen, note = with_recalls(256, [0.2, 0.5, 0.8, 0.8, 0.801, 0.801, 0.801, 0.801, 0.801])
    assert chosen == 4
    assert note == ("recall 90.0% @10 is out of reach: 16 of 256 lists give 80.1%, and the 4 that are searched 80.0%")
    assert with_recalls(4, [0.0, 0.2, 0.4])[1].startswith("recall 90.0% @10 is out of reach: 4 of 4 lists give 40.0%")
    nothing = SimpleNamespace(recall=lambda *_: {})
    assert choose_n_probe(new_index(8, "IVF16,Flat"), None, nothing, 0.9)[0] == 16


def test_a_real_index_searches_the_fewest_lists_that_reach_the_target(keyed, bert):
    manifest = build(keyed, bert, index="IVF32,Flat", n_probe=None, recall=0.8)
    assert 1 < manifest["n_probe"] < 32 and manifest["recall"]["@10"] >= 0.8 and not manifest["note"]
    half = build(keyed, bert, index="IVF32,Flat", n_probe=manifest["n_probe"] // 2)
    assert half["recall"]["@10"] < 0.8


# Recall, as training will have it.


def by_hand(index):
    """Recall, with queries drawn as for the manifest, and nothing else of it."""
    corpus, m = index.corpus, index.chunk_len
    queries = query_offsets(corpus, m, index.manifest["seed"])
    own = [(int(corpus.starts[d]), int(corpus.starts[d + 1])) for d in corpus.document_of(queries)]
    embedded = index.embed([corpus.text(o, m) for o in queries.tolist()])
    offsets = chunk_offsets(corpus, m)
    keys = index.keys.rows(np.arange(len(offsets))).astype("float64")
    recall = {}
    for k in (1, 2, 10):
        _, found = index.search(embedded, k, np.array(own))
        shares = []
        for query, (first, end), row in zip(embedded, own, found.tolist(), strict=True):
            distances = ((keys - query) ** 2).sum(-1)
            distances[(offsets >= first) & (offsets < end)] = np.inf
            near = set(offsets[distances <= np.sort(distances)[k - 1] + 1e-3].tolist())  # equal texts are equally far
            shares.append(len(near & set(row)) / k)
        recall[f"@{k}"] = float(np.mean(shares))
    return recall


def test_recall_is_that_of_queries_as_training_makes_them_and_searches_the_manifests_lists(keyed, bert):
    recalls = {}
    for n_probe in (1, 4):
        manifest = build(keyed, bert, index="IVF16,PQ16", n_probe=n_probe)
        index = RetroIndex(data_path=keyed, bert=bert)
        assert index.index.nprobe == index.n_probe == manifest["n_probe"] == n_probe
        recalls[n_probe] = by_hand(index)
        assert manifest["recall"] == pytest.approx(recalls[n_probe], abs=0.003), n_probe
    assert recalls[1]["@10"] < recalls[4]["@10"] - 0.1 and recalls[1]["@10"] < 0.8
    assert by_hand(RetroIndex(data_path=keyed, bert=bert, n_probe=1)) == pytest.approx(recalls[1], abs=0.003)


def corpus_of(lengths, n_train, **more):
    documents = [DocumentEntry(f"{i}", "", n, n) for i, n in enumerate(lengths)]
    return Corpus(np.zeros(sum(lengths), np.uint16), documents, n_train, CharTokenizer(["a"]), **more)


def test_queries_begin_anywhere_in_training_documents_with_a_chunk_and_a_token_to_come():
    corpus = corpus_of([20, 3, 17, 500], 3)
    # A document of 20 has 4 such beginnings, of 17 one; of a shorter one it is its own.
    assert query_offsets(corpus, 16, 0).tolist() == [0, 1, 2, 3, 20, 23]
    long = corpus_of([5000, 5000, 900], 2)
    drawn = query_offsets(long, 16, 0)
    assert len(drawn) == len(set(drawn.tolist())) == N_RECALL_QUERIES and len(set((drawn % 16).tolist())) == 16
    assert drawn.max() < 10_000 and 80 < (drawn < 5000).sum() < 176
    assert drawn.tolist() != query_offsets(long, 16, 1).tolist()


def test_a_query_may_not_find_its_document_or_where_one_trains_what_overlaps_it():
    offsets = np.array([3, 25])
    assert barred_in_training(corpus_of([20, 30, 9], 2), offsets, 16).tolist() == [[[0, 20]], [[20, 50]]]
    assert barred_in_training(corpus_of([200, 30], 1), offsets, 16).tolist() == [[[-28, 20]], [[-6, 42]]]


def test_the_nearest_by_brute_force_are_those_by_hand_over_small_blocks_and_several_ranges():
    rng = np.random.default_rng(1)
    keys, queries = (rng.standard_normal((n, 8)).astype(np.float32) for n in (40, 5))
    offsets = np.arange(40) * 16
    nothing = (0, 0)
    barred = [[nothing] * 2, [(0, 160), (600, 640)], [(-9, 1), (32, 33)], [(0, 560), (0, 16)], [(0, 640), nothing]]
    barred = np.array(barred)
    found = nearest_distances(queries, barred, [(offsets[i : i + 7], keys[i : i + 7]) for i in range(0, 40, 7)])
    for query, ranges, row in zip(queries, barred.tolist(), found, strict=True):
        kept = np.array([not any(first <= offset < end for first, end in ranges) for offset in offsets.tolist()])
        expected = np.sort(((keys[kept].astype("float64") - query) ** 2).sum(-1))[:10]
        np.testing.assert_allclose(row[: len(expected)], expected, rtol=1e-4)
        assert np.isinf(row[len(expected) :]).all()
    assert np.isfinite(found).sum(axis=1).tolist() == [10, 10, 10, 5, 0]


def test_where_chunks_begin_is_computed_and_what_number_each_has():
    drawn = np.random.default_rng(0)
    for n_train, n_valid, additions in ((1, 0, ()), (5, 2, (3, 1)), (4, 3, (2,))):
        lengths = drawn.integers(1, 40, size=n_train + n_valid + sum(additions)).tolist()
        documents = [DocumentEntry(f"{i}", "", n, n) for i, n in enumerate(lengths)]
        corpus = Corpus(np.zeros(sum(lengths), np.uint16), documents, n_train, None, additions=additions)
        in_parts = [i for i in range(len(lengths)) if not n_train <= i < n_train + n_valid]
        by_hand, of_document = [], []
        for i in in_parts:
            for nth in range(max(1, lengths[i] // 8)):
                by_hand.append(sum(lengths[:i]) + 8 * nth)
                of_document.append(i)
        offsets = ChunkOffsets(corpus, 8)
        assert offsets[:].tolist() == by_hand and len(offsets) == len(by_hand)
        assert offsets[2:-1:2].tolist() == by_hand[2:-1:2]
        shuffled = drawn.permutation(len(by_hand)).reshape(1, -1)
        assert offsets[shuffled].tolist() == [[by_hand[i] for i in shuffled[0]]]
        every = np.arange(-3, sum(lengths) + 50)
        expected = [by_hand.index(o) if o in by_hand else -1 for o in every.tolist()]
        assert offsets.numbers_of(every).tolist() == expected
        some = set(drawn.choice(in_parts, size=len(in_parts) // 2, replace=False).tolist())
        assert offsets.of_documents(some).tolist() == [u for u, i in enumerate(of_document) if i in some]
        assert [len(part) for part in offsets.parts] == [sum(i in part for i in of_document) for part in corpus.parts]


def test_what_was_removed_is_no_true_neighbor(data, bert):
    corpus = Corpus.load(data / "corpus")
    without = Corpus(corpus.tokens, corpus.documents, corpus.n_train, corpus.tokenizer, removed=[0])
    every, fewer = (Keys(data, c, CHUNK_LEN, bert.manifest) for c in (corpus, without))
    fewer.shards = every.shards
    kept = ExactNeighbors.of(fewer, bert, 0)
    numbers = np.flatnonzero(every.offsets[:] >= corpus.starts[1])
    blocks = [(every.offsets[numbers], every.rows(numbers))]
    np.testing.assert_allclose(kept.distances, nearest_distances(kept.queries, kept.barred, blocks), rtol=1e-5)
    assert (ExactNeighbors.of(every, bert, 0).distances < kept.distances - 1e-3).any()


def test_of_fewer_neighbors_than_are_asked_for_recall_counts_those_there_are():
    keys = np.eye(6, 8, dtype=np.float32)
    index = faiss.IndexIDMap2(faiss.IndexFlatL2(8))
    index.add_with_ids(keys[:4], np.arange(4) * 16)  # the index lacks the last two
    queries, barred = keys[:2] + 0.1, np.array([[(0, 1)], [(0, 96)]])
    blocks = [(np.arange(6) * 16, keys)]
    exact = ExactNeighbors(queries, barred, nearest_distances(queries, barred, blocks))
    # The first has 5 neighbors, all about equally far, of which 3 can be found; the second has none.
    assert exact.recall(index, None)["@10"] == 0.6
    assert ExactNeighbors(queries[1:], barred[1:], exact.distances[1:]).recall(index, None) == {}


# Neighbors that there are.


def test_three_neighbors_are_three(data, index, tmp_path):
    build_dataset(None, 4, data_path=tmp_path, corpus=index.corpus, index=index, config=DatasetConfig(n_neighbors=3))
    dataset = Dataset(tmp_path / DATASET_FILE["train"], index.corpus)
    rows = [row for i in range(len(dataset)) for row in dataset.line(i)["neighbors"]]
    assert len(rows) > 50 and all(len(set(row)) == len(row) == 3 for row in rows)
    assert dataset[0][2].shape == (4, 3, 2 * CHUNK_LEN) and (dataset[0][2][:, :, 0] >= 0).all()


def test_a_dataset_without_a_single_neighbor_is_refused_and_not_written(data, bert, tmp_path, monkeypatch):
    index = RetroIndex(data_path=data, bert=bert)
    found = np.array([-1, -1])

    def search(queries, *_):
        return np.zeros((len(queries), 2)), np.tile(found, (len(queries), 1))

    monkeypatch.setattr(index, "nearest_at", search)
    message = "--exclude document leaves no chunk of the train samples a neighbor.*--n-probe.*--exclude sample"
    with refused(InvalidOption, message):
        build_dataset(None, 4, data_path=tmp_path, corpus=index.corpus, index=index)
    assert not list(tmp_path.glob("*.jsonl"))
    shutil.rmtree(tmp_path / "retro_train_dataset.shards")
    found[0] = 0
    assert build_dataset(None, 4, data_path=tmp_path, corpus=index.corpus, index=index)["train"]["n_samples"]


# Reading while somebody writes.


def interrupted_after_the_manifest(folder, bert, monkeypatch, factory):
    """A database of `factory` whose files still wait to be renamed."""

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(index_file, "promote_new_index", die)
        with pytest.raises(KeyboardInterrupt):
            build(folder, bert, index=factory)


def test_lists_are_learnt_on_gpus_where_faiss_has_them_and_on_all_cores_where_others_wait(keyed, bert, monkeypatch):
    build(keyed, bert, index="IVF8,Flat")
    alone = (keyed / "retro.index").read_bytes()
    learnt, threads = [], []
    train = faiss.IndexIVFFlat.train

    def watched(index, x):
        learnt.append(index.clustering_index is not None and index.clustering_index.this == on_gpus.this)
        threads.append(faiss.omp_get_max_threads())
        train(index, x)

    on_gpus = faiss.IndexFlatL2(bert.d_emb)  # stands for one on GPUs, which computes the same
    monkeypatch.setattr(faiss.IndexIVFFlat, "train", watched)
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 1, raising=False)
    monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", lambda index: on_gpus, raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda process: range(3))
    monkeypatch.setattr("retro.parallel.n_processes", lambda: 2)
    monkeypatch.setattr("retro.parallel.wait_for_everyone", lambda: None)
    monkeypatch.setattr("retro.parallel._store", lambda: None)
    monkeypatch.setattr("retro.parallel.my_share", lambda numbers: numbers)
    before = faiss.omp_get_max_threads()
    build(keyed, bert, index="IVF8,Flat", seed=1)
    assert learnt == [True] and threads == [3] and faiss.omp_get_max_threads() == before
    monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
    build(keyed, bert, index="IVF8,Flat")
    assert learnt == [True, False] and (keyed / "retro.index").read_bytes() == alone


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_reader_finds_a_new_index_where_it_lies_and_renames_nothing(keyed, bert, monkeypatch, on_disk):
    if on_disk:
        monkeypatch.setattr("retro.search.filling.ON_DISK_ABOVE", 0)
        build(keyed, bert, index="IVF4,PQ16")
    else:
        build(keyed, bert, index="Flat")
    interrupted_after_the_manifest(keyed, bert, monkeypatch, "IVF8,Flat")
    before = {file.name: file.stat().st_ino for file in keyed.iterdir() if file.name.startswith("retro.i")}
    assert ("retro.ivfdata.new" in before) == on_disk and "retro.index.new" in before
    # Another process writes.
    hold = "import sys; from filelock import FileLock; FileLock(sys.argv[1]).acquire(); print(flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", hold, str(keyed / ".lock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        holder.stdout.readline()
        index = RetroIndex(data_path=keyed, bert=bert)
        assert index.index.nlist == 8 and index.index.ntotal == index.manifest["n_chunks"]
        corpus = index.corpus
        distances, found = index.search(index.embed([corpus.text(0, CHUNK_LEN)]), 1)
        assert found[0, 0] == 0 and distances[0, 0] == pytest.approx(0, abs=1e-3)
    finally:
        holder.communicate(b"\n")
    after = {file.name: file.stat().st_ino for file in keyed.iterdir() if file.name.startswith("retro.i")}
    assert after == before


def test_a_build_that_is_killed_does_not_lose_an_index_that_waits_for_its_place(keyed, bert, monkeypatch):
    interrupted_after_the_manifest(keyed, bert, monkeypatch, "SQ8")

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(index_file, "write_manifest", die)
    with pytest.raises(KeyboardInterrupt):
        build(keyed, bert, index="Flat")
    monkeypatch.undo()
    assert RetroIndex(data_path=keyed, bert=bert).manifest["index"] == "SQ8"


def test_what_waits_but_is_not_the_manifests_is_no_index(keyed, bert):
    build(keyed, bert, index="Flat")
    (keyed / "retro.index").rename(keyed / "kept")
    shutil.copy(keyed / "kept", keyed / "retro.index")
    with open(keyed / "retro.index", "ab") as file:
        file.write(b"x")
    (keyed / "retro.index.new").write_bytes(b"not it")
    with refused(DamagedFile, r"retro\.index has sha256 .* says"):
        RetroIndex(data_path=keyed, bert=bert)
    assert read_database_manifest(keyed)["index"] == "Flat"


# Memory.


def cgroups(root, own, limits):
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/cgroup").write_text(own)
    for path, text in limits.items():
        (root / "sys/fs/cgroup" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "sys/fs/cgroup" / path).write_text(text)
    return memory_of_machine(root)


def test_memory_is_what_the_narrowest_control_group_leaves(tmp_path):
    machine = memory_of_machine(tmp_path / "none")
    assert machine > 1 << 20
    v2 = {"memory.max": "max\n", "job/memory.max": "3000000\n", "job/step/memory.max": "max\n"}
    v2["else/memory.max"] = "5\n"
    assert cgroups(tmp_path / "v2", "0::/job/step\n", v2) == 3_000_000
    v1 = {"memory/memory.limit_in_bytes": f"{1 << 62}\n", "memory/a/b/memory.limit_in_bytes": "2000000\n"}
    assert cgroups(tmp_path / "v1", "3:cpu,cpuacct:/\n5:memory:/a/b\n0::/\n", v1) == 2_000_000
    inside = {"memory/memory.limit_in_bytes": "1000000\n"}  # the host's name for the group is no path here
    assert cgroups(tmp_path / "inside", "5:memory:/docker/1f2e\n", inside) == 1_000_000
    assert cgroups(tmp_path / "free", "0::/\n", {"memory.max": "max\n"}) == machine


def test_a_part_of_an_index_holds_its_lists_and_not_what_all_parts_share(tmp_path):
    keys = np.random.default_rng(0).standard_normal((3000, 64), np.float32)
    index = new_index(64, "OPQ8,IVF64_HNSW8,PQ8")
    prepare_training(index)
    index.train(keys)
    whole = faiss.deserialize_index(faiss.serialize_index(index))
    whole.add_with_ids(keys, np.arange(3000) * 7)
    for number, some in enumerate((slice(1000), slice(1000, 3000))):
        part = faiss.deserialize_index(faiss.serialize_index(index))
        part.add_with_ids(keys[some], np.arange(3000)[some] * 7)
        write_lists(part, tmp_path / f"{number}")
        # A code of 8 bytes and an offset of 8 a key, a length of 8 a list.
        assert 0 <= (tmp_path / f"{number}").stat().st_size - 16 * part.ntotal - 8 * 64 < 100
    for number in range(2):
        merge_lists(index, tmp_path / f"{number}")
    assert index.ntotal == 3000 and np.array_equal(faiss.serialize_index(index), faiss.serialize_index(whole))
