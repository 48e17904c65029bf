"""Samples as arrays, mapped from shards that nobody has to put together: where there are too many for lines of JSON.

    retro_train_dataset.jsonl                                       the header, and no lines
    retro_train_dataset.arrays/51f9a2c7/000000-6f0c1be5a0f1c3d2.npy

All samples take the same number of bytes, so that each is found by arithmetic: numbers of its stretches and chunks,
where the stretches start, and for each chunk where its neighbors start and how far they are, with -1 for those that are
not there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from retro.errors import DamagedFile, MissingArtifact
from retro.storage.manifests import sha256_of_json
from retro.storage.shards import TOKENS_PER_SHARD, Shards

OF_SHARDS = ("n_samples", "samples_per_shard")  # in a header, what tells how many there are


def record_of(header: Mapping[str, Any]) -> np.dtype:
    """The type of a sample with this header."""
    C, K = header["chunks_per_sample"], header["n_neighbors"]
    return np.dtype([
        ("n_stretches", "<i4"), ("n_chunks", "<i4"),
        ("offsets", "<i8", (C,)), ("neighbors", "<i8", (C, K)), ("distances", "<f4", (C, K)),
    ])  # fmt: skip


def packed(samples: Sequence[Mapping[str, Any]], record: np.dtype) -> np.ndarray:
    """Samples as they would be lines of JSON, as an array of shape `[n]`."""
    records = np.zeros(len(samples), dtype=record)
    records["offsets"] = records["neighbors"] = -1
    for to, sample in zip(records, samples, strict=True):
        to["n_stretches"], to["n_chunks"] = len(sample["offsets"]), len(sample["neighbors"])
        to["offsets"][: len(sample["offsets"])] = sample["offsets"]
        for u, (row, distances) in enumerate(zip(sample["neighbors"], sample["distances"], strict=True)):
            to["neighbors"][u, : len(row)], to["distances"][u, : len(row)] = row, distances
    return records


def unpacked(record: np.void) -> dict[str, Any]:
    """A sample as it would be a line of JSON. Distances have at most 4 digits behind the point, as they had there.

    Raises `ValueError` for more stretches or chunks than there is room for.
    """
    n, rows, most = record["n_stretches"], range(record["n_chunks"]), len(record["offsets"])
    if not (0 <= n <= most and 0 <= record["n_chunks"] <= most):
        raise ValueError(f"{n} stretches and {record['n_chunks']} chunks, where {most} have room")
    lengths = (record["neighbors"] >= 0).sum(axis=1)
    return {
        "offsets": record["offsets"][:n].tolist(),
        "neighbors": [record["neighbors"][u, : lengths[u]].tolist() for u in rows],
        "distances": [[round(d, 4) for d in record["distances"][u, : lengths[u]].tolist()] for u in rows],
    }


def samples_per_shard(header: Mapping[str, Any]) -> int:
    """How many samples the work on a shard is, whether it becomes an array or lines."""
    return max(1, TOKENS_PER_SHARD // (header["chunk_len"] * header["chunks_per_sample"]))


class SampleArrays:
    """The arrays of a header that says so: it has `arrays`, which names their folder, and `samples_per_shard`.

    * `path` is the header's

    Raises `MissingArtifact` if a shard is missing, or has not the bytes that its name speaks of.
    """

    def __init__(self, path: Path, header: Mapping[str, Any]) -> None:
        C, K, n_samples, per_shard = (header[name] for name in ("chunks_per_sample", "n_neighbors", *OF_SHARDS))
        if not re.fullmatch("[0-9a-f]{64}", header["arrays"]) or 8 + C * (8 + 12 * K) >= 1 << 31:
            raise DamagedFile(path, f"speaks of arrays {header['arrays']!r:.80} of {C} chunks with {K} neighbors")
        folder, n_shards = folder_of_arrays(path) / header["arrays"][:8], -(n_samples // -per_shard)
        if (found := sum(1 for _ in folder.rglob("*.npy"))) < n_shards:
            raise MissingArtifact(folder, f"{folder} has {found} shards, but {path} speaks of {n_shards}")
        self.header, self.record = header, record_of(header)
        self.shards = shards_of_arrays(path, header["arrays"], n_samples, per_shard)
        if (sha256 := sha256_of_arrays(self.shards)) != header["sha256"]:
            raise DamagedFile(path, f"speaks of arrays {header['sha256']}, but {folder} has {sha256}")

    def __len__(self) -> int:
        return int(self.header["n_samples"])

    def __getitem__(self, idx: int) -> dict[str, Any]:
        """Sample `idx` as it would be a line of JSON."""
        number, row = divmod(idx, self.header["samples_per_shard"])
        return unpacked(self.of_shard(number)[row])

    def of_shard(self, number: int) -> np.ndarray:
        """The samples of shard `number`, of shape `[n]`, mapped. Raises `DamagedFile` if it holds anything else."""
        per_shard, shard = self.header["samples_per_shard"], self.shards.mapped(number)
        if shard.shape != (n := (min(per_shard, len(self) - number * per_shard),)) or shard.dtype != self.record:
            found, wanted = f"{shard.dtype} {shard.shape}", f"{self.record} {n}"
            raise DamagedFile(self.shards.path(number), f"holds {found}, but {wanted} is wanted")
        return shard

    def shown(self, idx: int) -> str:
        """Where sample `idx` is."""
        number, row = divmod(idx, self.header["samples_per_shard"])
        return f"row {row} of {self.shards.path(number)}"


def folder_of_arrays(path: Path) -> Path:
    """Where the folders of arrays lie, of which a header names one."""
    return path.with_suffix(".arrays")


def shards_of_arrays(path: Path, name: str, n_samples: int, per_shard: int) -> Shards:
    """The shards of arrays called `name`."""
    return Shards(folder_of_arrays(path) / name[:8], {"arrays": name}, [""] * -(n_samples // -per_shard), ".npy")


def sha256_of_arrays(shards: Shards) -> str:
    """Names what is in all of these shards."""
    return sha256_of_json([shards.path(number).name for number in range(len(shards))])
