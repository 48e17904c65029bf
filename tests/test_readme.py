"""The README: its example runs, its commands have the options that it names, its tree is what is there."""

import dataclasses
import re
from pathlib import Path

import pytest

from retro.cli import COMMANDS, main
from retro.text.corpus import Corpus

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands(text: str) -> list[tuple[str, list[str]]]:
    """Each command in a page, in blocks of code and between words, with the options it is given."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    lines = [line.partition("#")[0] for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    spans = [
        " ".join(span.split()) for span in re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    ]
    found = []
    for line in [*lines, *spans]:
        if command := re.search(rf"(?:^|[ .])retro[ .]({'|'.join(COMMANDS)})\b(.*)", line):
            found.append((command[1], re.findall(r"--[a-z][a-z-]*", command[2])))
    return found


@pytest.mark.parametrize("page", ["README.md", "docs/at_scale.md", "docs/your_text.md"])
def test_each_option_in_a_command_of_a_page_is_one_of_that_command(page, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    found = commands((ROOT / page).read_text())
    assert len(found) > 8 and sum(len(options) for _, options in found) > 8
    for name in {name for name, _ in found}:
        with pytest.raises(SystemExit):
            main([name, "--help"])
        known = set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
        assert {option for command, options in found for option in options if command == name} <= known, name


def test_the_library_can_be_used_as_the_example_shows(plays, tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"As a library:\n\n```python\n(.*?)```", README, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes").mkdir()
    for play in ("hamlet.md", "macbeth.md", "othello.md"):
        (tmp_path / "notes" / play).write_text((plays / play).read_text()[:2000])
    names = {}
    quick = "replace(demo.train, steps=1, batch_size=1, warmup=1)"
    names["replace"] = dataclasses.replace
    for long, short in (("config=demo.train", f"config={quick}"), (", 64, ", ", 40, ")):  # as it stands, but quick
        assert example.count(long) == 1
        example = example.replace(long, short)
    exec(compile(example, "README.md", "exec"), names)
    assert names["summary"]["steps"] == 1 and len(names["sampler"].neighbors) >= 1
    found = [neighbor.document for chunk in names["sampler"].neighbors for neighbor in chunk]
    assert found and set(found) <= {d.name for d in Corpus.load("mydata/corpus").documents}
    *_, last = names["sampler"].neighbors
    assert capsys.readouterr().out.endswith("\n".join(["it read:", *(neighbor.text for neighbor in last)]) + "\n")


def test_the_tree_names_every_module_and_folder_and_nothing_else():
    (tree,) = re.findall(r"```\n(retro/\n.*?)```", README, re.DOTALL)
    package, *beside = re.split(r"^(?=\S)", tree, flags=re.MULTILINE)[1:]
    columns = [line.strip().split("  ")[0] for line in package.splitlines()[1:]]
    named = {name for column in columns for name in column.split(", ") if name}
    there = {p.name + "/" * p.is_dir() for p in (ROOT / "retro").iterdir() if p.suffix == ".py" or p.is_dir()}
    assert named == {name for name in there if not name.startswith("__")}
    assert all((ROOT / line.split()[0]).is_dir() for line in beside) and len(beside) > 3
