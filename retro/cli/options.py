"""Options from the config dataclasses: every field is one, its default is shown, its comment is the help.

They come from the command line, from a file (`--config FILE.yaml`, with the same names), or from a preset; the first of
these that has one decides.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, TypeVar, get_type_hints

from jsonargparse import ActionConfigFile, ArgumentParser, Namespace

from retro.config import PRESETS, Preset

Config = TypeVar("Config")


def new_parser(command: str, description: str, *, texts: str = "", of_a_run: bool = False) -> ArgumentParser:
    """A parser with the options that commands share.

    * `texts` is the help of the texts that are named, if any are
    * `of_a_run`: the data are the run's unless they are named
    """
    parser = ArgumentParser(prog=f"retro {command}", description=description)
    if texts:
        parser.add_argument("texts", metavar="TEXT", nargs="*", type=str, default=[], help=texts)
    parser.add_argument("--config", action=ActionConfigFile, metavar="FILE.yaml", help="a file with options")
    data = "data" if not of_a_run else None
    parser.add_argument(
        "--data-path",
        metavar="DIR",
        type=str | None,
        default=data,
        help="artifacts" + " (the run's, if null)" * of_a_run,
    )
    parser.add_argument("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1, mps")
    return parser


def add_config(parser: ArgumentParser, of: type, values: Any = None, skip: Collection[str] = ()) -> None:
    """Add an option for each field of a config class.

    * `values` has the defaults: an object of the class, or a dict; what it lacks has the class' default
    """
    group, hints, comments = (
        parser.add_argument_group((of.__doc__ or "").rstrip(".")),
        get_type_hints(of),
        comments_of(of),
    )
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


def parse_with_preset(build: Callable[[Preset], ArgumentParser], argv: Sequence[str]) -> tuple[Namespace, set[str]]:
    """All options, and the names of those that were given; the preset, itself an option, has the defaults.

    * `build` makes the parser for a preset
    """
    named = list(argv[argv.index("--preset") + 1 :][:1]) if "--preset" in argv else []
    name = named[0] if named and named[0] in PRESETS else None
    while True:
        parser = build(PRESETS[name or "demo"])
        parser.add_argument(
            "--preset",
            type=Literal["tutorial", "demo"] | None,
            default=None,
            help=f"a complete set-up, with text of its own; the defaults shown here are those of {name or 'demo'}",
        )
        options = parser.parse_args(list(argv))
        if options.preset == name:
            return options, set(parser.parse_args(list(argv), defaults=False).keys())
        name = options.preset


def data_path_of(options: Namespace) -> Path:
    """The data folder that is named, or the default."""
    return Path(options.data_path)
