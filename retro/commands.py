"""The command lines: `python -m retro.database`, `.dataset`, `.train`, `.sample`, `.evaluate`.

Each stage builds its artifact if it is not there or was made otherwise, and leaves it alone if it
is what the options ask for. `retro.train` does the same for the stages before it, but never replaces
an artifact that was made otherwise: it says what differs and which command rebuilds it.

Everything heavy is imported after the options are read, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retro.artifacts import differences, read_json
from retro.presets import PRESETS, Preset, texts_of

if TYPE_CHECKING:
    from retro.corpus import Corpus

Main = Callable[..., int]  # takes argv, or reads it from the process


def command(main: Callable[[Sequence[str] | None], None]) -> Main:
    """Turn what users can cause into a message and a non-zero exit status, without a traceback."""

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            main(argv)
        except (ValueError, OSError) as error:
            if sys.flags.dev_mode:  # python -X dev shows where
                raise
            print(f"\nerror: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\ninterrupted; the same command continues from the last finished piece", file=sys.stderr)
            return 130
        return 0

    return run


def _parser(description: str, *, texts: bool = False) -> argparse.ArgumentParser:
    """A parser with the options that all commands share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if texts:
        parser.add_argument("texts", metavar="TEXT", nargs="*", help="text files, .jsonl files, or folders of them")
    parser.add_argument("--data-path", type=Path, default=Path("data"), metavar="DIR", help="artifacts (default: data)")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="a complete set-up (defaults are those of demo)")
    parser.add_argument("--seed", type=int, default=0, help="start of everything random (default: 0)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    parser.add_argument("--embedder", metavar="NAME_OR_FOLDER", help="BERT: a folder, a hub name, or the packaged one")
    return parser


def _add_database_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", metavar="NAME", help="char, bpe:SIZE, or a Hugging Face name or folder")
    parser.add_argument("--chunk-len", type=int, help="tokens of a chunk")
    parser.add_argument(
        "--valid-fraction", type=float, help="share of the text to hold out, in whole documents (default: 0.1)"
    )
    parser.add_argument("--index", metavar="FACTORY_STRING", help="FAISS index, as Flat or IVF256,PQ64; or auto")
    parser.add_argument("--n-probe", type=int, help="lists of the index to search")


def _add_dataset_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--chunks-per-sample", type=int, help="chunks of a sample")
    parser.add_argument("--n-neighbors", type=int, help="neighbors of a chunk")
    parser.add_argument("--skip-range", type=int, help="fewer than this many tokens are skipped before a sample")
    parser.add_argument(
        "--exclude",
        choices=("document", "sample", "span"),
        help="what neighbors may not come from: the query's document (default), its sample (default where only one "
        "document trains), or the tutorial's span, which leaks text still to be predicted",
    )


def _preset(args: argparse.Namespace) -> Preset:
    """The preset with the options of the command line in place of its own."""
    preset = PRESETS[args.preset or "demo"]
    given = {k: v for k, v in vars(args).items() if v is not None and hasattr(preset, k)}
    for name in ("chunk_len", "n_probe", "chunks_per_sample", "n_neighbors", "skip_range"):
        if given.get(name, 1) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {given[name]} is not at least 1")
    if not 0 <= given.get("valid_fraction", 0) < 1:
        raise ValueError(f"--valid-fraction {given['valid_fraction']} is not a share from 0 up to (not including) 1")
    return replace(preset, **{k: v for k, v in given.items() if k not in ("name", "preset")})


def _say(text: str = "") -> None:
    print(text, flush=True)


def prepare_corpus(preset: Preset, texts: Sequence[str], data_path: Path, seed: int, rebuild: bool) -> Corpus:
    """The corpus of `texts` (the preset's own if empty): found, or built."""
    from retro.corpus import REPAIR, Corpus, build_corpus, find_texts, plan_corpus, wanted_corpus

    paths = [Path(text) for text in texts] or texts_of(preset, data_path)
    folder = data_path / "corpus"
    repair = f"{REPAIR} --tokenizer {preset.tokenizer} --data-path {data_path}"
    fraction = preset.valid_fraction
    wanted = wanted_corpus(plan_corpus(find_texts(paths), fraction, seed), preset.tokenizer, fraction, seed)
    if _found(folder / "manifest.json", wanted, repair, rebuild):
        return Corpus.load(folder)
    corpus = build_corpus(paths, folder, preset.tokenizer, fraction, seed)
    valid = ", ".join(corpus.documents[i].name for i in list(corpus.split("valid"))[:4])
    _say(
        f"corpus: {len(corpus.documents):,} documents, {len(corpus.tokens):,} tokens of {corpus.n_tokens:,} kinds; "
        f"held out: {valid or 'nothing'}{' ...' if len(corpus.split('valid')) > 4 else ''}"
    )
    return corpus


def prepare_database(
    preset: Preset, corpus: Corpus, data_path: Path, seed: int, device: Any, rebuild: bool
) -> dict[str, Any]:
    """The database's manifest: found, or built."""
    from retro.corpus import REPAIR
    from retro.database import MANIFEST_FILE, build_database, wanted_database

    wanted = wanted_database(corpus, preset.chunk_len, preset.index, preset.embedder, seed)
    repair = f"{REPAIR} --chunk-len {preset.chunk_len} --index {preset.index} --data-path {data_path}"
    if not _found(data_path / MANIFEST_FILE, wanted, repair, rebuild):
        build_database(
            preset.chunk_len,
            n_probe=preset.n_probe,
            corpus=corpus,
            data_path=data_path,
            index=preset.index,
            embedder=preset.embedder,
            device=device,
            seed=seed,
        )
    manifest = read_json(data_path / MANIFEST_FILE, repair)
    if manifest["note"]:
        _say(f"note: {manifest['note']}")
    _say(f"database: {_description(manifest)}")
    return manifest


def _description(database: dict[str, Any]) -> str:
    recall = ", ".join(f"{share:.1%} {k}" for k, share in database["recall"].items())
    return f"{database['n_chunks']:,} chunks of {database['chunk_len']} tokens in {database['index']}; recall {recall}"


def prepare_dataset(
    preset: Preset, corpus: Corpus, database: dict[str, Any], data_path: Path, seed: int, device: Any, rebuild: bool
) -> dict[str, Any]:
    """Counts of the training dataset, found or built."""
    from retro.dataset import DATASET_FILE, REPAIR, Dataset, audit, build_dataset, default_exclude, wanted_dataset
    from retro.dataset import read_header as header_of

    p, exclude = preset, preset.exclude or default_exclude(corpus)
    wanted = wanted_dataset(database, p.chunks_per_sample, p.skip_range, p.n_neighbors, exclude, seed)
    repair = f"{REPAIR} --data-path {data_path} --exclude {exclude} --chunks-per-sample {p.chunks_per_sample}"
    paths = [data_path / name for name in DATASET_FILE.values()]
    found = [_found(path, wanted, repair, rebuild, lambda path, _: header_of(path)) for path in paths]
    if not all(found):
        build_dataset(
            None,
            p.chunks_per_sample,
            p.skip_range,
            corpus=corpus,
            data_path=data_path,
            n_neighbors=p.n_neighbors,
            exclude=exclude,
            device=device,
            seed=seed,
        )
    counts = audit(Dataset(paths[0], corpus))
    _say(
        f"dataset: {counts['samples']:,} samples, {counts['chunks']:,} chunks with {counts['neighbors']:,} neighbors "
        f"(exclude={exclude}); {counts['leaking_neighbors']:,} neighbors overlap text still to be predicted"
    )
    return counts


def _found(
    path: Path, wanted: dict[str, Any], repair: str, rebuild: bool, read: Callable[..., dict[str, Any]] = read_json
) -> bool:
    """Whether the artifact at `path` is the one wanted; if it was made otherwise, rebuild it or refuse."""
    if not path.exists():
        return False
    try:
        different = differences(read(path, repair), wanted)
    except ValueError:
        if not rebuild:
            raise
        return False
    if different and not rebuild:
        raise ValueError(
            f"{path} was made with {'; '.join(different)}. Rebuild it: {repair}, "
            "or keep it and use another --data-path."
        )
    return not different


@command
def database_command(argv: Sequence[str] | None = None) -> None:
    """`python -m retro.database`: texts to corpus and database."""
    parser = _parser("Build the key-value database of a text: BERT embeddings in a FAISS index.", texts=True)
    _add_database_options(parser)
    args = parser.parse_args(argv)
    preset = _preset(args)
    from retro.corpus import Corpus
    from retro.device import pick_device

    device = pick_device(args.device)
    if not args.texts and args.preset is None and (args.data_path / "corpus" / "manifest.json").exists():
        corpus = Corpus.load(args.data_path / "corpus")  # another index over the text that is there
    else:
        corpus = prepare_corpus(preset, args.texts, args.data_path, args.seed, rebuild=True)
    prepare_database(preset, corpus, args.data_path, args.seed, device, rebuild=True)
    _say(f"next: python -m retro.dataset --data-path {args.data_path}")


@command
def dataset_command(argv: Sequence[str] | None = None) -> None:
    """`python -m retro.dataset`: the database's text to samples with neighbors."""
    parser = _parser("Retrieve the neighbors of every training and validation sample, once.")
    _add_dataset_options(parser)
    args = parser.parse_args(argv)
    preset = _preset(args)
    from retro.corpus import REPAIR
    from retro.database import MANIFEST_FILE, open_corpus
    from retro.device import pick_device

    corpus, manifest = open_corpus(args.data_path), read_json(args.data_path / MANIFEST_FILE, REPAIR)
    prepare_dataset(preset, corpus, manifest, args.data_path, args.seed, pick_device(args.device), rebuild=True)
    _say(f"next: python -m retro.train --data-path {args.data_path}")


@command
def train_command(argv: Sequence[str] | None = None) -> None:
    """`python -m retro.train`: everything that is missing, then training and a sample."""
    parser = _parser(
        "Train a RETRO model; with --preset or TEXT, build corpus, database and dataset first where they are missing.",
        texts=True,
    )
    _add_database_options(parser)
    _add_dataset_options(parser)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help="training steps")
    length.add_argument("--epochs", type=int, help="passes over the samples, in place of steps")
    parser.add_argument("--batch-size", type=int, help="samples of a step")
    parser.add_argument("--lr", type=float, help="learning rate (a factor of Noam's in the tutorial preset)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="arithmetic (default: fp32)")
    parser.add_argument(
        "--compile", action="store_true", default=None, help="compile the model; pays on long runs only"
    )
    parser.add_argument(
        "--no-retrieval", action="store_true", help="without cross-attention: the baseline of retro.evaluate"
    )
    parser.add_argument("--resume", metavar="RUN", type=Path, help="continue the run in this folder")
    args = parser.parse_args(argv)
    preset = _preset(args)
    started = time.perf_counter()
    from retro.device import pick_device

    device = pick_device(args.device)
    if args.resume is not None:
        _resume(args, device)
        return
    counts = None
    if args.preset or args.texts:
        corpus = prepare_corpus(preset, args.texts, args.data_path, args.seed, rebuild=False)
        manifest = prepare_database(preset, corpus, args.data_path, args.seed, device, rebuild=False)
        counts = prepare_dataset(preset, corpus, manifest, args.data_path, args.seed, device, rebuild=False)
    from retro.train import TrainConfig, train

    options: dict[str, Any] = {"seed": args.seed, **preset.train}
    options |= {k: v for k in ("batch_size", "lr", "precision", "compile") if (v := getattr(args, k)) is not None}
    if args.steps is not None or args.epochs is not None:
        options |= {"steps": args.steps, "epochs": args.epochs}
    run, summary = train(
        data_path=args.data_path,
        name=f"retro_{preset.name}",
        config=TrainConfig(**options),
        model_shape=preset.model | ({"ca_layers": ()} if args.no_retrieval else {}),
        device=device,
        prompt=preset.prompt,
    )
    _report(run, summary, args.data_path, device, preset.prompt, counts)
    _say(f"\neverything took {time.perf_counter() - started:.0f} s; samples with other prompts: ")
    _say(f'  python -m retro.sample --run {run} --show-neighbors "YOUR PROMPT"')


def _resume(args: argparse.Namespace, device: Any) -> None:
    """Continue a run with its own configs, to `--steps` or `--epochs` if given."""
    from retro.train import TrainConfig, read_run, train

    made_with = read_run(args.resume)
    config = None
    if args.steps is not None or args.epochs is not None:
        config = TrainConfig(**{**made_with["train"], "steps": args.steps, "epochs": args.epochs})
    data_path = _data_path(args, made_with)
    prompt = PRESETS[args.preset or "demo"].prompt
    run, summary = train(data_path=data_path, config=config, device=device, resume=args.resume, prompt=prompt)
    _report(run, summary, data_path, device, prompt)


def _report(
    run: Path,
    summary: dict[str, Any],
    data_path: Path,
    device: Any,
    prompt: str,
    counts: dict[str, int] | None = None,
) -> None:
    """What came out: the numbers, where the files lie, and a sample with its sources.

    `counts` are the dataset's, if they have been counted.
    """
    from retro.corpus import REPAIR
    from retro.database import MANIFEST_FILE, open_corpus
    from retro.dataset import DATASET_FILE, Dataset, audit

    manifest = read_json(data_path / MANIFEST_FILE, REPAIR)
    corpus = open_corpus(data_path)
    counts = counts or audit(Dataset(data_path / DATASET_FILE["train"], corpus))
    rows = {
        "model": f"{summary['n_parameters']:,} parameters, {summary['steps']:,} steps on {summary['device']}",
        "database": _description(manifest),
        "neighbors": f"{counts['neighbors']:,} for {counts['chunks']:,} chunks of {counts['samples']:,} samples; "
        f"{counts['leaking_neighbors']:,} overlap text still to be predicted",
        "training": f"{summary['train_bpb']:.3f} bits per byte",
        "validation": f"{summary['valid_bpb']:.3f} bits per byte "
        f"({summary['valid_bpb_without_retrieval']:.3f} with retrieval switched off)",
        "speed": f"{summary['tokens_per_second']:,.0f} training tokens per second",
        "files": str(run),
    }
    _say("\n" + "\n".join(f"{name:<12}{text}" for name, text in rows.items()))
    try:
        corpus.tokenizer.encode(prompt)
    except ValueError:  # the preset's prompt cannot be written in this text's characters: take held-out text
        prompt = corpus.text(corpus.n_train_tokens, manifest["chunk_len"])
    _sample(run, data_path, device, prompt, 128, show_neighbors=True, options={"temperature": 0.8, "top_k": 40})


def _sample(
    run: Path, data_path: Path, device: Any, prompt: str, length: int, show_neighbors: bool, options: dict[str, Any]
) -> None:
    """Write a sample as it comes, then the neighbors that its chunks read."""
    from retro.database import RetroIndex
    from retro.model import RetroModel
    from retro.sample import Sampler

    made_with = read_json(run / "run.json", "python -m retro.train")["dataset"]
    model = RetroModel.load(run, device)
    index = RetroIndex(made_with["chunk_len"], n_neighbors=made_with["n_neighbors"], data_path=data_path, device=device)
    sampler = Sampler(device, model, index.corpus, made_with["chunk_len"], index=index)
    _say(f"\n--- prompt ---\n{prompt}\n--- sample ---")
    for piece in sampler.stream(prompt, length, **options):
        print(piece, end="", flush=True)
    _say()
    if not show_neighbors:
        return
    ids = sampler.corpus.tokenizer.encode(prompt)
    for u, neighbors in enumerate(sampler.neighbors, start=1):
        origin = "prompt" if u * made_with["chunk_len"] <= len(ids) else "sample"
        _say(f"\n--- neighbors of chunk {u} ({origin}) ---" + ("" if neighbors else "\nnone"))
        for n in neighbors:
            _say(f"[{n.document}, token {n.offset:,}, distance {n.distance:.2f}] {' '.join(n.text.split())}")


@command
def sample_command(argv: Sequence[str] | None = None) -> None:
    """`python -m retro.sample`: text from a trained model."""
    parser = _parser("Write text with a trained model that retrieves as it writes.")
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--run", type=Path, required=True, help="folder of a run, as retro.train prints it")
    parser.add_argument("--length", type=int, default=256, help="tokens to write (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default), 1 draws")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this total probability only")
    parser.add_argument("--show-neighbors", action="store_true", help="print what each chunk retrieved")
    args = parser.parse_args(argv)
    from retro.device import pick_device

    device = pick_device(args.device)
    made_with = read_json(args.run / "run.json", "python -m retro.train")
    data_path = _data_path(args, made_with)
    options = {k: getattr(args, k) for k in ("temperature", "top_k", "top_p", "seed")}
    _sample(args.run, data_path, device, args.prompt, args.length, args.show_neighbors, options)


@command
def evaluate_command(argv: Sequence[str] | None = None) -> None:
    """`python -m retro.evaluate`: what retrieval brings to held-out text."""
    parser = _parser(
        "Measure bits per byte with retrieval on, off and random, and leakage, on held-out text.", texts=True
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a run, as retro.train prints it")
    parser.add_argument(
        "--baseline", metavar="RUN", type=Path, help="a run of retro.train --no-retrieval to compare with"
    )
    parser.add_argument(
        "--database", metavar="DIR", type=Path, help="data folder to retrieve from (default: the run's)"
    )
    parser.add_argument("--n-neighbors", type=int, help="neighbors that a chunk reads (default: as in training)")
    parser.add_argument("--stride", type=int, help="tokens between windows (default: half a window)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="where the figures go (default: RUN/evaluation)")
    parser.add_argument(
        "--report", metavar="FILE.html", type=Path, help="write a page that shows what each token gained"
    )
    args = parser.parse_args(argv)
    from retro.artifacts import require_match, write_json
    from retro.corpus import REPAIR
    from retro.database import RetroIndex, open_corpus
    from retro.dataset import REPAIR as DATASET_REPAIR
    from retro.device import pick_device
    from retro.evaluate import evaluate, held_out_texts, plot, require_held_out, table
    from retro.model import RetroModel

    device = pick_device(args.device)
    run_json = args.run / "run.json"
    made_with = read_json(run_json, "python -m retro.train")["dataset"]
    data_path = _data_path(args, read_json(run_json, ""))
    trained_on = open_corpus(data_path)
    require_match(
        run_json, made_with, {"corpus_sha256": trained_on.sha256}, f"{DATASET_REPAIR} --data-path {data_path}"
    )
    held_out = held_out_texts(args.texts, trained_on.tokenizer) if args.texts else trained_on
    m, database = made_with["chunk_len"], args.database or data_path
    in_database = open_corpus(database)
    if in_database.tokenizer.sha256 != trained_on.tokenizer.sha256:
        raise ValueError(
            f"{database} has another tokenizer than {args.run} (sha256 {in_database.tokenizer.sha256[:12]}, but "
            f"{trained_on.tokenizer.sha256[:12]} is wanted). Rebuild it: {REPAIR} --tokenizer {data_path}/corpus "
            f"--valid-fraction 0 --chunk-len {m} --data-path {database}"
        )
    require_held_out(held_out, trained_on, in_database)
    baseline = None
    if args.baseline:
        of_baseline = read_json(args.baseline / "run.json", "python -m retro.train --no-retrieval")["dataset"]
        wanted = {"corpus_sha256": trained_on.sha256}
        repair = f"python -m retro.train --no-retrieval --data-path {data_path}"
        require_match(args.baseline / "run.json", of_baseline, wanted, repair)
        baseline = RetroModel.load(args.baseline, device)
    model = RetroModel.load(args.run, device)
    index = RetroIndex(m, corpus=in_database, data_path=database, device=device)
    evaluation = evaluate(
        model,
        held_out,
        index,
        n_neighbors=args.n_neighbors if args.n_neighbors is not None else made_with["n_neighbors"],
        window=m * made_with["chunks_per_sample"],
        stride=args.stride,
        baseline=baseline,
        device=device,
    )
    summary = evaluation.summary() | {"run": args.run.name, "baseline_run": args.baseline and args.baseline.name}
    out = args.out or args.run / "evaluation"
    write_json(out / "evaluation.json", summary)
    _say("\n" + table(summary))
    _say(f"\nwritten: {out / 'evaluation.json'}")
    try:
        plot(summary, out / "filtered.png")
        _say(f"written: {out / 'filtered.png'}")
    except ImportError:
        _say("not written: the plot, which needs matplotlib (pip install matplotlib)")
    if args.report:
        from retro.report import write_report

        write_report(args.report, evaluation, model)
        _say(f"written: {args.report}")


def _data_path(args: argparse.Namespace, run: dict[str, Any]) -> Path:
    """The folder of a run's data: as named, or as it was when the run was made."""
    return args.data_path if args.data_path != Path("data") else Path(run["data_path"])


def quiet_libraries() -> None:
    """No telemetry and no parallelism warnings from the tokenizer library in a command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


quiet_libraries()
