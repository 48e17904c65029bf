"""The house: the tutorial's five modules in front, plain; data flow one way."""

import ast
import importlib
import importlib.util
import inspect
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import FIRST

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("room", FIRST)
def test_a_room_is_short_and_begins_as_the_tutorials_page_does(room):
    source = (ROOT / "retro" / f"{room}.py").read_text()
    tree = ast.parse(source)
    assert len(source.splitlines()) <= (470 if room == "model" else 250)
    imports = [
        n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom) and getattr(n, "module", "") != "__future__"
    ]
    assert sum((n.end_lineno or 0) - n.lineno + 1 for n in imports) <= 12
    definitions = [n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef)]
    assert definitions[0] == FIRST[room]
    code = source.replace(ast.get_docstring(tree, clean=False), "")
    for word in ("sha256", "hashlib", "lock", "Fields", "process_group", "torch.distributed", "repair", "python -m"):
        assert not re.search(rf"(?<![a-z]){re.escape(word)}", code), f"{room} has {word}"


@pytest.mark.skipif(
    shutil.which("lint-imports", path=str(Path(sys.executable).parent)) is None, reason="needs the extra dev"
)
def test_imports_point_down_and_a_step_up_is_noticed(tmp_path):
    command = [str(Path(sys.executable).parent / "lint-imports"), "--no-cache"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0
    for name in ("retro", "pyproject.toml"):
        (shutil.copytree if name == "retro" else shutil.copy)(ROOT / name, tmp_path / name)
    with open(tmp_path / "retro" / "storage" / "files.py", "a") as file:
        file.write("\n\ndef f():\n    from retro.text.corpus import Corpus\n\n    return Corpus\n")
    result = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )
    assert result.returncode == 1 and "retro.storage is not allowed to import retro.text" in result.stdout


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_each_call_of_the_tutorial_has_its_names_in_their_order_and_needs_no_more():
    folder = Path(importlib.util.find_spec("labml_nn").origin).parent / "transformers" / "retro"
    compared = 0
    for room in FIRST:
        for node in ast.parse((folder / f"{room}.py").read_text()).body:
            if not isinstance(node, ast.ClassDef | ast.FunctionDef) or node.name.startswith("_"):
                continue
            ours = getattr(importlib.import_module(f"retro.{room}"), node.name)
            for function in [node] if isinstance(node, ast.FunctionDef) else node.body:
                if not isinstance(function, ast.FunctionDef) or function.name == "mask_attention":
                    continue  # a step of SelfAttention, which nobody else calls
                called = ours if function is node else getattr(ours, function.name)
                given = [p for p in inspect.signature(called).parameters.values() if p.name != "self"]
                theirs = [argument.arg for argument in function.args.args if argument.arg != "self"]
                where = f"{room}.{node.name}.{function.name}"
                assert [p.name for p in given[: len(theirs)]] == theirs, where
                assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in given[: len(theirs)]), where
                n_needed = len(theirs) - len(function.args.defaults)
                assert all(p.default is not p.empty for p in given[n_needed:]), where
                compared += len(theirs)
    assert compared > 60
