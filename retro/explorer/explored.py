"""What is explored: a run, its database, and what may be asked of them at once from several tabs.

A model and what embeds are used by one at a time, token by token, so tabs take turns. A database that changes is opened
again; what is being written meanwhile goes on with the one that it began with.
"""

from __future__ import annotations

import base64
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro.config import SampleConfig
from retro.errors import InvalidOption
from retro.explorer.writing import WAYS, Writer, Written
from retro.retrofit import Model
from retro.runs.curves import PICTURE
from retro.runs.run import corpus_of_run, read_run
from retro.sample import Sampler, sampler_of
from retro.search.chunks import how_far
from retro.search.updates import add_documents, remove_documents
from retro.storage.manifests import read_manifest
from retro.text.corpus import Corpus

MAX_PROMPT = 20_000  # characters
MAX_TOKENS = 512  # of a sample
MAX_SECONDS = 300.0  # that one sample may take
SECONDS_BETWEEN = 0.1  # two views of what is being written
MAX_ADDED = 5_000_000  # bytes of a text or file
MAX_FOUND = 20
AROUND = 1024  # tokens of a document that are shown before and behind a place
REPORT = "evaluation/report.html"


@dataclass(frozen=True)
class Found:
    """A chunk of the database that was found, with what follows it."""

    document: str
    offset: int  # tokens from the start of the document
    corpus_offset: int
    how_far: str
    chunk: str
    continuation: str


@dataclass(frozen=True)
class Place:
    """A place in a document: the text before a chunk, the chunk, and the text behind it."""

    document: str
    offset: int
    n_tokens: int  # of the document
    before: str
    chunk: str
    behind: str
    is_whole: bool  # else the document has more text on one side, or on both


class Explored:
    """A run and the database that it reads.

    * `run` is its folder, `model` what was trained there
    * `data_path` is the folder of the data
    """

    def __init__(self, run: Path, model: Model, data_path: Path, device: Any) -> None:
        self.run, self.model, self.data_path, self.device = run, model, data_path, device
        self.lock = threading.RLock()  # of the model, and of what embeds
        self.sampler: Sampler = self._open()
        self.reads = bool(model.ca_layers)

    @property
    def corpus(self) -> Corpus:
        """What the database has now."""
        return self.sampler.corpus

    def _open(self) -> Sampler:
        corpus = corpus_of_run(self.run, read_run(self.run), self.data_path, True)
        sampler = sampler_of(self.run, self.model, self.data_path, corpus, self.device)
        if self.model.ca_layers:
            sampler.index.nearest(["so that what searches is loaded"], 1)
        return sampler

    def write(
        self, prompt: str, length: int, ways: Sequence[str], config: SampleConfig
    ) -> Iterator[dict[str, list[Written]]]:
        """A prompt continued in some of the `WAYS`, a token of each in turn; at the end with shares of attention.

        Raises `ValueError` for a prompt that cannot be continued, or is too long, `InvalidOption` for a `length`
        above `MAX_TOKENS`. After `MAX_SECONDS` it ends where it is.
        """
        if len(prompt) > MAX_PROMPT:
            raise ValueError(f"the prompt has {len(prompt):,} characters; at most {MAX_PROMPT:,} are continued here")
        if length > MAX_TOKENS:
            raise InvalidOption("length", length, f"is above {MAX_TOKENS}, the most that is written here at once")
        started, last = time.monotonic(), 0.0
        writers = [Writer(self.sampler, way, config) for way in WAYS if way in ways]
        texts = {writer.way: writer.write(prompt, length) for writer in writers}
        while texts and time.monotonic() - started < MAX_SECONDS:
            for writer in writers:
                if writer.way in texts:
                    with self.lock:
                        if next(texts[writer.way], None) is None:
                            del texts[writer.way]
            if time.monotonic() - last >= SECONDS_BETWEEN:
                last = time.monotonic()
                yield {writer.way: writer.chunks() for writer in writers}
        with self.lock:
            shares = {writer.way: writer.attention() for writer in writers}
        yield {writer.way: writer.chunks(shares[writer.way]) for writer in writers}

    def search(self, text: str, n: int) -> list[Found]:
        """The `n` chunks of the database nearest to a text.

        Raises `ValueError` for an empty text, or one that is too long, and where the run reads no database.
        """
        self._require_database()
        if not text.strip():
            raise ValueError("there is nothing to search for; write a few words")
        if len(text) > MAX_PROMPT:
            raise ValueError(f"the text has {len(text):,} characters; at most {MAX_PROMPT:,} are searched for here")
        index, m = self.sampler.index, self.sampler.chunk_len
        with self.lock:
            distances, offsets = index.nearest([text], min(max(1, n), MAX_FOUND))
        found = []
        for distance, offset in zip(distances[0].tolist(), offsets[0].tolist(), strict=True):
            if offset < 0:
                continue
            number, end = int(index.corpus.document_of(offset)), int(index.corpus.ends_of(offset))
            found.append(
                Found(
                    index.corpus.documents[number].name,
                    offset - int(index.corpus.starts[number]),
                    offset,
                    how_far(distance),
                    index.corpus.text(offset, min(m, end - offset)),
                    index.corpus.text(offset + m, min(m, end - offset - m)) if end > offset + m else "",
                )
            )
        return found

    def place(self, corpus_offset: int) -> Place:
        """A document of the database, opened at the chunk that begins at an offset of the corpus.

        Raises `InvalidOption` for an offset that is not in it.
        """
        corpus, m = self.corpus, self.sampler.chunk_len
        if not 0 <= corpus_offset < len(corpus.tokens):
            raise InvalidOption(
                "offset", corpus_offset, f"is not in the corpus, which has {len(corpus.tokens):,} tokens"
            )
        number = int(corpus.document_of(corpus_offset))
        start, end = int(corpus.starts[number]), int(corpus.starts[number + 1])
        first, last = max(start, corpus_offset - AROUND), min(end, corpus_offset + m + AROUND)
        chunk_end = min(corpus_offset + m, end)
        return Place(
            corpus.documents[number].name,
            corpus_offset - start,
            end - start,
            corpus.text(first, corpus_offset - first) if first < corpus_offset else "",
            corpus.text(corpus_offset, chunk_end - corpus_offset),
            corpus.text(chunk_end, last - chunk_end) if chunk_end < last else "",
            (first, last) == (start, end),
        )

    def names(self) -> list[str]:
        """The documents of the database."""
        return sorted(self.corpus.documents[number].name for number in self.corpus.in_database)

    def add(self, text: str, name: str) -> str:
        """Add a text to the database under a name; returns what was done, in words.

        Raises `ValueError` for what cannot be added.
        """
        name = Path(name.strip()).name or "pasted"
        if not text.strip():
            raise ValueError("there is no text to add")
        if (n := len(text.encode(errors="replace"))) > MAX_ADDED:
            raise ValueError(f"{name} has {n / 1e6:.1f} MB; at most {MAX_ADDED / 1e6:.0f} MB are added here at once")
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name if name.endswith(('.txt', '.md', '.py')) else name + '.txt'}"
            file.write_text(text, encoding="utf-8")
            return self._change(lambda: add_documents([file], self.data_path, device=self.device))

    def add_file(self, path: str) -> str:
        """Add an uploaded file to the database; as `add`."""
        file = Path(path)
        if file.stat().st_size > MAX_ADDED:
            raise ValueError(
                f"{file.name} has {file.stat().st_size / 1e6:.1f} MB; at most {MAX_ADDED / 1e6:.0f} MB are added here"
            )
        with tempfile.TemporaryDirectory() as folder:
            shutil.copy(file, folder)
            return self._change(lambda: add_documents([Path(folder) / file.name], self.data_path, device=self.device))

    def remove(self, name: str) -> str:
        """Take a document out of the database; returns what was done, in words. Raises `ValueError` as it says why."""
        return self._change(lambda: remove_documents([name], self.data_path, device=self.device))

    def _change(self, how: Any) -> str:
        self._require_database()
        with self.lock:
            before = set(self.names())
            how()
            self.sampler = self._open()
            after = set(self.names())
        n = self.sampler.index.manifest["n_chunks"]
        said = [f"{name} is in the database now" for name in sorted(after - before)]
        said += [f"{name} is out of the database" for name in sorted(before - after)]
        return f"{'; '.join(said) or 'nothing changed: it was there already'}. {len(after):,} documents, {n:,} chunks."

    def _require_database(self) -> None:
        if not self.reads:
            raise ValueError(f"{self.run} was trained without retrieval, and has no database")

    def evaluation(self) -> dict[str, Any]:
        """What is known of the run's quality: pictures as data URIs, the figures, and the report's page."""
        from retro.evaluation.figures import table

        files = {"How it learnt": self.run / PICTURE, "By overlap, r(C)": self.run / "evaluation" / "filtered.png"}
        file, report = self.run / "evaluation" / "evaluation.json", self.run / REPORT
        return {
            "pictures": {
                title: f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
                for title, path in files.items()
                if path.exists()
            },
            "table": table(read_manifest(file)) if file.exists() else None,
            "report": report.read_text(encoding="utf-8") if report.exists() else None,
            "command": f"retro evaluate --run {self.run} --report {report}",
        }
