"""The command lines that build and train: `python -m retro.database`, `retro.dataset`, `retro.train`.

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

from retro import distributed
from retro.artifacts import differences, read_json, remove_unfinished
from retro.presets import PRESETS, Preset, texts_of

if TYPE_CHECKING:
    from retro.corpus import Corpus

MISSING, WHOLE, DAMAGED_KEYS = range(3)  # states that a database is found in
DATA = Path("data")  # where artifacts lie unless --data-path says otherwise
Main = Callable[..., int]  # takes argv, or reads it from the process


def command(main: Callable[[Sequence[str] | None], None]) -> Main:
    """Turn what users can cause into a message and a non-zero exit status, without a traceback."""

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        if distributed.rank():  # the first process speaks for all
            os.environ["TQDM_DISABLE"] = "1"
            sys.stdout = open(os.devnull, "w")
        try:
            main(argv)
        except (ValueError, OSError) as error:
            if sys.flags.dev_mode:  # python -X dev shows where
                raise
            print(f"\nerror: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            print("\ninterrupted; the same command finds again what was finished", file=sys.stderr)
            return 130
        return 0

    return run


def new_parser(description: str, *, texts: bool = False, builds: bool = True) -> argparse.ArgumentParser:
    """A parser with the options that commands share: all of them, or those that build something."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    if texts:
        parser.add_argument("texts", metavar="TEXT", nargs="*", help="text files, .jsonl files, or folders of them")
    default = f"default: {DATA}" if builds else "default: the run's"
    parser.add_argument("--data-path", type=Path, metavar="DIR", help=f"artifacts ({default})")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default: auto)")
    if builds:
        parser.add_argument("--preset", choices=sorted(PRESETS), help="a complete set-up (defaults are those of demo)")
        parser.add_argument("--seed", type=int, default=0, help="start of everything random (default: 0)")
        parser.add_argument(
            "--embedder", metavar="NAME_OR_FOLDER", help="BERT: a folder, a hub name, or the packaged one"
        )
    return parser


def _add_database_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", metavar="NAME", help="char, bpe:SIZE, or a Hugging Face name or folder")
    parser.add_argument("--chunk-len", type=int, help="tokens of a chunk")
    parser.add_argument(
        "--valid-fraction", type=float, help="share of the text to hold out, in whole documents (default: 0.1)"
    )
    parser.add_argument("--index", metavar="FACTORY_STRING", help="FAISS index, as Flat or IVF256,PQ64; or auto")
    searched = parser.add_mutually_exclusive_group()
    searched.add_argument("--n-probe", type=int, help="lists of the index to search")
    searched.add_argument("--recall", type=float, help="search as many lists as this recall at 10 needs (default: 0.9)")


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
    if "recall" in given:
        given["n_probe"] = None
        if not 0 < given["recall"] < 1:
            raise ValueError(f"--recall {given['recall']} is not a share between 0 and 1")
    for name in ("chunk_len", "n_probe", "chunks_per_sample", "n_neighbors", "skip_range"):
        if (given.get(name) or 1) < 1 or given.get(name) == 0:
            raise ValueError(f"--{name.replace('_', '-')} {given[name]} is not at least 1")
    if not 0 <= given.get("valid_fraction", 0) < 1:
        raise ValueError(f"--valid-fraction {given['valid_fraction']} is not a share from 0 up to (not including) 1")
    return replace(preset, **{k: v for k, v in given.items() if k not in ("name", "preset")})


def say(text: str = "") -> None:
    """Print at once: what is said stands before the progress bars that follow."""
    print(text, flush=True)


def prepare_corpus(preset: Preset, texts: Sequence[str], data_path: Path, seed: int, rebuild: bool) -> Corpus:
    """The corpus of `texts` (the preset's own if empty): found, or built."""
    from retro.corpus import REPAIR, Corpus, build_corpus, find_texts, plan_corpus, wanted_corpus

    folder = data_path / "corpus"
    repair = f"{REPAIR} --tokenizer {preset.tokenizer} --data-path {data_path}"
    fraction = preset.valid_fraction
    corpus: Corpus | None = None

    def paths() -> list[Path]:
        """The texts, downloaded if they have to be; for the first process to ask."""
        return [Path(text) for text in texts] or texts_of(preset, data_path)

    def whole() -> bool:
        """Whether the corpus of these texts is there, neither torn nor altered."""
        nonlocal corpus
        wanted = wanted_corpus(plan_corpus(find_texts(paths()), fraction, seed), preset.tokenizer, fraction, seed)
        if not _found(folder / "manifest.json", wanted, repair, rebuild):
            return False
        try:
            corpus = Corpus.load(folder)
        except ValueError as error:
            manifest = read_json(folder / "manifest.json", repair)
            if manifest.get("additions") or manifest.get("removed"):
                raise ValueError(
                    f"{error}. But documents were added and removed since it was built: to build it of these "
                    f"texts alone, delete {folder}; then repeat --add and --remove"
                ) from None
            say(f"made again: {error}")  # nothing is lost
            return False
        return True

    if distributed.agreed(whole):
        return corpus or Corpus.load(folder)
    distributed.first(lambda: build_corpus(paths(), folder, preset.tokenizer, fraction, seed))
    corpus = Corpus.load(folder)
    valid = ", ".join(corpus.documents[i].name for i in list(corpus.split("valid"))[:4])
    say(
        f"corpus: {len(corpus.documents):,} documents, {len(corpus.tokens):,} tokens of {corpus.n_tokens:,} kinds; "
        f"held out: {valid or 'nothing'}{' ...' if len(corpus.split('valid')) > 4 else ''}"
    )
    return corpus


def prepare_database(
    preset: Preset, corpus: Corpus, data_path: Path, seed: int, device: Any, rebuild: bool
) -> dict[str, Any]:
    """The database's manifest: found, or built."""
    from retro.corpus import REPAIR
    from retro.database import (
        MANIFEST_FILE,
        PARTS_FOLDER,
        build_database,
        keys_of,
        mend_keys,
        read_manifest,
        wanted_database,
    )
    from retro.faiss_index import holds_keys, read_index

    search = preset.n_probe or preset.recall
    wanted = wanted_database(corpus, preset.chunk_len, preset.index, search, preset.embedder, seed)
    repair = f"{REPAIR} --chunk-len {preset.chunk_len} --index {preset.index} --data-path {data_path}"

    def look() -> int:
        """The state of the database of this text; a torn or altered index is as good as none."""
        if not _found(data_path / MANIFEST_FILE, wanted, repair, rebuild):
            return MISSING
        state = MISSING
        try:
            manifest = read_manifest(data_path, repair)
            index = read_index(data_path, manifest, repair)
            state = DAMAGED_KEYS
            if not holds_keys(index):
                keys_of(data_path, corpus, manifest).verify()
            return WHOLE
        except (ValueError, FileNotFoundError) as error:  # nothing is lost
            say(f"made again: {error}")
            return state

    if (state := distributed.agreed(look)) != MISSING:
        manifest = read_manifest(data_path, repair)
        keys = keys_of(data_path, corpus, manifest)
        if state == DAMAGED_KEYS:
            mend_keys(keys, data_path, manifest, device)
        distributed.first(lambda: remove_unfinished(data_path, data_path / PARTS_FOLDER, *keys.others))
    else:
        build_database(
            preset.chunk_len,
            n_probe=preset.n_probe,
            recall=preset.recall,
            corpus=corpus,
            data_path=data_path,
            index=preset.index,
            embedder=preset.embedder,
            device=device,
            seed=seed,
        )
    manifest = read_manifest(data_path, repair)
    if manifest["note"]:
        say(f"note: {manifest['note']}")
    say(f"database: {describe(manifest)}")
    return manifest


def describe(database: dict[str, Any]) -> str:
    """A database's manifest in a line: how many chunks, in which index, with which recall."""
    recall = ", ".join(f"{share:.1%} {k}" for k, share in database["recall"].items())
    return f"{database['n_chunks']:,} chunks of {database['chunk_len']} tokens in {database['index']}; recall {recall}"


def prepare_dataset(
    preset: Preset, corpus: Corpus, database: dict[str, Any], data_path: Path, seed: int, device: Any, rebuild: bool
) -> dict[str, Any]:
    """Counts of the training dataset, found or built."""
    from retro.dataset import (
        DATASET_FILE,
        REPAIR,
        Dataset,
        audit,
        build_dataset,
        default_exclude,
        parts_folder,
        read_header,
        wanted_dataset,
    )

    p, exclude = preset, preset.exclude or default_exclude(corpus)
    wanted = wanted_dataset(database, p.chunks_per_sample, p.skip_range, p.n_neighbors, exclude, seed)
    repair = f"{REPAIR} --data-path {data_path} --exclude {exclude} --chunks-per-sample {p.chunks_per_sample}"
    paths = [data_path / name for name in DATASET_FILE.values()]

    def whole() -> bool:
        """Whether both files are there, of this database, and neither torn nor altered."""
        if not all([_found(path, wanted, repair, rebuild, lambda path, _: read_header(path)) for path in paths]):
            return False
        try:
            for path in paths:
                Dataset(path, corpus)
        except ValueError as error:  # nothing is lost
            say(f"made again: {error}")
            return False
        return True

    if distributed.agreed(whole):
        distributed.first(lambda: remove_unfinished(data_path, *map(parts_folder, paths)))
    else:
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
    say(
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
    parser = new_parser("Build the key-value database of a text: BERT embeddings in a FAISS index.", texts=True)
    _add_database_options(parser)
    change = parser.add_mutually_exclusive_group()
    change.add_argument(
        "--plan", action="store_true", help="build nothing: say what --n-tokens of such text would take"
    )
    change.add_argument("--add", metavar="TEXT", nargs="+", help="add texts to a database, embedding only them")
    change.add_argument("--remove", metavar="NAME", nargs="+", help="take documents out of a database")
    parser.add_argument("--n-tokens", type=float, metavar="N", help="size to plan for, as 1e9")
    parser.add_argument("--n-processes", type=int, default=1, metavar="N", help="processes to plan for (default: 1)")
    args = parser.parse_args(argv)
    args.data_path = args.data_path or DATA
    preset = _preset(args)
    if args.plan != (args.n_tokens is not None):
        raise ValueError("--plan and --n-tokens go together: python -m retro.database --plan --n-tokens 1e9 [TEXT ...]")
    from retro.corpus import Corpus
    from retro.device import pick_device

    device = pick_device(args.device)
    if args.plan:
        _plan(args, preset, device)
        return
    if args.add or args.remove:
        _change_database(args, device)
        return
    if not args.texts and args.preset is None and (args.data_path / "corpus" / "manifest.json").exists():
        corpus = Corpus.load(args.data_path / "corpus")  # another index over the text that is there
    else:
        corpus = prepare_corpus(preset, args.texts, args.data_path, args.seed, rebuild=True)
    prepare_database(preset, corpus, args.data_path, args.seed, device, rebuild=True)
    if corpus.split("valid"):
        say(f"next: python -m retro.dataset --data-path {args.data_path}")
    else:  # nothing to validate on: a database for models that are trained already
        say(f"next: python -m retro.evaluate --run RUN TEXT ... --database {args.data_path}")


def _plan(args: argparse.Namespace, preset: Preset, device: Any) -> None:
    """Say what a database will take."""
    from retro.plan import check_size, describe, measure, plan

    check_size(args.n_tokens, args.n_processes)
    texts = [Path(text) for text in args.texts] or texts_of(preset, args.data_path)
    say(f"measuring this machine on a sample of {texts[0]}{' and others' if len(texts) > 1 else ''}")
    p = preset
    rates = measure(texts, p.tokenizer, p.chunk_len, p.embedder, device, p.index, p.valid_fraction)
    say(describe(plan(args.n_tokens, rates, p.index, args.n_processes)))


def _change_database(args: argparse.Namespace, device: Any) -> None:
    """Add documents to a database, or take some out."""
    from retro.living import add_documents, remove_documents

    if args.texts:
        raise ValueError(f"{args.texts[0]}: texts to build a database of, but --add and --remove change one")
    if args.add:
        manifest = add_documents(args.add, args.data_path, device=device)
    else:
        manifest = remove_documents(args.remove, args.data_path, device=device)
    removed = ", ".join(manifest["removed"].values()) or "none"
    say(f"database: {describe(manifest)}; {sum(manifest['additions'])} documents added since, removed: {removed}")
    say(f"next: python -m retro.dataset --data-path {args.data_path}, before another model is trained on it")


@command
def dataset_command(argv: Sequence[str] | None = None) -> None:
    """`python -m retro.dataset`: the database's text to samples with neighbors."""
    parser = new_parser("Retrieve the neighbors of every training and validation sample, once.")
    _add_dataset_options(parser)
    args = parser.parse_args(argv)
    args.data_path = args.data_path or DATA
    preset = _preset(args)
    from retro.database import open_corpus, read_manifest
    from retro.device import pick_device

    corpus, manifest = open_corpus(args.data_path), read_manifest(args.data_path)
    prepare_dataset(preset, corpus, manifest, args.data_path, args.seed, pick_device(args.device), rebuild=True)
    say(f"next: python -m retro.train --data-path {args.data_path}")


@command
def train_command(argv: Sequence[str] | None = None) -> None:
    """`python -m retro.train`: everything that is missing, then training and a sample."""
    parser = new_parser(
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
    parser.add_argument(
        "--fsdp", action="store_true", help="under torchrun: spread the weights over the processes, for large models"
    )
    parser.add_argument("--resume", metavar="RUN", type=Path, help="continue the run in this folder")
    args = parser.parse_args(argv)
    preset = _preset(args)
    started = time.perf_counter()
    from retro.device import pick_device

    device = pick_device(args.device)
    if args.resume is not None:
        if args.no_retrieval:
            raise ValueError("--no-retrieval shapes a new run; --resume continues one as it is. Leave one of them out")
        _resume(args, device)
        return
    args.data_path = args.data_path or DATA
    if preset.valid_fraction == 0:
        raise ValueError("--valid-fraction 0 leaves nothing to validate on; training needs a share above 0")
    counts = None
    if args.preset or args.texts:
        corpus = prepare_corpus(preset, args.texts, args.data_path, args.seed, rebuild=False)
        manifest = prepare_database(preset, corpus, args.data_path, args.seed, device, rebuild=False)
        counts = prepare_dataset(preset, corpus, manifest, args.data_path, args.seed, device, rebuild=False)
    from retro.run_commands import report_run
    from retro.train import TrainConfig, train

    options: dict[str, Any] = {"seed": args.seed, **preset.train}
    options |= {k: v for k in ("batch_size", "lr", "precision", "compile") if (v := getattr(args, k)) is not None}
    if args.steps is not None or args.epochs is not None:
        options |= {"steps": args.steps, "epochs": args.epochs}
    run, summary = train(
        data_path=args.data_path,
        name=f"retro_{preset.name}" + ("_no_retrieval" if args.no_retrieval else ""),
        config=TrainConfig(**options),
        model_shape=preset.model | ({"ca_layers": ()} if args.no_retrieval else {}),
        device=device,
        prompt=preset.prompt,
        fsdp=args.fsdp,
    )
    if distributed.rank():
        return
    report_run(run, summary, args.data_path, device, preset.prompt, counts)
    say(f"\neverything took {time.perf_counter() - started:.0f} s; samples with other prompts: ")
    elsewhere = "" if args.data_path.resolve().is_relative_to(Path.cwd()) else f" --data-path {args.data_path}"
    say(f'  python -m retro.sample --run {run}{elsewhere} --show-neighbors "YOUR PROMPT"')


def _resume(args: argparse.Namespace, device: Any) -> None:
    """Continue a run with its own configs, to `--steps` or `--epochs` if given."""
    from retro.run_commands import data_path_of, report_run
    from retro.train import TrainConfig, read_run, train

    made_with = read_run(args.resume)
    config = None
    if args.steps is not None or args.epochs is not None:
        config = TrainConfig(**{**made_with["train"], "steps": args.steps, "epochs": args.epochs})
    data_path = data_path_of(args.data_path, args.resume, made_with)
    prompt = PRESETS[args.preset or "demo"].prompt
    run, summary = train(
        data_path=data_path, config=config, device=device, resume=args.resume, prompt=prompt, fsdp=args.fsdp
    )
    if distributed.rank():
        return
    report_run(run, summary, data_path, device, prompt)


def quiet_libraries() -> None:
    """No telemetry and no parallelism warnings from the tokenizer library in a command."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


quiet_libraries()
