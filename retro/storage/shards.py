"""Long work in shards, so that what is finished stays finished.

Embedding a corpus, filling an index and retrieving neighbors take hours. Each is cut into shards that depend on nothing
but their number, and each finished shard is a file. After a crash, the same command makes those that are missing.
Several processes make a shard each.

A shard's name ends in a hash of its bytes *and* of what it was made with. So a torn or altered shard, or one of
another corpus, is told by its name: it is thrown away and made again.

    keys/51f9a2c7/manifest.json
    keys/51f9a2c7/000000-6f0c1be5a0f1c3d2.npy
    keys/51f9a2c7/000001-93b8d1a4e57f2c60.npy
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from retro import cluster, parallel
from retro.errors import ArtifactError, MissingArtifact, differences
from retro.progress import bar, note
from retro.storage.files import BLOCK, atomic_write, mapped_array
from retro.storage.known import known
from retro.storage.manifests import FORMAT_VERSION, read_manifest, sha256_of_json, write_manifest

TOKENS_PER_SHARD = 1 << 19  # of text: the work that an interruption can lose, and that shares its duplicates
PER_FOLDER = 1000  # shards; those behind the first thousand are in folders of their own, as keys/51f9a2c7/001
MOST_OPEN = 256  # shards mapped at one time: each takes one of the files that a process may have open
HASH_LENGTH = 16  # hexadecimal digits of it in a name: enough to tell damage


class Shards:
    """The finished shards of a stage, in a folder of their own.

    * `folder` is made if it is not there
    * `manifest` is what all shards depend on; a folder of anything else is emptied
    * `inputs` are what each shard depends on besides; there are as many shards
    * `suffix` is how the files' names end, as `.npy`
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], inputs: Sequence[str], suffix: str) -> None:
        self.folder = folder
        self.manifest = manifest
        self.inputs = inputs
        self.suffix = suffix
        self._verified: dict[int, Path] = {}
        self._listed: dict[int, list[Path]] = {}
        self._mapped: dict[int, np.ndarray] = {}  # the last ones to be read, the very last at the end

    def __getstate__(self) -> dict[str, Any]:
        """What another process is sent: nothing that is mapped here."""
        return self.__dict__ | {"_mapped": {}}

    def __len__(self) -> int:
        """Number of shards, finished or not."""
        return len(self.inputs)

    def open(self) -> None:
        """Empty the folder of what is not of this work. One process calls it, before the others begin."""
        manifest = self.folder / "manifest.json"
        try:
            fits = not differences(read_manifest(manifest), self.manifest)
        except ArtifactError:
            fits = False
        if not fits:
            if self.folder.exists():
                shutil.rmtree(self.folder)
            write_manifest(manifest, self.manifest)
        ours = {file for files in self._files().values() for file in files}
        for file in self.folder.rglob("*"):
            if file.is_file() and file != manifest and file not in ours:
                file.unlink()

    def missing(self, all_processes: bool = False) -> list[int]:
        """Numbers of the shards to make: of this process's share, or of all. Removes damaged ones, and says so."""
        numbers, files = list(range(len(self))), self._files()
        missing = []
        for number in numbers if all_processes else parallel.my_share(numbers):
            for file in files.get(number, ()):
                if number not in self._verified and file.name == self._name(number, file):
                    self._verified[number] = file
                elif self._verified.get(number) != file:
                    note(f"{file} is damaged, or of another text: it is made again")
                    file.unlink()
            if number not in self._verified:
                missing.append(number)
        return missing

    def make_missing(
        self,
        what: str,
        unit: str,
        sizes: Sequence[int],
        make: Callable[[int, Any, Path, Callable[[int], Any]], None],
        prepare: Callable[[int], Any] | None = None,
        on_gpu: bool = False,
    ) -> None:
        """Make the missing shards, each process its share or a cluster all of them, with a bar beside it.

        * `sizes` are how much work each shard is, in `unit`
        * `make` is called with a shard's number, what was prepared for it, the path to write it to, and a function to
          call with how much is done
        * `prepare` prepares for a shard, in a thread of its own, while the one before is made
        * `on_gpu`: of a cluster, it takes GPUs
        """
        prepare = prepare or (lambda number: None)
        parallel.on_rank_zero(self.open)
        missing = self.missing()
        mine = sum(sizes[number] for number in parallel.my_share(list(range(len(self)))))
        with bar(what, unit, mine, mine - sum(sizes[number] for number in missing)) as progress:
            if cluster.is_there():

                def make_there(number: int) -> int:
                    with self.written(number) as temporary:
                        make(number, prepare(number), temporary, lambda n: None)
                    return sizes[number]

                for size in cluster.mapped(make_there, missing, on_gpu):
                    progress.update(size)
                self.open()  # of what a worker that died has begun
            else:
                for number, prepared in _ahead(prepare, missing):
                    with self.written(number) as temporary:
                        make(number, prepared, temporary, progress.update)
        parallel.wait_for_everyone()

    @contextmanager
    def written(self, number: int) -> Iterator[Path]:
        """Give a temporary path for a shard; on success it becomes the shard."""
        part = self._folder_of(number) / f"{number:06d}.part"
        with atomic_write(part) as temporary:
            yield temporary
        self._verified[number] = part.rename(part.with_name(self._name(number, part)))

    def path(self, number: int) -> Path:
        """The file of a finished shard. Raises `MissingArtifact` if it is missing, or damaged."""
        if number not in self._verified:
            if number not in self._listed:
                self._listed = self._files()
            found = [f for f in self._listed.get(number, ()) if f.exists() and f.name == self._name(number, f)]
            if not found:
                self._listed.pop(number, None)
                raise MissingArtifact(self.folder, f"{self.folder} has no shard {number}, or a damaged one")
            self._verified[number] = found[0]
        return self._verified[number]

    def mapped(self, number: int) -> np.ndarray:
        """The array of a finished shard, mapped; the first time it is read whole, to see that it is what its name says.

        Raises `MissingArtifact` if it is missing, or damaged, and `DamagedFile` if it holds no array.
        """
        shard = self._mapped.pop(number) if number in self._mapped else mapped_array(self.path(number))
        self._mapped[number] = shard
        if len(self._mapped) > MOST_OPEN:
            self._mapped.pop(next(iter(self._mapped)))
        return shard

    def _files(self) -> dict[int, list[Path]]:
        """The files of the folder that have a shard's number."""
        files: dict[int, list[Path]] = {}
        for file in self.folder.rglob(f"*-*{self.suffix}"):
            number = file.name.partition("-")[0]
            if number.isdigit() and int(number) < len(self) and file.parent == self._folder_of(int(number)):
                files.setdefault(int(number), []).append(file)
        return files

    def _folder_of(self, number: int) -> Path:
        return self.folder / f"{number // PER_FOLDER:03d}" if number >= PER_FOLDER else self.folder

    def remove(self) -> None:
        """Delete the folder: what the shards were for is written."""
        shutil.rmtree(self.folder)

    def _name(self, number: int, file: Path) -> str:
        made_of = f"{sha256_of_json([FORMAT_VERSION, self.manifest])} {number} {self.inputs[number]} "

        def digest() -> str:
            whole = hashlib.sha256(made_of.encode())
            with open(file, "rb") as content:
                while block := content.read(BLOCK):
                    whole.update(block)
            return whole.hexdigest()[:HASH_LENGTH]

        return f"{number:06d}-{known(file, f'shard {made_of}', digest)}{self.suffix}"


def _ahead(prepare: Callable[[int], Any], numbers: Sequence[int]) -> Iterator[tuple[int, Any]]:
    """Each number with what was prepared for it, while the one before was made."""
    with ThreadPoolExecutor(1) as pool:
        futures = [pool.submit(prepare, number) for number in numbers[:1]]
        for number, following in zip_longest(numbers, numbers[1:]):
            prepared = futures.pop().result()
            if following is not None:
                futures.append(pool.submit(prepare, following))
            yield number, prepared
