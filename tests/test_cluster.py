"""A Ray cluster of two nodes, each a process of its own, makes what one process makes; one of them is killed midway."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from retro import cluster
from retro.storage.shards import Shards

# Shards of a few hundred tokens, so that there are many; the retriever has keys and an index of tokens.
COMMANDS = """
import sys
from retro.search import bm25, keys
from retro.storage import sample_file, shards
from retro.text import in_shards
for module in (shards, keys, bm25, sample_file):
    module.TOKENS_PER_SHARD = 1 << 9
in_shards.BYTES_PER_SHARD = 1 << 11
from retro.cli import main
texts, data = sys.argv[1:]
common = ["--data-path", data, "--device", "cpu"]
made = ["--tokenizer", "bpe:400", "--chunk-len", "16", "--retriever", "hybrid", "--index", "IVF8,PQ16"]
status = main(["database", texts, *made, *common]) or main(["dataset", "--chunks-per-sample", "4", *common])
raise SystemExit(status)
"""


@pytest.fixture(scope="module")
def nodes():
    """The address of a cluster, whose first node works nothing, and two that do."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    workers = [made.add_node(num_cpus=1) for _ in range(2)]
    made.wait_for_nodes()
    yield made, workers
    made.shutdown()


def started(plays, data, home, **environment) -> subprocess.Popen:
    options = {"HOME": str(home), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    return subprocess.Popen(
        [sys.executable, "-c", COMMANDS, str(plays), str(data)],
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
    alone = started(plays, tmp_path / "alone", tmp_path, RAY_ADDRESS="")
    assert alone.wait() == 0, alone.stdout.read()
    process = started(plays, "data", tmp_path, RAY_ADDRESS=made.address)  # a relative path: workers go to the folder
    while process.poll() is None and len([*(tmp_path / "data/keys").glob("*/*.npy")]) < 5:
        time.sleep(0.02)
    n_keys = len([*(tmp_path / "data/keys").glob("*/*.npy")])
    made.remove_node(first, allow_graceful=False)
    said, _ = process.communicate()
    assert process.returncode == 0, said
    with_it, without = files_of(tmp_path / "data"), files_of(tmp_path / "alone")
    assert with_it == without and len(without) > 50
    assert 5 <= n_keys < sum(name.startswith("keys/") for name in without) - 5, "the node was killed too late"


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
    shards.open()
    (tmp_path / "shards" / ".000003.part.1.tmp").write_bytes(b"half")

    def make(number, prepared, path, done):
        with open(path, "wb") as file:
            np.save(file, np.full(3, prepared))

    shards.make_missing("Try", "shard", [1] * 6, make, lambda number: number + 1)
    assert [np.load(shards.path(n)).tolist() for n in range(6)] == [[n + 1] * 3 for n in range(6)]
    assert len([*(tmp_path / "shards").iterdir()]) == 7


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
