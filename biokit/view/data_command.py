"""`biokit data`: the named data sets; fetch one, show one."""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path
from typing import Any

from biokit.datasets import DATASETS, NamedDataset, find_dataset, is_here, locate, locate_companions
from biokit.view.table import Table

NUM_ROWS_SHOWN = 5


def add_parser(commands: Any) -> None:
    """Add `data` and what it can do to the command line."""
    data = commands.add_parser("data", help="named data sets: list them, fetch one, show one")
    actions = data.add_subparsers(dest="action", required=True)

    every = actions.add_parser("list", help="all that biokit knows by name, and which of them are on this machine")
    every.set_defaults(run=_list)

    fetch = actions.add_parser("fetch", help="download, check and unpack data sets from the package index")
    fetch.add_argument("names", nargs="+", metavar="NAME", help="a data set")
    fetch.add_argument("--wheel", type=Path, metavar="FILE", help="the wheel, where this machine reaches no index")
    fetch.add_argument("--again", action="store_true", help="although it is on this machine")
    fetch.set_defaults(run=_fetch)

    show = actions.add_parser("show", help="where it comes from, its licence, columns and first rows")
    show.add_argument("name", metavar="NAME", help="a data set")
    show.set_defaults(run=_show)


def list_datasets() -> Table:
    """All named data sets, a row each."""
    rows = [
        [dataset.name, f"{dataset.rows:,}", dataset.kind, _whereabouts(dataset), dataset.description]
        for dataset in DATASETS.values()
    ]
    return Table(["name", "rows", "of", "where", "what"], rows)


def describe_dataset(name: str) -> Table:
    """What is known of a data set, and its first rows where it is on this machine. Raises DataError: no such name."""
    dataset = find_dataset(name)
    rows = [
        ["name", dataset.name],
        ["what", dataset.description],
        ["rows", f"{dataset.rows:,} {dataset.kind}" + _invalid(dataset)],
        ["columns", ", ".join(dataset.columns)],
        ["source", f"{dataset.source} ({dataset.package} {dataset.version or 'as installed'})"],
        ["licence", dataset.licence],
        ["sha256", dataset.files[dataset.path]],
    ]
    if not is_here(dataset):
        return Table(["", ""], [*rows, ["where", f"not fetched: biokit data fetch {name}"]])
    rows.append(["where", str(locate(name))])
    rows += [["beside it", str(path)] for path in locate_companions(name)]
    return Table(["", ""], rows + [[f"row {number}", text] for number, text in enumerate(_first_rows(dataset), 1)])


def _first_rows(dataset: NamedDataset) -> list[str]:
    if dataset.kind != "molecules":
        return []
    from biokit.data.tables import read_table

    return [row.text for row in islice(read_table(locate(dataset.name)), NUM_ROWS_SHOWN)]


def _whereabouts(dataset: NamedDataset) -> str:
    if not is_here(dataset):
        return f"{dataset.wheel_bytes / 1e6:.1f} MB to fetch" if dataset.version else f"{dataset.package} is missing"
    return "fetched" if dataset.version else f"in {dataset.package}"


def _invalid(dataset: NamedDataset) -> str:
    return f", {dataset.invalid_rows} of them invalid" if dataset.invalid_rows else ""


def _list(options: argparse.Namespace) -> int:
    print(list_datasets())
    return 0


def _fetch(options: argparse.Namespace) -> int:
    from biokit.data.fetch import fetch

    for name in options.names:
        print(fetch(name, options.wheel, options.again))
    return 0


def _show(options: argparse.Namespace) -> int:
    print(describe_dataset(options.name))
    return 0
