"""From texts to a corpus on disk: tokens, tokenizer, and the manifest that names both."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from retro.config import CorpusConfig
from retro.progress import MOMENT, each, note
from retro.storage.files import TEMPORARY, atomic_write, exclusive_lock, sha256_of_file
from retro.storage.manifests import package_versions, write_manifest
from retro.text.copies import first_of_equals
from retro.text.corpus import (
    MANIFEST_FILE,
    SIGNATURES_FILE,
    TOKENIZER_FILE,
    TOKENS_FILE,
    Corpus,
    DocumentEntry,
    documents_file,
    sha256_of_corpus,
)
from retro.text.documents import Document, find_texts, read_documents
from retro.text.records import Columns
from retro.text.split import Split, cut_in_two, entry_of, require_text, split_texts
from retro.text.spool import Spool
from retro.text.table import Documents, write_table
from retro.text.tokenizer import Tokenizer, lost_text, train_tokenizer

CHARS_AT_ONCE = 1 << 22  # of the documents that are tokenized together, on all cores
LEARNT_FROM = 1 << 26  # characters that a subword vocabulary is learnt from, where there are more
COLUMNS = ("text_column", "name_column")  # of CorpusConfig


def build_corpus(
    paths: Sequence[str | Path],
    folder: str | Path,
    tokenizer: str = CorpusConfig.tokenizer,
    valid_fraction: float = CorpusConfig.valid_fraction,
    seed: int = CorpusConfig.seed,
    name: str | None = None,
    keep_near_held_out: bool = CorpusConfig.keep_near_held_out,
    hold_out: Literal["documents", "folders"] = CorpusConfig.hold_out,
    text_column: str = CorpusConfig.text_column,
    name_column: str | None = CorpusConfig.name_column,
) -> Corpus:
    """Read texts into a corpus folder: tokens, tokenizer, signatures, a table of documents, and a manifest.

    * `paths` are text files, files of many texts, datasets, and folders of them (`retro.text.documents`)
    * `tokenizer` is `char`, `bpe:SIZE` (trained here, on the training documents), or the name or folder of any
      Hugging Face tokenizer
    * `valid_fraction` is the least share of the bytes to hold out, in whole documents; the last part of the text when
      there is only one document, as in the tutorial; 0 holds nothing out
    * `name` is what runs on this text are called; left out, the name of the file, or of the folder of all of them
    * `keep_near_held_out` trains on documents that are near-duplicates of held-out ones; they are left out otherwise
    * `hold_out` is what is held out as a whole: `documents`, or the `folders` that their names tell

    * `text_column`, `name_column` are the fields of records, and the columns of Parquet files and datasets, in which
      their text is, and what they are called

    The texts are read once, one at a time, into a file without a name beside the corpus; what comes afterwards takes
    them from there. Raises `ValueError` for text that cannot be used and leaves an existing corpus as it was.
    """
    folder = Path(folder)
    config = CorpusConfig(tokenizer, valid_fraction, hold_out, keep_near_held_out, seed, text_column, name_column)
    texts = find_texts(paths)
    with Spool(read_documents(texts, Columns(text_column, name_column)), folder) as documents:
        require_text(documents, texts)
        split = split_texts(documents, valid_fraction, seed, keep_near_held_out, hold_out)
        parts = cut_in_two(documents[0], valid_fraction) if split.single else documents
        return _write_corpus(parts, split, folder, config, name or name_of(paths))


def _write_corpus(documents: Sequence[Document], split: Split, folder: Path, config: CorpusConfig, name: str) -> Corpus:
    """The corpus of documents that are held out as `split` says."""
    numbers_of = {side: [i for i, of in enumerate(split.sides) if of == side] for side in ("train", "valid")}

    # As in the tutorial, every character of either part is in the vocabulary. A subword
    # vocabulary is learnt from the training documents alone.
    learnt_from = [*numbers_of["train"], *(numbers_of["valid"] if config.tokenizer == "char" else ())]
    encoder = train_tokenizer(config.tokenizer, _texts_to_learn_from(documents, learnt_from, config))

    dtype = np.dtype("uint16" if encoder.n_tokens <= 1 << 16 else "uint32")
    written: list[tuple[int, DocumentEntry]] = []
    n_train = 0
    # The manifest, which knows the hashes of the other files, comes after them.
    with exclusive_lock(folder):
        with (
            atomic_write(folder / TOKENS_FILE) as tokens,
            atomic_write(folder / TOKENIZER_FILE) as mapping,
            atomic_write(folder / SIGNATURES_FILE) as signatures,
        ):
            with open(tokens, "wb") as file:
                for numbers in numbers_of.values():
                    written += write_documents(file, ((i, documents[i]) for i in numbers), encoder, dtype)
                    n_train = n_train or len(written)
                    if not n_train:
                        raise ValueError(f"no text to train on has a token of the tokenizer {config.tokenizer}")
            written = _with_groups_together(tokens, written, n_train, split.groups, dtype)
            numbers = [number for number, _ in written]
            split.signatures[numbers].tofile(signatures)
            encoder.save(mapping)
            files = {TOKENS_FILE: tokens, TOKENIZER_FILE: mapping, SIGNATURES_FILE: signatures}
            hashes = {f"{name}_sha256": sha256_of_file(path) for name, path in files.items()}
        entries = [entry for _, entry in written]
        hashes |= replace_table(folder, entries, first_of_equals(split.groups[numbers]))
        manifest = {
            **corpus_cache_key(split.sha256, config),
            "name": name,
            "text_column": config.text_column,
            "name_column": config.name_column,
            "tokenizer": encoder.kind,
            "dtype": str(dtype),
            "n_train": n_train,
            "n_documents": len(entries),
            "sha256": sha256_of_corpus(entries, n_train, encoder),
            "additions": [],
            "removed": [],
            **hashes,
            "versions": package_versions(),
            "left_out": [list(pair) for pair in split.left_out],
        }
        write_manifest(folder / MANIFEST_FILE, manifest)
        remove_other_tables(folder, manifest)
    return Corpus.load(folder)


def replace_table(
    folder: Path, entries: Sequence[DocumentEntry], groups: np.ndarray, before: Documents | None = None
) -> dict[str, str]:
    """Write the table of documents of a manifest that is to be written; returns its hash, as that says it.

    The one of the manifest that is there stays beside it. Arguments are those of `write_table`.
    """
    with atomic_write(folder / "documents.bin") as table:
        write_table(table, entries, groups, before)
        named = {"documents_sha256": sha256_of_file(table)}
    os.replace(folder / "documents.bin", folder / documents_file(named))
    return named


def remove_other_tables(folder: Path, manifest: dict[str, Any]) -> None:
    """Remove the tables of documents that a manifest does not speak of."""
    for table in set(folder.glob("documents*.bin")) - {folder / documents_file(manifest)}:
        table.unlink()


def _with_groups_together(
    tokens: Path, written: list[tuple[int, DocumentEntry]], n_train: int, groups: np.ndarray, dtype: np.dtype
) -> list[tuple[int, DocumentEntry]]:
    """The training documents in the order in which near-duplicates follow each other, in the file of tokens too.

    What a query may not retrieve is then one range of offsets.
    """
    first = first_of_equals(groups[[number for number, _ in written[:n_train]]])
    order = [*np.argsort(first, kind="stable").tolist(), *range(n_train, len(written))]
    if order != sorted(order):
        starts = np.cumsum([0] + [entry.n_tokens for _, entry in written])
        as_read, ordered = np.memmap(tokens, dtype, mode="r"), tokens.with_name(f"{tokens.name}{TEMPORARY}")
        with open(ordered, "wb") as file:
            for place in order:
                as_read[starts[place] : starts[place + 1]].tofile(file)
        os.replace(ordered, tokens)
    return [written[place] for place in order]


def name_of(paths: Sequence[str | Path]) -> str:
    """What texts are called: a file or folder by its name, several by the folder that holds all of them."""
    whole = [Path(path).resolve() for path in paths]
    name = whole[0].stem if len(whole) == 1 else Path(os.path.commonpath(whole)).name
    return "".join(c if c.isalnum() or c in "-_." else "_" for c in name).strip("._") or "text"


def write_documents(
    file: BinaryIO, documents: Iterable[tuple[int, Document]], encoder: Tokenizer, dtype: np.dtype
) -> list[tuple[int, DocumentEntry]]:
    """Append the tokens of numbered documents to a file; returns their entries. What has no token is no document.

    Tells of the first document that its tokens do not give back.
    """
    entries, lost = [], None
    for batch in _in_batches(each(documents, "Tokenize", "document", delay=MOMENT)):
        arrays = encoder.encode_batch([document.text for _, document in batch])
        for (number, document), ids in zip(batch, arrays, strict=True):
            if not lost and (lost := lost_text(encoder, document.text, ids)):
                note(
                    f"The tokenizer does not keep all of the text: in {document.name}, {lost}. Bits per byte of models "
                    f"of this corpus cannot be compared with those of other tokenizers."
                )
            if not len(ids):
                continue  # of characters that the tokenizer drops
            file.write(ids.astype(dtype).tobytes())
            entries.append((number, DocumentEntry(*entry_of(document), len(ids))))
    return entries


def _in_batches(documents: Iterable[tuple[int, Document]]) -> Iterator[list[tuple[int, Document]]]:
    """Documents that are tokenized together: as many as have `CHARS_AT_ONCE`, or one longer one."""
    batch, n_chars = [], 0
    for number, document in documents:
        batch.append((number, document))
        n_chars += len(document.text)
        if n_chars >= CHARS_AT_ONCE:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def _texts_to_learn_from(documents: Sequence[Document], numbers: list[int], config: CorpusConfig) -> Iterator[str]:
    """The texts of documents with these numbers; for subwords, if they are longer, `LEARNT_FROM` characters of them.

    Which these are, is drawn by the seed.
    """
    if config.tokenizer == "char":
        yield from (documents[number].text for number in numbers)
        return
    left = LEARNT_FROM
    for place in np.random.default_rng(config.seed).permutation(len(numbers)):
        text = documents[numbers[place]].text[:left]
        left -= len(text)
        yield text
        if not left:
            return


def corpus_cache_key(texts_sha256: str, config: CorpusConfig) -> dict[str, Any]:
    """The part of a corpus' manifest that tells whether it has to be built again."""
    name = config.tokenizer
    if (file := Path(name) / TOKENIZER_FILE).is_file():
        name = f"{Path(name).name}:{sha256_of_file(file)[:12]}"
    # What the columns are shows in the texts that are read from them.
    others = {key: value for key, value in asdict(config).items() if key not in ("tokenizer", *COLUMNS)}
    return {"texts_sha256": texts_sha256, "tokenizer_name": name, **others}
