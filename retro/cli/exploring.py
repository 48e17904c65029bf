"""`retro explore`: a run and its database, in a browser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from retro.cli.options import add_config, config_from, new_parser
from retro.cli.using import DATABASE_HELP, DRAWN, OR_BASE_HELP, RUN_HELP, find_run, require_base_or_run
from retro.config import SampleConfig
from retro.progress import note


def explore_command(argv: Sequence[str]) -> None:
    """A local page on which a run writes."""
    parser = new_parser("explore", "See a run write with its sources beside it, and its database.", of_a_run=True)
    parser.add_argument("--run", type=str, default=None, help=RUN_HELP)
    parser.add_argument("--base", type=str, default=None, help=OR_BASE_HELP)
    parser.add_argument("--database", metavar="DIR", type=str, default=None, help=DATABASE_HELP)
    host_help = "address to be opened at from elsewhere, with a password; null for this machine alone"
    parser.add_argument("--host", type=str, default=None, help=host_help)
    parser.add_argument("--port", type=int, default=None, help="null for the first that is free, from 7860 on")
    add_config(parser, SampleConfig, DRAWN)
    options = parser.parse_args(list(argv))
    config = config_from(SampleConfig, options)
    of_base = require_base_or_run(options)
    from retro.device import pick_device
    from retro.explorer.page import new_page, require_gradio, serve

    require_gradio()
    device = pick_device(options.device)
    from retro.explorer.explored import Explored

    if of_base:
        note(f"{options.base}: loading the model and the database in {options.database}")
        explored = Explored.of_base(options.base, Path(options.database), device)
    else:
        from retro.runs.checkpoints import load_model

        run, _, data_path, _ = find_run(options)
        note(f"{run}: loading the model and its database")
        explored = Explored.of_run(run, load_model(run, device, options.base), data_path, device)
    serve(new_page(explored, config, explored.beginning()), options.host, options.port)
