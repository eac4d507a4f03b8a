"""Prediction of properties on six tables: a head on frozen hiddens against a random forest, three scaffold splits each.

The model is $BIOKIT_MODEL (a name or a folder, as `load_model` takes it), else `molbart_mini_moses`. The activities
stand inside the installed rdkit, MoleculeNet's tables where BIOKIT_REAL_DATA says. $BIOKIT_TUNE=1 adds a tuned encoder,
which takes several times as long. Ratios are of the first metric, such that more than 1 is better than the forest.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from biokit.model_folder import list_models, load_model
from biokit.models.molbart import MolBART
from biokit.tasks.property import FOREST, PropertyReport, compare_predictors
from biokit.tasks.property_data import read_properties
from biokit.tasks.property_metrics import LOWER_IS_BETTER
from tests.bench.timing import Row

DEFAULT_MODEL = "molbart_mini_moses"
NO_MODEL = "not measured: there is no model (BIOKIT_MODEL)"
TABLES = {
    "CHEMBL2321810": ("chembl2321810", "Act"),
    "ESOL": ("moleculenet/esol.csv", "measured log solubility in mols per litre"),
    "FreeSolv": ("moleculenet/freesolv.csv", "expt"),
    "Lipophilicity": ("moleculenet/lipophilicity.csv", "exp"),
    "BBBP": ("moleculenet/bbbp.csv", "p_np"),
    "BACE": ("moleculenet/bace.csv", "Class"),
}


def measure(name: str, model: MolBART, tokenizer: Any, **settings: Any) -> list[Row]:
    """Rows of one table; `settings` are those of `compare_predictors`."""
    table, target = TABLES[name]
    if "/" in table:
        folder = os.environ.get("BIOKIT_REAL_DATA", "")
        if not folder:
            return [Row(name, FOREST)]
        table = f"{folder}/{table}"
    data = read_properties(table, target, model, tokenizer, on_bad="drop")
    tune = os.environ.get("BIOKIT_TUNE") == "1"
    report = compare_predictors(data, model, tokenizer, progress=False, **({"tune": tune} | settings))
    return list(_describe(f"{name}, {data.kind}, {len(data):,} of {data.num_rows:,} rows", report))


def _describe(what: str, report: PropertyReport) -> Iterator[Row]:
    """A row a method and metric against the forest's, and one that says who wins."""
    for method in report.methods:
        if method == FOREST:
            continue
        for metric in report.metrics:
            ours, theirs = report.describe(method, metric), report.describe(FOREST, metric)
            row = Row(f"{what}: {metric}, {method}", FOREST, ours, theirs)
            yield _with_ratio(row, report, method) if metric == report.metrics[0] else row
    yield Row(f"{what}: {report.verdict}", "all", "-")


def _with_ratio(row: Row, report: PropertyReport, method: str) -> Row:
    metric = report.metrics[0]
    pairs = zip(report.values(method, metric), report.values(FOREST, metric), strict=True)
    ratios = [theirs / ours if metric in LOWER_IS_BETTER else ours / theirs for ours, theirs in pairs]
    shown = f"{statistics.median(ratios):.2f}x", f"{min(ratios):.2f} - {max(ratios):.2f}"
    return Row(row.what, row.peer, row.ours, row.theirs, *shown)


def measure_all() -> list[Row]:
    source = os.environ.get("BIOKIT_MODEL", "") or DEFAULT_MODEL
    if source not in list_models() and not Path(source).is_dir():
        return [Row(name, FOREST, NO_MODEL) for name in TABLES]
    model, tokenizer = load_model(source)
    assert isinstance(model, MolBART)
    return [row for name in TABLES for row in measure(name, model, tokenizer)]
