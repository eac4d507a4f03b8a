"""All runs of this user at a glance, and what differs between two of them."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from biokit.errors import BiokitError, RunError
from biokit.launch.facts import compare_runs, describe_run
from biokit.launch.orders import read_order
from biokit.launch.register import list_registered
from biokit.launch.run import Run
from biokit.launch.slurm import jobs
from biokit.runs import RunFolder
from biokit.safe_files import to_number
from biokit.view.table import Table

DEFAULT_ROOT = Path("runs")
MAX_DEPTH = 4  # of a run folder below a root
HEAD = ("run", "status", "step", "loss", "started", "where")


def find_runs(roots: Sequence[Path] = ()) -> list[Path]:
    """Folders of runs below some folders; without any, of all that a supervisor has had, and of those below `runs/`.

    Raises:
        RunError: no such folder.
    """
    for root in roots:
        if not root.is_dir():
            raise RunError(f"runs below {root}", "there is no such folder", "Give a folder that holds runs")
    known = [] if roots else list_registered()
    below = [path for root in roots or [DEFAULT_ROOT] for path in _scan(root, MAX_DEPTH)]
    found = {path.resolve(): path for path in [*known, *below]}  # the later spelling is the shorter one
    return list(found.values())


def list_runs(roots: Sequence[Path] = ()) -> Table:
    """A table of runs, the newest last; one that cannot be read says so in its row.

    Raises:
        RunError: no such folder.
    """
    rows = sorted(map(_row, find_runs(roots)))
    return Table(HEAD, [row for _, row in rows])


def find_run(name: str) -> Run:
    """A run by its folder, or by the end of the path of one that `list_runs` shows.

    Raises:
        RunError: there is none, or several.
    """
    if Path(name).is_dir():
        return Run.attach(name)
    words = Path(name).parts
    found = [path for path in find_runs() if words and path.resolve().parts[-len(words) :] == words]
    if len(found) != 1:
        what = f"several bear the name: {', '.join(map(str, found))}" if found else "there is no such run"
        raise RunError(f"run {name}", what, "Give its folder; `biokit runs list` names all")
    return Run.attach(found[0])


def diff_runs(first: str | Path | Run, second: str | Path | Run) -> Table:
    """What differs between two runs: configuration, code, versions, data, layout, final losses.

    Raises:
        RunError: a folder that holds no run.
    """
    runs = [run if isinstance(run, Run) else Run.attach(run) for run in (first, second)]
    names = [_shown(run.folder.path) for run in runs]
    if names[0] == names[1]:
        names = ["first", "second"]
    return Table(("what differs", *names), compare_runs(runs[0].folder, runs[1].folder))


def _scan(root: Path, depth: int) -> Iterator[Path]:
    """Run folders at or below a folder; what lies inside a run is not looked through for checkpoints and the like."""
    if _is_run(root):
        yield root
    if not depth:
        return
    with contextlib.suppress(OSError):
        for path in sorted(root.iterdir()):
            inside = _is_run(root) and path.name in ("checkpoints", "data", "lives", "logs", "metrics", "tensorboard")
            if path.is_dir() and not path.is_symlink() and not path.name.startswith(".") and not inside:
                yield from _scan(path, depth - 1)


def _is_run(path: Path) -> bool:
    folder = RunFolder(path)
    if folder.launch_file.exists() or (path / jobs.JOB_FILE).exists():
        return True
    with contextlib.suppress(RunError):  # token stores and checkpoints have a manifest too
        return "status" in folder.read_manifest()
    return folder.metrics_file().exists()


def _row(path: Path) -> tuple[float, tuple[str, ...]]:
    """(when it was started, its cells)."""
    name = _shown(path)
    try:
        folder = RunFolder(path)
        if os.path.lexists(folder.manifest_file):
            folder.read_manifest()
        if os.path.lexists(folder.launch_file):
            read_order(folder)
        facts = describe_run(folder, Run(folder).status)
        started = to_number(facts.get("started"))
        return started, (name, *_cells(facts, started))
    except (BiokitError, OSError, ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
        return 0.0, (name, "unreadable", "", "", "", str(error))


def _cells(facts: dict[str, Any], started: float) -> Iterable[str]:
    step, of, loss = facts.get("step"), facts.get("num_steps"), facts.get("loss")
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(started)) if started else ""
    return (
        str(facts["status"]),
        f"{step}/{of}" if step and of else str(step or ""),
        f"{loss:.4f}" if isinstance(loss, (int, float)) and math.isfinite(loss) else str(loss or ""),
        when,
        f"Slurm job {job}" if (job := facts.get("slurm_job")) else str(facts.get("host", "")),
    )


def _shown(path: Path) -> str:
    """Relative to where the user is, where that is shorter."""
    relative = os.path.relpath(path)
    return str(path) if relative.startswith("..") else relative
