"""What is computed of many documents, in shards: a command that was interrupted goes on behind the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro.errors import DamagedFile
from retro.progress import MOMENT, bar
from retro.storage.manifests import sha256_of_json
from retro.storage.shards import Shards
from retro.text.documents import Document

BYTES_PER_SHARD = 1 << 22  # of text
Arrays = tuple[np.ndarray, ...]
Found = Sequence[tuple[str, str, int]]  # name, sha256 and bytes of the text of each document, in the order of reading
Work = Callable[[list[Document]], Arrays]


class InShards:
    """Arrays that are computed of documents, of as many together as have `BYTES_PER_SHARD`, or of one longer one.

    * `folder` takes the shards, for who holds its lock
    * `manifest` is what the arrays depend on besides the texts
    * `found` are all documents, `numbers` those that are wanted, in their order
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], found: Found, numbers: Iterable[int]) -> None:
        self.batches, n_bytes = list[list[int]](), BYTES_PER_SHARD
        for number in numbers:
            if n_bytes >= BYTES_PER_SHARD:
                self.batches.append([])
                n_bytes = 0
            self.batches[-1].append(number)
            n_bytes += found[number][2]
        inputs = [sha256_of_json([found[number][1] for number in batch]) for batch in self.batches]
        self.shards = Shards(folder, manifest, inputs, ".npy")

    def compute(
        self,
        what: str,
        documents: Sequence[Document],
        work: Work,
        mapped: Callable[[Work, Iterable[list[Document]]], Iterable[Arrays]] = map,
    ) -> None:
        """Compute the shards that are missing, with a bar beside it.

        * `work` computes the arrays of some documents
        * `mapped` does this for those of one shard after the other
        """
        self.shards.open()
        missing = self.shards.missing(all_processes=True)
        total, left = (sum(len(self.batches[shard]) for shard in of) for of in (range(len(self.shards)), missing))
        batches = ([documents[number] for number in self.batches[shard]] for shard in missing)
        with bar(what, "document", total, total - left, MOMENT) as progress:
            for shard, arrays in zip(missing, mapped(work, batches), strict=True):
                with self.shards.written(shard) as temporary, open(temporary, "wb") as file:
                    for array in arrays:
                        np.save(file, array, allow_pickle=False)
                progress.update(len(self.batches[shard]))

    def arrays(self, n: int) -> Iterator[tuple[list[int], Arrays]]:
        """Numbers of the documents of each shard, and the `n` arrays that were computed of them."""
        for shard, batch in enumerate(self.batches):
            path = self.shards.path(shard)
            with open(path, "rb") as file:
                try:
                    yield batch, tuple(np.load(file, allow_pickle=False) for _ in range(n))
                except (ValueError, EOFError) as error:
                    raise DamagedFile(path, f"does not hold {n} arrays ({error})") from None
