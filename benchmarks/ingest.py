"""Texts to a corpus: how many megabytes a second, in how much memory, beside retro-pytorch: `make ingest`.

    python benchmarks/ingest.py            # 64, 256 and 1,024 MB of JSON lines, and 16 MB beside the peer
    python benchmarks/ingest.py --tiny     # a hundredth of it

The text is that of the Python files of the installed packages, over and over, each time with one word in 20 changed,
so that no document is near to another. Writes `ingest.json` and `INGEST.md` beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MB = 1_000_000
SIZES = (64, 256, 1024)  # MB of text
MADE_UP = 1_000_000  # documents of a corpus that is opened
BESIDE = 16  # MB of text for the peer, whose tokenizer is slow
TOKENIZERS = ("char", "bpe:32000")
ONE_WORD_IN = 20
BERT = "the packaged BERT's"  # tokenizer, which the peer takes


def texts() -> Iterator[str]:
    """Different documents without an end."""
    files = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    drawn = random.Random(0)
    drawn.shuffle(files)
    for times in range(sys.maxsize):
        for file in files:
            text = file.read_bytes()[:100_000].decode(errors="ignore").replace("\0", "")
            if not text.strip():
                continue
            words = text.split(" ")
            for i in range(drawn.randrange(ONE_WORD_IN), len(words) if times else 0, ONE_WORD_IN):
                words[i] += f"{times}x{i}"
            yield " ".join(words)


def write(path: Path, n_bytes: int, as_files: bool = False) -> None:
    """So many bytes of documents: a file of JSON lines, or a folder of files."""
    path.mkdir() if as_files else None
    with open(os.devnull if as_files else path, "w", encoding="utf-8") as lines:
        for number, text in enumerate(texts()):
            n_bytes -= len(text.encode())
            if as_files:
                (path / f"{number:05d}.txt").write_text(text, encoding="utf-8")
            else:
                lines.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            if n_bytes <= 0:
                return


def child(*arguments: str) -> dict[str, Any]:
    """One step in a process of its own: what it found, seconds, seconds of all cores, and the most memory it held."""
    done = subprocess.run([sys.executable, __file__, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def cost_of(work: Callable[[], Any]) -> tuple[dict[str, float], Any]:
    """Seconds, seconds of all cores, and how far memory rose, in bytes; and what the work gave.

    Processes that it starts count. Memory is their own, looked at 20 times a second; not the pages of files that are
    mapped.
    """
    from loky import get_reusable_executor

    def look() -> None:
        while not done.wait(0.05):
            most.append(max(most.pop(), anonymous()))

    most, done = [anonymous()], threading.Event()
    first, looking = most[0], threading.Thread(target=look)
    looking.start()
    before, start = core_seconds(), time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    done.set()
    looking.join()
    get_reusable_executor().shutdown(wait=True)  # those that have ended are counted
    return {"seconds": seconds, "core_seconds": core_seconds() - before, "memory": most[0] - first}, result


def core_seconds() -> float:
    """What this process and those of its own that have ended have taken."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(of.ru_utime + of.ru_stime for of in used)


def anonymous() -> int:
    """Bytes that this process and those below it hold."""
    n_bytes, processes = 0, [str(os.getpid())]
    for process in processes:
        try:
            processes += Path(f"/proc/{process}/task/{process}/children").read_text().split()
            n_bytes += 1024 * int(Path(f"/proc/{process}/status").read_text().split("RssAnon:")[1].split()[0])
        except (OSError, IndexError):  # it has ended
            continue
    return n_bytes


def look(texts: str) -> dict[str, Any]:
    """Reading and hashing alone, as a command does it to see whether a corpus is of these texts."""
    from retro.text.documents import find_texts
    from retro.text.split import list_documents

    cost, found = cost_of(lambda: list_documents(find_texts([texts])))
    return cost | {"documents": len(found), "bytes": sum(n for _, _, n in found)}


def build(texts: str, folder: str, tokenizer: str) -> dict[str, Any]:
    """A corpus; then to open it, for the first time and again."""
    from retro.config import PACKAGED
    from retro.text.build import build_corpus
    from retro.text.corpus import Corpus
    from retro.text.pretrained import find_embedder

    cost, corpus = cost_of(
        lambda: build_corpus([texts], folder, find_embedder(PACKAGED) if tokenizer == BERT else tokenizer)
    )
    opening = []
    time.sleep(2.5)  # until the files are old enough to be remembered
    for _ in range(3):
        start = time.perf_counter()
        Corpus.load(folder)
        opening.append(time.perf_counter() - start)
    return cost | {
        "bytes": sum(document.n_bytes for document in corpus.documents),
        "documents": len(corpus.documents),
        "tokens": len(corpus.tokens),
        "opening": opening,
    }


def make_up(folder: str, n: str, tokens: str = "20") -> dict[str, Any]:
    """A corpus of so many documents of so many tokens each, drawn at random, as `build_corpus` would write it."""
    import hashlib

    import numpy as np

    from retro.storage.files import sha256_of_file
    from retro.storage.manifests import read_manifest, write_manifest
    from retro.text import corpus as files
    from retro.text.build import build_corpus, remove_other_tables, replace_table
    from retro.text.table import DocumentEntry

    n_documents, length, place, drawn = int(n), int(tokens), Path(folder), np.random.default_rng(0)
    (place.parent / "few").mkdir(exist_ok=True)
    for number in range(3):
        (place.parent / "few" / f"{number}.txt").write_text(f"some text, number {number}, of the usual kind" * 9)
    corpus = build_corpus([place.parent / "few"], place)
    drawn.integers(corpus.n_tokens, size=length * n_documents, dtype=np.uint16).tofile(place / files.TOKENS_FILE)
    with open(place / files.SIGNATURES_FILE, "wb") as out:
        for _ in range(n_documents):
            drawn.integers(1 << 32, size=files.N_ORDERS, dtype=np.uint32).tofile(out)
    hashes = (hashlib.sha256(number.to_bytes(8, "little")).hexdigest() for number in range(n_documents))
    entries = [DocumentEntry(f"text.jsonl:{i}", sha256, length, length) for i, sha256 in enumerate(hashes, start=1)]
    n_train = n_documents - n_documents // 10
    manifest = read_manifest(place / files.MANIFEST_FILE) | {"n_train": n_train, "n_documents": n_documents}
    manifest |= {"sha256": files.sha256_of_corpus(entries, n_train, corpus.tokenizer)}
    manifest |= replace_table(place, entries, np.arange(n_documents))
    for name in (files.TOKENS_FILE, files.SIGNATURES_FILE):
        manifest[f"{name}_sha256"] = sha256_of_file(place / name)
    write_manifest(place / files.MANIFEST_FILE, manifest)
    remove_other_tables(place, manifest)
    return {}


def opened(folder: str) -> dict[str, Any]:
    """To open a corpus, and look a document up; memory is all that the process has more then, mapped pages too."""
    from retro.text.corpus import Corpus

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    corpus = Corpus.load(folder)
    name = corpus.documents[int(corpus.document_of(len(corpus.tokens) // 2))].name
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"seconds": seconds, "memory": 1024 * (after - before), "documents": len(corpus.documents), "name": name}


def peer(texts: str, folder: str) -> dict[str, Any]:
    """retro-pytorch's `text_folder_to_chunks_`, with the packaged BERT's tokenizer, which is the fast one."""
    import peers
    from transformers import BertTokenizerFast

    from retro.config import PACKAGED
    from retro.text.pretrained import find_embedder

    peers.stand_in("autofaiss")
    from retro_pytorch import retrieval

    tokenizer = BertTokenizerFast.from_pretrained(find_embedder(PACKAGED))
    if not hasattr(tokenizer, "batch_encode_plus"):  # its name before transformers 5
        tokenizer.batch_encode_plus = tokenizer.__call__
    retrieval.TOKENIZER = tokenizer
    n_bytes = sum(file.stat().st_size for file in Path(texts).iterdir())
    Path(folder).mkdir()
    memory_maps = {f"{name}_memmap_path": f"{folder}/{name}" for name in ("chunks", "seqs", "doc_ids")}
    cost, _ = cost_of(lambda: retrieval.text_folder_to_chunks_(folder=texts, **memory_maps))
    return cost | {"bytes": n_bytes}


def measured(tiny: bool) -> dict[str, Any]:
    from scale import machine

    record: dict[str, Any] = machine() | {"build": [], "beside": []}
    scale = 100 if tiny else 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
        for size in SIZES:
            lines = folder / f"{size}.jsonl"
            write(lines, size * MB // scale)
            record["build"].append({"size": size, "tokenizer": "none: read and hashed"} | child("look", str(lines)))
            for tokenizer in TOKENIZERS:
                made = child("build", str(lines), str(folder / "corpus"), tokenizer)
                record["build"].append({"size": size, "tokenizer": tokenizer} | made)
                print(json.dumps(record["build"][-1]), flush=True)
            lines.unlink()
        child("make_up", str(folder / "made-up"), str(MADE_UP // scale))
        time.sleep(2.5)  # until the files are old enough to be remembered
        record["opened"] = [child("opened", str(folder / "made-up")) for _ in range(4)]
        print(json.dumps(record["opened"]), flush=True)
        write(folder / "files", BESIDE * MB // scale, as_files=True)
        for round_ in range(3):
            for which in (BERT, "bpe:32000", "retro-pytorch"):
                place = str(folder / f"{which}-{round_}".replace(" ", "-"))
                if which == "retro-pytorch":
                    made = child("peer", str(folder / "files"), place)
                else:
                    made = child("build", str(folder / "files"), place, which)
                record["beside"].append({"which": which} | made)
                print(json.dumps(record["beside"][-1]), flush=True)
    return record


def page(record: dict[str, Any]) -> str:
    """What was measured, as a page."""
    lines = [
        "# From texts to a corpus",
        "",
        f"`make ingest`, {record['date']}: {record['processor']}, {record['cores']} cores. JSON lines of Python",
        "code; a corpus is read, hashed, compared for near-duplicates, split, learnt from, tokenized and written. MB a",
        "second, by the clock and for each core that was busy; memory is how far it rose at most.",
        "",
        "| MB | tokenizer | documents | MB/s | MB/s a core | memory, MB | opened at first, again (s) |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in record["build"]:
        mb = row["bytes"] / MB
        opened = f"{row['opening'][0]:.2f}, {row['opening'][-1]:.2f}" if "opening" in row else ""
        figures = f"{mb / row['seconds']:.1f} | {mb / row['core_seconds']:.1f} | {row['memory'] / MB:,.0f} | {opened}"
        lines.append(f"| {mb:,.0f} | {row['tokenizer']} | {row['documents']:,} | {figures} |")
    first, *again = record["opened"]
    middle_one = sorted(again, key=lambda row: row["seconds"])[len(again) // 2]
    lines += [
        "",
        f"A corpus of {first['documents']:,} documents of twenty tokens each, drawn at random, is opened at first in",
        f"{first['seconds']:.2f} s (its files are hashed), by other processes in {middle_one['seconds']:.3f} s; they",
        f"have {middle_one['memory'] / MB:,.0f} MB more then, mapped pages too.",
        "",
        f"Beside retro-pytorch's `text_folder_to_chunks_`, which compares and learns nothing, on {BESIDE} MB of files,",
        "in turns, three times; both with BERT's tokenizer, and this with one that it learns:",
        "",
        "| | seconds (three rounds) | as fast |",
        "|---|---|---|",
    ]
    seconds: dict[str, list[float]] = {}
    for row in record["beside"]:
        seconds.setdefault(row["which"], []).append(row["seconds"])
    middle = {which: sorted(of)[len(of) // 2] for which, of in seconds.items()}
    for which, of in seconds.items():
        shown = ", ".join(f"{s:.1f}" for s in of)
        lines.append(f"| {which} | {shown} | {middle['retro-pytorch'] / middle[which]:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    steps = {"look": look, "build": build, "make_up": make_up, "opened": opened, "peer": peer}
    if len(sys.argv) > 1 and sys.argv[1] in steps:
        print(json.dumps(steps[sys.argv[1]](*sys.argv[2:])))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a hundredth of it, written nowhere")
    tiny = parser.parse_args().tiny
    record = measured(tiny)
    if not tiny:
        (HERE / "ingest.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (HERE / "INGEST.md").write_text(page(record), encoding="utf-8")
    print(page(record))


if __name__ == "__main__":
    main()
