"""What is explored: a model, its database, and what may be asked of them at once from several tabs.

A model and what embeds are used by one at a time, token by token, so tabs take turns. A database that changes is opened
again; what is being written meanwhile goes on with the one that it began with.
"""

from __future__ import annotations

import base64
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from retro.config import DatasetConfig, EvaluateConfig, SampleConfig
from retro.errors import InvalidOption
from retro.explorer.writing import WAYS, Read, Writer, Written, read_of
from retro.in_context import InContext
from retro.retrofit import Model
from retro.runs.curves import PICTURE
from retro.runs.run import corpus_of_run, read_run
from retro.sample import Sampler, base_in_context, sampler_in_context, sampler_of
from retro.search.updates import add_documents, remove_documents
from retro.storage.manifests import read_manifest
from retro.text.corpus import Corpus

MAX_PROMPT = 20_000  # characters
MAX_TOKENS = 512  # of a sample
MAX_SECONDS = 300.0  # that one sample may take
SECONDS_BETWEEN = 0.1  # two views of what is being written
MAX_ADDED = 5_000_000  # bytes of a text or file
MAX_FOUND = 20
MAX_MEASURED = 6_000  # characters of a text whose gains are shown
AROUND = 1024  # tokens of a document that are shown before and behind a place
REPORT = "evaluation/report.html"


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
    """A model and the database that it reads.

    * `name` is what they are called: the run's folder, or the base
    * `opened` opens what writes; it is called again whenever the database has changed
    * `run` is the folder of the run, if it is one
    """

    def __init__(self, name: str, opened: Callable[[], Sampler], run: Path | None = None) -> None:
        self.name, self.run, self._opened = name, run, opened
        self.lock = threading.RLock()  # of the model, and of what embeds
        self.sampler: Sampler = self._open()
        self.model, self.reads = self.sampler.model, bool(self.sampler.model.ca_layers)

    @classmethod
    def of_run(cls, run: Path, model: Model, data_path: Path, device: Any) -> Explored:
        """A run in a folder, whose `model` is loaded, and its data."""

        def opened() -> Sampler:
            corpus = corpus_of_run(run, read_run(run), data_path, True)
            return sampler_of(run, model, data_path, corpus, device)

        return cls(str(run), opened, run)

    @classmethod
    def of_base(cls, base: str, data_path: Path, device: Any) -> Explored:
        """A pretrained model, untrained, with neighbors from a database in its context.

        Raises `InvalidOption` as `base_in_context` does.
        """
        model = base_in_context(base, data_path, device)
        return cls(base, lambda: sampler_in_context(model, data_path))

    @property
    def corpus(self) -> Corpus:
        """What the database has now."""
        return self.sampler.corpus

    @property
    def data_path(self) -> Path:
        """The folder of the data."""
        return self.sampler.data_path

    def beginning(self) -> str:
        """Two chunks of a document that nobody trains on, or where there is none, of the first one."""
        corpus, n = self.corpus, 2 * self.sampler.chunk_len
        return (
            corpus.beginning_of_held_out(n) if corpus.split("valid") else corpus.text(0, min(n, int(corpus.starts[1])))
        )

    def _open(self) -> Sampler:
        sampler = self._opened()
        if sampler.model.ca_layers:
            sampler.index.nearest(["so that what searches is loaded"], 1)
        return sampler

    def write(
        self, prompt: str, length: int, ways: Sequence[str], config: SampleConfig
    ) -> Iterator[dict[str, list[Written]]]:
        """A prompt continued in some of the `WAYS`, a token of each in turn; at the end with shares of attention.

        Raises `ValueError` for a prompt that cannot be continued, or is too long, `InvalidOption` for a `length`
        above `MAX_TOKENS`. After `MAX_SECONDS` it ends where it is.
        """
        _require_short(prompt, "prompt", MAX_PROMPT, "continued")
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

    def search(self, text: str, n: int) -> list[Read]:
        """The `n` chunks of the database nearest to a text.

        Raises `ValueError` for an empty text, or one that is too long, and where the run reads no database.
        """
        self._require_database()
        if not text.strip():
            raise ValueError("there is nothing to search for; write a few words")
        _require_short(text, "text", MAX_PROMPT, "searched for")
        sampler = self.sampler
        with self.lock:
            ((found, _),) = sampler.retrieve([text], min(max(1, n), MAX_FOUND))
        return [read_of(sampler.corpus, sampler.chunk_len, neighbor) for neighbor in found]

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
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"{name if name.endswith(('.txt', '.md', '.py')) else name + '.txt'}"
            file.write_text(text, encoding="utf-8")
            return self._add(file)

    def add_file(self, path: str) -> str:
        """Add an uploaded file to the database; as `add`."""
        with tempfile.TemporaryDirectory() as folder:
            return self._add(Path(shutil.copy(path, folder)))

    def _add(self, file: Path) -> str:
        if (n := file.stat().st_size) > MAX_ADDED:
            raise ValueError(
                f"{file.name} has {n / 1e6:.1f} MB; at most {MAX_ADDED / 1e6:.0f} MB are added here at once"
            )
        return self._change(lambda: add_documents([file], self.data_path, device=self.sampler.device))

    def remove(self, name: str) -> str:
        """Take a document out of the database; returns what was done, in words. Raises `ValueError` as it says why."""
        return self._change(lambda: remove_documents([name], self.data_path, device=self.sampler.device))

    def _change(self, how: Callable[[], object]) -> str:
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
            raise ValueError(f"{self.name} was trained without retrieval, and has no database")

    def evaluation(self) -> dict[str, Any]:
        """What is known of the run's quality: pictures as data URIs, the figures, and the report's page."""
        from retro.evaluation.figures import table

        if self.run is None:
            return {"pictures": {}, "table": None, "report": None, "command": None}
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

    def gains(self, text: str) -> str:
        """A page with a text, colored by what each token gained from what was retrieved.

        Raises `ValueError` for a text that is too long or too short, `SeenText` for one that is in the database, and
        `ValueError` where nothing is read, or not by a trained model.
        """
        from retro.evaluate import evaluate, held_out_texts
        from retro.evaluation.report import write_report

        self._require_database()
        sampler = self.sampler
        if isinstance(sampler.model, InContext):
            raise ValueError(
                f"{self.name} reads what stands before its text; gains are shown of a run that learnt to read"
            )
        _require_short(text, "text", MAX_MEASURED, "measured")
        with tempfile.TemporaryDirectory() as folder:
            file, page = Path(folder) / "text.txt", Path(folder) / "page.html"
            file.write_text(text, encoding="utf-8")
            corpus = held_out_texts([file], sampler.corpus.tokenizer)
            window = min(sampler.max_chunks or sys.maxsize, DatasetConfig.chunks_per_sample) * sampler.chunk_len
            config = EvaluateConfig(n_neighbors=sampler.n_neighbors, window=window, n_shuffles=1)
            with self.lock:
                found = evaluate(sampler.model, corpus, sampler.index, config=config, device=sampler.device)
                write_report(page, found, sampler.model, about=[self.name])
            return page.read_text(encoding="utf-8")


def _require_short(text: str, what: str, most: int, done: str) -> None:
    if len(text) > most:
        raise ValueError(f"the {what} has {len(text):,} characters; at most {most:,} are {done} here")
