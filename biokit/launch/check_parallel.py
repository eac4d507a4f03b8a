"""Does a configuration train the same under other layouts? A few steps on each, one after the other, compared."""

from __future__ import annotations

import contextlib
import html
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from biokit.config import RunConfig
from biokit.errors import ConfigError, RunError, list_faults
from biokit.launch.failed_run import RunFailed
from biokit.launch.run import start_training
from biokit.layouts import find_layout
from biokit.parallel.grid import STAGED, ZERO_STAGE
from biokit.runs import RunFolder
from biokit.view.comparison import DifferenceTable, compare_curves, difference_table
from biokit.view.picture import Picture

NUM_STEPS = 5
TIMEOUT_S = 900.0  # of each layout
REPORT_S = 1.5  # between two progress lines
_WORD = re.compile(r"(?:(\w+):)?(1|(?:dp|tp|pp)[0-9]+(?:x(?:dp|tp|pp)[0-9]+)*)")


@dataclass(frozen=True)
class Wanted:
    """A layout by its word: `1`, `dp2`, `tp2xpp2`, `Zero2:dp4`."""

    word: str
    strategy: str
    tensor: int = 1
    data: int = 1
    pipeline: int = 1

    @property
    def num_processes(self) -> int:
        return self.tensor * self.data * self.pipeline


@dataclass(frozen=True)
class ParallelCheck:
    """What came out: a table, a plot, and what was set otherwise than in the configuration."""

    notes: tuple[str, ...]
    table: DifferenceTable
    picture: Picture

    @property
    def within(self) -> bool:
        """Whether each layout's losses differ from the first one's by no more than fp32 allows."""
        return self.table.within

    def raise_if_outside(self) -> None:
        """Nothing where all are within their bounds.

        Raises:
            RunError: one is not; names it, the step and the difference.
        """
        outside = [row for row in self.table.rows if not row.within]
        if outside:
            faults = [f"{row.name} by {row.largest:.1e} at step {row.step} (bound {row.bound:.1e})" for row in outside]
            do = "Look where a mean, a mask or a seed depends on the rank; compare the gradients of the first step"
            asked = f"the losses of {self.table.reference.layout}"
            raise RunError(asked, f"other layouts differ: {list_faults(faults, most=len(faults))}", do)

    def __repr__(self) -> str:
        return "\n".join([*self.notes, repr(self.table), "", self.picture.alt])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        image = self.picture._repr_mimebundle_()["image/png"]
        notes = "".join(f"<p>{html.escape(note)}</p>" for note in self.notes)
        table = self.table._repr_mimebundle_()["text/html"]
        alt = html.escape(self.picture.alt, quote=True)
        shown = f'{notes}{table}<img alt="{alt}" src="data:image/png;base64,{image}">'
        return {"text/html": shown, "image/png": image, "text/plain": repr(self)}


def parse_layout(word: str) -> Wanted:
    """A layout out of its word. Without a strategy's name: tensor ranks ask for ThreeD, stages for Pipeline, data ranks
    for DDP.

    Raises:
        ConfigError: it is not of that form.
    """
    found = _WORD.fullmatch(word)
    sizes = re.findall(r"(dp|tp|pp)([0-9]+)", found[2]) if found else []
    if not found or len(dict(sizes)) < len(sizes) or any(int(size) < 1 for _, size in sizes):
        do = "Write 1, dp2, tp2, pp2, combinations as tp2xpp2, or with a strategy's name: Zero2:dp2"
        raise ConfigError(f'layout "{word}"', "it is not of that form", do)
    number = {name: int(size) for name, size in sizes}
    tensor, data, pipeline = number.get("tp", 1), number.get("dp", 1), number.get("pp", 1)
    plain = "ThreeD" if tensor > 1 else "Pipeline" if pipeline > 1 else "DDP" if data > 1 else "Single"
    return Wanted(word, found[1] or plain, tensor, data, pipeline)


def check_parallel(config: RunConfig, layouts: Sequence[str], steps: int = NUM_STEPS) -> ParallelCheck:
    """Train the same few steps under each layout and lay the curves on one another; the first is the reference.

    The runs stand in scratch folders over one token store, and are removed unless one fails. Prints a line of progress.

    Args:
        layouts: words as `parse_layout` takes them, two or more.
        steps: of each run; the learning rate's schedule is that of a run of so many steps.

    Raises:
        ConfigError: words or layouts that cannot be, all of them named; nothing was started.
        RunFailed: a run failed.
    """
    wanted = _read_words(layouts)
    plain, notes = _plain_config(config, wanted, steps)
    configs = _configure(plain, wanted)
    for note in notes:
        print(note, flush=True)
    with _scratch(config) as scratch:
        store = config.data.store_dir or str(_own_store(config) or scratch / "data")
        folders: dict[str, RunFolder] = {}
        for number, layout in enumerate(wanted):
            path = scratch / f"{number}_{layout.word.replace(':', '_')}"
            one = replace(configs[layout.word], run_dir=str(path))
            folders[layout.word] = _train(layout, replace(one, data=replace(one.data, store_dir=store)))
        first, *others = folders
        table = difference_table(folders[first], {name: folders[name] for name in others})
        picture = compare_curves(folders, title=f"The same {steps} steps under {len(folders)} layouts")
    return ParallelCheck(tuple(notes), table, picture)


def _read_words(words: Sequence[str]) -> list[Wanted]:
    wanted, faults = [], []
    for word in words:
        try:
            wanted.append(parse_layout(word))
        except ConfigError as error:
            faults.append(str(error).rstrip("."))
    if faults:
        raise ConfigError("layouts to compare", list_faults(faults, most=len(faults)), "Mend them; nothing was started")
    repeated = sorted({word for word in words if words.count(word) > 1})
    if len(wanted) < 2 or repeated:
        found = f"{', '.join(repeated)} is named twice" if repeated else f"there is {len(wanted)}"
        raise ConfigError("layouts to compare", found, "Give two or more, e.g. 1 dp2 tp2")
    return wanted


def _plain_config(config: RunConfig, wanted: Sequence[Wanted], steps: int) -> tuple[RunConfig, list[str]]:
    """The configuration without what makes layouts differ rightly, and what was changed for that, in words."""
    notes = []
    train = replace(
        config.train,
        train_iters=steps,
        log_interval=1,
        eval_interval=0,
        eval_iters=1,
        eval_molecules=0,
        early_stopping_patience=0,
        save_interval=0,
        keep_last=0,
        keep_best=0,
        tensorboard=False,
        progress=False,
    )
    model = config.model
    if model.dropout and any(layout.tensor > 1 for layout in wanted):
        notes.append(f"model.dropout={model.dropout} is 0 here: tensor ranks draw masks of their own.")
        model = replace(model, dropout=0.0)
    if train.precision != "fp32":
        notes.append(f"train.precision={train.precision} is fp32 here: the bound is what fp32 allows.")
        train = replace(train, precision="fp32")
    return replace(config, train=train, model=model, do_training=True, resume=False), notes


def _configure(config: RunConfig, wanted: Sequence[Wanted]) -> dict[str, RunConfig]:
    """The configuration of each layout, by its word.

    Raises:
        ConfigError: impossible ones, all of them named.
    """
    configs, faults = {}, []
    for layout in wanted:
        configs[layout.word] = one = _under(config, layout)
        try:
            find_layout(one, layout.num_processes)
        except ConfigError as error:
            faults.append(f"{layout.word}: {str(error).rstrip('.')}")
    if faults:
        asked = f"{len(faults)} of {len(wanted)} layouts"
        raise ConfigError(asked, f"they cannot be: {list_faults(faults, most=len(faults))}", "Nothing was started")
    return configs


def _under(config: RunConfig, layout: Wanted) -> RunConfig:
    """The same training under a layout; options that it does not know are left out."""
    tree = asdict(config.parallel)
    tree |= {"tensor_model_parallel_size": layout.tensor}
    tree |= {"pipeline_model_parallel_size": layout.pipeline if layout.pipeline > 1 or layout.strategy in STAGED else 0}
    if layout.strategy != "ThreeD":
        tree |= {"sequence_parallel": False, "partition_activations": False}
    if layout.tensor == 1:
        tree["partition_activations"] = False
    if layout.strategy not in ZERO_STAGE:
        tree["deepspeed_config"] = ""
    return replace(config, strategy=layout.strategy, parallel=type(config.parallel)(**tree))


def _own_store(config: RunConfig) -> Path | None:
    """The token store that the run of this configuration has made already."""
    path = Path(config.run_dir) / "data"
    return path.absolute() if path.is_dir() else None


@contextlib.contextmanager
def _scratch(config: RunConfig) -> Iterator[Path]:
    """A folder that is removed afterwards, unless a run failed in it: its logs are wanted then."""
    path = Path(tempfile.mkdtemp(prefix="biokit-check-"))
    try:
        yield path
    except RunFailed:
        raise
    except BaseException:
        shutil.rmtree(path, ignore_errors=True)
        raise
    shutil.rmtree(path)


def _train(layout: Wanted, config: RunConfig) -> RunFolder:
    """Train to the end; prints where it is."""
    started, due = time.monotonic(), 0.0
    run = start_training(config, layout.num_processes, timeout_s=TIMEOUT_S)
    try:
        while run.alive:
            if time.monotonic() >= due:
                print(f"{_progress(layout, run.metrics(), started):<78}", end="\r", flush=True)
                due = time.monotonic() + REPORT_S
            time.sleep(0.1)
        run.raise_on_failure()
    finally:
        if run.alive:
            run.stop(0)
    print(f"{_progress(layout, run.metrics(), started):<78}", flush=True)
    shutil.rmtree(run.folder.checkpoints, ignore_errors=True)  # a large model's would fill the disk
    return run.folder


def _progress(layout: Wanted, lines: Sequence[dict[str, Any]], started: float) -> str:
    processes = f"{layout.num_processes} process{'es' if layout.num_processes > 1 else ''}"
    where = f"step {lines[-1]['step']}, loss {lines[-1]['loss']:.4f}" if lines else "starting"
    return f"{layout.word} ({layout.strategy}, {processes}): {where}, {time.monotonic() - started:.0f} s"
