"""A Ray cluster of two nodes, each a process of its own, makes what one process makes; one of them is killed midway."""

import contextlib
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from retro import cluster
from retro.database import RetroIndex
from retro.storage.shards import Shards

# Shards of a few hundred tokens, so that there are many. Of keys and of the index of tokens they are so small in the
# process of the command alone, which has the workers make them; of samples, workers open what is there.
COMMANDS = """
import sys
from retro.search import bm25, keys
from retro.storage import sample_arrays
from retro.text import in_shards
in_shards.BYTES_PER_SHARD = 1 << 11
for module in {"database": (bm25, keys), "dataset": (sample_arrays,)}[sys.argv[1]]:
    module.TOKENS_PER_SHARD = 1 << 9
from retro import cluster
mapped = cluster.mapped
cluster.mapped = lambda *arguments: print("by the cluster", flush=True) or mapped(*arguments)
from retro.cli import main
raise SystemExit(main(sys.argv[1:]))
"""
DATABASE = ["--tokenizer", "bpe:400", "--chunk-len", "16", "--index", "IVF8,PQ16", "--device", "cpu"]


@pytest.fixture(scope="module")
def nodes():
    """The address of a cluster, whose first node works nothing, and two that do."""
    import ray
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    workers = [made.add_node(num_cpus=1) for _ in range(2)]
    made.wait_for_nodes()
    yield made, workers
    ray.shutdown()
    made.shutdown()


def started(home, address, *command) -> subprocess.Popen:
    options = {"HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_ADDRESS": address}
    return subprocess.Popen(
        [sys.executable, "-c", COMMANDS, *map(str, command)],
        env={**os.environ, **options},
        cwd=home,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def files_of(folder: Path) -> dict[str, bytes]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.mark.slow
def test_a_cluster_makes_what_one_process_makes_and_loses_nothing_with_a_node(nodes, plays, tmp_path):
    made, (first, _) = nodes
    command = ["database", plays, "--retriever", "hybrid", *DATABASE, "--data-path"]
    alone = started(tmp_path, "", *command, tmp_path / "alone")
    said, _ = alone.communicate()
    assert alone.returncode == 0, said
    process = started(tmp_path, made.address, *command, "data")  # a relative path: workers go to the folder
    while process.poll() is None and len([*(tmp_path / "data/keys").glob("*/*.npy")]) < 5:
        time.sleep(0.02)
    n_keys = len([*(tmp_path / "data/keys").glob("*/*.npy")])
    made.remove_node(first, allow_graceful=False)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    assert said.count("by the cluster") == 3  # near-duplicates, the index of tokens, embedding
    with_it, without = files_of(tmp_path / "data"), files_of(tmp_path / "alone")
    assert with_it == without
    assert 5 <= n_keys < sum(name.startswith("keys/") for name in without) - 5, "the node was killed too late"


@pytest.mark.slow
def test_a_dataset_by_a_cluster_is_that_of_one_process(nodes, data, tmp_path):
    made, _ = nodes
    for name in ("alone", "data"):
        shutil.copytree(data, tmp_path / name)
        for file in (tmp_path / name).glob("retro_*_dataset.jsonl"):
            file.unlink()
    command = ["dataset", "--chunks-per-sample", "4", "--skip-range", "3", "--device", "cpu", "--data-path"]
    for name, address in (("alone", ""), ("data", made.address)):
        process = started(tmp_path, address, *command, name)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        assert said.count("by the cluster") == (2 if address else 0)  # samples to train on, and to validate
    with_it, without = files_of(tmp_path / "data"), files_of(tmp_path / "alone")
    assert with_it == without and "retro_train_dataset.jsonl" in without


def test_an_index_that_is_sent_is_opened_again_and_finds_the_same(index, data):
    message = pickle.dumps(RetroIndex(data_path=data))
    assert len(message) < 1e5, "neither BERT nor what is mapped is sent"
    sent = pickle.loads(message)
    assert sent.keys.is_whole() and len(pickle.dumps(sent.keys)) < 1e5
    queries = index.embed(["To be, or not to be", "Exeunt"])
    for ours, theirs in zip(index.search(queries, 3), sent.search(queries, 3), strict=True):
        assert np.array_equal(ours, theirs)


@pytest.mark.slow
def test_what_a_worker_raises_is_raised_and_items_come_in_their_order(nodes, monkeypatch, tmp_path):
    made, _ = nodes
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    monkeypatch.chdir(tmp_path)
    assert cluster.is_there()
    own = os.getpid()

    def work(n: int) -> tuple[int, bool, str]:
        time.sleep(0.01 * (n % 3))
        if n == 99:
            raise ZeroDivisionError("of 99")
        return n * n, os.getpid() == own, os.getcwd()

    found = [*cluster.mapped(work, range(20))]
    assert [square for square, _, _ in found] == [n * n for n in range(20)]
    assert not any(here for _, here, _ in found) and {folder for _, _, folder in found} == {str(tmp_path)}
    with pytest.raises(ZeroDivisionError, match="of 99"):
        [*cluster.mapped(work, [1, 99, 2])]

    # What a worker began and did not finish is not left.
    shards = Shards(tmp_path / "shards", {"n": 1}, [""] * 6, ".npy")

    def make(number, prepared, path, done):
        path.with_name(f".{number:06d}.part.1.tmp").write_bytes(b"half")  # as if another had died at it
        with open(path, "wb") as file:
            np.save(file, np.full(3, prepared))

    shards.make_missing("Try", "shard", [1] * 6, make, lambda number: number + 1)
    assert [np.load(shards.path(n)).tolist() for n in range(6)] == [[n + 1] * 3 for n in range(6)]
    assert len([*(tmp_path / "shards").iterdir()]) == 7


@pytest.mark.slow
def test_what_a_node_was_at_when_it_died_is_computed_by_another(nodes, monkeypatch, tmp_path):
    import ray

    made, (_, second) = nodes
    third, seen, found, killed = made.add_node(num_cpus=1), set(), [], False
    monkeypatch.setenv("RAY_ADDRESS", made.address)
    monkeypatch.chdir(tmp_path)

    def work(n: int) -> tuple[int, str]:
        time.sleep(3)  # a worker ends some time after its node
        return n, ray.get_runtime_context().get_node_id()

    for number, node in cluster.mapped(work, range(8)):
        found.append(number)
        seen.add(node)
        if len(seen) == 2 and not killed:  # both are at the next
            for lost in (third, second):
                with contextlib.suppress(ValueError):  # this process is connected to it
                    made.remove_node(lost, allow_graceful=False)
                    killed = True
                    break
    assert killed and found == list(range(8))


def test_without_ray_or_under_torchrun_there_is_no_cluster(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not cluster.is_there()
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(cluster.parallel, "n_processes", lambda: 2)
    assert not cluster.is_there()
    monkeypatch.setattr(cluster.parallel, "n_processes", lambda: 1)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ValueError, match=r"RAY_ADDRESS is set, but Ray is not installed: pip install 'retro-lm\[ray\]'"
    ):
        cluster.is_there()
