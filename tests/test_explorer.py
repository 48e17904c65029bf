"""The explorer: what it writes is what the library writes, its page is safe, and a person can use it."""

import re
import shutil
import threading
import time
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from conftest import CHUNK_LEN, load_script, refused
from test_sampling import SHAPE

from retro.cli import main
from retro.config import SampleConfig, TrainConfig
from retro.decoding import decoder_of
from retro.errors import InvalidOption, SeenText
from retro.evaluation.attention import attention_shares
from retro.explorer import explored as limits
from retro.explorer.explored import Explored
from retro.explorer.page import new_page, serve, show
from retro.explorer.writing import WAYS, Writer
from retro.runs.checkpoints import load_model
from retro.sample import sampler_of
from retro.train import train

DRAWN = SampleConfig(temperature=1.0, top_k=20, seed=3)
PROMPT = "Who is there? Nay, answer me: stand, and unfold yourself. Long live the king!"
screenshot = load_script(Path(__file__).parent.parent / "docs" / "screenshot.py")
until, element = screenshot.until, screenshot.shown
needs_browser = pytest.mark.skipif(
    not (shutil.which("chromium") and shutil.which("chromedriver")),
    reason="needs a browser: apt-get install chromium chromium-driver",
)


@pytest.fixture
def run(data, tmp_path, monkeypatch):
    """The folder of a run that was trained for a few steps, beside its data, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, "data")
    return train(name="reads", config=TrainConfig(steps=4, batch_size=2), model_shape=SHAPE, device="cpu")[0]


@pytest.fixture
def explored(run, tmp_path):
    return Explored.of_run(run, load_model(run, "cpu"), tmp_path / "data", "cpu")


def last(pieces):
    *_, found = pieces
    return found


def text_of(chunks):
    return "".join(text for chunk in chunks for _, _, text in chunk.parts)


def whole_of(parts):
    return "".join(text for _, text in parts)


def write(explored, ways=tuple(WAYS), length=40, config=DRAWN):
    return last(explored.write(PROMPT, length, ways, config))


# What is written.


def test_each_way_writes_what_the_library_writes_when_it_reads_that(explored, run):
    corpus = explored.corpus
    columns = write(explored)
    assert list(columns) == list(WAYS)
    sampler = sampler_of(run, explored.model, explored.data_path, corpus, "cpu")
    assert text_of(columns["on"]) == PROMPT + sampler.sample(PROMPT, 40, DRAWN)
    found = [[n.corpus_offset for n in of] for of in sampler.neighbors]
    read = [[read.neighbor.corpus_offset for read in chunk.read] for chunk in columns["on"]]
    assert read == [[], *found][: len(read)], "beside a chunk is what was found for the one before it"
    # Without retrieval it is a decoder that never reads, with the same draws.
    from retro.sample import choose

    ids, decoder, generator = (
        corpus.tokenizer.encode(PROMPT),
        decoder_of(explored.model, reads=False),
        torch.Generator(),
    )
    generator.manual_seed(DRAWN.seed)
    with torch.inference_mode():
        for _ in range(40):
            logits = decoder.feed(torch.tensor(ids[decoder.length :]))
            ids.append(choose(logits.float(), DRAWN, generator))
    assert text_of(columns["off"]) == corpus.tokenizer.decode(ids)
    assert not any(chunk.read for chunk in columns["off"])
    assert len({text_of(chunks) for chunks in columns.values()}) == 3, "what is read makes a difference"


def test_random_neighbors_are_of_the_database_and_the_same_for_a_seed(explored):
    removed = explored.names()[0]
    explored.remove(removed)
    of = partial(write, explored, ("random",), 120)
    offsets = [r.neighbor.corpus_offset for chunk in of()["random"] for r in chunk.read]
    assert offsets == [r.neighbor.corpus_offset for chunk in of()["random"] for r in chunk.read]
    other = of(config=SampleConfig(temperature=1.0, top_k=20, seed=4))["random"]
    assert offsets != [r.neighbor.corpus_offset for chunk in other for r in chunk.read]
    names = {r.neighbor.document for chunk in of()["random"] for r in chunk.read}
    assert len(set(offsets)) > 10 and names == set(explored.names()) and removed not in names


def test_what_a_chunk_and_a_neighbor_have_in_common_is_marked_in_both_and_they_share_the_attention(explored):
    prompt = explored.corpus.text(int(explored.corpus.starts[1]), 5 * CHUNK_LEN)  # it finds itself, and what follows
    chunks, runs = last(explored.write(prompt, 20, ["on"], DRAWN))["on"], 0
    for chunk in chunks:
        marked = "".join(text for _, in_run, text in chunk.parts if in_run)
        for read in chunk.read:
            common = "".join(text for in_run, text in read.chunk + read.continuation if in_run)
            assert common in marked or not common
            runs += bool(common)
            assert whole_of(read.chunk + read.continuation) == read.neighbor.text
    assert runs >= 2
    writer, n_prompt = Writer(explored.sampler, "on", DRAWN), len(explored.corpus.tokenizer.encode(PROMPT[:20]))
    assert "".join(writer.write(PROMPT[:20], explored.sampler.max_chunks * CHUNK_LEN - n_prompt - 1))
    found = writer.attention()
    s, n = writer.sampler, len(writer.sampler.tokens) // CHUNK_LEN
    ret = torch.stack([s.values[u] for u in range(n)])
    expected = attention_shares(s.model, torch.tensor(s.tokens)[None], ret[None])[0]
    assert np.allclose(found, expected) and 0.99 < found[0].sum() < 1.01
    shown = [read.share for chunk in writer.chunks(found) for read in chunk.read]
    assert shown == pytest.approx(found[: len(shown) // 2].ravel().tolist())


def test_a_text_longer_than_the_window_shows_no_share_of_what_is_out_of_it(explored):
    n = explored.sampler.max_chunks * CHUNK_LEN
    prompt = explored.corpus.text(int(explored.corpus.starts[1]), n - 10)
    chunks = last(explored.write(prompt, CHUNK_LEN + 20, ["on"], DRAWN))["on"]
    shares = [[read.share for read in chunk.read] for chunk in chunks]
    assert shares[1][0] is None and shares[-1][0] is not None
    assert text_of(chunks).startswith(prompt)


def test_two_tabs_at_once_are_not_mixed(explored):
    prompts = [PROMPT, "The quality of mercy is not strained, it droppeth as the gentle rain from heaven"]
    alone = [text_of(last(explored.write(p, 60, ["on", "off"], DRAWN))["on"]) for p in prompts]
    found = {}

    def tab(number):
        found[number] = text_of(last(explored.write(prompts[number % 2], 60, ["on", "off"], DRAWN))["on"])

    threads = [threading.Thread(target=tab, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {number: alone[number % 2] for number in range(4)}


def test_what_is_asked_for_is_bounded(explored, monkeypatch):
    with refused(InvalidOption, "--length 513 is above 512"):
        next(explored.write("a", 513, ["on"], DRAWN))
    with refused(ValueError, "the prompt has 20,001 characters; at most 20,000 are continued here"):
        next(explored.write("a" * 20_001, 8, ["on"], DRAWN))
    with refused(ValueError, "the prompt is empty"):
        next(explored.write("", 8, ["on"], DRAWN))
    with refused(ValueError, "there is nothing to search for"):
        explored.search(" ", 3)
    with refused(ValueError, "big.txt has 5.0 MB; at most 5 MB are added here at once"):
        explored.add("a" * 5_000_001, "big.txt")
    with refused(InvalidOption, "--offset 10000000 is not in the corpus"):
        explored.place(10_000_000)
    assert len(explored.search("king", 1000)) == limits.MAX_FOUND
    monkeypatch.setattr(limits, "MAX_SECONDS", 0.0)
    assert text_of(write(explored, ("on",))["on"]) == "", "nothing was begun"


# The database.


def test_a_search_finds_what_the_index_finds_and_opens_the_document_there(explored, index):
    text = index.corpus.text(int(index.corpus.starts[1]) + 3 * CHUNK_LEN, CHUNK_LEN)
    found = explored.search(text, 4)
    distances, offsets = index.nearest([text], 4)
    places = [f.neighbor.corpus_offset for f in found]
    assert places == offsets[0].tolist() and whole_of(found[0].chunk) == text
    assert len(distances[0]) == len(found) == 4
    at = explored.place(places[0])
    corpus = explored.corpus
    number = int(corpus.document_of(places[0]))
    whole = corpus.text(int(corpus.starts[number]), at.n_tokens)
    assert at.document == corpus.documents[number].name == found[0].neighbor.document and at.chunk == text
    assert at.before + at.chunk + at.behind in whole and at.before.endswith(corpus.text(places[0] - 8, 8))
    assert found[0].continuation and at.behind.startswith(whole_of(found[0].continuation))


def test_a_text_that_is_added_is_found_and_read_and_one_that_is_removed_is_not(explored, tmp_path):
    secret = "The zebra quartet of Ulm plays the contrabassoon on Thursdays, xylophones on Fridays. " * 4
    assert "zebra.txt is in the database now" in explored.add(secret, f"{tmp_path}/zebra")
    assert "zebra.txt" in explored.names() and not (tmp_path / "zebra.txt").exists(), "a name is no path"
    assert explored.search("The zebra quartet of Ulm plays", 1)[0].neighbor.document == "zebra.txt"
    chunks = last(explored.write("The zebra quartet of Ulm plays the contrabassoon on", 8, ["on"], DRAWN))["on"]
    assert "zebra.txt" in {read.neighbor.document for chunk in chunks for read in chunk.read}
    assert "it was there already" in explored.add(secret, "zebra.txt")
    assert "zebra.txt is out of the database" in explored.remove("zebra.txt")
    assert explored.search("The zebra quartet of Ulm plays", 1)[0].neighbor.document != "zebra.txt"
    file = tmp_path / "yaks.md"
    file.write_text("Yaks of the northern slope, counted by moonlight. " * 9)
    assert "yaks.md is in the database now" in explored.add_file(str(file))
    held_out = next(d.name for i, d in enumerate(explored.corpus.documents) if i in explored.corpus.split("valid"))
    number = [d.name for d in explored.corpus.documents].index(held_out)
    start, end = explored.corpus.starts[number : number + 2].tolist()
    with refused(SeenText, "held out"):
        explored.add(explored.corpus.text(start, end - start), "new.txt")
    with refused(ValueError, "no document of the database is called"):
        explored.remove("nothing.txt")


def test_what_is_being_written_goes_on_while_the_database_changes(explored):
    whole = text_of(write(explored, ("on",), 60)["on"])
    pieces = explored.write(PROMPT, 60, ["on"], DRAWN)
    next(pieces)
    explored.add("Something else altogether, of no importance to what is being written. " * 5, "else.txt")
    assert text_of(last(pieces)["on"]) == whole


# The page.

HOSTILE = (
    "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">\u202e</div></details>"
)


class Tags(HTMLParser):
    def __init__(self, html):
        super().__init__()
        self.seen = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))


def test_hostile_texts_are_text(explored):
    explored.add(f"{HOSTILE} A hostile text that is found by its words. " * 6, "<b onclick=x>hostile.txt")
    found = explored.search("A hostile text that is found by its words", 2)
    chunks = last(explored.write(f"{HOSTILE} A hostile text that is found", 30, ["on"], DRAWN))["on"]
    pages = [
        show("found", found),
        show("place", explored.place(found[0].neighbor.corpus_offset)),
        show("written", [("with retrieval", chunks)], True),
        show("said", HOSTILE, True),
        show("evaluation", {"pictures": {}, "table": HOSTILE, "report": HOSTILE, "command": HOSTILE}, HOSTILE),
    ]
    for page in pages:
        tags = Tags(page).seen
        assert not {"script", "img", "b"} & {tag for tag, _ in tags} or page is pages[0]
        assert not [name for _, attributes in tags for name in attributes if name.startswith("on")]
    assert {tag for tag, _ in Tags(pages[0]).seen} == {"ol", "li", "p", "b", "div"}
    ((_, frame),) = [tag for tag in Tags(pages[-1]).seen if tag[0] == "iframe"]
    assert frame["sandbox"] is None and frame["srcdoc"] == HOSTILE, "a report runs no script, and opens nothing"


def test_the_evaluation_is_shown_once_there_is_one(explored, run, capsys):
    before = explored.evaluation()
    assert before["table"] is before["report"] is None and "How it learnt" in before["pictures"]
    command = before["command"].removeprefix("retro ").split()
    assert main([*command, "--n-windows", "1", "--n-shuffles", "1"]) == 0
    after = explored.evaluation()
    assert "bits per byte" in after["table"].lower() and "<h1>What retrieval did" in after["report"]
    assert set(after["pictures"]) == {"How it learnt", "By overlap, r(C)"}
    page = show("evaluation", after, "a run")
    assert page.count("data:image/png;base64,") == 2 and "What each token gained is shown here" not in page


def test_a_pasted_text_is_colored_by_what_its_tokens_gained(explored, run, tmp_path, capsys):
    text = explored.corpus.beginning_of_held_out(5 * CHUNK_LEN)
    (tmp_path / "text.txt").write_text(text)
    command = ["evaluate", str(tmp_path / "text.txt"), "--run", str(run), "--n-shuffles", "1"]
    assert main([*command, "--out", str(tmp_path / "out"), "--report", str(tmp_path / "page.html")]) == 0
    page, expected = explored.gains(text), (tmp_path / "page.html").read_text()
    assert page[page.index("</header>") :] == expected[expected.index("</header>") :]
    assert page.count('class="up') + page.count('class="down') > 20
    added = "Yaks of the northern slope, counted by moonlight. " * 9
    explored.add(added, "yaks.txt")
    with refused(SeenText, "is in the training text or in the database: text.txt is yaks.txt, or nearly"):
        explored.gains(added)
    with refused(ValueError, "the text has 6,001 characters; at most 6,000 are measured here"):
        explored.gains("a" * 6_001)
    with refused(ValueError, "there is nothing to predict"):
        explored.gains("")


def test_a_run_without_retrieval_writes_and_says_that_it_reads_nothing(run, tmp_path):
    plain, _ = train(
        name="plain", config=TrainConfig(steps=1, batch_size=2), model_shape=SHAPE | {"ca_layers": ()}, device="cpu"
    )
    explored = Explored.of_run(plain, load_model(plain, "cpu"), tmp_path / "data", "cpu")
    columns = write(explored, ("on", "off"), 20)
    assert text_of(columns["on"]) == text_of(columns["off"])
    assert "it reads nothing" in show("written", [("on", columns["on"])], explored.reads)
    for ask in (lambda: explored.search("king", 2), lambda: explored.gains("king"), lambda: explored.remove("king")):
        with refused(ValueError, "was trained without retrieval, and has no database"):
            ask()


@contextmanager
def served(explored, **options):
    pytest.importorskip("gradio", reason="the page needs it: pip install gradio")
    page = new_page(explored, DRAWN, PROMPT)
    try:
        yield serve(page, wait=False, **options)
    finally:
        page.close()


def test_the_page_is_served_to_this_machine_alone_and_to_others_with_a_password(explored, capsys):
    with served(explored) as address:
        assert address.startswith("http://127.0.0.1:")
        assert urlopen(f"{address}config").status == 200
    assert "password" not in capsys.readouterr().out
    with served(explored, host="0.0.0.0") as address:
        port = address.rstrip("/").rpartition(":")[2]
        with pytest.raises(HTTPError, match="401"):
            urlopen(f"http://127.0.0.1:{port}/config")
    assert re.search(r"open http://\S+/ with the user retro and the password \S{20,} \(Ctrl-C", capsys.readouterr().out)


def test_without_gradio_the_command_says_how_to_get_it(run, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "gradio", None)
    assert main(["explore"]) == 1
    assert "pip install 'retro-lm[explore]'" in capsys.readouterr().err


# In a browser, as a person would.


@pytest.fixture
def browser(tmp_path):
    driver = screenshot.new_browser(1440, 1200, tmp_path / "profile")
    yield driver
    driver.quit()


def button(browser, name):
    return until(lambda: element(browser, "button.lg", name))


def tab(browser, name):
    return until(lambda: element(browser, "button[role=tab]", name))


def field(browser, label):
    called = f"//label[normalize-space()='{label}' or .//span[normalize-space()='{label}']]"
    path = f"{called}//*[self::textarea or self::input]"
    return until(lambda: [e for e in browser.find_elements("xpath", path) if e.is_displayed()])[0]


def sample_of(browser):
    """The texts of the columns, without those of the neighbors."""
    return browser.execute_script(
        "return [...document.querySelectorAll('.retro.columns section')].map("
        "s => [...s.querySelectorAll('.row > .text')].map(t => t.textContent).join(''))"
    )


@needs_browser
def test_a_person_writes_searches_and_changes_the_database_in_a_browser(explored, browser):
    with served(explored) as address:
        browser.get(address)
        prompt = until(lambda: element(browser, "textarea"))
        until(lambda: prompt.get_attribute("value") == PROMPT)
        button(browser, "Write").click()
        expected = last(explored.write(PROMPT, 128, ["on", "off"], DRAWN))
        shown = [text_of(expected[way]).replace("\r", "\n") for way in ("on", "off")]  # as HTML takes it
        until(lambda: sample_of(browser) == shown)
        assert element(browser, ".retro details[open] summary"), "the nearest neighbor is open"
        until(lambda: "% of the attention" in element(browser, ".retro.columns").text)
        # What was added is found, and opened; what is hostile in it is text.
        tab(browser, "Database").click()
        field(browser, "Text to add").send_keys(f"{HOSTILE} The zebra quartet of Ulm plays on Thursdays. ")
        button(browser, "Add the text").click()
        until(
            lambda: (
                element(browser, ".retro[role=status]") and "pasted.txt is in the database now" in browser.page_source
            )
        )
        tab(browser, "Search").click()
        field(browser, "Search the database by a text").send_keys("The zebra quartet of Ulm plays")
        until(lambda: [b for b in browser.find_elements("css selector", "button.primary") if b.is_displayed()])[
            0
        ].click()
        until(lambda: element(browser, ".retro.found li"))
        assert "pasted.txt" in element(browser, ".retro.found li").text
        until(lambda: element(browser, "input[type=radio]")).click()
        assert "zebra quartet of Ulm" in until(lambda: element(browser, ".retro .document")).text
        assert browser.title.startswith("retro: "), "no script of the text ran"
        tab(browser, "Evaluation").click()
        assert until(lambda: element(browser, ".retro figure img")) and "retro evaluate --run" in browser.page_source
        button(browser, "Measure").click()
        frame = until(lambda: element(browser, "iframe.retro"))
        assert "What retrieval did" in frame.get_attribute("srcdoc")
        assert [entry for entry in browser.get_log("browser") if entry["level"] != "INFO"] == []


@needs_browser
def test_a_sample_stops_when_told_and_a_reload_keeps_the_prompt(explored, browser, monkeypatch):
    quick = Writer.write
    monkeypatch.setattr(Writer, "write", lambda *given: (time.sleep(0.05) or piece for piece in quick(*given)))
    with served(explored) as address:
        browser.get(address)
        prompt = until(lambda: element(browser, "textarea"))
        until(lambda: prompt.get_attribute("value") == PROMPT)
        prompt.clear()
        prompt.send_keys("Something of my own, kept")
        button(browser, "Write").click()
        until(lambda: sample_of(browser) and len(sample_of(browser)[0]) > len("Something of my own, kept") + 3)
        button(browser, "Stop").click()
        time.sleep(1)
        stopped = sample_of(browser)
        time.sleep(1)
        assert sample_of(browser) == stopped and len(explored.corpus.tokenizer.encode(stopped[0])) < 100
        browser.refresh()
        until(lambda: (e := element(browser, "textarea")) and e.get_attribute("value") == "Something of my own, kept")


@needs_browser
def test_it_is_usable_by_keyboard_alone_on_a_telephone_and_in_the_dark(explored, browser):
    from selenium.webdriver.common.keys import Keys

    with served(explored) as address:
        for dark in (False, True):
            browser.set_window_size(1440 if not dark else 500, 900)
            browser.execute_cdp_cmd(
                "Emulation.setDeviceMetricsOverride",
                {"width": 390 if dark else 1440, "height": 844, "deviceScaleFactor": 1, "mobile": dark},
            )
            browser.get(f"{address}?__theme={'dark' if dark else 'light'}")
            prompt = until(lambda: element(browser, "textarea"))
            until(lambda box=prompt: box.get_attribute("value") == PROMPT)
            active = browser.switch_to
            prompt.send_keys(Keys.TAB)
            for _ in range(12):
                if active.active_element.text == "Write":
                    break
                active.active_element.send_keys(Keys.TAB)
            assert active.active_element.text == "Write"
            active.active_element.send_keys(Keys.ENTER)
            until(lambda: element(browser, ".retro details[open]"))
            width, inner = browser.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
            assert width <= inner, "nothing is beside the screen"
            colors = browser.execute_script(
                "let of = document.querySelector('.retro .prompt'), color = getComputedStyle(of).color, back;"
                "do { back = getComputedStyle(of).backgroundColor; of = of.parentElement }"
                " while (back == 'rgba(0, 0, 0, 0)');"
                "return [color, back]"
            )
            assert contrast(*colors) >= 4.5
            summary = element(browser, ".retro details[open] summary")
            browser.execute_script("arguments[0].focus()", summary)
            assert active.active_element == summary
            until(lambda: "% of the attention" in element(browser, ".retro.columns").text)
            element(browser, ".retro details[open] summary").send_keys(Keys.ENTER)
            until(lambda: browser.find_elements("css selector", ".retro details:not([open])"))


@needs_browser
def test_the_picture_of_the_readme_is_taken_of_a_run(run, tmp_path, monkeypatch):
    picture = tmp_path / "picture.png"
    monkeypatch.setattr("sys.argv", ["screenshot.py", "--run", str(run), "--out", str(picture)])
    screenshot.main()
    assert picture.read_bytes().startswith(b"\x89PNG") and len(picture.read_bytes()) > 20_000


def contrast(*colors):
    """WCAG's contrast ratio of two colors, as `rgb(r, g, b)`."""

    def luminance(color):
        channels = [int(c) / 255 for c in re.findall(r"\d+", color)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return np.dot([0.2126, 0.7152, 0.0722], linear)

    darker, lighter = sorted(map(luminance, colors))
    return (lighter + 0.05) / (darker + 0.05)
