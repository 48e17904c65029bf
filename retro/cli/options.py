"""Options from the config dataclasses: every field is one, its default is shown, its comment is the help.

They come from the command line, from a file (`--config FILE.yaml`, with the same names), or from a preset; the first of
these that has a value decides.
"""

from __future__ import annotations

import inspect
import re
import shutil
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from retro.config import OF_OWN_TEXT, PRESETS, Preset

Config = TypeVar("Config")
DATA = "data"  # where artifacts lie unless another folder is named


def new_parser(command: str, description: str, *, texts: str = "", of_a_run: bool = False) -> ArgumentParser:
    """A parser with the options that commands share.

    * `texts` is the help of the texts that can be named, if any can
    * `of_a_run`: the data are the run's unless they are named
    """
    parser = ArgumentParser(prog=f"retro {command}", description=description)
    if texts:
        parser.add_argument("texts", metavar="TEXT", nargs="*", type=str, default=[], help=texts)
    parser.add_argument("--config", action=ActionConfigFile, metavar="FILE.yaml", help="a file with options")
    default, what = (None, "folder of the data; null for the run's") if of_a_run else (DATA, "folder of the data")
    parser.add_argument("--data-path", metavar="DIR", type=str, default=default, help=what)
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser


def add_config(parser: ArgumentParser, of: type, values: Any = None, skip: Collection[str] = ()) -> None:
    """Add an option for each field of a config class.

    * `values` has the defaults: an object of the class, or a dict; what it lacks has the class' default
    """
    group = parser.add_argument_group((of.__doc__ or "").rstrip("."))
    hints, comments = get_type_hints(of), comments_of(of)
    for field in fields(of):
        default = values.get(field.name, field.default) if isinstance(values, Mapping) else getattr(values, field.name)
        if field.name not in skip and default is not MISSING:
            is_switch = hints[field.name] is bool and default is False
            kind: dict[str, Any] = {"action": "store_true"} if is_switch else {"type": hints[field.name]}
            name = field.name.replace("_", "-")
            group.add_argument(f"--{name}", default=default, help=comments[field.name].replace("%", "%%"), **kind)


def comments_of(of: type) -> dict[str, str]:
    """The comment of each field of a dataclass: behind it, or in the lines above it."""
    found: dict[str, str] = {}
    above: list[str] = []
    for line in inspect.getsource(of).splitlines():
        if match := re.fullmatch(r"\s+(\w+): .*?(?:\s\s#\s(.*))?", line):
            found[match[1]] = match[2] or " ".join(above)
        above = [*above, line.strip().removeprefix("# ")] if line.strip().startswith("# ") else []
    return found


def config_from(of: Callable[..., Config], options: Namespace, changed: Mapping[str, Any] | None = None) -> Config:
    """The config object of the options' values; `changed` are others."""
    values = {f.name: getattr(options, f.name) for f in fields(of) if f.name in options}  # type: ignore[arg-type]
    return of(**values | dict(changed or {}))


def parse_with_preset(
    build: Callable[[Preset], ArgumentParser], argv: Sequence[str]
) -> tuple[Namespace, set[str], set[str]]:
    """All options, the names of those that were given, and of those that stand on the command line.

    * `build` makes the parser for a preset, which has the defaults and is an option itself
    """
    argv = config_first(argv)
    on_command_line = {arg.partition("=")[0].removeprefix("--").replace("-", "_") for arg in argv if arg[:2] == "--"}
    named = list(argv[argv.index("--preset") + 1 :][:1]) if "--preset" in argv else []
    name = named[0] if named and named[0] in PRESETS else "retrofit" if "base" in on_command_line else "demo"
    while True:
        parser = build(PRESETS[name])
        parser.add_argument(
            "--preset",
            type=Literal[tuple(PRESETS)] | None,
            default=None,
            help=f"a complete set-up ({', '.join(OF_OWN_TEXT)} bring a text); the defaults shown are those of {name}",
        )
        options = parser.parse_args(argv)
        given = set(parser.parse_args(argv, defaults=False).keys())
        wanted = options.preset or ("retrofit" if "base" in given else "demo")
        if wanted == name:
            return options, given, on_command_line
        name = wanted


def config_first(argv: Sequence[str]) -> list[str]:
    """The arguments with `--config FILE` before the others, which then go before what the file says."""
    files: list[str] = []
    rest: list[str] = []
    following = False
    for arg in argv:
        is_config = arg == "--config" or arg.startswith("--config=")
        (files if is_config or following else rest).append(arg)
        following = arg == "--config"
    return [*files, *rest]


def the_other_of(pair: tuple[str, str], given: Collection[str], on_command_line: Collection[str]) -> str | None:
    """Of two options that exclude each other, the one to leave out, because the other was given; None for neither.

    Raises `ValueError` if both stand on the command line. If a file has both, it means the first.
    """
    if set(pair) <= set(on_command_line):
        flags = " and ".join(f"--{name.replace('_', '-')}" for name in pair)
        raise ValueError(f"{flags} exclude each other; leave one of them out")
    for names in (on_command_line, given):
        for name, other in (pair, pair[::-1]):
            if name in names:
                return other
    return None


def program() -> str:
    """What to type to call this program again: where it lies, if the shell would not find it."""
    called = Path(sys.argv[0])
    return str(called) if called.name == "retro" and shutil.which("retro") is None else "retro"


def data_path_of(options: Namespace) -> Path:
    """The data folder that is named, or the default."""
    return Path(options.data_path)
