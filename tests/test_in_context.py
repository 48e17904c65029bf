"""A base that has its neighbors in context: it writes what a loop over prompts writes, and what was evaluated."""

import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CHUNK_LEN, refused
from test_retrofit_runs import write_base, write_place

from retro.cli import main
from retro.config import EvaluateConfig, RetrofitConfig, SampleConfig
from retro.decoding import decoder_of
from retro.errors import InvalidOption
from retro.evaluate import evaluate
from retro.explorer.explored import Explored
from retro.explorer.page import show
from retro.explorer.writing import WAYS
from retro.in_context import InContext, put_before
from retro.retrofit import Retrofit
from retro.sample import base_in_context, choose, sampler_in_context

M, K = CHUNK_LEN, 2
PROMPT = "Who is there? Nay, answer me: stand, and unfold yourself. Long live the king!"
DRAWN = SampleConfig(temperature=1.0, top_k=20, seed=3)


@pytest.fixture(scope="module")
def place(data, tmp_path_factory):
    """A folder with data and a base with the tokens of them; only the base may be read by others."""
    return write_place(data, tmp_path_factory.mktemp("in-context"), max_position_embeddings=1024)


@pytest.fixture
def here(place, monkeypatch):
    monkeypatch.chdir(place)
    return place


@pytest.fixture
def sampler(place):
    return sampler_in_context(base_in_context(str(place / "base"), place / "data", "cpu"), place / "data")


def test_it_writes_what_a_loop_writes_that_puts_neighbors_before_the_text(sampler):
    index, base = sampler.index, sampler.model.base
    ids, generator = sampler.corpus.tokenizer.encode(PROMPT), torch.Generator().manual_seed(DRAWN.seed)
    n_prompt = len(ids)
    with torch.inference_mode():
        for _ in range(5 * M):
            before = []
            if u := len(ids) // M:
                chunk = sampler.corpus.tokenizer.decode(ids[: u * M])[
                    len(sampler.corpus.tokenizer.decode(ids[: u * M - M])) :
                ]
                (offsets,) = index.nearest([chunk], K)[1]
                for offset in reversed(offsets.tolist()):
                    before += index.corpus.tokens[offset : min(offset + 2 * M, index.corpus.ends_of(offset))].tolist()
                before = before[len(before) % M :]
            logits = base(torch.tensor(before + ids)[None]).logits[0, -1]
            ids.append(choose(logits.float(), DRAWN, generator))
    written = sampler.sample(PROMPT, 5 * M, DRAWN)
    assert sampler.tokens == ids and written == sampler.corpus.tokenizer.decode_after(ids[:n_prompt], ids[n_prompt:])
    assert len({tuple(n.corpus_offset for n in of) for of in sampler.neighbors}) > 3


@pytest.mark.parametrize("most", [64, 9])  # chunks that the base reads; nine hold no whole window with neighbors
def test_its_losses_are_those_of_the_rival_that_is_evaluated(sampler, most):
    base, index = sampler.model.base, sampler.index
    model, retrofit = InContext(base, M), Retrofit(base, RetrofitConfig("base", chunk_len=M, ca_layers=(1,)))
    model.max_chunks = retrofit.max_chunks = most
    config = EvaluateConfig(n_neighbors=K, window=8 * M, stride=8 * M, n_windows=1)
    found = evaluate(retrofit, index.corpus, index, config=config, others=("off",), against=("in-context",))
    start = int(index.corpus.starts[index.corpus.split("valid")[0]])
    first = int(np.flatnonzero(found.n_bytes)[0])  # of the window that was taken
    first = (first - 1) // M * M
    tokens = torch.tensor(index.corpus.tokens[start + first : start + first + 8 * M].tolist())
    decoder, i = decoder_of(model), 0
    with torch.inference_mode():
        while i < len(tokens) - 1:
            due, ret = decoder.completes_chunk, None
            if due:
                ret = torch.from_numpy(index.values(found.neighbors[(first + i) // M, :K][None])[0])
            logits = decoder.feed(
                tokens[i : i + 1] if due else tokens[i : i + min(decoder.n_next(), len(tokens) - 1 - i)], ret
            )
            i = decoder.length
            expected = float(F.cross_entropy(logits.float(), tokens[i]))
            assert found.nats["in-context"][first + i] == pytest.approx(expected, rel=1e-4, abs=1e-5), i
    assert decoder.before.size == 2 * M * K or most == 9


def test_with_nothing_found_it_is_the_base_and_nothing_is_computed_twice(sampler):
    base, ids = sampler.model.base, sampler.corpus.tokenizer.encode(PROMPT)
    prompt, all_of_it = torch.tensor([ids]), torch.ones(1, len(ids), dtype=torch.long)
    options = {"max_new_tokens": 60, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    greedy = base.generate(prompt, attention_mask=all_of_it, **options)
    decoder, nothing, n_read = decoder_of(sampler.model), torch.full((K, 2 * M), -1), []
    base.register_forward_pre_hook(lambda _, __, given: n_read.append(given["input_ids"].shape[1]), with_kwargs=True)
    with torch.inference_mode():
        while len(ids) < greedy.shape[1]:
            ret = nothing if decoder.completes_chunk else None
            logits = decoder.feed(torch.tensor(ids[decoder.length : decoder.length + decoder.n_next()]), ret)
            if decoder.length == len(ids):
                ids.append(int(logits.argmax()))
    assert ids == greedy[0].tolist() and sum(n_read) == len(ids) - 1


def test_the_nearest_neighbor_is_put_next_to_the_text_and_chunks_stay_what_they_are():
    values = np.array([[1, 2, 3, 4], [5, 6, -1, -1], [7, 8, 9, -1]])
    assert put_before(values, 2).tolist() == [8, 9, 5, 6, 1, 2, 3, 4]
    assert put_before(np.full((2, 4), -1), 2).tolist() == []


def test_what_leaves_too_little_to_the_text_or_has_other_tokens_is_refused(here, data, sampler):
    sampler.model.max_chunks = 7
    with refused(InvalidOption, "--n-neighbors 2 would put 64 tokens before the text, of the 112 that the base reads"):
        sampler.model.require_room(2)
    sampler.model.max_chunks = 8
    sampler.model.require_room(2)
    write_base(here / "other", data / "corpus" / "tokenizer.json")
    path = here / "other" / "tokenizer.json"
    path.write_text(path.read_text().replace('"unk_token":null', '"unk_token":"!"').replace('"!":', '"!!":', 1))
    with refused(InvalidOption, "has another tokenizer"):
        base_in_context(str(here / "other"), here / "data", "cpu")


def test_the_command_writes_with_a_base_and_a_database_alone(here, sampler, capsys):
    command = [
        "sample",
        "--base",
        "base",
        "--database",
        "data",
        "--length",
        "40",
        "--temperature",
        "1",
        "--top-k",
        "20",
    ]
    assert main([*command, "--seed", "3", "--show-neighbors", PROMPT]) == 0
    out = capsys.readouterr().out
    assert sampler.sample(PROMPT, 40, DRAWN) in out and len(re.findall("--- neighbors of chunk", out)) >= 3
    for wrong, said in (
        (["--database", "data"], "--database data is read by a base: name it too"),
        (["--base", "base", "--database", "data", "--run", "logs/x"], "--run logs/x goes without --database"),
        (["--base", "base", "--database", "data", "--data-path", "data"], "--data-path data goes without --database"),
    ):
        for name in ("sample", "explore"):
            assert main([name, *wrong, *([PROMPT] if name == "sample" else [])]) == 1
            assert said in capsys.readouterr().err


def test_it_is_explored_as_a_run_is(data, place, tmp_path, sampler):
    shutil.copytree(data, tmp_path / "data")
    explored = Explored.of_base(str(place / "base"), tmp_path / "data", "cpu")
    *_, columns = explored.write(PROMPT, 40, list(WAYS), DRAWN)
    text = {way: "".join(part for chunk in chunks for _, _, part in chunk.parts) for way, chunks in columns.items()}
    assert text["on"] == PROMPT + sampler.sample(PROMPT, 40, DRAWN) and len(set(text.values())) == 3
    assert all(read.share is None for chunk in columns["on"] for read in chunk.read)
    assert explored.evaluation() == {"pictures": {}, "table": None, "report": None, "command": None}
    assert "this is a base without one" in show("evaluation", explored.evaluation(), explored.name)
    with refused(ValueError, "reads what stands before its text; gains are shown of a run"):
        explored.gains(PROMPT)
    secret = "The zebra quartet of Ulm plays the contrabassoon on Thursdays, xylophones on Fridays. " * 4
    assert "zebra.txt is in the database now" in explored.add(secret, "zebra.txt")
    *_, columns = explored.write("The zebra quartet of Ulm plays the contrabassoon on", 8, ["on"], DRAWN)
    assert "zebra.txt" in {read.neighbor.document for chunk in columns["on"] for read in chunk.read}
