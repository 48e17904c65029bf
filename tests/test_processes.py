"""Several processes: `torchrun` with two on CPUs, one of them killed on the way, leaves what one process leaves."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chaos
import pytest
import torch

from retro.config import model_config
from retro.model import RetroModel
from retro.runs.checkpoints import load_model
from retro.storage.manifests import read_manifest

HERE = Path(__file__).parent
ONE_THREAD = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def torchrun(*arguments, cwd, restarts=0):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", restarts, HERE / "chaos.py", "--stages", *arguments]
    return subprocess.Popen(
        list(map(str, command)), cwd=cwd, env=ONE_THREAD, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process leaves of all stages but the last."""
    folder = tmp_path_factory.mktemp("alone")
    chaos.prepare(folder)
    command = [sys.executable, HERE / "chaos.py", "--stages", "database", "dataset", "train"]
    subprocess.run(command, cwd=folder, env=ONE_THREAD, check=True, capture_output=True)
    return folder


def require_trained_alike(one, two):
    """The models of two checkpoints moved far from where they began, to the same place but for rounding."""
    torch.manual_seed(0)
    beginning = RetroModel.from_config(model_config(read_manifest(one / "config.json"))).state_dict()
    one, two = (load_model(checkpoint).state_dict() for checkpoint in (one, two))
    # Without positions, as in cross-attention, a key's bias adds the same to all scores: Adam follows mere rounding.
    compared = {name for name in one if not name.endswith((".theta", "cca.0.key.bias", "ca.0.key.bias"))}
    assert len(compared) > 60
    for name in compared:
        assert (one[name] - beginning[name]).abs().mean() > 0.01, f"{name} is untrained"
        torch.testing.assert_close(two[name], one[name], rtol=0, atol=2e-5)


def children_of(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill_a_worker(process, pattern, folder):
    """Wait for a file, then send SIGKILL to the second worker."""
    deadline = time.time() + 120
    while not list(folder.glob(pattern)):
        assert process.poll() is None and time.time() < deadline, process.stdout.read()
        time.sleep(0.005)
    worker = children_of(process.pid)[-1]
    os.kill(worker, signal.SIGKILL)
    return worker


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="finds the workers in /proc")
def test_two_processes_killed_twice_leave_what_one_leaves(alone, tmp_path):
    chaos.prepare(tmp_path)
    process = torchrun("database", "dataset", "train", cwd=tmp_path, restarts=2)
    first = kill_a_worker(process, "data/keys/*/000002-*.npy", tmp_path)  # in the embedding
    second = kill_a_worker(process, "logs/*/*/checkpoints/00000008", tmp_path)  # in the training
    said, _ = process.communicate()
    assert process.returncode == 0 and first != second, said[-4000:]
    expected, found = chaos.contents(alone), chaos.contents(tmp_path)
    data = {name for name in expected if name.startswith("data")}
    assert {name for name in found if name.startswith("data")} == data and len(data) > 15
    assert [name for name in data if found[name] != expected[name]] == []
    # The same run, the same steps; sums of two halves are rounded otherwise than one sum.
    summary = next(name for name in expected if name.endswith("summary.json"))
    one, two = json.loads(expected[summary]), json.loads(found[summary])
    assert one["steps"] == two["steps"] == 24
    for figure in ("train_bpb", "valid_bpb", "valid_bpb_without_retrieval"):
        assert one[figure] == pytest.approx(two[figure], abs=2e-4)
    require_trained_alike(*(next(folder.glob("logs/*/*/checkpoints/00000024")) for folder in (alone, tmp_path)))


@pytest.mark.slow
def test_weights_sharded_over_two_processes_are_whole_again_in_one(alone, tmp_path):
    (tmp_path / "data").symlink_to(alone / "data")
    process = torchrun("sharded", cwd=tmp_path)
    said, _ = process.communicate()
    assert process.returncode == 0, said[-4000:]
    run, expected = (next(folder.glob("logs/*/*/checkpoints/00000024")) for folder in (tmp_path, alone))
    assert {f.name for f in run.glob("model*")} == {f"model-0000{r}-of-00002.safetensors" for r in (0, 1)}
    require_trained_alike(expected, run)
    summaries = [json.loads((checkpoint.parent.parent / "summary.json").read_text()) for checkpoint in (run, expected)]
    assert summaries[0]["valid_bpb"] == pytest.approx(summaries[1]["valid_bpb"], abs=2e-4)
    assert (run / "optimizer-00001-of-00002.safetensors").exists()
    assert read_manifest(run.parents[1] / "run.json")["continues"]["step"] == 12


HALVES = """
import copy, torch
from retro import parallel
from retro.config import RetroConfig, TrainConfig
from retro.model import RetroModel
from retro.runs.engine import shard_model
from retro.train import Trainer

torch.manual_seed(0)
cpu, config = torch.device("cpu"), TrainConfig(precision="bf16")
shape = dict(d_model=32, n_heads=2, d_k=16, d_ff=64, n_layers=3, ca_layers=(1,), n_encoder_layers=1)
model = RetroModel.from_config(RetroConfig(64, chunk_len=8, encoder_ca_layers=(0,), relative_positions=True, **shape))
batch = torch.randint(64, (2, 32)), torch.randint(64, (2, 32)), torch.randint(64, (2, 4, 2, 16))
parallel.join_group(cpu)
whole = copy.deepcopy(model)
expected = Trainer(cpu, whole, None, torch.optim.SGD(whole.parameters()), config=config).loss(*batch)
expected.backward()
shard_model(model, cpu, config.precision)
gathered, states = [], []
for layer in [*model.attn, *model.ffw, *model.cca]:
    layer.register_forward_hook(lambda module, inputs, output: states.append(output.dtype))
for inner in (m for m in model.ffw[0].modules() if isinstance(m, torch.nn.Linear)):  # where weights are whole
    inner.register_forward_hook(lambda module, *_: gathered.extend(p.dtype for p in module.parameters()))
trainer = Trainer(cpu, whole, None, torch.optim.SGD(whole.parameters()), config=config)
trainer.model = trainer.net = model
loss = trainer.loss(*batch)
loss.backward()
assert set(gathered) == {torch.bfloat16}, gathered
assert set(states) == {torch.float32}, states  # what layers add to
assert {p.dtype for p in model.parameters()} == {p.grad.dtype for p in model.parameters() if p.grad is not None} == {
    torch.float32
}
torch.testing.assert_close(loss, expected, rtol=2e-3, atol=0)
for (name, ours), theirs in zip(model.named_parameters(), whole.parameters(), strict=True):
    if theirs.grad is not None and theirs.grad.norm() > 1e-3:
        cosine = torch.cosine_similarity(ours.grad.full_tensor().flatten(), theirs.grad.flatten(), dim=0)
        assert cosine > 0.99, (name, cosine)
"""


def test_sharded_weights_are_gathered_in_16_bits_and_learnt_in_32(tmp_path):
    (script := tmp_path / "halves.py").write_text(HALVES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    result = subprocess.run(list(map(str, command)), env=ONE_THREAD, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


WAITING = """
import os, time
from datetime import timedelta
from retro import parallel
from retro.errors import LostProcess

parallel.PATIENCE, parallel.BEAT = timedelta(seconds=2), timedelta(seconds=0.1)
assert parallel.on_rank_zero(lambda: time.sleep(4) or 5) == (None if parallel.rank() else 5)
assert parallel.broadcast_from_rank_zero(lambda: 7 + parallel.rank()) == 7
if parallel.rank() == 1:
    os._exit(3)
started = time.monotonic()
try:
    parallel.wait_for_everyone()
except LostProcess as error:
    print(f"{time.monotonic() - started:.1f}: {error}", flush=True)
    os._exit(0)
"""


def test_a_process_that_works_is_waited_for_and_one_that_died_is_noticed():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WAITING], env=ONE_THREAD | address | {"RANK": rank}, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in "01"
    ]  # fmt: skip
    (said, wrong), _ = (process.communicate(timeout=100) for process in processes)
    assert [process.returncode for process in processes] == [0, 3], wrong
    seconds, _, error = said.partition(": ")
    assert 2 <= float(seconds) < 10 and error.startswith("process 1 of 2 has given no sign of life for ")
