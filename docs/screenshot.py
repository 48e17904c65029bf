"""The picture of the explorer in the README: `python docs/screenshot.py --run RUN [PROMPT.txt]`.

It opens the page of a run in a headless Chromium, lets it continue the prompt with retrieval and without, and writes
`docs/explorer.png`. It needs the packages chromium and chromium-driver of Debian, and selenium.
"""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path
from typing import Any

from selenium import webdriver

from retro.config import SampleConfig
from retro.explorer.explored import Explored
from retro.explorer.page import new_page, serve
from retro.runs.checkpoints import load_model
from retro.runs.run import data_path_of, read_run, run_in

HERE = Path(__file__).resolve().parent
SECONDS = 900  # the longest that a sample may take


def new_browser(width: int, height: int, profile: Path | None = None) -> Any:
    """A headless Chromium that asks nothing of other machines."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    words = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    words += f" disable-component-update disable-sync hide-scrollbars window-size={width},{height}"
    for word in [*words.split(), *([f"user-data-dir={profile}"] if profile else [])]:
        options.add_argument(f"--{word}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def until(condition: Any, seconds: float = 60) -> Any:
    """What a condition gives once it gives something. Raises `TimeoutError` where it does not."""
    started = time.monotonic()
    while not (found := condition()):
        if time.monotonic() - started > seconds:
            raise TimeoutError("the page did not come to that")
        time.sleep(0.1)
    return found


def shown(browser: Any, css: str, text: str | None = None) -> Any:
    """The first element of a kind that is shown, with a text if one is given; else None."""
    found = browser.find_elements("css selector", css)
    return next((e for e in found if e.is_displayed() and text in (None, e.text)), None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", type=Path, nargs="?", help="a file; left out, the beginning of a held-out text")
    parser.add_argument("--run", type=Path, required=True, help="folder of a run, or logs/NAME for its latest")
    parser.add_argument("--out", type=Path, default=HERE / "explorer.png", help="the picture")
    args = parser.parse_args()
    run = run_in(args.run)
    explored = Explored.of_run(run, load_model(run, "cpu"), data_path_of(run, read_run(run), None), "cpu")
    prompt = args.prompt.read_text(encoding="utf-8") if args.prompt else explored.corpus.beginning_of_held_out(96)
    page = new_page(explored, SampleConfig(), prompt)
    browser = new_browser(1280, 1150)
    try:
        browser.get(serve(page, wait=False))
        until(lambda: (box := shown(browser, "textarea")) and box.get_attribute("value"))
        until(lambda: shown(browser, "button.lg", "Write")).click()
        # The shares of attention come last.
        until(lambda: (of := shown(browser, ".retro.columns")) and "of the attention" in of.text, SECONDS)
        browser.execute_script("document.querySelector('.retro.columns').scrollIntoView()")
        browser.save_screenshot(str(args.out))
    finally:
        browser.quit()
        page.close()
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
