"""`retro train`: everything that is missing, then training and a sample."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from retro import parallel
from retro.cli.building import TEXTS, database_config
from retro.cli.options import (
    add_config,
    config_from,
    data_path_of,
    new_parser,
    parse_with_preset,
    program,
    the_other_of,
)
from retro.cli.repair import explain
from retro.config import (
    FROM_DATA,
    OF_OWN_TEXT,
    PACKAGED_BASE,
    PRESETS,
    CorpusConfig,
    DatabaseConfig,
    DatasetConfig,
    Preset,
    RetroConfig,
    RetrofitConfig,
    TrainConfig,
)
from retro.errors import InvalidOption
from retro.progress import note


def train_command(argv: Sequence[str]) -> None:
    """Train a model, on data that are there or on texts."""
    options, given, named = parse_with_preset(_parser, argv)
    changed = {"steps": None} if the_other_of(("steps", "epochs"), given, named) == "steps" else {}
    config = config_from(TrainConfig, options, changed)
    log = tuple(name for name in map(str.strip, options.log.split(",")) if name)
    if log:  # before anything takes long
        from retro.runs.tracking import require_trackers

        require_trackers(log)
    own_tokenizer = {"tokenizer": options.base} if options.base and "tokenizer" not in given else {}
    configs = (
        config_from(CorpusConfig, options, own_tokenizer),
        database_config(options, given, named),
        config_from(DatasetConfig, options),
    )
    shape = _shape(options, given)
    started = time.perf_counter()
    from retro.device import pick_device

    device = pick_device(options.device)
    if options.resume is not None:
        if options.no_retrieval:
            raise ValueError("--no-retrieval shapes a new run; --resume continues one as it is. Leave one of them out")
        data_path = Path(options.data_path) if "data_path" in given else None
        base = options.base if "base" in named else None
        _resume(options, config if given & {"steps", "epochs"} else None, data_path, base, device, log)
        return
    if configs[0].valid_fraction == 0:
        raise InvalidOption("valid_fraction", 0, "leaves nothing to validate on; training needs a share above 0")
    counts = None
    if options.preset in OF_OWN_TEXT or options.texts:
        counts = _prepare(options, configs, device)
    from retro.train import train

    data_path, prompt = data_path_of(options), options.prompt
    if prompt is None and options.preset and not options.texts:
        prompt = PRESETS[options.preset].prompt
    run, summary = train(
        data_path=data_path,
        name=options.name,
        config=config,
        model_shape=shape,
        device=device,
        prompt=prompt,
        fsdp=options.fsdp,
        log=log,
    )
    if parallel.rank():
        return
    _report_run(run, summary, data_path, device, prompt, counts)
    note(f"\neverything took {time.perf_counter() - started:.0f} s; other prompts, in a browser or here:")
    elsewhere = "" if data_path.resolve().is_relative_to(Path.cwd()) else f" --data-path {data_path}"
    show = " --show-neighbors" if shape.get("ca_layers", True) else ""
    note(f"  {program()} explore --run {run}{elsewhere}")
    note(f'  {program()} sample --run {run}{elsewhere}{show} "YOUR PROMPT"')


def _shape(options: Namespace, given: set[str]) -> dict[str, Any]:
    """What a model is made with: values of `RetrofitConfig` where a base is named, else of `RetroConfig`."""
    if options.base is None:
        shape = {name: getattr(options, name) for name in RetroConfig.__dataclass_fields__ if name not in FROM_DATA}
        return shape | ({"ca_layers": ()} if options.no_retrieval else {})
    if options.no_retrieval and options.trains == "added":
        raise ValueError(
            "--no-retrieval: a base that reads nothing stays as it is; retro evaluate measures it as off. To let it "
            "learn without retrieval, add --trains lora, or all"
        )
    if not_its := sorted(given & {*RetroConfig.__dataclass_fields__} - {*RetrofitConfig.__dataclass_fields__}):
        raise InvalidOption(not_its[0], getattr(options, not_its[0]), "is the base's own; leave it out, or --base")
    # Those that both have show the default of `RetroConfig`.
    of_both = {*RetroConfig.__dataclass_fields__} - given
    fields = [name for name in RetrofitConfig.__dataclass_fields__ if name not in {*of_both, *FROM_DATA}]
    shape = {name: getattr(options, name) for name in fields}
    return shape | ({"ca_layers": ()} if options.no_retrieval else {})


def _parser(preset: Preset) -> ArgumentParser:
    parser = new_parser(
        "train",
        "Train a RETRO model; with --preset or TEXT, build corpus, database and dataset first where they are missing.",
        texts=TEXTS,
    )
    parser.add_argument("--name", type=str, default=None, help="the run's folder below logs/; null for the text's name")
    parser.add_argument(
        "--prompt",
        type=str,
        default=None,
        help="text to continue; null for the beginning of a held-out document",
    )
    parser.add_argument(
        "--no-retrieval", action="store_true", help="without cross-attention: the baseline of retro evaluate"
    )
    parser.add_argument(
        "--fsdp", action="store_true", help="under torchrun: shard the weights over the processes, for large models"
    )
    parser.add_argument(
        "--log",
        metavar="NAME,...",
        type=str,
        default="",
        help="trackers that are told the curves too, if installed: tensorboard, wandb, trackio",
    )
    parser.add_argument(
        "--resume",
        metavar="RUN",
        type=str,
        default=None,
        help="continue the run in this folder; with other --steps or --epochs, in a new run beside it",
    )
    add_config(parser, CorpusConfig, preset.corpus)
    add_config(parser, DatabaseConfig, preset.database, skip=("seed",))
    add_config(parser, DatasetConfig, preset.dataset, skip=("seed",))
    parser.add_argument(
        "--base",
        type=str | None,
        default=preset.model.get("base"),
        help=f"a pretrained causal language model that learns to read: a folder, a hub name, or {PACKAGED_BASE}",
    )
    of_both = [name for name in RetroConfig.__dataclass_fields__ if name in RetrofitConfig.__dataclass_fields__]
    add_config(parser, RetrofitConfig, preset.model, skip=("base", *of_both, *FROM_DATA))
    add_config(parser, RetroConfig, preset.model, skip=FROM_DATA)
    add_config(parser, TrainConfig, preset.train, skip=("seed",))
    return parser


def _prepare(
    options: Namespace, configs: tuple[CorpusConfig, DatabaseConfig, DatasetConfig], device: Any
) -> dict[str, int]:
    """Corpus, database and dataset where they are missing; counts of the last."""
    from retro.cli.stages import prepare_corpus, prepare_database, prepare_dataset

    corpus_config, database_config, dataset_config = configs
    data_path = data_path_of(options)
    corpus = prepare_corpus(corpus_config, options.preset or "demo", options.texts, data_path, rebuild=False)
    manifest = prepare_database(database_config, corpus, data_path, device, rebuild=False)
    return prepare_dataset(dataset_config, corpus, manifest, data_path, device, rebuild=False)


def _resume(
    options: Namespace,
    config: TrainConfig | None,
    named: Path | None,
    base: str | None,
    device: Any,
    log: tuple[str, ...],
) -> None:
    """Continue a run with its own configs; if `config` has another length, one that goes on from it.

    * `named` is the folder of the data, if it is given, `base` where the run's base is now
    """
    from retro.runs.run import data_path_of as data_of_run
    from retro.runs.run import read_run
    from retro.train import train

    folder = Path(options.resume)
    manifest = read_run(folder)
    data_path = data_of_run(folder, manifest, named)
    run, summary = train(
        data_path=data_path,
        config=config,
        model_shape={} if base is None else {"base": base},
        device=device,
        resume=folder,
        prompt=options.prompt,
        fsdp=options.fsdp,
        log=log,
    )
    if not parallel.rank():
        _report_run(run, summary, data_path, device, options.prompt, None, base)


def _report_run(
    run: Path,
    summary: dict[str, Any],
    data_path: Path,
    device: Any,
    prompt: str | None,
    counts: dict[str, int] | None,
    base: str | None = None,
) -> None:
    """What came out: the numbers, where the files lie, and a sample with its sources.

    * `counts` are the dataset's, if they have been counted
    * `base` is where the run's base is now, if it was moved
    """
    from retro.cli.stages import describe
    from retro.cli.using import DRAWN, write_sample
    from retro.dataset import DATASET_FILE, Dataset
    from retro.evaluation.audit import audit
    from retro.runs.checkpoints import load_model
    from retro.runs.run import read_run
    from retro.sample import sampler_of
    from retro.search.index_file import read_database_manifest
    from retro.text.corpus import open_corpus

    corpus, manifest = open_corpus(data_path), read_database_manifest(data_path)
    counts = counts or audit(Dataset(data_path / DATASET_FILE["train"], corpus))
    reads = bool(read_run(run)["model"]["ca_layers"])
    off = f"({summary['valid_bpb_without_retrieval']:.3f} with retrieval switched off)" if reads else "(no retrieval)"
    n_trained = summary["n_trained_parameters"]
    trained = f", {n_trained:,} of them trained" if n_trained < summary["n_parameters"] / 2 else ""
    rows = {
        "model": f"{summary['n_parameters']:,} parameters{trained}, {summary['steps']:,} steps on {summary['device']}",
        "database": describe(manifest),
        "neighbors": f"{counts['neighbors']:,} for {counts['chunks']:,} chunks of {counts['samples']:,} samples; "
        f"{counts['leaking_neighbors']:,} overlap text still to be predicted",
        "training": f"{summary['train_bpb']:.3f} bits per byte",
        "validation": f"{summary['valid_bpb']:.3f} bits per byte {off}",
        "speed": f"{summary['tokens_per_second']:,.0f} training tokens per second",
        "files": str(run),
    }
    note("\n" + "\n".join(f"{name:<12}{text}" for name, text in rows.items()))
    try:
        corpus.tokenizer.encode(prompt or "")
    except ValueError:  # it cannot be written in this text's characters
        prompt = None
    prompt = prompt or corpus.beginning_of_held_out(2 * manifest["chunk_len"])
    try:
        model, config = load_model(run, device, base), DRAWN
        write_sample(run, sampler_of(run, model, data_path, corpus, device), prompt, 128, reads, config)
    except Exception as error:  # the run is finished all the same
        note(f"no sample: {explain(error)}")
