"""A run launched again from its card: the same order in a new folder."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from biokit.config import config_hash, config_to_yaml, load_config
from biokit.errors import RunError
from biokit.flags import read_flags
from biokit.launch.facts import asked_file
from biokit.launch.orders import GIVEN, HERE, TRAIN, Order, read_order
from biokit.launch.run import Run, start_run
from biokit.launch.training_order import check_lives
from biokit.runs import RunFolder, write_atomically
from biokit.secrets import MASK


def start_again(run: Run, run_dir: str | Path = "", overrides: Sequence[str] = (), *, detach: bool = False) -> Run:
    """Carry out a run's order again, in the folder that it was started in, with the code as it is now.

    Args:
        run_dir: of the new run; empty: the old one's with a number behind it.
        overrides: `key=value` of a training's configuration.
        detach: the run outlives this process.

    Raises:
        ConfigError: an override that cannot be, or an impossible layout.
        RunError: nobody knows how it was started, its order cannot be carried out here, or the new folder is not empty.
    """
    order, old = read_order(run.folder), run.folder.path.absolute()
    new = RunFolder(Path(run_dir).absolute() if run_dir else _next_folder(old))
    _check_order(order, old, overrides)
    if new.path.is_dir() and any(new.path.iterdir()):
        raise RunError(f"run {old} again", f"{new.path} is not empty", "Give another --run-dir")
    where = Path(order.facts.get("cwd", Path.cwd()))
    if not where.is_dir():
        raise RunError(f"run {old} again", f"{where}, in which it was started, is gone", "Make it, or start it by hand")
    with contextlib.chdir(where):  # the order's paths are relative to it
        if order.kind == "train":
            order = _with_config(order, new, overrides)
        return start_run(new, replace(order, facts=_lasting(order)), detach)


def _check_order(order: Order, old: Path, overrides: Sequence[str]) -> None:
    asked = f"run {old} again"
    if any(MASK in word for word in (*order.program, *order.torchrun, *order.environment.values())):
        found = f"its command line held a secret, of which only {MASK} was kept"
        raise RunError(asked, found, "Start it by hand, with the secret in the environment")
    if order.placement not in (HERE, GIVEN):
        raise RunError(asked, f"its processes were placed by {order.placement!r}", "Submit it with `biokit submit`")
    if order.kind not in ("train", "script", "cell"):
        raise RunError(asked, f"it is of the kind {order.kind!r}", "Start it by hand")
    if overrides and order.program[: len(TRAIN)] != TRAIN:
        raise RunError(asked, f"{overrides[0]}: it is no training of biokit", "Leave the overrides out")


def _with_config(order: Order, new: RunFolder, overrides: Sequence[str]) -> Order:
    """The order for a configuration of the new run's own, which is written now."""
    from biokit.layouts import find_layout

    _, (name, *words), _ = read_flags(order.program[len(TRAIN) :])
    config = load_config(name, [*words, *overrides, f"run_dir={new.path}"])
    check_lives(config, order.max_lives)
    facts: dict[str, object] = {"config_hash": config_hash(config)}
    if layout := order.facts.get("layout"):
        facts["layout"] = find_layout(config, int(layout["world_size"])).as_dict()
    write_atomically(asked_file(new), config_to_yaml(config))
    return replace(order, program=(*TRAIN, str(asked_file(new))), facts=facts)


def _lasting(order: Order) -> dict[str, object]:
    """The facts that are the order's own; the others are found anew."""
    return {name: order.facts[name] for name in ("config_hash", "layout") if name in order.facts}


def _next_folder(old: Path) -> Path:
    return next(path for number in itertools.count(2) if not (path := old.with_name(f"{old.name}_{number}")).exists())
