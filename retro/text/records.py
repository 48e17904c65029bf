"""Files of many texts: JSON lines, plain or compressed, Parquet, and datasets of Hugging Face, read a row at a time."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from retro.errors import InvalidOption
from retro.text.reading import decoded, with_plain_newlines

JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
RECORD_SUFFIXES = (*JSON_LINES, ".parquet")
HUB = "hf:"  # how a dataset of the hub is named: hf:NAME, hf:NAME:SPLIT, hf:NAME:SPLIT:CONFIG
# What tells folders that `datasets` saved: all files of one of these.
_OF_A_DATASET = (("dataset_info.json", "state.json"), ("dataset_dict.json",))
_ROWS_AT_ONCE = 100  # of Parquet and datasets; a row may be a book
_N_NAMED = 10  # columns that an error names


class _Digits(str):
    """A number of a record, as it stands there: Python makes no int of one with very many digits."""


_KINDS = {
    dict: "an object", list: "a list", str: "a string", float: "a number", int: "a number", _Digits: "a number",
    bool: "true or false", type(None): "null",
}  # fmt: skip


@dataclass(frozen=True)
class Columns:
    """The fields of a record that are its text and its name; without a name it is called by its place."""

    text: str = "text"
    name: str | None = None

    @staticmethod
    def of(manifest: Mapping[str, Any]) -> Columns:
        """What a corpus was read by."""
        return Columns(manifest.get("text_column", "text"), manifest.get("name_column"))


PLAIN = Columns()


class Record(NamedTuple):
    """A text, the number of its line or row, from 1, and what its file calls it, if it was asked for that."""

    number: int
    text: str
    name: str | None


def holds_records(path: Path) -> bool:
    """Whether a path is that of many texts: by its suffix, as a dataset on disk, or one of the hub."""
    return path.name.lower().endswith(RECORD_SUFFIXES) or is_dataset(path)


def is_dataset(path: Path) -> bool:
    """Whether this names a dataset of the hub, or is a folder in which one was saved."""
    return is_on_hub(path) or any(all((path / name).is_file() for name in names) for names in _OF_A_DATASET)


def is_on_hub(path: Path) -> bool:
    """Whether this names a dataset of the hub, and no file."""
    return str(path).startswith(HUB) and not path.exists()


def read_records(path: Path, columns: Columns) -> Iterator[Record]:
    """The records of a file or dataset, one at a time, whatever its size is.

    Raises `ValueError` naming the line or row whose text cannot be used, or what is torn, and `InvalidOption` for a
    column that is not there and for a format whose package is not installed.
    """
    if is_dataset(path):
        yield from _rows(_dataset_batches(path, columns), path, columns)
    elif path.name.lower().endswith(".parquet"):
        yield from _rows(_parquet_batches(path, columns), path, columns)
    else:
        yield from _lines(path, columns)


def _lines(path: Path, columns: Columns) -> Iterator[Record]:
    number = 0
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, start=1):
                if not (text := decoded(line, f"{path}, line {number}", begins=number == 1)).strip():
                    continue
                with _expecting(f'a JSON object with a "{columns.text}" string', f"{path}, line {number}"):
                    record = _record(_object(text), number, columns)
                yield record
    except (EOFError, zlib.error, OSError) as error:
        if isinstance(error, OSError) and error.filename:
            raise  # the system does not let us read it
        raise ValueError(f"{path} is torn or damaged behind line {number} ({error}); get it again") from None


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """The lines of a file, unpacked while they are read."""
    if path.suffix.lower() == ".gz":
        with gzip.open(path) as unpacked:
            yield unpacked  # type: ignore[misc]
    elif path.suffix.lower() == ".zst":
        pyarrow = _package("pyarrow", path)
        with pyarrow.OSFile(str(path)) as packed, pyarrow.CompressedInputStream(packed, "zstd") as unpacked:
            yield io.BufferedReader(unpacked)
    else:
        with open(path, "rb") as file:
            yield file


def _object(line: str) -> Mapping[str, Any]:
    """A line of JSON. Raises `ValueError` saying what is there instead."""
    try:
        record = json.loads(line, parse_int=_Digits)
    except json.JSONDecodeError as error:
        raise ValueError(f"this is no JSON ({error.msg}, column {error.colno})") from None
    except RecursionError:
        raise ValueError("this is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError(f"this is {_KINDS[type(record)]}")
    return record


def _record(fields: Mapping[str, Any], number: int, columns: Columns) -> Record:
    """The text and the name in the fields of a record. Raises `ValueError` saying what is there instead."""
    text, name = with_plain_newlines(_string(fields, columns.text)), None
    if columns.name is not None and text.strip():
        value = fields.get(columns.name)
        name = str(value) if type(value) in (int, _Digits) else _string(fields, columns.name)
        if not name.strip():
            raise ValueError(f'its "{columns.name}" is empty')
    return Record(number, text, name)


@contextmanager
def _expecting(what: str, place: str) -> Iterator[None]:
    """Inside, a `ValueError` that says what is there tells also where, and what was expected."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: expected {what}, but {error}") from None


def _string(fields: Mapping[str, Any], column: str) -> str:
    value = fields.get(column)
    if type(value) is not str:
        found = _KINDS.get(type(value), f"of the type {type(value).__name__}")
        raise ValueError(f'its "{column}" is {found}' if column in fields else f'it has no "{column}"')
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):04x}"
        raise ValueError(f'character {error.start + 1} of its "{column}" is {half}, half a surrogate pair') from None
    return value


def _rows(batches: Iterable[Mapping[str, list[Any]]], path: Path, columns: Columns) -> Iterator[Record]:
    """The records of batches, each of which has lists of the values of its columns, that of texts first."""
    number = 0
    for batch in batches:
        for values in zip(*batch.values(), strict=True):
            number += 1
            if values[0] is None:
                continue  # no text, as an empty one
            with _expecting(f'a "{columns.text}" string', f"{path}, row {number}"):
                record = _record(dict(zip(batch, values, strict=True)), number, columns)
            yield record


def _parquet_batches(path: Path, columns: Columns) -> Iterator[Mapping[str, list[Any]]]:
    parquet, pyarrow = _package("pyarrow.parquet", path), _package("pyarrow", path)
    try:
        # Without buffers for whole columns, of which a file may have one.
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=1 << 20) as file:
            wanted = _wanted(path, columns, file.schema_arrow.names)
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=wanted):
                yield batch.to_pydict()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        if isinstance(error, OSError) and error.filename:
            raise
        raise ValueError(f"{path} is no whole Parquet file ({str(error)[:200]}); get it again") from None


def _dataset_batches(path: Path, columns: Columns) -> Iterator[Mapping[str, list[Any]]]:
    datasets = _package("datasets", path)
    name, split, config = (*str(path).removeprefix(HUB).split(":"), "", "")[:3]
    try:
        if is_on_hub(path):
            dataset = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        else:
            dataset = datasets.load_from_disk(str(path))
    except Exception as error:  # whatever the hub, or what lies in the folder, makes of it
        raise ValueError(f"{path} cannot be read as a dataset: {str(error)[:300]}") from None
    if isinstance(dataset, datasets.DatasetDict):
        raise ValueError(f"{path} holds {', '.join(dataset)}; name one of them: {path / next(iter(dataset), 'train')}")
    wanted = _wanted(path, columns, dataset.column_names)
    try:
        for batch in dataset.select_columns(wanted).iter(_ROWS_AT_ONCE):
            yield {column: batch[column] for column in wanted}
    except (KeyError, OSError, ValueError) as error:  # a column that nobody told of, a connection that was lost
        raise ValueError(f"{path} cannot be read to its end ({str(error)[:300]}); try again") from None


def _wanted(path: Path, columns: Columns, found: list[str] | None) -> list[str]:
    """The columns to read, of those that there are, if that is known."""
    for option, column in (("text_column", columns.text), ("name_column", columns.name)):
        if found is not None and column is not None and column not in found:
            shown = ", ".join(found[:_N_NAMED]) + (", ..." if len(found) > _N_NAMED else "")
            raise InvalidOption(option, column, f"is no column of {path}, which has {shown}")
    return list(dict.fromkeys(filter(None, (columns.text, columns.name))))


def _package(name: str, path: Path) -> Any:
    """A package that only some formats need."""
    try:
        return import_module(name)
    except ImportError:
        raise ValueError(
            f"{path} is read by {name.partition('.')[0]}, which is not installed: pip install 'retro-lm[datasets]'"
        ) from None
