"""Samples: all of the text is in one, short documents share one, and none of them sees the others."""

import json
import math
import pickle
import shutil

import numpy as np
import pytest
import torch
from conftest import CHUNK_LEN

from retro.bert_embeddings import BERTChunkEmbeddings
from retro.cli import main
from retro.cli.repair import repair_of
from retro.config import DatabaseConfig, DatasetConfig, RetroConfig
from retro.database import RetroIndex, build_database
from retro.dataset import DATASET_FILE, Dataset, build_dataset, sample_offsets, stretch_lengths
from retro.errors import DamagedFile, MissingArtifact
from retro.model import RetroModel
from retro.runs.data import split_stretches
from retro.search.chunks import Chunks
from retro.storage import sample_arrays, sample_file
from retro.text.build import build_corpus
from retro.text.corpus import Corpus, DocumentEntry
from retro.text.tokenizer import CharTokenizer
from retro.train import Trainer

C, K = 4, 3


@pytest.fixture(scope="module")
def records(bert, plays, tmp_path_factory):
    """Sixty short documents of 3 to 60 tokens and one long one, with three neighbors a chunk."""
    path, lines = tmp_path_factory.mktemp("records"), []
    words = (plays / "hamlet.md").read_text().split()
    rng = np.random.default_rng(1)
    for n in [2000, *rng.integers(1, 20, size=60)]:
        at = int(rng.integers(len(words) - n)) if n < 2000 else 0
        lines.append(json.dumps({"text": " ".join(words[at : at + n])}))
    (path / "records.jsonl").write_text("\n".join(lines))
    corpus = build_corpus([path / "records.jsonl"], path / "corpus", "bpe:300", valid_fraction=0.05)
    build_database(CHUNK_LEN, corpus=corpus, data_path=path, config=DatabaseConfig(index="Flat"), bert=bert)
    index = RetroIndex(data_path=path, corpus=corpus, bert=bert)
    config = DatasetConfig(chunks_per_sample=C, skip_range=1, n_neighbors=K)
    headers = build_dataset(config=config, corpus=corpus, data_path=path, index=index)
    return corpus, headers, {split: Dataset(path / name, corpus) for split, name in DATASET_FILE.items()}


@pytest.mark.parametrize("split", ["train", "valid"])
def test_every_token_but_the_first_of_a_document_is_predicted_once(records, split):
    corpus, headers, datasets = records
    predicted = np.zeros(len(corpus.tokens), dtype=int)
    for idx in range(len(dataset := datasets[split])):
        for offset in dataset.line(idx)["offsets"]:
            n = int(stretch_lengths(corpus, offset, C * CHUNK_LEN))
            predicted[offset + 1 : offset + 1 + n] += 1
    first, behind = (corpus.starts[n] for n in (corpus.split(split).start, corpus.split(split).stop))
    wanted = np.zeros_like(predicted)
    wanted[first:behind] = 1
    wanted[corpus.starts[:-1]] = 0
    assert (predicted == wanted).all() and headers[split]["n_targets"] == wanted.sum()


def test_what_is_skipped_is_counted_and_a_short_document_loses_nothing():
    lengths = [1, 2, 9, 16, 17, 18, 40, 500]
    entries = [DocumentEntry(str(i), str(i), n, n) for i, n in enumerate(lengths)]
    corpus = Corpus(np.zeros(sum(lengths), dtype=np.int64), entries, len(lengths), CharTokenizer("a"))
    config = DatasetConfig(chunks_per_sample=C, skip_range=8, seed=2)
    stretches = np.concatenate(sample_offsets(corpus, "train", 16, config))
    predicted = {int(d): 0 for d in range(len(lengths))}
    for start, n in zip(stretches, stretch_lengths(corpus, stretches, C * 16), strict=True):
        predicted[int(corpus.document_of(start))] += int(n)
    # Up to 17 tokens there is no chunk and token to predict behind a skip, so none is skipped.
    assert [predicted[i] for i in range(5)] == [0, 1, 8, 15, 16]
    for i in (5, 6, 7):
        assert lengths[i] - 1 - 7 * math.ceil(lengths[i] / 64) <= predicted[i] <= lengths[i] - 1
    assert predicted[7] < 499
    other = np.concatenate(sample_offsets(corpus, "train", 16, DatasetConfig(C, 8, seed=3)))
    assert stretches.tolist() != other.tolist()


def test_short_documents_share_samples_and_each_begins_a_chunk_behind_a_missing_token(records):
    corpus, _, datasets = records
    dataset = datasets["train"]
    shared = 0
    for idx in range(len(dataset)):
        (src, tgt, neighbors), line = dataset[idx], dataset.line(idx)
        at, rows = 0, iter(line["neighbors"])
        for number, offset in enumerate(line["offsets"]):
            end = int(corpus.ends_of(offset))
            n = min(C * CHUNK_LEN, end - 1 - offset)
            assert src[at : at + n].tolist() == corpus.tokens[offset : offset + n].tolist()
            assert tgt[at : at + n].tolist() == corpus.tokens[offset + 1 : offset + n + 1].tolist()
            whole = range(at // CHUNK_LEN, (at + n) // CHUNK_LEN)
            for u in whole:
                assert neighbors[u].tolist() == corpus.values(np.array(next(rows)), 2 * CHUNK_LEN).tolist()
            following = at + (n // CHUNK_LEN + 1) * CHUNK_LEN
            assert (neighbors[whole.stop : following // CHUNK_LEN] == -1).all()
            assert (tgt[at + n : following] == -100).all()
            is_last = number == len(line["offsets"]) - 1
            assert (src[at + n : following] == (0 if is_last else -1)).all() and (is_last or src[at + n] == -1)
            at = following
        shared += len(line["offsets"]) > 1
    assert shared > 5
    # Of short records, most of a sample is text: unshared, it would be less than half.
    short = [
        dataset.line(i)["offsets"] for i in range(len(dataset)) if dataset.line(i)["offsets"][0] >= corpus.starts[1]
    ]
    n_short = sum(stretch_lengths(corpus, np.concatenate(short), C * CHUNK_LEN))
    assert n_short / (len(short) * C * CHUNK_LEN) > 0.6 > 0.5 > n_short / (len(np.concatenate(short)) * C * CHUNK_LEN)


def test_a_chunk_has_the_neighbors_that_its_own_text_retrieves(records, bert):
    corpus, _, datasets = records
    dataset = datasets["train"]
    index = RetroIndex(data_path=dataset.path.parent, corpus=corpus, bert=bert)
    for line in map(dataset.line, range(0, len(dataset), 4)):
        rows = iter(line["distances"])
        for offset in line["offsets"]:
            n = int(stretch_lengths(corpus, offset, C * CHUNK_LEN))
            chunks = range(offset, offset + n - CHUNK_LEN + 1, CHUNK_LEN)
            queries = index.embed([corpus.text(start, CHUNK_LEN) for start in chunks])
            for query in queries:
                expected, _ = index.search(query[None], K, corpus.barred_ranges(np.array([offset])))
                assert next(rows) == pytest.approx(expected[0].tolist(), abs=1e-3)
        assert not list(rows)


def test_a_sample_of_several_texts_gives_each_the_logits_that_it_has_alone(records):
    corpus, _, datasets = records
    dataset = datasets["train"]
    torch.manual_seed(0)
    shape = {"d_model": 32, "n_layers": 3, "ca_layers": (1, 2), "n_heads": 2, "d_k": 16, "d_ff": 32}
    config = RetroConfig(corpus.n_tokens, chunk_len=CHUNK_LEN, n_encoder_layers=1, encoder_ca_layers=(0,), **shape)
    model = RetroModel.from_config(config).eval()
    idx = max(
        range(len(dataset)), key=lambda i: len(dataset.line(i)["neighbors"]) * (len(dataset.line(i)["offsets"]) > 1)
    )
    src, _, neighbors = dataset[idx]
    tokens, stretches = split_stretches(src[None])
    with torch.no_grad():
        together, at = model(tokens, neighbors[None], stretches)[0], 0
        mixed = model(tokens, neighbors[None])[0]
        for number, offset in enumerate(dataset.line(idx)["offsets"]):
            n = int(stretch_lengths(corpus, offset, C * CHUNK_LEN))
            whole = slice(at // CHUNK_LEN, (at + n) // CHUNK_LEN)
            alone = model(src[None, at : at + n], neighbors[None, whole])[0]
            torch.testing.assert_close(together[at : at + n], alone, rtol=1e-4, atol=1e-5)
            if number:  # and without the numbers it would read the text before
                assert (mixed[at : at + n] - alone).abs().max() > 1e-2
            at += (n // CHUNK_LEN + 1) * CHUNK_LEN
    assert (neighbors >= 0).any()


def test_training_and_validation_read_shared_samples_so(records):
    """The trainer's loss of a shared sample is the mean over its targets of the losses of its texts alone."""
    corpus, _, datasets = records
    dataset = datasets["train"]
    torch.manual_seed(0)
    shape = {"d_model": 32, "n_layers": 2, "ca_layers": (1,), "n_heads": 2, "d_k": 16, "d_ff": 32}
    config = RetroConfig(corpus.n_tokens, chunk_len=CHUNK_LEN, n_encoder_layers=1, encoder_ca_layers=(), **shape)
    model = RetroModel.from_config(config)
    trainer = Trainer("cpu", model, None, torch.optim.SGD(model.parameters(), lr=0.1))
    idx = max(range(len(dataset)), key=lambda i: len(dataset.line(i)["offsets"]))
    src, tgt, neighbors = dataset[idx]
    losses, n_targets, at = 0.0, 0, 0
    for offset in dataset.line(idx)["offsets"]:
        n = int(stretch_lengths(corpus, offset, C * CHUNK_LEN))
        whole = slice(at // CHUNK_LEN, (at + n) // CHUNK_LEN)
        part = slice(at, at + n)
        losses += n * trainer.loss(src[None, part], tgt[None, part], neighbors[None, whole]).item()
        n_targets += n
        at += (n // CHUNK_LEN + 1) * CHUNK_LEN
    together = trainer.loss(src[None], tgt[None], neighbors[None]).item()
    assert together == pytest.approx(losses / n_targets, rel=1e-5)
    assert split_stretches(torch.zeros(2, 5, dtype=torch.long))[1] is None


@pytest.fixture
def embedded(monkeypatch):
    """The texts that any BERT embeds."""
    texts, embed = [], BERTChunkEmbeddings.__call__
    monkeypatch.setattr(
        BERTChunkEmbeddings,
        "__call__",
        lambda self, chunks, *others: texts.extend(chunks) or embed(self, chunks, *others),
    )
    return texts


def chunks_in(dataset) -> list[int]:
    """Where the chunks that have neighbors begin."""
    corpus, most = dataset.corpus, C * CHUNK_LEN
    stretches = [start for idx in range(len(dataset)) for start in dataset.line(idx)["offsets"]]
    return [
        chunk
        for start in stretches
        for chunk in range(start, start + int(stretch_lengths(corpus, start, most)) - CHUNK_LEN + 1, CHUNK_LEN)
    ]


@pytest.mark.parametrize(
    ("precision", "factory", "skip_range"),
    [
        ("fp32", "IVF4,PQ16", 1),
        *(pytest.param(*of, marks=pytest.mark.slow) for of in (("fp32", "Flat", 1), ("bf16", "Flat", 1))),
        ("fp32", "Flat", 5),
    ],
)
def test_no_chunk_of_the_database_is_embedded_again(
    data, tmp_path, embedded, monkeypatch, precision, factory, skip_range
):
    corpus, bert = Corpus.load(data / "corpus"), BERTChunkEmbeddings("cpu", trim=False, precision=precision)
    if precision == "fp32":
        shutil.copytree(data / "keys", tmp_path / "keys")
    build_database(CHUNK_LEN, corpus=corpus, data_path=tmp_path, config=DatabaseConfig(index=factory), bert=bert)
    index = RetroIndex(data_path=tmp_path, corpus=corpus, bert=bert)
    config, lines = DatasetConfig(chunks_per_sample=C, skip_range=skip_range, n_neighbors=K), {}
    for way in ("stored", "embedded"):
        embedded.clear()
        build_dataset(config=config, corpus=corpus, data_path=tmp_path / way, index=index)
        made = [Dataset(tmp_path / way / name, corpus) for name in DATASET_FILE.values()]
        chunks = [chunk for dataset in made for chunk in chunks_in(dataset)]
        n_train = len(chunks_in(made[0]))
        new = [chunk for chunk in chunks if way == "embedded" or chunk not in set(index.keys.offsets[:].tolist())]
        assert sorted(embedded) == sorted(corpus.texts(np.array(new), CHUNK_LEN))
        if way == "stored":
            assert len(chunks) - len(new) == n_train if skip_range == 1 else 0 < len(chunks) - len(new) < n_train / 2
        lines[way] = [dataset.line(idx) for dataset in made for idx in range(len(dataset))]
        monkeypatch.setattr(index.retriever, "embedded", lambda queries: index.embed(queries.texts))
    distances = [np.array([d for line in lines[way] for row in line["distances"] for d in row]) for way in lines]
    assert [line["offsets"] for line in lines["stored"]] == [line["offsets"] for line in lines["embedded"]]
    neighbors = [[row for line in lines[way] for row in line["neighbors"]] for way in lines]
    # What goes through BERT beside other chunks is rounded otherwise, in the last bits of its precision.
    np.testing.assert_allclose(*distances, rtol=1e-4 if precision == "fp32" else 0.03)
    same = np.mean([row == other for row, other in zip(*neighbors, strict=True)])
    assert same == 1 if precision == "fp32" else same > 0.9
    assert len(neighbors[0]) > 200


def test_the_query_of_a_chunk_in_the_database_is_its_key_bit_for_bit(data, bert):
    index = RetroIndex(data_path=data, bert=bert)
    keys, corpus = index.keys, index.corpus
    # In any order, twice, and between others: one token on, the last of the text, a held-out one.
    known = np.array([7, 3, 3, len(keys.offsets) - 1])
    others = [int(keys.offsets[3]) + 1, len(corpus.tokens) - CHUNK_LEN, int(corpus.starts[corpus.n_train])]
    offsets = np.insert(keys.offsets[known], [0, 2, 4], others)
    queries = index.retriever.embedded(Chunks(corpus, offsets, CHUNK_LEN))
    assert queries[[1, 2, 4, 5]].tobytes() == keys.rows(known).tobytes()
    np.testing.assert_allclose(queries[[0, 3, 6]], index.embed(corpus.texts(np.array(others), CHUNK_LEN)), atol=1e-4)
    assert np.unique(queries, axis=0).shape == (6, keys.d_emb)


def test_an_index_of_whole_keys_serves_without_the_keys_on_disk(data, bert, tmp_path, embedded):
    shutil.copytree(data, tmp_path / "data")
    offsets = RetroIndex(data_path=data, bert=bert).keys.offsets[:9]
    (shard,) = (tmp_path / "data" / "keys").glob("*/*.npy")
    shard.write_bytes(shard.read_bytes()[:-1])
    index = RetroIndex(data_path=tmp_path / "data", bert=bert)
    embedded.clear()
    assert index.nearest_at(offsets, 1)[1][:, 0].tolist() == offsets.tolist()
    assert embedded == index.corpus.texts(offsets, CHUNK_LEN)


@pytest.fixture
def many(records, monkeypatch, tmp_path):
    """The data folder of the records, without samples; now these are too many for lines, and a few make a shard."""
    monkeypatch.setattr(sample_file, "MOST_LINES", 8)
    monkeypatch.setattr(sample_arrays, "TOKENS_PER_SHARD", 5 * C * CHUNK_LEN)
    for path in records[2]["train"].path.parent.iterdir():
        if path.name not in DATASET_FILE.values():
            (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / path.name)
    return tmp_path


def samples_in(folder, bert) -> dict[str, Dataset]:
    """Samples of the text in a folder, made if they are not there."""
    corpus = Corpus.load(folder / "corpus")
    index = RetroIndex(data_path=folder, corpus=corpus, bert=bert)
    build_dataset(config=DatasetConfig(C, 1, K), corpus=corpus, data_path=folder, index=index)
    return {split: Dataset(folder / name, corpus) for split, name in DATASET_FILE.items()}


def test_samples_that_are_too_many_for_lines_are_the_same_as_arrays(many, bert, monkeypatch):
    with monkeypatch.context() as few:
        few.setattr(sample_file, "MOST_LINES", 1 << 20)
        of_lines = samples_in(many, bert)
    for file in many.glob("*.jsonl"):
        file.rename(file.with_suffix(".lines"))
    for split, dataset in samples_in(many, bert).items():
        lines, n = of_lines[split], len(of_lines[split])
        assert dataset.path.read_bytes().count(b"\n") == 1 and len(dataset) == n > 2
        assert [dataset.line(i) for i in range(n)] == [lines.line(i) for i in range(n)]
        for i in (0, n // 2, n - 1):
            assert all(torch.equal(a, b) for a, b in zip(dataset[i], lines[i], strict=True))
        shards = [*(many / f"retro_{split}_dataset.arrays").glob("*/*.npy")]
        assert len(shards) == -(n // -5) and {np.load(shard).dtype.itemsize for shard in shards} == {
            8 + 8 * C + 12 * C * K
        }
        # Sent to another process, it maps what is there.
        assert len(message := pickle.dumps(dataset.samples)) < 1e5 and pickle.loads(message)[0] == lines.line(0)
        # And as lines again it is the file that would have been written.
        sample_file.write_lines(dataset.samples, many / "lines.jsonl")
        assert (many / "lines.jsonl").read_bytes() == dataset.path.with_suffix(".lines").read_bytes()
    assert len(shards) < len(samples_in(many, bert)["train"].samples.samples.shards) > 2


def test_arrays_that_were_interrupted_go_on_and_lines_stay_until_they_are_whole(many, records, bert, monkeypatch):
    before = records[2]["train"].path.read_bytes()
    path, made, pack = many / DATASET_FILE["train"], [], sample_file.packed
    path.write_bytes(before)
    path.with_suffix(".shards").mkdir()

    def stopped(samples, record):
        made.append(len(samples))
        if len(made) == 3:
            raise KeyboardInterrupt
        return pack(samples, record)

    monkeypatch.setattr(sample_file, "packed", stopped)
    monkeypatch.setattr(sample_file, "is_whole", lambda *_: False)  # as if the lines were of something else
    with pytest.raises(KeyboardInterrupt):
        samples_in(many, bert)
    assert path.read_bytes() == before and len([*many.glob("retro_train_dataset.arrays/*/*.npy")]) == 2
    found = samples_in(many, bert)
    n_shards = -(len(found["train"]) // -5)
    assert len(made) == 3 + n_shards - 2 - (len(found["valid"]) // -5) and path.read_bytes() != before
    assert not path.with_suffix(".shards").exists()
    assert found["train"].line(7)["neighbors"] == records[2]["train"].line(7)["neighbors"]
    # Fewer are lines again, and no arrays are left.
    monkeypatch.undo()
    monkeypatch.setattr(sample_file, "is_whole", lambda *_: False)
    samples_in(many, bert)
    assert path.read_bytes() == before and not [*many.glob("*.arrays")]


def test_an_array_that_is_missing_or_altered_is_named_with_what_makes_it_and_made_again(many, bert, capsys):
    corpus, dataset = Corpus.load(many / "corpus"), samples_in(many, bert)["train"]
    first, second, *_ = sorted(many.glob("retro_train_dataset.arrays/*/*.npy"))
    whole, when = second.read_bytes(), first.stat().st_mtime_ns
    for damage in (whole[:-1] + bytes([whole[-1] ^ 1]), None, whole[:100]):
        second.unlink() if damage is None else second.write_bytes(damage)
        with pytest.raises(MissingArtifact, match=r"no shard 1, or a damaged one|has 26 shards") as error:
            Dataset(dataset.path, corpus)
        assert repair_of(error.value) == f"Make it: retro dataset --data-path {many}"
        assert main(["verify", "--data-path", str(many)]) == 1
        assert f"retro dataset --data-path {many}" in capsys.readouterr().out
        assert len(samples_in(many, bert)["train"]) == len(dataset)
        assert second.read_bytes() == whole and first.stat().st_mtime_ns == when
    assert main(["verify", "--data-path", str(many)]) == 0
    # Another folder's arrays, of names that fit to no header.
    other = json.loads(dataset.path.read_text())
    for name, value in {"sha256": "0" * 64, "n_samples": 9}.items():
        body = sample_file.with_checksum({k: v for k, v in other.items() if k != "checksum"} | {name: value})
        dataset.path.write_text(json.dumps(body) + "\n")
        with pytest.raises(DamagedFile, match="speaks of arrays"):
            Dataset(dataset.path, corpus)


@pytest.mark.parametrize("count", ["n_stretches", "n_chunks"])
@pytest.mark.parametrize("value", [-1, C + 1, 1 << 30])
def test_a_record_of_more_than_it_has_room_for_is_no_sample(many, bert, count, value):
    dataset = samples_in(many, bert)["train"]
    shards, sound = dataset.samples.samples.shards, dataset.line(1)
    records = np.load(shards.path(0))
    records[1][count] = value
    shards.mapped = lambda number: records  # as someone forged it, with hashes that fit
    with pytest.raises(DamagedFile, match=r"no sample .* in row 1 of \S+000000-\w+\.npy"):
        dataset.line(1)
    records[1][count] = len(sound["offsets" if count == "n_stretches" else "neighbors"])
    assert dataset.line(1) == sound
