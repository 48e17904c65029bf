"""`retro sample` and `retro evaluate`: what a trained run writes, and what retrieval brings to it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import Namespace

from retro.cli.building import TEXTS
from retro.cli.options import DATA, add_config, config_from, new_parser
from retro.cli.repair import explain
from retro.config import PACKAGED_BASE, EvaluateConfig, SampleConfig
from retro.errors import InvalidOption, phrase
from retro.progress import note, terminal_width

if TYPE_CHECKING:
    from retro.retrofit import Model
    from retro.sample import Sampler
    from retro.text.corpus import Corpus

BASE_HELP = "where the run's base is now, a folder or a hub name; null for where it was"
OR_BASE_HELP = BASE_HELP + "; with --database a base that reads that in its context, without a run"
DATABASE_HELP = "folder of a database that --base reads, where there is no run"
DRAWN = SampleConfig(temperature=0.8, top_k=40)  # greedy text, which the library's default is, soon turns in circles
RUN_HELP = "folder of a run, or logs/NAME for its latest; null for the latest of the data that reads neighbors"


def find_run(options: Namespace) -> tuple[Path, dict[str, Any], Path, Corpus]:
    """The run that is named, or the latest of the data; its manifest, the folder of its data, and their corpus."""
    from retro.runs.run import corpus_of_run, data_path_of, latest_run, read_run, run_in

    named = None if options.data_path is None else Path(options.data_path)
    if options.run is None:
        run = latest_run(named or Path(DATA))
        note(f"run: {run}")
    else:
        run = run_in(Path(options.run))
    manifest = read_run(run)
    data_path = data_path_of(run, manifest, named)
    return run, manifest, data_path, corpus_of_run(run, manifest, data_path, named is not None)


def require_base_or_run(options: Namespace) -> bool:
    """Whether a base with a database is named, and no run. Raises `InvalidOption` for half of it, or for both."""
    if options.database is None:
        return False
    if options.base is None:
        raise InvalidOption(
            "database", options.database, f"is read by a base: name it too, as in --base {PACKAGED_BASE}"
        )
    for name in ("run", "data_path"):
        if (given := getattr(options, name)) is not None:
            raise InvalidOption(name, given, "goes without --database, which is for a base that has no run")
    return True


def sample_command(argv: Sequence[str]) -> None:
    """Text from a trained model."""
    parser = new_parser("sample", "Write text with a trained model that retrieves as it writes.", of_a_run=True)
    parser.add_argument(
        "prompt", nargs="?", type=str, default=None, help="text to continue; left out, it asks for one by one"
    )
    parser.add_argument("--run", type=str, default=None, help=RUN_HELP)
    parser.add_argument("--base", type=str, default=None, help=OR_BASE_HELP)
    parser.add_argument("--database", metavar="DIR", type=str, default=None, help=DATABASE_HELP)
    parser.add_argument("--length", type=int, default=256, help="tokens to write")
    parser.add_argument("--show-neighbors", action="store_true", help="print what each chunk retrieved")
    add_config(parser, SampleConfig, DRAWN)
    options = parser.parse_args(list(argv))
    config = config_from(SampleConfig, options)
    of_base = require_base_or_run(options)
    from retro.device import pick_device

    device = pick_device(options.device)
    from retro.runs.checkpoints import load_model
    from retro.sample import base_in_context, sampler_in_context, sampler_of

    if of_base:
        name, database = options.base, Path(options.database)
        sampler = sampler_in_context(base_in_context(name, database, device), database)
    else:
        name, _, data_path, corpus = find_run(options)
        sampler = sampler_of(name, load_model(name, device, options.base), data_path, corpus, device)

    def write(prompt: str) -> None:
        write_sample(name, sampler, prompt, options.length, options.show_neighbors, config)

    if options.prompt is None:
        _write_what_is_asked(write)
    else:
        write(options.prompt)


def _write_what_is_asked(write: Callable[[str], None]) -> None:
    """Continue prompts from standard input, a line each, to its end. Ctrl-C stops a sample; between two, the loop."""
    asks = sys.stdin.isatty()
    if asks:
        note("write the beginning of a text; Ctrl-C stops what is written, Ctrl-D ends")
    while True:
        try:
            prompt = input("\n> " if asks else "")
        except EOFError:
            return
        try:
            write(prompt)
        except KeyboardInterrupt:
            note("\nstopped")
        except ValueError as error:  # one that cannot be continued, as an empty one
            print(f"error: {explain(error)}", file=sys.stderr)


def write_sample(
    run: Path | str, sampler: Sampler, prompt: str, length: int, show_neighbors: bool, config: SampleConfig
) -> None:
    """Write a sample as it comes, then the neighbors that its chunks read."""
    from retro.search.chunks import how_far

    pieces = sampler.stream(prompt, length, config)
    note(f"\n--- prompt ---\n{prompt}\n--- sample ---")
    for text in pieces:
        print(text, end="", flush=True)
    note("")
    if not show_neighbors:
        return
    if not sampler.model.ca_layers:
        note(f"\nno neighbors: {run} was trained without retrieval, and reads none")
        return
    n_tokens = len(sampler.corpus.tokenizer.encode(prompt))
    for u, neighbors in enumerate(sampler.neighbors, start=1):
        origin = "prompt" if u * sampler.chunk_len <= n_tokens else "sample"
        note(f"\n--- neighbors of chunk {u} ({origin}) ---" + ("" if neighbors else "\nnone"))
        for n in neighbors:
            note(f"[{n.document}, token {n.offset:,}, {how_far(n.distance)}] {' '.join(n.text.split())}")


def evaluate_command(argv: Sequence[str]) -> None:
    """What retrieval brings to held-out text."""
    parser = new_parser(
        "evaluate",
        "Measure bits per byte with retrieval on, off and random, and leakage, on the run's held-out text or on TEXT.",
        texts=TEXTS,
        of_a_run=True,
    )
    against_help = "rivals to measure besides, with commas between: in-context, longer-context, both, knn-lm"
    baseline_help = "a run of retro train --no-retrieval, or logs/NAME for its latest"
    parser.add_argument("--run", type=str, default=None, help=RUN_HELP)
    parser.add_argument("--base", type=str, default=None, help=BASE_HELP)
    parser.add_argument("--baseline", metavar="RUN", type=str, default=None, help=baseline_help)
    parser.add_argument(
        "--database", metavar="DIR", type=str, default=None, help="data to retrieve from; null for the run's"
    )
    parser.add_argument(
        "--out", metavar="DIR", type=str, default=None, help="folder of the figures; null for RUN/evaluation"
    )
    parser.add_argument(
        "--report", metavar="FILE.html", type=str, default=None, help="write a page: what each token gained"
    )
    parser.add_argument("--against", metavar="NAMES", type=str, default="", help=against_help)
    add_config(parser, EvaluateConfig, EvaluateConfig())
    options = parser.parse_args(list(argv))
    config = config_from(EvaluateConfig, options)
    from retro.device import pick_device
    from retro.runs.run import run_in

    device = pick_device(options.device)
    run, manifest, data_path, corpus = find_run(options)
    if options.baseline is not None:
        options.baseline = str(run_in(Path(options.baseline)))
    evaluation, model, baseline, differing = _evaluate(options, config, run, manifest, data_path, corpus, device)
    summary = evaluation.summary() | {
        "run": run.name,
        "baseline_run": options.baseline and Path(options.baseline).name,
        "baseline_differs": [phrase({name: pair}) for name, pair in differing.items()],
        "database_path": str(options.database or data_path),
        "texts": options.texts,
    }
    out = Path(options.out or run / "evaluation")
    if options.against:
        from retro.evaluation.costs import costs
        from retro.storage.manifests import write_manifest

        write_manifest(out / "evaluation.json", summary)  # what took long is there, whatever becomes of the rest
        summary["costs"] = costs(
            evaluation.nats,
            model,
            evaluation.corpus,
            evaluation.index,
            n_neighbors=evaluation.n_neighbors,
            window=evaluation.window,
            baseline=baseline,
        )
    _write_figures(summary, out)
    if options.report:
        from retro.evaluation.report import write_report
        from retro.runs.checkpoints import newest_checkpoint

        about = [str(run), f"{int(newest_checkpoint(run).name):,} steps"]
        write_report(Path(options.report), evaluation, model, about=about)
        note(f"written: {options.report}")


def _evaluate(
    options: Namespace,
    config: EvaluateConfig,
    run: Path,
    manifest: dict[str, Any],
    data_path: Path,
    trained_on: Corpus,
    device: Any,
) -> tuple[Any, Model, Model | None, dict[str, tuple[Any, Any]]]:
    """The evaluation, the model, its baseline, and in what that differs besides retrieval."""
    from dataclasses import replace

    from retro.database import RetroIndex
    from retro.errors import require_match
    from retro.evaluate import evaluate
    from retro.evaluation.held_out import held_out_texts, require_held_out
    from retro.runs.checkpoints import load_model
    from retro.text.records import Columns

    dataset = manifest["dataset"]
    require_match(
        data_path / "corpus", {"corpus_sha256": trained_on.sha256}, {"corpus_sha256": dataset["corpus_sha256"]}
    )
    held_out = trained_on
    if options.texts:
        held_out = held_out_texts(options.texts, trained_on.tokenizer, Columns.of(trained_on.manifest))
    database = Path(options.database or data_path)
    in_database = trained_on
    if database.resolve() != data_path.resolve():
        in_database = _open_database(database, trained_on, dataset["chunk_len"], f"{data_path}/corpus")
    require_held_out(held_out, trained_on, in_database)
    baseline, differing = None, dict[str, tuple[Any, Any]]()
    if options.baseline is not None:
        baseline, differing = _load_baseline(Path(options.baseline), manifest, data_path, device, options.base)
    model = load_model(run, device, options.base)
    config = replace(
        config,
        n_neighbors=config.n_neighbors or dataset["n_neighbors"],
        window=config.window or dataset["chunk_len"] * dataset["chunks_per_sample"],
    )
    index = RetroIndex(dataset["chunk_len"], corpus=in_database, data_path=database, device=device)
    rivals = [name.strip() for name in options.against.split(",") if name.strip()]
    evaluation = evaluate(model, held_out, index, config=config, baseline=baseline, against=rivals, device=device)
    return evaluation, model, baseline, differing


def _write_figures(summary: dict[str, Any], out: Path) -> None:
    from retro.evaluation.figures import plot, plot_costs, table
    from retro.storage.manifests import write_manifest

    note("\n" + table(summary, terminal_width()))
    if summary["baseline_differs"]:
        note(f"note: the baseline differs in more than retrieval: {'; '.join(summary['baseline_differs'])}")
    write_manifest(out / "evaluation.json", summary)
    note(f"\nwritten: {out / 'evaluation.json'}")
    try:
        plot(summary, out / "filtered.png")
        note(f"written: {out / 'filtered.png'}")
        if "costs" in summary:
            plot_costs(summary, out / "costs.png")
            note(f"written: {out / 'costs.png'}")
    except ImportError:
        note("not written: the plots, which need matplotlib (pip install matplotlib)")


def _open_database(path: Path, trained_on: Corpus, chunk_len: int, tokenizer: str) -> Corpus:
    """The corpus of a database, if the run can read what it retrieves: same tokens, same chunks."""
    from retro.errors import ArtifactError, require_match
    from retro.search.index_file import MANIFEST_FILE, read_database_manifest
    from retro.text.corpus import open_corpus

    try:
        corpus = open_corpus(path)
        found = {
            "chunk_len": read_database_manifest(path)["chunk_len"],
            "tokenizer_sha256": corpus.tokenizer.sha256,
        }
        wanted = {"chunk_len": chunk_len, "tokenizer_sha256": trained_on.tokenizer.sha256}
        require_match(path / MANIFEST_FILE, found, wanted)
    except ArtifactError as error:
        options = f"--tokenizer {tokenizer} --valid-fraction 0 --chunk-len {chunk_len} --data-path {path}"
        raise ValueError(f"{error}. Build it for this run: retro database TEXT ... {options}") from None
    return corpus


def _load_baseline(
    path: Path, run: dict[str, Any], data_path: Path, device: Any, base: str | None
) -> tuple[Model, dict[str, tuple[Any, Any]]]:
    """A model without retrieval of the same data, and in what else it differs from the run."""
    from retro.errors import differences, require_match
    from retro.runs.checkpoints import load_model
    from retro.runs.run import read_run

    baseline = read_run(path)
    require_match(path / "run.json", baseline["dataset"], {"corpus_sha256": run["dataset"]["corpus_sha256"]})
    if baseline["model"]["ca_layers"]:
        command = f"retro train --no-retrieval --data-path {data_path}"
        raise ValueError(f"{path} was trained with retrieval, so it is no baseline. Train one: {command}")
    unlike = ["ca_layers", "n_encoder_layers", "encoder_ca_layers", "encoder", "base_sha256"]
    unlike += ["trains"] * (run["model"].get("trains") == "added")  # which there is none of without readers
    theirs, ours = (
        {**r["train"], **{k: v for k, v in r["model"].items() if k not in unlike}}
        # Steps that were made in a run of another length had its learning rates.
        | {f"continues_{k}": r.get("continues", {}).get(k) for k in ("step", "n_steps")}
        for r in (baseline, run)
    )
    return load_model(path, device, base if "base" in baseline["model"] else None), differences(theirs, ours)
