"""Near-duplicates: one group, one side of the split, and no neighbor of a query's group."""

import json
import pickle
import shutil
from itertools import pairwise

import numpy as np
import pytest
from conftest import CHUNK_LEN, CHUNKS_PER_SAMPLE
from datasketch import MinHash

from retro.cli import main
from retro.config import DatabaseConfig, DatasetConfig
from retro.database import RetroIndex, build_database
from retro.dataset import DATASET_FILE, Dataset, build_dataset
from retro.errors import NameTaken, SeenText
from retro.evaluation.audit import audit, can_be_copied
from retro.evaluation.held_out import require_held_out
from retro.evaluation.leakage import retrieve
from retro.evaluation.windows import chunk_offsets
from retro.search.updates import add_documents, split_new_and_restored
from retro.text import copies
from retro.text.build import build_corpus
from retro.text.copies import by_processes, grams_of, groups_of, near, signature, signatures_of
from retro.text.corpus import Corpus, DocumentEntry
from retro.text.documents import Document
from retro.text.tokenizer import CharTokenizer

RNG = np.random.default_rng(5)


def words(n: int) -> list[str]:
    return [f"w{i}" for i in RNG.integers(1 << 40, size=n)]


def test_the_similarity_of_two_texts_is_that_of_their_sets_of_13_words_in_a_row():
    first = words(1000)
    # The second goes on otherwise after 900 words: 888 grams in common, of 988 + 988 - 888.
    second = first[:900] + words(100)
    a, b = " ".join(first), ", ".join(second).upper()
    exact = [{tuple(text[i : i + 13]) for i in range(len(text) - 12)} for text in (first, second)]
    assert [len(grams_of(a)), len(grams_of(b))] == [len(grams) for grams in exact] == [988, 988]
    assert len(set(grams_of(a)) & set(grams_of(b))) == len(exact[0] & exact[1]) == 888
    assert (signature(a) == signature(b)).mean() == pytest.approx(888 / 1088, abs=0.1)
    assert (signature(a) == signature(" ".join(words(1000)))).mean() < 0.1
    assert len(grams_of("too few words")) == len(grams_of("?!")) == 1
    assert not set(grams_of("alpha")) & set(grams_of("omega"))
    # Every word of a gram counts, the last one too.
    for at in range(13):
        changed = [*first[:at], "other", *first[at + 1 : 13]]
        assert not set(grams_of(" ".join(first[:13]))) & set(grams_of(" ".join(changed)))


def test_a_signature_is_that_of_datasketch():
    for text in ("one text", "à " * 40, " ".join(words(100)), " ".join([*words(9000), *words(30) * 5])):
        minhash = MinHash(128, hashfunc=int, scheme="affine32")
        minhash.update_batch(grams_of(text))
        assert signature(text).tolist() == minhash.hashvalues.tolist()
        assert signature(text).dtype == np.uint32


def test_words_are_found_alike_in_texts_of_few_and_of_many_letters(monkeypatch):
    letters = [*"aB_1 .\n\x1c\x85", *"äßİ²½٣", "e\u0301", "–", "“", "\u00a0", "\u2003", "ก", "日", "の", "🙂", "\ud800"]
    texts = ["".join(RNG.choice(letters, size=200)) for _ in range(200)] + ["?!", "–", " ", "Ünd 日本"]
    few = [grams_of(text).tolist() for text in texts]
    monkeypatch.setattr(copies, "_FEW", -1)
    assert few == [grams_of(text).tolist() for text in texts]
    words_of = [word.encode("utf-8", "surrogatepass") for word in copies.WORD.findall(texts[0].lower())]
    assert len(words_of) > 40 and copies._words_of(texts[0]) == words_of


def test_what_is_near_is_a_group_and_what_is_near_to_that_belongs_to_it():
    text = words(400)
    # Each differs from the one before in its last 30 words: near to that one, but less and less to the first.
    chain = [" ".join(text[: 400 - 30 * i] + words(30 * i)) for i in range(3)]
    versions = [" ".join(text), " ".join(words(300)), " ".join(text) + "!", " ".join(words(300)), " ".join(text)]
    assert groups_of(signatures_of(versions)).tolist() == [0, 1, 0, 3, 0]
    signs = signatures_of([*chain, *versions])
    assert groups_of(signs).tolist()[3] == 0
    # One that comes later joins two groups that were apart.
    left, right = words(200), words(200)
    apart = signatures_of([" ".join(left), " ".join(right)])
    between = apart[0].copy()
    between[:64] = apart[1][:64]
    assert groups_of(apart).tolist() == [0, 1]
    bridge = np.where(np.arange(128) < 110, apart[0], apart[1])[None]
    assert groups_of(np.concatenate([apart, bridge]), [0, 1]).tolist() == [0, 1, 0]
    assert near(bridge, apart) == [[0]]


def test_groups_and_what_is_near_are_those_of_a_comparison_of_all_pairs():
    signs = RNG.integers(1 << 32, size=(300, 128), dtype=np.uint32)
    for i in range(100, 300):  # a version of an earlier one, of which 0 to 12 numbers are others, or 60
        signs[i] = signs[RNG.integers(i)]
        changed = RNG.permutation(128)[: RNG.choice([0, 5, 12, 60])]
        signs[i, changed] = RNG.integers(1 << 32, size=len(changed))
    alike = (signs[:, None] == signs).mean(axis=-1) >= 0.8
    first = np.arange(300)
    while (joined := np.array([first[row].min() for row in alike])).tolist() != first.tolist():
        first = joined
    assert groups_of(signs).tolist() == first.tolist() and 100 < len(set(first.tolist())) < 200
    assert groups_of(signs, groups_of(signs[:150]).tolist()).tolist() == first.tolist()
    distinct = np.unique(signs[:200], axis=0)
    assert near(signs[200:], distinct) == [
        np.flatnonzero((row == distinct).mean(axis=-1) >= 0.8).tolist() for row in signs[200:]
    ]
    assert near(signs[:0], signs) == [] and near(signs[:2], signs[:0]) == [[], []]


def test_many_versions_of_a_text_are_one_group():
    signs = np.repeat(signatures_of(["one text for all of them"]), 1500, axis=0)
    signs[np.arange(1500), np.arange(1500) % 128] = np.arange(1500)
    assert not groups_of(signs).any()


def test_many_equal_texts_are_no_more_work_than_one(monkeypatch):
    signs = np.repeat(signatures_of(["one text for all of them"]), 50_000, axis=0)
    assert not groups_of(signs).any()  # in pairs, these would be a billion


QUOTED = " A prologue that every one of them ends with, word for word, goes on for longer than a chunk or two of it."


@pytest.fixture(scope="module")
def copied(plays, bert, tmp_path_factory):
    """Beginnings of five plays, one of them twice, the second time with some words more; and another's exact copy."""
    folder, data = tmp_path_factory.mktemp("copied"), tmp_path_factory.mktemp("data")
    for file in plays.iterdir():
        (folder / file.name).write_text(file.read_text()[:2500] + QUOTED)
    macbeth, john = (folder / name for name in ("macbeth.md", "king-john.md"))
    (folder / "a-macbeth.md").write_text("A second edition of it\n" + macbeth.read_text())
    (folder / "z-john.md").write_text(john.read_text())
    corpus = build_corpus([folder], data / "corpus", "bpe:512")
    build_database(CHUNK_LEN, corpus=corpus, data_path=data, config=DatabaseConfig(index="Flat"), bert=bert)
    return folder, data, corpus, RetroIndex(data_path=data, bert=bert)


def counts_of(data, corpus, index, target) -> dict[str, int]:
    index.corpus, index.keys.corpus = corpus, corpus
    build_dataset(None, CHUNKS_PER_SAMPLE, corpus=corpus, data_path=target, index=index)
    return audit(Dataset(target / DATASET_FILE["train"], corpus))


def test_no_chunk_finds_what_follows_it_in_a_copy_of_its_document(copied, tmp_path):
    _, data, corpus, index = copied
    trained = [corpus.documents[i].name for i in corpus.split("train")]
    assert {"a-macbeth.md", "macbeth.md"} < set(trained) or {"king-john.md", "z-john.md"} < set(trained)
    found = counts_of(data, corpus, index, tmp_path / "groups")
    assert found["copied_from_own"] == found["leaking_neighbors"] == 0 < found["neighbors"]
    # Without the groups each of the two retrieves the other's continuation, and the audit by offsets sees nothing.
    alone = Corpus.load(data / "corpus")
    alone.groups = np.arange(len(alone.documents))
    counts_of(data, alone, index, tmp_path / "alone")
    blind = audit(Dataset(tmp_path / "alone" / DATASET_FILE["train"], corpus))
    assert blind["leaking_neighbors"] == 0 and blind["copied_from_own"] > 0.3 * blind["chunks"] / 5


def test_the_audit_by_content_counts_what_a_search_by_hand_finds(copied, tmp_path, monkeypatch):
    _, data, corpus, index = copied
    found = counts_of(data, corpus, index, tmp_path)
    dataset, by_hand = Dataset(tmp_path / DATASET_FILE["train"], corpus), 0
    for src, tgt, neighbors in (dataset[i] for i in range(len(dataset))):
        tokens = [t if t >= 0 else None for t in [*src[:1].tolist(), *tgt.tolist()]]  # positions 0..n
        for u in range(CHUNKS_PER_SAMPLE):
            following = tokens[(u + 1) * CHUNK_LEN : (u + 2) * CHUNK_LEN]
            if None in following:
                following = following[: following.index(None)]
            runs = {tuple(following[i : i + 8]) for i in range(len(following) - 7)}
            values = [v.tolist() for v in neighbors[u]]
            by_hand += any(tuple(v[i : i + 8]) in runs for v in values for i in range(len(v) - 7))
    assert found["copied_from_elsewhere"] == by_hand > 0
    monkeypatch.setattr("retro.evaluation.audit.CHUNKS_AT_ONCE", 5 * CHUNKS_PER_SAMPLE)
    assert audit(dataset) == found and len(dataset) % 5


def test_the_audit_by_offsets_counts_every_value_that_reaches_into_the_text_to_come(data, monkeypatch):
    corpus, m = Corpus.load(data / "corpus"), CHUNK_LEN
    dataset = Dataset(data / DATASET_FILE["train"], corpus)
    (offset,) = dataset.line(2)["offsets"]
    end = offset + CHUNKS_PER_SAMPLE * m + 1  # of what the sample predicts
    to_come = [offset + (u + 1) * m for u in range(CHUNKS_PER_SAMPLE)]  # not read yet by who reads the neighbors
    # A value ends where the text to come begins, or one token in it; begins at the end of the sample, or one before.
    rows = [[start - 2 * m, start - 2 * m + 1] for start in to_come[:2]] + [[end, end - 1], [end + 5, to_come[3]]]
    assert int(corpus.document_of(end + 5)) == int(corpus.document_of(offset - m))
    line = {"offsets": [offset], "neighbors": rows, "distances": []}
    monkeypatch.setattr(dataset, "line", lambda idx: line)
    monkeypatch.setattr(Dataset, "__len__", lambda self: 1)
    found = audit(dataset)
    assert (found["neighbors"], found["leaking_neighbors"], found["leaking_samples"]) == (8, 4, 1)


def test_eight_tokens_in_a_row_can_be_copied_and_seven_cannot():
    chunk, other = np.arange(16)[None], np.arange(100, 132)
    values = np.stack([other, other, other])[None]
    values[0, 0, 5:13], values[0, 1, 5:12], values[0, 2, 5:13] = np.arange(8, 16), np.arange(9, 16), np.arange(8)[::-1]
    assert can_be_copied(chunk, values).tolist() == [[True, False, False]]
    assert not can_be_copied(np.full((1, 16), -1), np.full((1, 1, 32), -1)).any()


@pytest.mark.parametrize("seed", range(6))
def test_a_group_is_on_one_side_and_copies_of_held_out_documents_are_left_out(copied, tmp_path, seed):
    folder = copied[0]
    corpus = build_corpus([folder], tmp_path / "corpus", seed=seed, valid_fraction=0.2)
    held_out, left_out = [corpus.documents[i].name for i in corpus.split("valid")], corpus.manifest["left_out"]
    names = {d.name for d in corpus.documents} | {name for name, _ in left_out}
    assert names == {f.name for f in folder.iterdir()} and all(near in held_out for _, near in left_out)
    train, valid = (corpus.signatures[list(corpus.split(side))] for side in ("train", "valid"))
    assert not any(near(train, valid))
    for pair in ({"a-macbeth.md", "macbeth.md"}, {"king-john.md", "z-john.md"}):
        assert not pair & set(held_out) or len(pair & set(held_out)) == 1 == len(pair & {name for name, _ in left_out})
    assert {len(near) for near in map(tuple, left_out)} <= {2}
    for number, entry in enumerate(corpus.documents):
        assert corpus.text(corpus.starts[number], entry.n_tokens) == (folder / entry.name).read_text()
    # What a query may not find is one range, because near-duplicates lie side by side.
    assert corpus.barred_ranges(corpus.starts[:-1]).shape[1] == 1


def test_copies_of_held_out_documents_train_if_that_is_asked_for_but_are_not_retrieved_for_them(copied, tmp_path, bert):
    folder = copied[0]
    seed = next(s for s in range(20) if build_corpus([folder], tmp_path / "corpus", seed=s).manifest["left_out"])
    corpus = build_corpus([folder], tmp_path / "corpus", "bpe:512", seed=seed, keep_near_held_out=True)
    assert not corpus.manifest["left_out"] and len(corpus.documents) == len(list(folder.iterdir()))
    copies = [i for i in corpus.split("train") if corpus.groups[i] in corpus.groups[list(corpus.split("valid"))]]
    assert copies
    build_database(CHUNK_LEN, corpus=corpus, data_path=tmp_path, config=DatabaseConfig(index="Flat"), bert=bert)
    index = RetroIndex(data_path=tmp_path, bert=bert)
    offsets = chunk_offsets(corpus, CHUNK_LEN)
    unbarred = index.search(index.embed(corpus.texts(offsets, CHUNK_LEN)), 1)[1]
    assert set(copies) & set(corpus.document_of(unbarred.ravel()).tolist())
    build_dataset(None, CHUNKS_PER_SAMPLE, data_path=tmp_path, index=index)
    valid = Dataset(tmp_path / DATASET_FILE["valid"], corpus)
    in_dataset = [n for i in range(len(valid)) for row in valid.line(i)["neighbors"] for n in row]
    for found in (in_dataset, retrieve(corpus, index, offsets, 10)[0].ravel()):
        assert not set(copies) & set(corpus.document_of(np.array(found)).tolist())


def test_what_is_barred_is_the_tokens_of_the_whole_group_wherever_they_lie():
    lengths, groups = RNG.integers(1, 9, size=12).tolist(), [0, 0, 2, 0, 4, 2, 6, 6, 6, 4, 10, 0]
    entries = [DocumentEntry(str(i), str(i), n, n) for i, n in enumerate(lengths)]
    corpus = Corpus(np.zeros(sum(lengths), dtype=np.int64), entries, 12, CharTokenizer("a"), groups=groups)
    offsets = np.arange(sum(lengths))
    documents = np.repeat(np.arange(12), lengths)
    for offset, ranges in zip(offsets.tolist(), corpus.barred_ranges(offsets), strict=True):
        barred = {i for first, end in ranges.tolist() for i in range(first, end)}
        group = groups[documents[offset]]
        assert barred == {int(i) for i in offsets if groups[documents[i]] == group}
        assert all(a < b or (a, b) == (0, 0) for a, b in ranges.tolist())
    # As wide as these queries need.
    starts = corpus.starts[:-1]
    assert corpus.barred_ranges(starts[[10, 2]]).shape == (2, 2, 2)
    assert corpus.barred_ranges(starts[:0]).shape == (0, 1, 2)
    assert corpus.barred_ranges(starts[[10, 6]]).shape == (2, 1, 2)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat", "IVF4,PQ16"])
def test_a_search_passes_over_several_ranges_and_still_finds_as_many(data, bert, tmp_path, factory):
    corpus = Corpus.load(data / "corpus")
    shutil.copytree(data / "keys", tmp_path / "keys")
    config = DatabaseConfig(index=factory, n_probe=4)
    build_database(CHUNK_LEN, corpus=corpus, data_path=tmp_path, config=config, bert=bert)
    index = RetroIndex(data_path=tmp_path, corpus=corpus, bert=bert)
    queries = index.embed([corpus.text(o, CHUNK_LEN) for o in (3, 1000, 2000)])
    # For each query all but two stretches of the text are barred, in two ranges.
    ends = [(40, 200), (900, 1100), (30, 4000)]
    ranges = np.array([[(0, a), (b, len(corpus.tokens))] for a, b in ends])
    distances, found = index.search(queries, 3, ranges)
    for row, near_by, query, (a, b) in zip(found, distances, queries, ends, strict=True):
        allowed = np.flatnonzero((index.keys.offsets[:] >= a) & (index.keys.offsets[:] < b))
        exact = np.sort(((index.keys.rows(allowed) - query) ** 2).sum(1))[:3]
        assert ((row >= a) & (row < b)).all() and len(set(row.tolist())) == 3
        np.testing.assert_allclose(near_by, exact, rtol=1e-3, atol=1e-3)


def test_an_added_copy_joins_the_group_and_is_barred_for_the_samples_of_the_other(copied, tmp_path, bert):
    folder, data, *_ = copied
    for name in ("corpus", "keys"):
        shutil.copytree(data / name, tmp_path / name)
    for name in ("retro.index", "retro.index.json"):
        shutil.copy(data / name, tmp_path / name)
    trained = Corpus.load(tmp_path / "corpus")
    name = trained.documents[0].name
    new = tmp_path / "new"
    new.mkdir()
    (new / "edition.md").write_text((folder / name).read_text() + "FINIS")
    (new / name).write_text("A text of other words that has the name of a play. " * 9)
    add_documents([new], tmp_path, bert=bert)
    corpus = Corpus.load(tmp_path / "corpus")
    added = {corpus.documents[i].name: i for i in corpus.parts[1]}
    assert set(added) == {"edition.md", f"{name} (2)"}
    assert corpus.groups[added["edition.md"]] == corpus.groups[0] != corpus.groups[added[f"{name} (2)"]]
    assert corpus.barred_ranges(np.zeros(1, dtype=int)).shape[1] == 2
    assert (
        corpus.signatures.tolist()
        == signatures_of(corpus.text(a, b - a) for a, b in pairwise(corpus.starts.tolist())).tolist()
    )
    found = counts_of(tmp_path, corpus, RetroIndex(data_path=tmp_path, bert=bert), tmp_path)
    assert found["copied_from_own"] == 0


@pytest.fixture(scope="module")
def versions(tmp_path_factory) -> tuple:
    """A text in two versions of the same words, and five others."""
    folder = tmp_path_factory.mktemp("versions")
    texts = {name: " ".join(words(60)) for name in ("a", "b", "c", "d", "e", "f")}
    texts["b"] = texts["a"] + "!"
    for name, text in texts.items():
        (folder / name).with_suffix(".txt").write_text(text)
    return folder, texts


def test_a_version_of_a_document_is_told_though_another_document_has_the_same_words(versions, tmp_path):
    folder, texts = versions
    corpus = build_corpus([folder], tmp_path, "bpe:300", valid_fraction=0)
    assert (corpus.signatures[0] == corpus.signatures[1]).all()
    for name in ("a.txt", "b.txt"):
        with pytest.raises(NameTaken, match=f"another version of {name}"):
            split_new_and_restored(corpus, [Document(name, texts["a"] + " ?")])


def test_held_out_text_is_not_added_though_a_copy_of_it_trains(versions, tmp_path):
    folder, texts = versions
    for seed in range(60):
        corpus = build_corpus([folder], tmp_path, "bpe:300", seed=seed, keep_near_held_out=True)
        if "a.txt" in [corpus.documents[i].name for i in corpus.split("valid")]:
            break
    assert "b.txt" in [corpus.documents[i].name for i in corpus.split("train")]
    with pytest.raises(SeenText, match=r"new.txt is a.txt, or nearly"):
        split_new_and_restored(corpus, [Document("new.txt", texts["a"])])


def test_a_text_that_comes_twice_is_added_or_restored_once(versions, tmp_path):
    folder, texts = versions
    corpus = build_corpus([folder], tmp_path, "bpe:300", valid_fraction=0)
    number = [d.name for d in corpus.documents].index("d.txt")
    corpus.removed = frozenset([number])
    twice = [Document(name, text) for text in (texts["d"], "a new text") for name in ("first.txt", "second.txt")]
    assert split_new_and_restored(corpus, twice) == ([Document("first.txt", "a new text")], [number])


def test_the_whole_of_a_text_whose_last_part_is_held_out_is_neither_added_nor_evaluated_with(plays, tmp_path):
    one = build_corpus([plays / "hamlet.md"], tmp_path / "one", "char")
    assert one.is_one_text
    whole = Document("the-play.md", "A note at its beginning\n" + (plays / "hamlet.md").read_text())
    with pytest.raises(SeenText, match=r"the-play.md is hamlet.md \[valid\], or nearly"):
        split_new_and_restored(one, [whole])
    other = Document("macbeth.md", (plays / "macbeth.md").read_text())
    assert split_new_and_restored(one, [other]) == ([other], [])
    all_plays = build_corpus([plays], tmp_path / "all", "char", valid_fraction=0)
    with pytest.raises(SeenText, match=r"hamlet.md \[valid\] is hamlet.md, or nearly"):
        require_held_out(one, all_plays)
    require_held_out(all_plays, one)  # nothing is held out there


def test_near_duplicates_that_are_added_together_lie_side_by_side(copied, tmp_path, bert):
    _, data, *_ = copied
    shutil.copytree(data, tmp_path / "data")
    texts = {f"{i:02}": " ".join(words(40)) for i in range(4)}
    texts |= {f"{i:02}": texts[f"{i % 4:02}"] + "!" * i for i in range(4, 12)}
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts.values()))
    add_documents([tmp_path / "new.jsonl"], tmp_path / "data", bert=bert)
    corpus = Corpus.load(tmp_path / "data" / "corpus")
    added = corpus.parts[1]
    names = [corpus.documents[i].name for i in added]
    assert names == [f"new.jsonl:{i + 1}" for first in range(4) for i in (first, first + 4, first + 8)]
    for number, i in zip(added, (i for first in range(4) for i in (first, first + 4, first + 8)), strict=True):
        assert corpus.text(corpus.starts[number], corpus.documents[number].n_tokens) == texts[f"{i:02}"]
        assert corpus.signatures[number].tolist() == signature(texts[f"{i:02}"]).tolist()
    assert corpus.groups[added.start :].tolist() == np.repeat(added[::3], 3).tolist()
    assert corpus.barred_ranges(corpus.starts[added.start : -1]).shape == (12, 1, 2)


def test_another_process_maps_the_signatures_itself(copied):
    _, data, *_ = copied
    corpus = Corpus.load(data / "corpus")
    sent = pickle.dumps(corpus)
    assert corpus.signatures[3].tobytes() not in sent
    assert np.array_equal(pickle.loads(sent).signatures, corpus.signatures)
    assert corpus.signatures.shape == (len(corpus.documents), 128)


def test_a_corpus_says_what_it_leaves_out_and_that_one_text_retrieves_from_itself(plays, tmp_path, capsys):
    texts = tmp_path / "texts"
    texts.mkdir()
    for name in ("hamlet.md", "macbeth.md"):
        for copy in ("", "copy of "):
            (texts / f"{copy}{name}").write_text((plays / name).read_text() + copy)
    argv = ["database", str(texts), "--tokenizer", "char", "--index", "Flat", "--data-path"]
    assert main([*argv, str(tmp_path / "two")]) == 0
    said = capsys.readouterr().out
    assert "left out: 1 near-duplicates of held-out documents: " in said and "note: there is one text" not in said
    assert main([*argv, str(tmp_path / "kept"), "--keep-near-held-out"]) == 0
    assert "left out" not in capsys.readouterr().out
    kept = Corpus.load(tmp_path / "kept" / "corpus")
    assert len(kept.documents) == 4 and len(set(kept.groups.tolist())) == 2
    for name in ("macbeth.md", "copy of macbeth.md"):
        (texts / name).unlink()
    assert main([*argv, str(tmp_path / "one")]) == 0
    said = capsys.readouterr().out
    assert "note: there is one text, and its end is held out" in said and "left out: 1 near-dup" in said


def test_the_dataset_is_made_again_for_another_n_probe_or_span(copied, tmp_path):
    _, data, _, index = copied
    config = DatasetConfig(chunks_per_sample=CHUNKS_PER_SAMPLE, exclude="span")
    made = {}
    for n_probe, span in [(1, 8), (2, 8), (2, 40)]:
        index = RetroIndex(data_path=data, bert=index.bert, n_probe=n_probe, exclude_neighbor_span=span)
        header = build_dataset(config=config, corpus=index.corpus, data_path=tmp_path, index=index)["train"]
        assert (header["n_probe"], header["exclude_neighbor_span"]) == (n_probe, span)
        made[span] = header["sha256"]
    assert made[8] != made[40]


def test_building_a_corpus_of_other_texts_does_not_lose_what_was_added(copied, bert, tmp_path, capsys):
    folder, data, *_ = copied
    shutil.copytree(data, tmp_path / "data")
    (tmp_path / "note.txt").write_text("A note that was added later. " * 9)
    add_documents([tmp_path / "note.txt"], tmp_path / "data", bert=bert)
    before = {p: p.read_bytes() for p in (tmp_path / "data" / "corpus").iterdir()}
    argv = ["database", str(folder / "hamlet.md"), str(folder / "macbeth.md"), "--data-path", str(tmp_path / "data")]
    assert main([*argv, "--tokenizer", "bpe:512"]) == 1
    assert "Documents were added to" in (said := capsys.readouterr().err) and "repeat retro add" in said
    assert before == {p: p.read_bytes() for p in (tmp_path / "data" / "corpus").iterdir()}


def test_processes_sign_texts_as_one_does_in_their_order_and_hold_few_of_them(monkeypatch):
    batches = [[f"text {i} {j}" * (1 + i % 7) for j in range(9)] for i in range(60)]
    taken = []
    found = by_processes(signatures_of, (taken.append(batch) or batch for batch in batches), 2)
    first = next(found)
    assert len(taken) < 8, "what is waited for is bounded"
    for one, batch in zip([first, *found], batches, strict=True):
        assert np.array_equal(one, signatures_of(batch))
    assert taken == batches
    monkeypatch.setattr(copies, "get_reusable_executor", lambda *_: pytest.fail("it is too little for processes"))
    assert np.array_equal([*by_processes(signatures_of, batches[:1])], [signatures_of(batches[0])])
    assert [*by_processes(signatures_of, [], 4)] == []
