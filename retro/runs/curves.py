"""The curves of a run: what labml recorded, as numbers and as a picture."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from retro import parallel
from retro.progress import note

LOG_FILE, PICTURE = "log.jsonl", "curves.png"  # labml's, and ours, in the run's folder
BITS = {"bpb.train": "train", "bpb.valid": "valid", "bpb.valid without neighbors": "valid without neighbors"}
LEARNING_RATE, SPEED = "learning rate", "tokens per second"

Curves = dict[str, dict[int, float]]


def recorded(run: Path) -> Curves:
    """Of each figure that labml recorded of a run, values by numbers of samples; of what was made again, the last."""
    curves: Curves = {}
    for line in (run / LOG_FILE).read_text(encoding="utf-8").splitlines():
        try:
            track = dict(json.loads(line)["track"])
            points = [(name, int(n), values) for name, pairs in track.items() for n, values in pairs]
        except (ValueError, KeyError, TypeError):
            continue  # the last line of a run that was killed
        for name, n, values in points:
            if finite := [value for value in values if isinstance(value, float | int) and math.isfinite(value)]:
                curves.setdefault(name, {})[n] = sum(finite) / len(finite)
    return {name: dict(sorted(curve.items())) for name, curve in curves.items()}


def draw(run: Path) -> None:
    """Draw the curves of a run into its folder, or say why not: the run is finished all the same.

    Of several processes the first does.
    """
    if parallel.rank():
        return
    try:
        _draw(run)
    except ImportError:
        note(f"not drawn: {run / PICTURE}, for which matplotlib is needed (pip install matplotlib)")
    except Exception as error:
        note(f"not drawn: {run / PICTURE} ({error})")


def _draw(run: Path) -> None:
    from matplotlib.figure import Figure  # and not pyplot, which has a state that a notebook would miss

    curves = recorded(run)
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    for name, label in BITS.items():
        _line(axes[0], curves.get(name, {}), label)
    axes[0].set(ylabel="bits per byte")
    if axes[0].lines:
        axes[0].legend(frameon=False, fontsize=8)
    for panel, name in zip(axes[1:], (LEARNING_RATE, SPEED), strict=True):
        _line(panel, curves.get(name, {}), name)
        panel.set(ylabel=name)
        panel.set_ylim(0, 1.08 * max([*curves.get(name, {}).values(), 1e-9]))
    for panel in axes:
        panel.set(xlabel="samples")
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(run / PICTURE, dpi=120)


def _line(panel: Any, curve: dict[int, float], label: str) -> None:
    if curve:
        panel.plot([*curve], [*curve.values()], marker="o" if len(curve) < 30 else "", markersize=3, label=label)
