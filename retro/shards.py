"""Work in pieces, so that what is finished stays finished.

Embedding a corpus, filling an index and retrieving neighbors take hours; each is cut into pieces that depend on
nothing but their number, and each finished piece is a file, a *shard*. Whoever is killed and started again makes
the pieces that are missing. Several processes make a piece each.

A shard's name ends in a hash of its bytes *and* of what it was made with, so a torn or altered one, or one of
another corpus, is told by its name: it is thrown away and made again.

    keys/51f9a2c7/manifest.json
    keys/51f9a2c7/000000-6f0c1be5a0f1c3d2.npy
    keys/51f9a2c7/000001-93b8d1a4e57f2c60.npy
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from labml import logger
from labml.logger import Text

from retro import distributed
from retro.artifacts import FORMAT_VERSION, differences, read_json, sha256_of_json, write_json, written_whole

HASH_LENGTH = 16  # hexadecimal digits of it in a name: enough to tell damage


class Shards:
    """The finished pieces of a stage, in a folder of their own.

    * `folder` is made if it is not there
    * `made_with` is what all pieces depend on; a folder of anything else is emptied
    * `labels` are what each piece depends on besides; there are as many pieces
    * `suffix` is how the files' names end, as `.npy`
    """

    def __init__(self, folder: Path, made_with: dict[str, Any], labels: Sequence[str], suffix: str) -> None:
        self.folder = folder
        self.made_with = {"format_version": FORMAT_VERSION, **made_with}
        self.labels = labels
        self.suffix = suffix
        self._verified: dict[int, Path] = {}
        self._listed: dict[int, list[Path]] = {}

    def __len__(self) -> int:
        """Number of pieces, finished or not."""
        return len(self.labels)

    def open(self) -> None:
        """Empty the folder of what is not of this work. One process calls it, before the others begin."""
        manifest = self.folder / "manifest.json"
        try:
            fits = not differences(read_json(manifest, ""), self.made_with)
        except (FileNotFoundError, ValueError):
            fits = False
        if not fits:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            write_json(manifest, self.made_with)
        for file in self.folder.iterdir():
            number = file.name.partition("-")[0]
            if file != manifest and not (number.isdigit() and int(number) < len(self) and file.suffix == self.suffix):
                file.unlink()

    def missing(self, mine: bool = True) -> list[int]:
        """Numbers of the pieces to make: of this process's share, or of all. Removes damaged ones, and says so."""
        numbers, files = list(range(len(self))), self._files()
        missing = []
        for number in distributed.share(numbers) if mine else numbers:
            for file in files.get(number, ()):
                if number not in self._verified and file.name == self._name(number, file):
                    self._verified[number] = file
                elif self._verified.get(number) != file:
                    logger.log(f"{file} is damaged, or of another text: it is made again", Text.warning)
                    file.unlink()
            if number not in self._verified:
                missing.append(number)
        return missing

    @contextmanager
    def written(self, number: int) -> Iterator[Path]:
        """Give a temporary path for a piece; on success it becomes the shard."""
        part = self.folder / f"{number:06d}.part"
        with written_whole(part) as temporary:
            yield temporary
        self._verified[number] = part.rename(self.folder / self._name(number, part))

    def path(self, number: int) -> Path:
        """The file of a finished piece. Raises `FileNotFoundError` if it is missing, or damaged."""
        if number not in self._verified:
            if number not in self._listed:
                self._listed = self._files()
            found = [f for f in self._listed.get(number, ()) if f.exists() and f.name == self._name(number, f)]
            if not found:
                self._listed.pop(number, None)
                raise FileNotFoundError(
                    f"{self.folder} has no whole shard {number}; run the same command again to make it"
                )
            self._verified[number] = found[0]
        return self._verified[number]

    def _files(self) -> dict[int, list[Path]]:
        """The files of the folder that have a piece's number."""
        files: dict[int, list[Path]] = {}
        for file in self.folder.glob(f"*-*{self.suffix}"):
            if (number := file.name.partition("-")[0]).isdigit():
                files.setdefault(int(number), []).append(file)
        return files

    def remove(self) -> None:
        """Delete the folder: what the pieces were for is written."""
        shutil.rmtree(self.folder)

    def _name(self, number: int, file: Path) -> str:
        digest = hashlib.sha256(f"{sha256_of_json(self.made_with)} {number} {self.labels[number]} ".encode())
        with open(file, "rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
        return f"{number:06d}-{digest.hexdigest()[:HASH_LENGTH]}{self.suffix}"
