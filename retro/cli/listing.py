"""`retro runs`: the runs there are, with their figures, the best of each text marked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser

from retro.errors import ArtifactError
from retro.progress import aligned, note, terminal_width

COLUMNS = ("run", "steps", "valid", "off", "held out", "tokens/s")


def runs_command(argv: Sequence[str]) -> None:
    """List runs."""
    description = "List the runs below logs/ with their figures, and mark the best on each text."
    ArgumentParser(prog="retro runs", description=description).parse_args(list(argv))
    from retro.errors import MissingArtifact
    from retro.runs.run import LOGS, runs_below

    texts: dict[str, list[dict[str, Any]]] = {}
    for folder in runs_below(LOGS):
        try:
            row = row_of(folder)
        except ArtifactError as error:
            note(f"passed over: {error}")
            continue
        texts.setdefault(row["text"], []).append(row)
    if not texts:
        raise MissingArtifact(LOGS, f"there is no run below {LOGS}")
    for text, rows in texts.items():
        note("\n".join(["", f"data: {text}", *table(rows, terminal_width())]))
    note("\nbits per byte: valid and off of the validation after training, held out of retro evaluate; * is the least")


def row_of(run: Path) -> dict[str, Any]:
    """What there is to say of a run."""
    from retro.runs.checkpoints import checkpoints_of
    from retro.runs.run import SUMMARY_FIELDS, SUMMARY_FILE, read_run
    from retro.storage.manifests import read_manifest

    manifest = read_run(run)
    checkpoints = checkpoints_of(run)
    row = {
        "text": f"{manifest['data_path']} ({manifest['dataset']['corpus_sha256'][:8]}){validated(manifest)}",
        "run": f"{run.parent.name}/{run.name}",
        "reads": bool(manifest["model"]["ca_layers"]),
        "steps": f"to {int(checkpoints[-1].name):,}" if checkpoints else "none yet",
    }
    if (run / SUMMARY_FILE).exists():
        summary = read_manifest(run / SUMMARY_FILE, SUMMARY_FIELDS)
        row |= {
            "steps": f"{summary['steps']:,}",
            "valid": summary["valid_bpb"],
            "tokens/s": summary["tokens_per_second"],
        }
        row["off"] = summary["valid_bpb_without_retrieval"] if row["reads"] else None
    try:
        evaluation = read_manifest(run / "evaluation" / "evaluation.json")
        # Of the run's own held-out documents, and with its own database.
        is_own = evaluation.get("texts") == [] and evaluation.get("database_path") == manifest["data_path"]
        row["held out"] = evaluation["bits_per_byte"]["on"]["value"] if is_own else None
    except (ArtifactError, KeyError, TypeError):
        pass  # not evaluated yet, or by an older version
    return row


def validated(manifest: dict[str, Any]) -> str:
    """How much of the text a run was validated on, if not on all: such runs are not compared with others."""
    n = manifest["train"].get("n_final_batches")
    return f", validated on {n:,} batches of {manifest['train']['batch_size']:,}" if n else ""


def table(rows: Sequence[dict[str, Any]], width: int | None = None) -> list[str]:
    """Lines for the runs on one text, those that are best first."""
    ordered = sorted(rows, key=lambda row: (row["valid"] if is_finite(row) else math.inf, row["run"]))
    cells = [[*COLUMNS]]
    for row in ordered:
        bits = [f"{row[name]:.3f}" if row.get(name) is not None else "" for name in ("valid", "off", "held out")]
        speed = f"{row['tokens/s']:,.0f}" if "tokens/s" in row else ""
        cells.append([row["run"], row["steps"], *bits, speed])
    best = is_finite(ordered[0])
    lines = aligned(cells, "<>>>>>", width and width - 2, (5, 4, 1))
    return [f"{'*' if number == 1 and best else ' '} {line}" for number, line in enumerate(lines)]


def is_finite(row: dict[str, Any]) -> bool:
    """Whether a run is finished, with a number."""
    return math.isfinite(row.get("valid", math.nan))
