"""The command lines that use a trained run: `python -m retro.sample`, `retro.evaluate`.

Everything heavy is imported after the options are read, so that `--help` answers at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from retro.artifacts import differences, require_match, write_json
from retro.commands import command, describe, new_parser, say

if TYPE_CHECKING:
    from retro.corpus import Corpus
    from retro.model import RetroModel


def report_run(
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
    from retro.database import open_corpus, read_manifest
    from retro.dataset import DATASET_FILE, Dataset, audit
    from retro.train import read_run

    manifest = read_manifest(data_path)
    corpus = open_corpus(data_path)
    counts = counts or audit(Dataset(data_path / DATASET_FILE["train"], corpus))
    reads = bool(read_run(run)["model"]["ca_layers"])
    off = f"({summary['valid_bpb_without_retrieval']:.3f} with retrieval switched off)" if reads else "(no retrieval)"
    rows = {
        "model": f"{summary['n_parameters']:,} parameters, {summary['steps']:,} steps on {summary['device']}",
        "database": describe(manifest),
        "neighbors": f"{counts['neighbors']:,} for {counts['chunks']:,} chunks of {counts['samples']:,} samples; "
        f"{counts['leaking_neighbors']:,} overlap text still to be predicted",
        "training": f"{summary['train_bpb']:.3f} bits per byte",
        "validation": f"{summary['valid_bpb']:.3f} bits per byte {off}",
        "speed": f"{summary['tokens_per_second']:,.0f} training tokens per second",
        "files": str(run),
    }
    say("\n" + "\n".join(f"{name:<12}{text}" for name, text in rows.items()))
    try:
        corpus.tokenizer.encode(prompt)
    except ValueError:  # the preset's prompt cannot be written in this text's characters: take held-out text
        prompt = corpus.text(corpus.n_train_tokens, manifest["chunk_len"])
    _sample(run, data_path, device, prompt, 128, show_neighbors=reads, options={"temperature": 0.8, "top_k": 40})


def _sample(
    run: Path, data_path: Path, device: Any, prompt: str, length: int, show_neighbors: bool, options: dict[str, Any]
) -> None:
    """Write a sample as it comes, then the neighbors that its chunks read."""
    from retro.database import RetroIndex
    from retro.model import RetroModel
    from retro.sample import Sampler
    from retro.train import read_run

    made_with = read_run(run)["dataset"]
    model = RetroModel.load(run, device)
    index = RetroIndex(made_with["chunk_len"], n_neighbors=made_with["n_neighbors"], data_path=data_path, device=device)
    sampler = Sampler(device, model, index.corpus, made_with["chunk_len"], index=index)
    say(f"\n--- prompt ---\n{prompt}\n--- sample ---")
    for piece in sampler.stream(prompt, length, **options):
        print(piece, end="", flush=True)
    say()
    if not show_neighbors:
        return
    ids = sampler.corpus.tokenizer.encode(prompt)
    for u, neighbors in enumerate(sampler.neighbors, start=1):
        origin = "prompt" if u * made_with["chunk_len"] <= len(ids) else "sample"
        say(f"\n--- neighbors of chunk {u} ({origin}) ---" + ("" if neighbors else "\nnone"))
        for n in neighbors:
            say(f"[{n.document}, token {n.offset:,}, distance {n.distance:.2f}] {' '.join(n.text.split())}")


@command
def sample_command(argv: Sequence[str] | None = None) -> None:
    """`python -m retro.sample`: text from a trained model."""
    parser = new_parser("Write text with a trained model that retrieves as it writes.", builds=False)
    parser.add_argument("prompt", help="text to continue")
    parser.add_argument("--run", type=Path, required=True, help="folder of a run, as retro.train prints it")
    parser.add_argument("--length", type=int, default=256, help="tokens to write (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default), 1 draws")
    parser.add_argument("--top-k", type=int, help="draw from the k likeliest tokens only")
    parser.add_argument("--top-p", type=float, help="draw from the likeliest tokens of this total probability only")
    parser.add_argument("--seed", type=int, default=0, help="start of the drawing (default: 0)")
    parser.add_argument("--show-neighbors", action="store_true", help="print what each chunk retrieved")
    args = parser.parse_args(argv)
    from retro.device import pick_device
    from retro.train import read_run

    device = pick_device(args.device)
    made_with = read_run(args.run)
    data_path = data_path_of(args.data_path, args.run, made_with)
    options = {k: getattr(args, k) for k in ("temperature", "top_k", "top_p", "seed")}
    _sample(args.run, data_path, device, args.prompt, args.length, args.show_neighbors, options)


@command
def evaluate_command(argv: Sequence[str] | None = None) -> None:
    """`python -m retro.evaluate`: what retrieval brings to held-out text."""
    parser = new_parser(
        "Measure bits per byte with retrieval on, off and random, and leakage, on the run's held-out text or on TEXT.",
        texts=True,
        builds=False,
    )
    parser.add_argument("--run", type=Path, required=True, help="folder of a run, as retro.train prints it")
    parser.add_argument("--baseline", metavar="RUN", type=Path, help="a run of retro.train --no-retrieval")
    parser.add_argument("--database", metavar="DIR", type=Path, help="data to retrieve from (default: the run's)")
    parser.add_argument("--n-neighbors", type=int, help="neighbors that a chunk reads (default: as in training)")
    parser.add_argument("--stride", type=int, help="tokens between windows (default: half a window)")
    parser.add_argument("--out", metavar="DIR", type=Path, help="replaced by the figures (default: RUN/evaluation)")
    parser.add_argument("--report", metavar="FILE.html", type=Path, help="write a page: what each token gained")
    args = parser.parse_args(argv)
    from retro.database import RetroIndex, open_corpus
    from retro.dataset import REPAIR
    from retro.device import pick_device
    from retro.evaluate import evaluate, held_out_texts, plot, require_held_out, table
    from retro.model import RetroModel
    from retro.train import read_run

    device = pick_device(args.device)
    run = read_run(args.run)
    made_with, data_path = run["dataset"], data_path_of(args.data_path, args.run, run)
    trained_on = open_corpus(data_path)
    repair = f"{REPAIR} --data-path {data_path}"
    require_match(args.run / "run.json", made_with, {"corpus_sha256": trained_on.sha256}, repair)
    held_out = held_out_texts(args.texts, trained_on.tokenizer) if args.texts else trained_on
    database = args.database or data_path
    in_database = _open_database(database, trained_on, made_with["chunk_len"], f"{data_path}/corpus")
    require_held_out(held_out, trained_on, in_database)
    baseline, differing = _load_baseline(args.baseline, run, data_path, device) if args.baseline else (None, [])
    model = RetroModel.load(args.run, device)
    evaluation = evaluate(
        model,
        held_out,
        RetroIndex(made_with["chunk_len"], corpus=in_database, data_path=database, device=device),
        n_neighbors=made_with["n_neighbors"] if args.n_neighbors is None else args.n_neighbors,
        window=made_with["chunk_len"] * made_with["chunks_per_sample"],
        stride=args.stride,
        baseline=baseline,
        device=device,
    )
    summary = evaluation.summary() | {
        "run": args.run.name,
        "baseline_run": args.baseline and args.baseline.name,
        "baseline_differs": differing,
        "database_path": str(database),
    }
    say("\n" + table(summary))
    if differing:
        say(f"note: the baseline differs in more than retrieval: {'; '.join(differing)}")
    out = args.out or args.run / "evaluation"
    write_json(out / "evaluation.json", summary)
    say(f"\nwritten: {out / 'evaluation.json'}")
    try:
        plot(summary, out / "filtered.png")
        say(f"written: {out / 'filtered.png'}")
    except ImportError:
        say("not written: the plot, which needs matplotlib (pip install matplotlib)")
    if args.report:
        from retro.report import write_report

        write_report(args.report, evaluation, model)
        say(f"written: {args.report}")


def _open_database(path: Path, trained_on: Corpus, chunk_len: int, tokenizer: str) -> Corpus:
    """The corpus of a database, if the run can read what it retrieves: same tokens, same chunks."""
    from retro.corpus import REPAIR
    from retro.database import open_corpus, read_manifest

    options = f"--tokenizer {tokenizer} --valid-fraction 0 --chunk-len {chunk_len} --data-path {path}"
    corpus = open_corpus(path)
    made_with = read_manifest(path, f"{REPAIR} {options}")
    made_with = {"chunk_len": made_with["chunk_len"], "tokenizer_sha256": corpus.tokenizer.sha256}
    wanted = {"chunk_len": chunk_len, "tokenizer_sha256": trained_on.tokenizer.sha256}
    require_match(path, made_with, wanted, f"{REPAIR} {options}")
    return corpus


def _load_baseline(path: Path, run: dict[str, Any], data_path: Path, device: Any) -> tuple[RetroModel, list[str]]:
    """A model without retrieval of the same data, and in what else it differs from the run."""
    from retro.model import RetroModel
    from retro.train import read_run

    repair = f"python -m retro.train --no-retrieval --data-path {data_path}"
    baseline = read_run(path, repair)
    sameness = {"corpus_sha256": run["dataset"]["corpus_sha256"]}
    require_match(path / "run.json", baseline["dataset"], sameness, repair)
    if baseline["model"]["ca_layers"]:
        raise ValueError(f"{path} was trained with retrieval, so it is no baseline. Train one: {repair}")
    unlike = ("ca_layers", "n_encoder_layers", "encoder_ca_layers")
    made_with, wanted = (
        {**r["train"], **{k: v for k, v in r["model"].items() if k not in unlike}} for r in (baseline, run)
    )
    return RetroModel.load(path, device), differences(made_with, wanted)


def data_path_of(named: Path | None, run: Path, made_with: dict[str, Any]) -> Path:
    """The folder of a run's data: as named, or, if that is in the current folder, as it was when the run was made."""
    path = named or Path(made_with["data_path"])
    if named is None and not path.resolve().is_relative_to(Path.cwd().resolve()):
        raise ValueError(
            f"{run / 'run.json'} says that its data lie in {path}, which is not in the current folder. "
            f"If you trust it, name it yourself: --data-path {path}"
        )
    if not path.exists():
        where = "" if named else f", where {run} was made,"
        raise FileNotFoundError(f"{path}{where} does not exist; name the folder of the run's data with --data-path")
    return path
