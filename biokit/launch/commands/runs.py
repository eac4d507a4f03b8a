"""`biokit runs`: list, show, stop, diff, again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add `runs` and what it can do to the command line."""
    runs = commands.add_parser("runs", help="list runs, show one, stop it, compare two, start one again")
    actions = runs.add_subparsers(dest="action", required=True)

    every = actions.add_parser("list", help="all runs of this user, and those below runs/")
    every.add_argument("roots", nargs="*", type=Path, metavar="ROOT", help="only runs below these folders")
    every.set_defaults(run=_list)

    show = actions.add_parser("show", help="the card of a run, and why it failed")
    _add_run(show)
    show.set_defaults(run=_show)

    stop = actions.add_parser("stop", help="end a run; a training saves a checkpoint at the next step boundary")
    _add_run(stop)
    stop.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds until SIGTERM, and again until SIGKILL (60)"
    )
    stop.set_defaults(run=_stop)

    diff = actions.add_parser("diff", help="what differs between two runs: configuration, code, data, layout, losses")
    diff.add_argument("first", metavar="A", help="a run")
    diff.add_argument("second", metavar="B", help="a run")
    diff.set_defaults(run=_diff)

    about = "start a run's order again in a new folder, and follow it"
    again = actions.add_parser("again", help=about, parents=[_again_options()])
    _add_run(again)
    again.add_argument(  # options may stand between these words too, which argparse's "*" does not allow
        "words", nargs=argparse.REMAINDER, metavar="key=value", help="changes to a training's configuration"
    )
    again.set_defaults(run=_again)


def _again_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--run-dir", default="", metavar="NEW", help="its folder (RUN_2, RUN_3, ...)")
    options.add_argument("--detach", action="store_true", help="return at once; the run goes on")
    return options


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", metavar="RUN", help="a run's folder, or the end of its path")


def _list(options: argparse.Namespace) -> int:
    from biokit.launch.listing import list_runs

    table = list_runs(options.roots)
    print(table if table.rows else "no runs")
    return 0


def _show(options: argparse.Namespace) -> int:
    from biokit.launch.failed_run import card_of
    from biokit.launch.listing import find_run

    run = find_run(options.name)
    print(run.card.text)
    if card := card_of(run.failure, run.hang):
        print(f"\n{card.text}")
    return 0


def _stop(options: argparse.Namespace) -> int:
    from biokit.launch.listing import find_run

    run = find_run(options.name)
    if run.ended:
        print(f"it had ended already: {run.status}")
        return 0
    print(f"{run.folder.path}: {run.stop(options.timeout)}")
    return 0


def _diff(options: argparse.Namespace) -> int:
    from biokit.launch.listing import diff_runs, find_run

    table = diff_runs(find_run(options.first), find_run(options.second))
    print(table if table.rows else "nothing differs")
    return 0


def _again(options: argparse.Namespace) -> int:
    from biokit.launch.again import start_again
    from biokit.launch.listing import find_run

    late, overrides = _again_options().parse_known_args(options.words)
    detach, run_dir = options.detach or late.detach, late.run_dir or options.run_dir
    run = start_again(find_run(options.name), run_dir, overrides, detach=detach)
    print(run.folder.path)
    if not detach:
        run.wait()
    return 0
