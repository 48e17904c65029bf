"""The page of the explorer, made with gradio: what it asks, and what it shows.

It is served on this machine alone, unless a host is named; then whoever opens it is asked for a token. Nothing of it is
loaded from elsewhere, and nothing is reported. What is shown is made by `explorer.html.j2`, which escapes all text.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from retro.config import SampleConfig
from retro.explorer.explored import MAX_ADDED, MAX_FOUND, MAX_MEASURED, MAX_PROMPT, MAX_TOKENS, Explored
from retro.explorer.writing import WAYS
from retro.progress import note

LOCAL = "127.0.0.1"
USER = "retro"  # whose password the token is
HERE = Path(__file__).parent
_ENVIRONMENT = Environment(loader=PackageLoader("retro.explorer", ""), autoescape=True, undefined=StrictUndefined)


def show(what: str, *arguments: Any) -> str:
    """HTML by a macro of the template."""
    return str(getattr(_ENVIRONMENT.get_template("explorer.html.j2").module, what)(*arguments))


def told(do: Callable[[], str]) -> str:
    """What is done, or why it is not."""
    try:
        return do()
    except (ValueError, OSError) as error:
        return show("said", str(error), True)


def new_page(explored: Explored, drawn: SampleConfig, prompt: str) -> Any:
    """The page, a `gradio.Blocks`.

    * `drawn` says how samples are drawn unless it is changed on the page
    * `prompt` is what stands in the page at first
    """
    gr = require_gradio()
    with gr.Blocks(title=f"retro: {Path(explored.name).name}", analytics_enabled=False) as page:
        gr.Markdown(f"# retro\n{explored.name}: {len(explored.names()):,} documents in {explored.data_path}")
        kept = gr.BrowserState([prompt, 128, list(WAYS)[:2]], storage_key="retro-prompt", secret="retro")
        with gr.Tab("Write"):
            text = gr.Textbox(prompt, label="Text to continue", lines=6, max_lines=16, max_length=MAX_PROMPT)
            ways = gr.CheckboxGroup(
                [(label, way) for way, label in WAYS.items()], value=list(WAYS)[:2], label="Side by side, same seed"
            )
            with gr.Accordion("How it is drawn", open=False), gr.Row():
                length = gr.Slider(1, MAX_TOKENS, 128, step=1, label="Tokens")
                temperature = gr.Slider(0, 2, drawn.temperature, step=0.05, label="Temperature")
                top_k = gr.Slider(0, 200, drawn.top_k or 0, step=1, label="Of the likeliest; 0 for all")
                seed = gr.Number(drawn.seed, precision=0, label="Seed")
            with gr.Row():
                go, stop = gr.Button("Write", variant="primary"), gr.Button("Stop")
            sample = gr.HTML()

            def write(
                text: str, ways: list[str], length: float, temperature: float, top_k: float, seed: float
            ) -> Iterator[str]:
                try:
                    config = SampleConfig(temperature=temperature, top_k=int(top_k) or None, seed=int(seed or 0))
                    for columns in explored.write(text or "", int(length), ways or ["on"], config):
                        yield show("written", [(WAYS[way], chunks) for way, chunks in columns.items()], explored.reads)
                except (ValueError, OSError) as error:
                    yield show("said", str(error), True)

            drawing = [text, ways, length, temperature, top_k, seed]
            writing = {
                "fn": write,
                "inputs": drawing,
                "outputs": sample,
                "concurrency_limit": 4,
                "api_visibility": "private",
            }
            started = [go.click(**writing, show_progress="minimal"), text.submit(**writing, show_progress="minimal")]
            stop.click(None, cancels=started, api_visibility="private")
            keeping = {"inputs": [text, length, ways], "outputs": kept, "show_progress": "hidden"}
            for event in (go.click, text.submit):
                event(lambda *values: list(values), **keeping, api_visibility="private")
            page.load(
                lambda values: values, kept, [text, length, ways], show_progress="hidden", api_visibility="private"
            )
        with gr.Tab("Search"):
            _search(gr, explored)
        with gr.Tab("Database"):
            _change(gr, explored)
        with gr.Tab("Evaluation"):
            shown = gr.HTML()
            page.load(
                lambda: told(lambda: show("evaluation", explored.evaluation(), explored.name)),
                None, shown, show_progress="hidden", api_visibility="private",
            )  # fmt: skip
            if explored.run and explored.reads:
                _measure(gr, explored, prompt)
    page.queue(default_concurrency_limit=4, max_size=32)
    return page


def _search(gr: Any, explored: Explored) -> None:
    with gr.Row():
        query = gr.Textbox(label="Search the database by a text", lines=2, max_length=MAX_PROMPT, scale=4)
        n = gr.Slider(1, MAX_FOUND, 5, step=1, label="Chunks", scale=1)
    go = gr.Button("Search", variant="primary")
    results = gr.HTML()
    places = gr.Radio([], label="Open a document there", visible=False)
    document = gr.HTML()

    def search(text: str, n: float) -> tuple[str, Any, str]:
        try:
            found = explored.search(text or "", int(n))
        except (ValueError, OSError) as error:
            return show("said", str(error), True), gr.Radio(choices=[], visible=False), ""
        choices = [
            (f"{i}. {n.document}, token {n.offset:,}", n.corpus_offset)
            for i, n in enumerate((read.neighbor for read in found), start=1)
        ]
        return show("found", found), gr.Radio(choices=choices, value=None, visible=bool(found)), ""

    for event in (go.click, query.submit):
        event(search, [query, n], [results, places, document], api_visibility="private")
    places.input(
        lambda offset: told(lambda: show("place", explored.place(int(offset)))), places, document,
        api_visibility="private",
    )  # fmt: skip


def _change(gr: Any, explored: Explored) -> None:
    said = gr.HTML()
    with gr.Row():
        with gr.Column():
            name = gr.Textbox("pasted.txt", label="Name", max_length=100)
            pasted = gr.Textbox(label="Text to add", lines=6, max_lines=16, max_length=MAX_ADDED)
            add = gr.Button("Add the text")
            file = gr.File(label="Or a file of text", file_count="single")
        with gr.Column():
            names = gr.Dropdown(explored.names(), value=None, label="Document to remove", filterable=True)
            remove = gr.Button("Remove it")

    def changed(do: Callable[[], str]) -> tuple[str, Any]:
        return told(lambda: show("said", do(), False)), gr.Dropdown(choices=explored.names(), value=None)

    def removed(name: str | None) -> tuple[str, Any]:
        return changed(lambda: explored.remove(name) if name else "no document is chosen")

    out = {"outputs": [said, names], "api_visibility": "private"}
    add.click(lambda text, name: changed(lambda: explored.add(text or "", name or "")), [pasted, name], **out)
    file.upload(lambda path: changed(lambda: explored.add_file(path)), file, **out)
    remove.click(removed, names, **out)


def _measure(gr: Any, explored: Explored, text: str) -> None:
    label = "A text that the model has not seen, to be colored by what each token gains"
    text_box = gr.Textbox(text, label=label, lines=6, max_lines=16, max_length=MAX_MEASURED)
    go, page = gr.Button("Measure"), gr.HTML()
    go.click(
        lambda text: told(lambda: show("page", explored.gains(text or ""))), text_box, page, api_visibility="private"
    )


def serve(page: Any, host: str | None = None, port: int | None = None, wait: bool = True) -> str:
    """Serve a page until it is interrupted; returns its address.

    * `host` is where others may open it from, with a token; left out, it is opened on this machine alone
    * `port` is one that is free; left out, the first from 7860 on
    * `wait`: until it is interrupted
    """
    gr = require_gradio()
    token = secrets.token_urlsafe(16) if host not in (None, LOCAL, "localhost") else None
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}
    _, address, _ = page.launch(
        server_name=host or LOCAL,
        server_port=port,
        auth=(USER, token) if token else None,
        max_file_size=MAX_ADDED,
        share=False,
        quiet=True,
        prevent_thread_lock=True,
        footer_links=[],
        ssr_mode=False,
        css=(HERE / "explorer.css").read_text(encoding="utf-8"),
        theme=gr.themes.Default(**fonts),
    )
    note(f"open {address}" + (f" with the user {USER} and the password {token}" if token else "") + " (Ctrl-C ends it)")
    if wait:
        page.block_thread()
    return str(address)


def require_gradio() -> Any:
    """The package `gradio`. Raises `ValueError` where it is not installed."""
    try:
        import gradio
    except ImportError:
        reason = "the explorer's page is made by gradio, which is not installed: pip install 'retro-lm[explore]'"
        raise ValueError(reason) from None
    return gradio
