"""Database and dataset: what is found, what must not be found, and what survives."""

import json
import shutil

import faiss
import numpy as np
import pytest
import torch
from conftest import CHUNK_LEN, CHUNKS_PER_SAMPLE, refused
from labml_helpers.datasets.text import TextFileDataset

from retro.bert_embeddings import BERTChunkEmbeddings
from retro.config import DatabaseConfig, DatasetConfig
from retro.database import RetroIndex, build_database, chunk_offsets
from retro.dataset import DATASET_FILE, Dataset, build_dataset, excluded_ranges
from retro.errors import DamagedFile, InvalidOption, MissingArtifact, StaleArtifact, TextTooShort
from retro.evaluation.audit import audit
from retro.search.building import config_of_database
from retro.search.factory import KMEANS_ITERATIONS, ivf_of, prepare_training, set_n_probe
from retro.search.querying import MANY_QUERIES_PER_LIST, search_many
from retro.text.build import build_corpus
from retro.text.corpus import Corpus


@pytest.fixture(scope="module")
def brute_force(index, bert):
    """A search: distances and offsets by comparing queries with every chunk of `data` outside of a range of offsets."""
    every = chunk_offsets(index.corpus, CHUNK_LEN)
    keys = bert([index.corpus.text(o, CHUNK_LEN) for o in every]).numpy().astype("float64")

    def search(queries, k, excluded=None):
        first, end = excluded or (0, 0)
        allowed = (every < first) | (every >= end)
        distances = ((queries[:, None].astype("float64") - keys[None, allowed]) ** 2).sum(-1)
        order = np.argsort(distances, axis=1)[:, :k]
        return np.take_along_axis(distances, order, axis=1), every[allowed][order]

    return search


@pytest.mark.parametrize("excluded", [None, "document"])
def test_an_exact_index_finds_what_brute_force_finds(index, brute_force, excluded):
    corpus = index.corpus
    span = (int(corpus.starts[1]), int(corpus.starts[2])) if excluded else None
    queries = index.embed([corpus.text(int(corpus.starts[1]) + 7 + 40 * i, CHUNK_LEN) for i in range(12)])
    distances, offsets = index.search(queries, 5, span)
    expected, expected_offsets = brute_force(queries, 5, span)
    np.testing.assert_allclose(distances, expected, rtol=1e-3, atol=1e-3)
    assert (offsets == expected_offsets).mean() > 0.95  # equal distances may come in another order


def test_each_query_can_leave_out_a_range_of_its_own_however_much_it_bars(index, brute_force):
    corpus, n = index.corpus, index.corpus.n_train_tokens
    ranges = np.array([(0, 0), (0, n // 2), (3 * CHUNK_LEN, n), (0, n - 2 * CHUNK_LEN), (0, n), (-9, 40), (0, n // 2)])
    texts = [corpus.text(40 * i, CHUNK_LEN) for i in range(6)]
    queries = index.embed([*texts, texts[1]])  # a query twice
    distances, offsets = index.search(queries, 4, ranges)
    for query, span, distance, found in zip(queries, ranges.tolist(), distances, offsets, strict=True):
        expected, _ = brute_force(query[None], 4, span)
        n_found = int((found >= 0).sum())
        assert n_found == expected.shape[1] and (found[n_found:] == -1).all()
        np.testing.assert_allclose(distance[:n_found], expected[0], rtol=1e-3, atol=1e-3)
        assert not any(span[0] <= offset < span[1] for offset in found[:n_found])
    assert (offsets[4] == -1).all() and (offsets[2] >= 0).sum() == 3


@pytest.mark.parametrize("factory", ["IVF16,PQ16", "IVF16,Flat"])
def test_searching_many_queries_at_once_finds_what_one_by_one_finds(factory):
    rng = np.random.default_rng(0)
    keys, queries = (rng.standard_normal((n, 32)).astype(np.float32) for n in (1000, 300))
    index = faiss.index_factory(32, factory)
    prepare_training(index)
    index.train(keys)
    index.add_with_ids(keys, np.arange(1000) * 16)
    index.nprobe = 4
    assert len(queries) * 4 >= MANY_QUERIES_PER_LIST * 16
    distances, found = search_many(index, queries, 5)
    expected, expected_ids = index.search(queries, 5)
    np.testing.assert_allclose(distances, expected, rtol=1e-4, atol=1e-4)
    assert (found == expected_ids).mean() > 0.99
    # More neighbors than the lists hold: -1, as FAISS has it.
    _, found = search_many(index, queries, 900)
    assert ((found == -1) == (index.search(queries, 900)[1] == -1)).all()


def test_an_index_learns_quickly_and_walks_to_the_nearest_lists():
    index = faiss.index_factory(384, "OPQ16,IVF512_HNSW8,PQ16")
    assert prepare_training(index) == 512
    ivf = faiss.downcast_index(faiss.extract_index_ivf(index))
    assert not ivf.do_polysemous_training and ivf.cp.niter == ivf.pq.cp.niter == KMEANS_ITERATIONS
    assert faiss.downcast_VectorTransform(index.chain.at(0)).max_train_points == 1 << 14
    # As FAISS comes, the last of many lists that the graph finds are not the nearest.
    centroids, queries = np.random.default_rng(0).standard_normal((2, 512, 384)).astype(np.float32)
    ivf.quantizer.add(centroids)
    graph = faiss.downcast_index(ivf.quantizer).hnsw

    def found(n_probe):
        lists, expected = ivf.quantizer.search(queries, n_probe)[1], faiss.knn(queries, centroids, n_probe)[1]
        return np.mean([len({*a} & {*b}) / n_probe for a, b in zip(lists.tolist(), expected.tolist(), strict=True)])

    for n_probe in (1, 64):
        graph.efSearch = 16
        before = found(n_probe)
        set_n_probe(index, n_probe)
        assert found(n_probe) > before + 0.1, n_probe


def coded(data, bert, path):
    """An index of codes over the keys of `data`, all of its lists searched."""
    shutil.copytree(data / "keys", path / "keys")
    corpus = Corpus.load(data / "corpus")
    manifest = build_database(
        CHUNK_LEN, corpus=corpus, data_path=path, bert=bert, n_probe=8, config=DatabaseConfig(index="IVF8,PQ16")
    )
    return RetroIndex(corpus=corpus, data_path=path, bert=bert), manifest


@pytest.mark.parametrize("excluded", [None, "document"])
def test_codes_propose_neighbors_and_whole_keys_decide(data, bert, brute_force, tmp_path, excluded):
    index, _ = coded(data, bert, tmp_path)
    corpus = index.corpus
    span = (int(corpus.starts[1]), int(corpus.starts[2])) if excluded else None
    queries = index.embed([corpus.text(int(corpus.starts[1]) + 7 + 9 * i, CHUNK_LEN) for i in range(100)])
    distances, offsets = index.search(queries, 3, span)
    n = len(chunk_offsets(corpus, CHUNK_LEN))
    everything, all_offsets = brute_force(queries, n, span)
    for query in range(len(queries)):
        true = dict(zip(all_offsets[query].tolist(), everything[query].tolist(), strict=True))
        np.testing.assert_allclose(distances[query], [true[o] for o in offsets[query].tolist()], rtol=1e-3, atol=1e-3)
    assert (np.diff(distances) >= 0).all()

    def share_of_true(found):
        return np.mean([len({*a} & {*b}) / 3 for a, b in zip(found.tolist(), all_offsets[:, :3].tolist(), strict=True)])

    # The nearest are found where all but the last document is left out, and the best of few are the first of many.
    bars = (0, int(corpus.starts[corpus.n_train - 1]))
    few, offsets_of_few = index.search(queries[:3], 3, bars)
    np.testing.assert_allclose(few, brute_force(queries[:3], 3, bars)[0], rtol=1e-3, atol=1e-3)
    assert (offsets_of_few >= bars[1]).all()
    if not excluded:
        np.testing.assert_array_equal(index.search(queries, 10)[0][:, :3], distances)
        assert share_of_true(offsets) > share_of_true(index.index.search(queries, 3)[1]) + 0.1


def test_an_offset_where_no_chunk_begins_is_no_neighbor(index):
    keys = index.keys
    assert (keys.numbers_of(keys.offsets[::-1]) == np.arange(len(keys.offsets))[::-1]).all()
    for offset in (int(keys.offsets[:][3]) + 1, int(keys.offsets[:][-1]) + CHUNK_LEN, 2**60):
        with refused(DamagedFile, rf"holds offset {offset}, where no chunk begins.*retro database"):
            keys.numbers_of(np.array([0, offset]))


def test_chunks_start_with_their_documents_and_come_from_training_only(index):
    corpus, offsets = index.corpus, chunk_offsets(index.corpus, CHUNK_LEN)
    assert set(corpus.starts[: corpus.n_train].tolist()) <= set(offsets.tolist())
    assert offsets.max() < corpus.n_train_tokens and (np.diff(offsets) >= CHUNK_LEN).all()


@pytest.mark.parametrize(
    "factory", ["IVF8,PQ16", "IVF8,Flat", "OPQ16_64,IVF8_HNSW8,PQ16", "PCA64,Flat", "HNSW16", "SQ8"]
)
def test_other_indexes_leave_a_document_out_too_and_report_their_recall(data, bert, tmp_path, factory):
    corpus = Corpus.load(data / "corpus")
    shutil.copytree(data / "keys", tmp_path / "keys")  # no embedding is needed for another index
    manifest = build_database(
        CHUNK_LEN, corpus=corpus, data_path=tmp_path, config=DatabaseConfig(index=factory), bert=bert
    )
    assert manifest["index"] == factory and 0.2 < manifest["recall"]["@10"] <= 1
    index = RetroIndex(corpus=corpus, data_path=tmp_path, bert=bert, n_probe=8)
    if "_HNSW" in factory:  # as it was while the index was filled
        assert faiss.downcast_index(ivf_of(index.index).quantizer).hnsw.efSearch == 64
    span = (int(corpus.starts[0]), int(corpus.starts[1]))
    _, offsets = index.search(index.embed([corpus.text(5, CHUNK_LEN)]), 8, span)
    assert (offsets >= span[1]).all()


def test_an_index_with_more_centroids_than_keys_becomes_exact_and_says_so(data, bert, tmp_path):
    shutil.copytree(data / "keys", tmp_path / "keys")
    manifest = build_database(
        CHUNK_LEN,
        n_centeroids=100_000,
        code_size=16,
        corpus=Corpus.load(data / "corpus"),
        data_path=tmp_path,
        bert=bert,
    )
    assert manifest["index"] == "Flat" and manifest["recall"]["@10"] == 1
    assert "100000 centroids to learn" in manifest["note"]


def test_a_value_is_a_chunk_and_its_continuation(index):
    tokens, offset = index.corpus.tokens, int(index.corpus.starts[1]) + 3 * CHUNK_LEN
    values = index.values(np.array([[offset, -1], [offset + 7, 0]]))
    starts = [offset, offset + 7, 0]
    assert values[[0, 1, 1], [0, 0, 1]].tolist() == [tokens[i : i + 2 * CHUNK_LEN].tolist() for i in starts]
    assert values.shape == (2, 2, 2 * CHUNK_LEN) and (values[0, 1] == -1).all()


def test_a_call_of_the_index_filters_as_the_tutorial_does(index):
    span = CHUNK_LEN + 8
    assert index.filter_neighbors(100, [100 - span - 1, 100 - span, 100, 100 + span, 100 + span + 1]) == [
        100 - span - 1,
        100 + span + 1,
    ]
    text = index.corpus.text(0, CHUNK_LEN)
    assert index([text], None)[0][0] == 0 and 0 not in index([text], [0])[0]


@pytest.mark.parametrize("exclude", ["document", "sample", "span"])
def test_no_neighbor_holds_what_its_sample_has_yet_to_predict_but_with_the_tutorials_span(
    data, index, tmp_path, exclude
):
    config = DatasetConfig(exclude=exclude)
    build_dataset(None, CHUNKS_PER_SAMPLE, data_path=tmp_path, corpus=index.corpus, index=index, config=config)
    dataset, corpus = Dataset(tmp_path / DATASET_FILE["train"], index.corpus), index.corpus
    leaks = 0
    for idx in range(len(dataset)):
        sample, (_, targets, values) = dataset.line(idx), dataset[idx]
        n = int((targets >= 0).sum())
        for u, row in enumerate(sample["neighbors"]):
            future = set(range(sample["offsets"][0] + (u + 1) * CHUNK_LEN, sample["offsets"][0] + n + 1))
            for k, start in enumerate(row):
                value = values[u, k][values[u, k] >= 0].tolist()
                assert value == corpus.tokens[start : start + len(value)].tolist()
                leaks += bool(future & set(range(start, start + len(value))))
                if exclude == "sample":
                    span = range(sample["offsets"][0], sample["offsets"][0] + CHUNKS_PER_SAMPLE * CHUNK_LEN + 1)
                    assert start + len(value) <= span.start or start >= span.stop
                if exclude == "document":
                    assert corpus.document_of(start) != corpus.document_of(sample["offsets"][0])
            if exclude != "span":
                assert len(row) == 2, "two neighbors exist for every chunk"
    assert audit(dataset)["leaking_neighbors"] == leaks
    assert (leaks > 0) == (exclude == "span")


def test_the_range_that_span_excludes_is_the_tutorials(index):
    header = {"split": "train", "exclude": "span", "chunk_len": CHUNK_LEN, "chunks_per_sample": CHUNKS_PER_SAMPLE}
    chunks, found = np.array([100, 131]), np.arange(300)
    for chunk, ((first, end),) in zip(chunks, excluded_ranges(chunks, chunks, header, index).tolist(), strict=True):
        kept = found[(found < first) | (found >= end)]
        assert kept.tolist() == index.filter_neighbors(int(chunk), found.tolist()) and len(kept) < 300


def test_unless_told_otherwise_a_neighbor_is_of_another_document_or_where_one_trains_outside_of_the_sample(
    data, index, tmp_path, bert
):
    dataset, corpus = Dataset(data / DATASET_FILE["train"], index.corpus), index.corpus
    assert dataset.header["exclude"] == "document"
    for sample in (dataset.line(i) for i in range(len(dataset))):
        assert all(
            corpus.document_of(n) != corpus.document_of(sample["offsets"][0]) for r in sample["neighbors"] for n in r
        )
    (tmp_path / "one.txt").write_text(corpus.text(0, 3000))
    one = build_corpus([tmp_path / "one.txt"], tmp_path / "corpus", str(data / "corpus"))
    build_database(CHUNK_LEN, corpus=one, data_path=tmp_path, bert=bert, config=DatabaseConfig(index="Flat"))
    headers = build_dataset(None, 2, data_path=tmp_path, index=RetroIndex(data_path=tmp_path, bert=bert))
    assert headers["train"]["exclude"] == "sample" and one.n_train == 1


def test_validation_documents_are_in_no_sample_and_no_neighbor(data):
    corpus = Corpus.load(data / "corpus")
    for split, name in DATASET_FILE.items():
        dataset = Dataset(data / name, corpus)
        for idx in range(len(dataset)):
            sample = dataset.line(idx)
            assert int(corpus.document_of(sample["offsets"][0])) in corpus.split(split)
            assert all(n < corpus.n_train_tokens for row in sample["neighbors"] for n in row)


def test_the_tutorials_inline_json_is_read(tmp_path):
    (tmp_path / "t.txt").write_text("abcdefgh" * 20)
    tds = TextFileDataset(tmp_path / "t.txt", list)
    (tmp_path / "d.json").write_text(json.dumps([["abcd", "bcde", [["abcd", "ef"], ["gh"]]]]))
    dataset = Dataset(tmp_path / "d.json", tds)
    src, tgt, neighbors = dataset[0]
    assert (src.tolist(), tgt.tolist()) == ([0, 1, 2, 3], [1, 2, 3, 4])
    assert neighbors.tolist() == [[[0, 1, 2, 3], [4, 5, -1, -1]], [[6, 7, -1, -1], [-1, -1, -1, -1]]]


def test_the_same_seed_gives_the_same_bytes(data, bert, index, tmp_path):
    corpus = Corpus.load(data / "corpus")
    build_database(CHUNK_LEN, corpus=corpus, data_path=tmp_path, config=DatabaseConfig(index="auto"), bert=bert)
    build_dataset(None, CHUNKS_PER_SAMPLE, corpus=corpus, data_path=tmp_path, index=index)
    for name in ("retro.index", "retro.index.json", *DATASET_FILE.values()):
        assert (tmp_path / name).read_bytes() == (data / name).read_bytes(), name


def test_artifacts_that_do_not_belong_together_are_refused(data, bert, char_bert, tmp_path):
    corpus = Corpus.load(data / "corpus")
    with refused(StaleArtifact, r"chunk_len=16, but chunk_len=32 is wanted.*--chunk-len 32"):
        RetroIndex(32, data_path=data, bert=bert)
    with pytest.raises(ValueError, match="trim=False, but trim=True"):
        RetroIndex(data_path=data, bert=char_bert)
    (tmp_path / "other.txt").write_text("something else entirely\n" * 50)
    other = build_corpus([tmp_path / "other.txt"], tmp_path / "corpus")
    with refused(StaleArtifact, r"corpus_sha256=.*retro database"):
        RetroIndex(corpus=other, data_path=data, bert=bert)
    with refused(StaleArtifact, r"corpus_sha256=.*retro dataset"):
        Dataset(data / DATASET_FILE["train"], other)
    with pytest.raises(InvalidOption, match="exclude='document' leaves no neighbors"):
        single = RetroIndex(data_path=data, bert=bert)
        single.corpus = other
        build_dataset(None, corpus=other, data_path=tmp_path, index=single, config=DatasetConfig(exclude="document"))
    with refused(TextTooShort, r"has \d+ tokens in \d documents, but a sample needs.*--chunks-per-sample, --chunk-len"):
        build_dataset(None, 10_000, corpus=corpus, data_path=tmp_path, index=RetroIndex(data_path=data, bert=bert))


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
def test_a_damaged_index_never_reaches_faiss(data, bert, tmp_path, damage):
    for name in ("retro.index", "retro.index.json"):
        shutil.copy(data / name, tmp_path / name)
    path, content = tmp_path / "retro.index", (tmp_path / "retro.index").read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-100] if damage == "truncated" else content[:5000] + b"\xff" + content[5001:])
    kind, message = (MissingArtifact, "does not exist") if damage == "missing" else (DamagedFile, "has sha256 .* says")
    with refused(kind, rf"retro\.index {message}.*retro database"):
        RetroIndex(corpus=Corpus.load(data / "corpus"), data_path=tmp_path, bert=bert)


def test_a_truncated_dataset_is_refused(data, tmp_path):
    path = tmp_path / "d.jsonl"
    lines = (data / DATASET_FILE["train"]).read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:-1]))
    with pytest.raises(DamagedFile, match=r"has \d+ samples, but its header says"):
        Dataset(path, Corpus.load(data / "corpus"))
    path.write_bytes(b"garbage\n")
    with pytest.raises(DamagedFile, match=r"d\.jsonl is not the JSON that retro writes"):
        Dataset(path, Corpus.load(data / "corpus"))


@pytest.mark.parametrize("search", [{"n_probe": 3}, {"n_probe": None, "recall": 0.8}])
def test_a_database_remembers_the_config_that_builds_it_again(data, bert, tmp_path, search):
    shutil.copytree(data / "keys", tmp_path / "keys")
    config = DatabaseConfig(chunk_len=CHUNK_LEN, index="IVF8,PQ16", n_train=300, seed=2, **search)
    manifest = build_database(config=config, corpus=Corpus.load(data / "corpus"), data_path=tmp_path, bert=bert)
    assert config_of_database(manifest) == config and manifest["n_train"] == 300


def test_an_index_of_whole_keys_is_searched_without_the_keys_beside_it(data, index, bert, tmp_path):
    for name in ("retro.index", "retro.index.json"):
        shutil.copy(data / name, tmp_path / name)
    alone = RetroIndex(corpus=Corpus.load(data / "corpus"), data_path=tmp_path, bert=bert)
    queries = index.embed([index.corpus.text(40 * i, CHUNK_LEN) for i in range(9)])
    for found, expected in zip(alone.search(queries, 3), index.search(queries, 3), strict=True):
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_queries_are_embedded_in_the_precision_of_the_keys(tmp_path, precision):
    (tmp_path / "a.txt").write_text("Full fathom five thy father lies;\nOf his bones are coral made;\n" * 5)
    build_corpus([tmp_path / "a.txt"], tmp_path / "corpus")
    bert = BERTChunkEmbeddings("cpu", precision=precision)
    manifest = build_database(data_path=tmp_path, bert=bert, config=DatabaseConfig(index="Flat"))
    index = RetroIndex(data_path=tmp_path)
    assert manifest["precision"] == index.bert.precision == precision
    assert next(index.bert.model.parameters()).dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
