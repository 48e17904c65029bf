"""Held-out documents, and whole folders of them, are those that hashes worked out by hand say."""

import hashlib
import json

import pytest
from conftest import refused

from retro.cli import main
from retro.config import CorpusConfig
from retro.errors import InvalidOption
from retro.storage.manifests import read_manifest, write_manifest
from retro.text.build import build_corpus
from retro.text.copies import near
from retro.text.corpus import Corpus
from retro.text.documents import find_texts, read_documents
from retro.text.split import folders_of, split_texts


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def text_of(name: str, n_words: int) -> str:
    """A text of its own, 8 bytes a word."""
    return "".join(f"{name}{i:06} " for i in range(n_words))


# By folder: a 80, b 160, c 40, d 240 words, 520 in all; one letter and six digits and a blank make 8 bytes of each.
WORDS = {"a/1.txt": 30, "a/2.txt": 50, "b/1.txt": 100, "b/2.txt": 60, "c/1.txt": 40, "d/1.txt": 200, "d/2.txt": 40}
TEXTS = {name: text_of("stuvwxy"[i], n) for i, (name, n) in enumerate(WORDS.items())}


def write(folder, texts):
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def split_of(folder, **options):
    texts = find_texts([folder])
    split = split_texts(list(read_documents(texts)), **options)
    return {name: side for (name, _), side in zip(texts, split.sides, strict=True)}, dict(split.left_out)


def order_of(folders: str, seed: int) -> list[str]:
    """The folders in the order of the hashes of seed and hashes of their texts."""

    def key(folder: str) -> str:
        return sha256(f"{seed}:{','.join(sorted(sha256(t) for name, t in TEXTS.items() if name[0] == folder))}")

    return sorted(folders, key=key)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.99])
def test_whole_folders_are_held_out_in_the_order_of_their_hashes_until_the_share_is_reached(tmp_path, seed, share):
    write(tmp_path, TEXTS)
    size, expected, n_words = {"a": 80, "b": 160, "c": 40, "d": 240}, set(), 0
    for folder in order_of("abcd", seed)[:3]:  # one of four has to train
        if n_words < share * 520:
            expected.add(folder)
            n_words += size[folder]
    sides, left_out = split_of(tmp_path, valid_fraction=share, seed=seed, hold_out="folders")
    assert sides == {name: "valid" if name[0] in expected else "train" for name in TEXTS} and not left_out
    assert len({tuple(order_of("abcd", s)) for s in range(5)}) > 2


def test_documents_are_drawn_by_hashes_of_their_own(tmp_path):
    write(tmp_path, TEXTS)
    for seed in range(5):
        first = min(TEXTS, key=lambda name: sha256(f"{seed}:{sha256(TEXTS[name])}"))
        assert split_of(tmp_path, valid_fraction=0.01, seed=seed)[0] == {
            name: "valid" if name == first else "train" for name in TEXTS
        }


def test_a_folder_is_what_stands_before_the_last_slash_of_a_name():
    names = ["top.txt", "a/1.txt", "a/b/2.txt", "a/3.jsonl:1", "a/3.jsonl:2", "last.txt", "b/2.txt"]
    assert folders_of(names) == [0, 1, 2, 1, 1, 0, 6]


def copies(folder, seed):
    """The folders, in the order in which they are drawn: the first has two copies of a text, the second one more."""
    first, second, *_ = order_of("abcd", seed)
    texts = dict(TEXTS)
    shared = texts.pop(f"{first}/1.txt")
    texts |= {f"{first}/1.txt": shared, f"{first}/1b.txt": shared + "!", f"{second}/copy.txt": shared + "?"}
    write(folder, texts)
    return first, second


@pytest.mark.parametrize("keep", [False, True])
def test_copies_of_held_out_documents_are_left_out_of_the_other_folders_which_train(tmp_path, keep):
    for seed in range(40):  # which folders are drawn changes with the copies in them
        folder = tmp_path / str(seed)
        first, second = copies(folder, seed)
        sides, left_out = split_of(folder, valid_fraction=0.01, seed=seed, hold_out="folders", keep_near_held_out=keep)
        held_out = {name[0] for name, side in sides.items() if side == "valid"}
        assert len(held_out) == 1
        if held_out != {first}:
            continue
        assert left_out.pop(f"{first}/1b.txt") == f"{first}/1.txt"  # of a group one is held out, whatever is kept
        assert sides[f"{first}/1b.txt"] == ""
        assert left_out == ({} if keep else {f"{second}/copy.txt": f"{first}/1.txt"})
        assert {name for name, side in sides.items() if side == "train"} == {
            name for name in sides if name[0] != first and (keep or name != f"{second}/copy.txt")
        }
        return
    raise AssertionError("never drawn")


def test_no_copy_is_on_both_sides_and_no_folder_is_torn_whatever_the_seed(tmp_path):
    for seed in range(8):
        folder = tmp_path / str(seed)
        copies(folder, seed)
        corpus = build_corpus([folder], folder / "corpus", valid_fraction=0.3, seed=seed, hold_out="folders")
        train, valid = (corpus.split(side) for side in ("train", "valid"))
        assert not any(near(corpus.signatures[list(train)], corpus.signatures[list(valid)]))
        parents = [{corpus.documents[i].name[0] for i in side} for side in (train, valid)]
        assert not parents[0] & parents[1] and all(parents)
        assert corpus.manifest["hold_out"] == "folders"
        # All bytes count once: 520 words, or those of the group's first document.
        n_bytes = sum(corpus.documents[i].n_bytes for i in valid)
        assert n_bytes >= 0.3 * 8 * 520 or len(parents[1]) == 3


def test_a_folder_with_which_nothing_would_be_left_to_train_on_is_passed_over(tmp_path):
    everything = {f"z/{name.replace('/', '-')}": text for name, text in TEXTS.items() if name[0] in "ac"}
    write(tmp_path, {name: text for name, text in TEXTS.items() if name[0] in "ac"} | everything)
    for seed in range(6):
        sides, left_out = split_of(tmp_path, valid_fraction=0.9, seed=seed, hold_out="folders")
        held_out = {name[0] for name, side in sides.items() if side == "valid"}
        assert held_out in ({"a"}, {"c"}) and "train" in sides.values()
        assert set(left_out) == {f"z/{name.replace('/', '-')}" for name in TEXTS if name[0] in held_out}


@pytest.mark.parametrize(
    "texts", [{"1.txt": "a b", "2.txt": "c d"}, {"x/1.txt": "a b"}, {"x/1.txt": "a", "y/1.txt": "a"}]
)
def test_documents_of_one_folder_or_of_copies_cannot_be_held_out_by_folders(tmp_path, texts):
    write(tmp_path, texts)
    with refused(
        InvalidOption, r"^--hold-out folders leaves nothing to train on: one folder has all documents, or copies"
    ):
        split_of(tmp_path, hold_out="folders")
    assert set(split_of(tmp_path, hold_out="folders", valid_fraction=0)[0].values()) == {"train"}


@pytest.mark.slow
def test_the_command_line_holds_out_folders_and_builds_another_corpus_for_it(tmp_path):
    write(tmp_path / "texts", TEXTS)
    argv = ["database", str(tmp_path / "texts"), "--index", "Flat", "--chunk-len", "64", "--data-path", str(tmp_path)]
    manifest = tmp_path / "corpus" / "manifest.json"
    torn = []
    for hold_out in ("documents", "folders"):
        assert main([*argv, "--valid-fraction", "0.3", "--hold-out", hold_out]) == 0
        found = json.loads(manifest.read_text())
        assert found["hold_out"] == hold_out
        documents = list(Corpus.load(tmp_path / "corpus").documents)
        folders = [{d.name[0] for d in part} for part in (documents[: found["n_train"]], documents[found["n_train"] :])]
        torn.append(bool(folders[0] & folders[1]))
    assert torn == [True, False]
    with refused(InvalidOption, "--hold-out files is not one of documents, folders"):
        CorpusConfig(hold_out="files")


def test_a_corpus_of_before_there_were_folders_is_what_it_was(tmp_path):
    write(tmp_path / "texts", TEXTS)
    argv = ["database", str(tmp_path / "texts"), "--index", "Flat", "--chunk-len", "64", "--data-path", str(tmp_path)]
    assert main(argv) == 0
    path = tmp_path / "corpus" / "manifest.json"
    manifest = read_manifest(path)
    del manifest["hold_out"]
    write_manifest(path, manifest)
    before = path.read_bytes()
    assert main(argv) == 0
    assert path.read_bytes() == before


def test_a_text_of_two_folders_that_are_held_out_is_held_out_once_and_counts_once(tmp_path):
    # 100 + 10 + 10 + 100 words; 52% are 114.4, which p or q has not alone: 110. Both together have 120.
    texts = {"p/t.txt": text_of("t", 100), "p/a.txt": text_of("a", 10), "q/b.txt": text_of("b", 10)}
    texts |= {"q/t.txt": texts["p/t.txt"], "r/d.txt": text_of("d", 100)}
    write(tmp_path, texts)
    contents = {name: sorted(sha256(text) for file, text in texts.items() if file[0] == name) for name in "pqr"}
    firsts = set()
    for seed in range(12):
        order = sorted("pqr", key=lambda name: sha256(f"{seed}:{','.join(contents[name])}"))
        sides, left_out = split_of(tmp_path, valid_fraction=0.52, seed=seed, hold_out="folders")
        if order[2] == "r":
            first, second = order[:2]
            assert left_out == {f"{second}/t.txt": f"{first}/t.txt"}
            assert [sides[name] for name in ("r/d.txt", "p/a.txt", "q/b.txt")] == ["train", "valid", "valid"]
            firsts.add(first)
    assert firsts == {"p", "q"}


@pytest.mark.parametrize("seed", range(3))
def test_copies_that_are_kept_train_however_many_documents_are_held_out(tmp_path, seed):
    write(tmp_path, TEXTS | {f"copy of {name[0]}{name[2]}.txt": text + "!" for name, text in TEXTS.items()})
    sides, left_out = split_of(tmp_path, valid_fraction=0.99, seed=seed, keep_near_held_out=True)
    assert not left_out and sorted(sides.values()) == ["train"] * 8 + ["valid"] * 6
