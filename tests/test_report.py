"""The report: what is on the page is what was measured, and it is safe and legible whatever the text."""

import math
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from conftest import CHUNK_LEN
from test_evaluate import IN_WINDOWS, WINDOW, model_of

from retro.config import DatabaseConfig, EvaluateConfig
from retro.database import RetroIndex, build_database
from retro.evaluate import evaluate, held_out_texts
from retro.evaluation.attention import attention_shares
from retro.evaluation.passages import CHUNKS_PER_PASSAGE, MIN_RUN, choose, common_run, rank_passages, text_spans
from retro.evaluation.report import FULL_COLOR_BITS, NOTABLE_BITS, write_report
from retro.text.build import build_corpus
from retro.text.corpus import Corpus, DocumentEntry

SCRIPT = "<script>alert(1)</script>"
LONG_NAME = f"<i>odd & {'n' * 100}.md"
ALL = 1000  # passages: more than there are


class Element(HTMLParser):
    """A parsed page: a tree of elements with `tag`, `attrs`, `children`; its tags must be balanced."""

    VOID = ("meta",)

    def __init__(self, tag="", attrs=()):
        super().__init__()
        self.tag, self.attrs, self.children, self.open = tag, dict(attrs), [], [self]

    def handle_starttag(self, tag, attrs):
        element = Element(tag, attrs)
        self.open[-1].children.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop().tag == tag

    def handle_data(self, data):
        self.open[-1].children.append(data)

    @property
    def text(self):
        return "".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag, kind=None):
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if child.tag == tag and (kind is None or kind in child.attrs.get("class", "").split()):
                    found.append(child)
                found += child.all(tag, kind)
        return found


def page_of(path, evaluation, model, n_passages=ALL):
    write_report(path, evaluation, model, n_passages)
    page = Element()
    page.feed(path.read_text(encoding="utf-8"))
    assert page.open == [page]
    return page


def rows_of(page):
    """Rows in the order of the text, of a page that shows all of one document."""
    rows = page.all("div", "row")
    return sorted(rows, key=lambda row: int(re.match(r"Chunk ([\d,]+)", row.all("p")[0].text)[1].replace(",", "")))


def tokens_of(row):
    return row.all("div", "text")[0].all("span")


def neighbors_of(row):
    """(document, offset in it, share in percent) of each neighbor in a row."""
    pattern = r"(\S+) from token ([\d,]+)\s+distance ([\d.]+)\s+(\d+)% of attention"
    found = [re.fullmatch(pattern, summary.text.strip()).groups() for summary in row.all("summary")]
    return [(name, int(offset.replace(",", "")), int(share)) for name, offset, _, share in found]


@pytest.fixture(scope="module")
def odd(plays, bert, tmp_path_factory):
    """Text that is hard to show, beside a database of such: the text, its evaluation, the model, the page of it all."""
    folder = tmp_path_factory.mktemp("odd")
    markup = f'{SCRIPT} <b title="a">&amp; <!-- & </span> so be it\n'
    (folder / "markup.md").write_text((markup + "=" * 64) * 40)  # which becomes a long token
    play = (plays / "hamlet.md").read_text()
    # Words of the database have tokens of their own; letters from elsewhere are spread over several.
    corpus = build_corpus([folder / "markup.md", plays / "hamlet.md"], folder / "corpus", "bpe:400", valid_fraction=0)
    build_database(CHUNK_LEN, corpus=corpus, config=DatabaseConfig(index="auto"), data_path=folder, bert=bert)
    index = RetroIndex(CHUNK_LEN, corpus=corpus, data_path=folder, bert=bert)
    text = (
        play[1000:1200]
        + f'naïve café, 3 € — 日本語 🎭🎭🎭 "x"\n\n\n{markup}  \nΑθήνα &amp; 한국어\t<!-- ' * 8
        + "=" * 900  # few tokens
    )
    (folder / LONG_NAME).write_text(text, encoding="utf-8")
    model = model_of(index, ca_layers=(0, 1))
    evaluation = evaluate(model, held_out_texts([folder / LONG_NAME], corpus.tokenizer), index, config=IN_WINDOWS)
    return text, evaluation, model, page_of(folder / "report.html", evaluation, model)


@pytest.fixture
def sharp(index):
    """A model that does not attend to everything alike."""
    model = model_of(index, ca_layers=(0, 1))
    with torch.no_grad():
        for cca in model.cca:
            cca.query.weight.mul_(30)
    return model


@pytest.mark.parametrize("length", [3 * CHUNK_LEN, 3 * CHUNK_LEN + 5, 4 * CHUNK_LEN + 1])
def test_shares_are_those_of_a_loop_over_layers_tokens_and_heads(index, sharp, length):
    generator = torch.Generator().manual_seed(length)
    C, K, R, n_vocab = 3, 3, 2 * CHUNK_LEN, index.corpus.n_tokens
    x = torch.randint(n_vocab, (2, length), generator=generator)
    ret = torch.randint(n_vocab, (2, C, K, R), generator=generator)
    ret[0, 0, 1, 7:] = -1  # a short neighbor
    ret[1, 2, 2] = -1  # a missing one
    ret[0, 1] = -1  # a chunk without any
    shares = attention_shares(sharp, x, ret)

    expected, n_read = torch.zeros(2, C, K), torch.zeros(2, C, K)
    with torch.no_grad():
        h = sharp.emb(x)
        for p in range(2):
            h = sharp.attn[p](h)
            if p == 0:
                e = sharp.encode(ret, h, ret >= 0)
            cca = sharp.cca[p]
            for b in range(2):
                for i in range(length):
                    u = (i + 1) // CHUNK_LEN - 1
                    if not 0 <= u < C or (ret[b, u] < 0).all():
                        continue
                    for head in range(cca.n_heads):
                        part = slice(head * cca.d_k, (head + 1) * cca.d_k)
                        query = cca.query(cca.norm(h[b, i]))[part]
                        scores = cca.key(e[b, u])[..., part] @ query / cca.d_k**0.5  # (K, R)
                        weights = scores.where(ret[b, u] >= 0, -torch.inf).flatten().softmax(0).view(K, R)
                        expected[b, u] += weights.sum(dim=1)
                        n_read[b, u] += 1
            h = sharp.ffw[p](cca(h, e, ret >= 0))
    torch.testing.assert_close(shares, expected / n_read.clamp(min=1), rtol=1e-4, atol=1e-5)
    sums = torch.ones(2, C)
    sums[0, 1] = 0
    torch.testing.assert_close(shares.sum(dim=-1), sums)
    assert shares[1, 2, 2] == 0 and shares.std() > 0.05, "all shares are alike"
    assert not any(cca._forward_pre_hooks for cca in sharp.cca)


def test_there_are_no_shares_where_nothing_reads(index):
    x = torch.zeros(1, CHUNK_LEN, dtype=torch.long)
    ret = torch.zeros(1, 1, 2, 2 * CHUNK_LEN, dtype=torch.long)
    assert attention_shares(model_of(index, ca_layers=()), x, ret).tolist() == [[[0, 0]]]
    assert attention_shares(model_of(index), x[:, 1:], ret[:, :0]).shape == (1, 0, 2)


def test_the_text_is_on_the_page_whole_and_in_no_way_markup(odd):
    text, evaluation, _, page = odd
    assert "".join(token.text for row in rows_of(page) for token in tokens_of(row)) == text
    assert not page.all("script") and SCRIPT in text
    assert any(SCRIPT in neighbor.text for neighbor in page.all("details"))
    assert any("</" in token.text for row in rows_of(page) for token in tokens_of(row)), "no token is markup by itself"
    assert page.all("h2")[0].text.startswith(f"{LONG_NAME} from token")
    # Some characters begin in one chunk and end in the next.
    ids = evaluation.corpus.tokens
    broken = [u for u in evaluation.offsets[1:] if "\ufffd" in evaluation.corpus.tokenizer.decode(ids[:u].tolist())]
    assert len(broken) > 3


@pytest.mark.parametrize("start", range(24))
def test_a_stretch_of_text_has_only_whole_characters(index, start):
    text = "a€日本🎭\ufffd—é " * 3
    tokens = np.array(index.corpus.tokenizer.encode(text))
    corpus = Corpus(tokens, [DocumentEntry("a", "a", 1, len(tokens))], 0, index.corpus.tokenizer)
    found = text_spans(corpus, start, start + 11)
    shown = "".join(span.text for span in found)
    assert shown in text and len(shown) >= 2
    for span in found:
        assert corpus.tokenizer.decode(tokens[span.start : span.end].tolist()) == span.text
    assert [end for _, end, _ in found[:-1]] == [first for first, _, _ in found[1:]]
    assert 0 <= found[0][0] - start < 4 and found[-1][1] >= start + 11


def test_the_bits_and_the_colors_on_the_page_are_those_of_the_evaluation(odd):
    _, evaluation, _, page = odd
    bits = {v: evaluation.nats[v] / math.log(2) for v in ("on", "off")}
    at = 0
    for token in (token for row in rows_of(page) for token in tokens_of(row)):
        found = re.search(
            r"([\d.]+) bits on, ([\d.]+) off, gain ([+-][\d.]+)(?: \((\d+) tokens\))?$", token.attrs["title"]
        )
        if found is None:
            assert at == 0 and token.attrs["title"].endswith("first of its document, not predicted")
            at = 1
            continue
        end = at + int(found[4] or 1)
        on, off = bits["on"][at:end].sum(), bits["off"][at:end].sum()
        assert [float(found[i]) for i in (1, 2, 3)] == pytest.approx([on, off, off - on], abs=0.00501)
        assert ("up" in token.attrs["class"].split()) == (off > on)
        assert float(token.attrs["style"].removeprefix("--g:")) == pytest.approx(
            min(abs(off - on) / FULL_COLOR_BITS, 1), abs=0.00501
        )
        at = end
    assert at == len(bits["on"]) > 400


def test_a_passage_has_the_bits_per_byte_of_its_own_chunks(odd):
    _, evaluation, _, page = odd
    ranked = rank_passages(evaluation)
    assert len(page.all("section")) == len(ranked) > 2
    for section in page.all("section"):
        chunks = ranked[int(re.search(r"rank (\d+)", section.text)[1]) - 1]
        chosen = np.isin(np.arange(len(evaluation.offsets)), chunks)
        on, off = (evaluation.bits_per_byte(v, chosen)["value"] for v in ("on", "off"))
        shown = [float(figure) for figure in re.findall(r"[+-]?\d+\.\d+", section.all("p", "figures")[0].text)]
        assert shown == pytest.approx([off - on, on, off], abs=0.000501)


def test_a_line_break_has_a_sign_if_its_gain_is_notable(odd, tmp_path):
    text, evaluation, model, _ = odd
    for bits, n_signs in ((NOTABLE_BITS * 0.9, 0), (-1.2 * NOTABLE_BITS, text.count("\n"))):
        nats = evaluation.nats | {"off": evaluation.nats["on"] + bits * math.log(2)}
        page = page_of(tmp_path / "report.html", replace(evaluation, nats=nats), model)
        assert len(page.all("i", "break")) == n_signs


@pytest.mark.parametrize("stride", [CHUNK_LEN, 2 * CHUNK_LEN, WINDOW])
def test_a_chunk_stands_beside_the_neighbors_of_the_chunk_before_it(index, sharp, tmp_path, stride):
    evaluation = evaluate(sharp, index.corpus, index, config=EvaluateConfig(window=WINDOW, stride=stride))
    corpus, page = index.corpus, page_of(tmp_path / "report.html", evaluation, sharp)
    rows = rows_of(page)
    assert len(rows) == len(evaluation.offsets) and not neighbors_of(rows[0])
    ret = torch.from_numpy(index.values(evaluation.neighbors[:4, :2]))[None]
    window = torch.from_numpy(corpus.tokens[evaluation.start : evaluation.start + WINDOW].astype(np.int64))[None]
    shares = attention_shares(sharp, window, ret)[0]
    for u, row in enumerate(rows[1:], start=1):
        begins = stride == WINDOW and u % 4 == 0  # a window, so there is no chunk to read the neighbors of
        found = neighbors_of(row)
        expected = [] if begins else evaluation.neighbors[u - 1, :2]
        places = [(corpus.documents[n].name, int(o - corpus.starts[n])) for o, n in
                  zip(expected, corpus.document_of(expected) if len(expected) else [], strict=True)]  # fmt: skip
        assert [(name, offset) for name, offset, _ in found] == places
        assert ("window begins" in row.all("p")[1].text) == begins
        if u < 4:
            assert [share for *_, share in found] == pytest.approx((100 * shares[u - 1]).tolist(), abs=0.51)


def test_what_a_chunk_has_in_common_with_a_neighbor_is_marked_in_both(index, tmp_path):
    corpus, m = index.corpus, CHUNK_LEN
    start = int(corpus.starts[1]) + 5 * m
    value = corpus.tokens[start : start + 2 * m].tolist()
    (strange,) = corpus.tokenizer.encode("~")
    assert strange not in corpus.tokens
    # The first chunk is one of the database; the second has five tokens of that one's continuation.
    planted = value[:m] + [strange] * 6 + value[m + 4 : m + 9] + [strange] * (m - 11)
    entry = DocumentEntry("new", "0", len(corpus.tokenizer.decode(planted)), 2 * m)
    held_out = Corpus(np.array(planted, dtype=np.int32), [entry], 0, corpus.tokenizer)
    model = model_of(index)
    evaluation = evaluate(model, held_out, index, config=IN_WINDOWS)
    first, second = rows_of(page_of(tmp_path / "report.html", evaluation, model))
    text = corpus.tokenizer.decode(value[m + 4 : m + 9])
    nearest = second.all("details")[0]
    assert [mark.text for mark in nearest.all("div", "continuation")[0].all("mark")] == [text]
    assert [mark.text for mark in nearest.all("mark")] == [text]
    assert nearest.all("div", "text")[0].text == corpus.tokenizer.decode(value[:m])
    assert "".join(token.text for token in tokens_of(second) if "run" in token.attrs["class"]) == text
    assert not [token for token in tokens_of(first) if "run" in token.attrs["class"]]


def test_the_longest_run_is_as_long_as_the_evaluation_found_it(odd):
    _, evaluation, _, page = odd
    shown = [max((len(mark.text) for mark in row.all("mark")), default=0) for row in rows_of(page)]
    assert [n > 0 for n in shown] == [n >= MIN_RUN for n in evaluation.copyable_tokens.tolist()]
    assert any(shown) and not all(shown)
    assert common_run([1, 2, 3, 4, 5, 6], [9, 2, 3, 9, 3, 4, 5, 9]) == (2, 4, 3)
    assert common_run([1, 2, 3], [1, 2, 9]) == (0, 0, 0)


def test_passages_are_all_of_the_text_once_in_the_order_of_their_gain(index, odd):
    _, evaluation, _, _ = odd
    passages = rank_passages(evaluation)
    assert sorted(np.concatenate(passages).tolist()) == list(range(len(evaluation.offsets)))
    assert all((np.diff(chunks) == 1).all() and 4 <= len(chunks) <= CHUNKS_PER_PASSAGE for chunks in passages)
    gains = evaluation.of_chunks(evaluation.nats["off"] - evaluation.nats["on"])
    sums = [gains[chunks].sum() for chunks in passages]
    assert sums == sorted(sums, reverse=True) and sums[0] > sums[-1]


def test_a_third_of_the_passages_shown_is_of_each_kind():
    kinds = [(0, "gain"), (1, "gain"), (4, "median"), (5, "median"), (9, "loss"), (8, "loss")]
    assert choose(10, 6) == kinds
    assert choose(11, 4) == [(0, "gain"), (1, "gain"), (5, "median"), (10, "loss")]
    assert choose(1, 6) == [(0, "gain")]
    for n_ranked in range(12):
        for n_passages in range(1, 12):
            ranks = [rank for rank, _ in choose(n_ranked, n_passages)]
            assert len(set(ranks)) == len(ranks) == min(n_ranked, n_passages)
            assert all(0 <= rank < n_ranked for rank in ranks)


def test_an_extreme_is_not_called_a_loss_if_nothing_was_lost(odd, tmp_path):
    _, evaluation, model, page = odd
    nats = evaluation.nats | {"off": evaluation.nats["on"] + np.arange(len(evaluation.n_bytes))}
    page = page_of(tmp_path / "report.html", replace(evaluation, nats=nats), model, 3)
    kinds = [kind.text for kind in page.all("p", "kind")]
    n = len(rank_passages(evaluation))
    assert [kind.split(" rank ")[0] for kind in kinds] == ["largest gain", "median", "smallest gain"]
    assert kinds[2].endswith(f"rank {n} of {n}")
    with pytest.raises(ValueError, match="n_passages=0"):
        write_report(tmp_path / "report.html", evaluation, model, 0)


def test_the_page_is_complete_in_itself_and_the_same_each_time(odd, tmp_path):
    _, evaluation, model, _ = odd
    page = page_of(tmp_path / "first.html", evaluation, model, 3)
    write_report(tmp_path / "second.html", evaluation, model, 3)
    source = (tmp_path / "first.html").read_text(encoding="utf-8")
    assert source == (tmp_path / "second.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|src=|url\(|@import|<link|<script", source)
    assert page.all("html")[0].attrs == {"lang": "en"} and page.all("meta")[0].attrs == {"charset": "utf-8"}
    assert "width=device-width" in page.all("meta")[1].attrs["content"]
    values = evaluation.summary()["bits_per_byte"]
    shown = {row.all("th")[0].text: row.all("td")[0].text for row in page.all("tbody")[0].all("tr")}
    assert shown == {
        "on": f"{values['on']['value']:.3f}",
        "off": f"{values['off']['value']:.3f}",
        "random neighbors": f"{values['random']['value']:.3f}",
    }
    behind = "Behind each figure: 1 document and 1 seed of the weights; random neighbors: the mean of 3 shuffles."
    assert any(behind in " ".join(note.text.split()) for note in page.all("p", "note"))
    verdicts = [row.all("td")[2].text for row in page.all("tbody")[0].all("tr")]
    assert verdicts == ["", "undecided p –", "undecided p –"], "one document says nothing about others"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium: apt-get install chromium")
def test_a_browser_shows_it_without_scrolling_sideways_and_without_errors(odd, tmp_path):
    _, evaluation, model, _ = odd
    write_report(tmp_path / "report.html", evaluation, model, ALL)
    # A window cannot be as narrow as a phone, a frame can.
    frames = "".join(f'<iframe src="report.html" width="{width}" height="900"></iframe>' for width in (390, 1440))
    measure = """onload = () => document.body.dataset.found = [...document.querySelectorAll("iframe")].map(
        frame => frame.contentDocument.documentElement.scrollWidth + " of " + frame.clientWidth).join(", ")"""
    wrapper = f"<!DOCTYPE html><title>frames</title><body>{frames}<script>{measure}</script>"
    (tmp_path / "frames.html").write_text(wrapper)
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    options += "--disable-component-update --disable-sync --allow-file-access-from-files --enable-logging=stderr "
    command = ["chromium", *options.split(), f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    done = subprocess.run(
        [*command, (tmp_path / "frames.html").as_uri()], capture_output=True, text=True, timeout=60, check=True
    )
    found = re.search(r'data-found="(\d+) of (\d+), (\d+) of (\d+)"', done.stdout).groups()
    narrow, narrow_frame, wide, wide_frame = map(int, found)
    assert narrow <= narrow_frame == 390 and wide <= wide_frame == 1440
    assert "CONSOLE" not in done.stderr, done.stderr
