"""Keys of 16 bits: half of the disk, and distances within a thousandth."""

import shutil

import numpy as np
import pytest
import torch
from conftest import CHUNK_LEN, CHUNKS_PER_SAMPLE, refused

from retro.cli import main
from retro.config import DatabaseConfig, DatasetConfig
from retro.database import RetroIndex, build_database
from retro.dataset import Dataset, build_dataset
from retro.errors import DamagedFile, InvalidOption
from retro.search.index_file import MANIFEST_FILE, read_database_manifest
from retro.search.keys import Keys
from retro.search.updates import add_documents
from retro.storage.manifests import read_manifest, write_manifest
from retro.text.corpus import Corpus


@pytest.fixture(scope="module")
def halved(data, bert, tmp_path_factory):
    """A database like that of `data`, with an index of codes, whose neighbors the keys decide; and one of 32 bits."""
    made = {}
    for bits in (16, 32):
        folder = made[bits] = tmp_path_factory.mktemp("keys") / str(bits)
        shutil.copytree(data / "corpus", folder / "corpus")
        config = DatabaseConfig(index="IVF8,PQ16", n_probe=8, key_bits=bits)
        build_database(CHUNK_LEN, data_path=folder, bert=bert, config=config)
    return made


@pytest.fixture
def copy(halved, tmp_path):
    shutil.copytree(halved[16], tmp_path / "data")
    return tmp_path / "data"


def test_they_are_the_same_keys_rounded_in_half_of_the_bytes(halved, bert):
    half, whole = (
        Keys(folder, Corpus.load(folder / "corpus"), CHUNK_LEN, read_database_manifest(folder))
        for folder in (halved[16], halved[32])
    )
    every = np.arange(len(half.offsets))
    assert half.dtype == np.float16 and half.rows(every).dtype == np.float32
    assert np.array_equal(half.rows(every), whole.rows(every).astype(np.float16).astype(np.float32))
    assert np.array_equal(half.of_shard(0), half.rows(every[: len(half.of_shard(0))]))
    sizes = [sum(f.stat().st_size for f in (halved[b] / "keys").rglob("*.npy")) - 128 for b in (16, 32)]
    assert 2 * sizes[0] == sizes[1]
    # Against sums by hand, each pair by itself.
    rng = np.random.default_rng(0)
    queries, rows, numbers = (
        whole.rows(every[:20]) + 0.1,
        rng.integers(20, size=500),
        rng.integers(len(every), size=500),
    )
    by_hand = ((queries[rows].astype(np.float64) - half.rows(numbers)) ** 2).sum(axis=1)
    np.testing.assert_allclose(half.distances(queries, rows, numbers), by_hand, rtol=1e-5)


def test_neighbors_are_those_of_whole_keys_and_their_distances_within_a_thousandth(halved, bert):
    half, whole = (RetroIndex(data_path=halved[bits], bert=bert) for bits in (16, 32))
    queries = half.embed([half.corpus.text(start, CHUNK_LEN) for start in range(3, 40_000, 97)][:300])
    found = [index.search(queries, 5) for index in (half, whole)]
    same = found[0][1] == found[1][1]
    assert same.mean() > 0.99
    # Of a chunk to itself, 0 is not met; any other chunk is a hundred thousand times as far.
    np.testing.assert_allclose(found[0][0][same], found[1][0][same], rtol=1e-3, atol=1e-4)


def test_all_that_comes_after_keeps_to_them(copy, bert, tmp_path, capsys):
    config = DatasetConfig(chunks_per_sample=CHUNKS_PER_SAMPLE)
    header = build_dataset(config=config, data_path=copy, index=RetroIndex(data_path=copy, bert=bert))["train"]
    assert header["retriever"] == "bert, keys of 16 bits"
    assert len(Dataset(copy / "retro_train_dataset.jsonl", Corpus.load(copy / "corpus"))) > 5
    (tmp_path / "note.txt").write_text("A note about lighthouses, which no play speaks of. " * 20)
    manifest = add_documents([tmp_path / "note.txt"], copy, bert=bert)
    assert manifest["key_bits"] == 16
    index = RetroIndex(data_path=copy, bert=bert)
    assert {index.keys.of_shard(n).dtype for n in range(index.keys.n_shards)} == {np.dtype("float32")}
    assert {np.load(file).dtype for file in (copy / "keys").rglob("*.npy")} == {np.dtype("float16")}
    offset = index.nearest(["lighthouses, which no play speaks of."], 1)[1][0, 0]
    assert index.corpus.documents[int(index.corpus.document_of(offset))].name == "note.txt"
    assert main(["verify", "--data-path", str(copy)]) == 0
    # Another number of bits is another database, and takes the place of this one.
    assert main(["remove", "note.txt", "--data-path", str(copy)]) == 0
    options = ["--chunk-len", str(CHUNK_LEN), "--index", "IVF8,PQ16", "--n-probe", "8", "--data-path", str(copy)]
    with pytest.raises(SystemExit):
        main(["plan", "--n-tokens", "1e6", "--key-bits", "8"])
    assert "key_bits" in (said := capsys.readouterr().err) and "Got value: 8" in said
    assert main(["database", "--key-bits", "32", *options]) == 0
    assert {np.load(file).dtype for file in (copy / "keys").rglob("*.npy")} == {np.dtype("float32")}


def test_what_16_bits_cannot_hold_is_refused_and_what_is_no_number_of_bits_too(data, bert, copy, tmp_path, monkeypatch):
    with refused(InvalidOption, "--key-bits 8 is not one of 32, 16"):
        DatabaseConfig(key_bits=8)
    shutil.copytree(data / "corpus", tmp_path / "large" / "corpus")
    monkeypatch.setattr(bert, "of_tokens", lambda tokens, *_: torch.full((len(tokens), bert.d_emb), 70_000.0))
    with refused(InvalidOption, "--key-bits 16 cannot hold features of up to 70000; use 32"):
        build_database(CHUNK_LEN, data_path=tmp_path / "large", bert=bert, config=DatabaseConfig(key_bits=16))
    write_manifest(copy / MANIFEST_FILE, read_manifest(copy / MANIFEST_FILE) | {"key_bits": 7})
    with refused(DamagedFile, "key_bits=7, but 32 or 16 is wanted"):
        RetroIndex(data_path=copy)
