"""`%torchrun` and `%%torchrun`: torchrun from a notebook. Loaded by `%load_ext biokit`."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import os
import secrets
import shlex
import shutil
import symtable
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from IPython.core.completer import CompletionContext, SimpleCompletion, SimpleMatcherResult, context_matcher
from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, magics_class, needs_local_scope, no_var_expand

from biokit.errors import BiokitError, ConfigError, RunError
from biokit.launch.failed_run import told_shortly
from biokit.launch.listing import find_run, list_runs
from biokit.launch.magics.cell_program import cell_words, write_cell
from biokit.launch.magics.hidden_words import hide_words
from biokit.launch.magics.live_cell import end_now, follow_run
from biokit.launch.magics.magic_line import (
    MagicLine,
    describe_flags,
    flags_of,
    list_flags,
    read_line,
    split_words,
)
from biokit.launch.orders import Order, has_own_output
from biokit.launch.output import OutputTail
from biokit.launch.run import Run, start_run
from biokit.launch.started import check_free
from biokit.runs import RunFolder
from biokit.secrets import looks_secret, mask, mask_words

MAX_SHOWN = 200  # characters of a name or a line that is refused
DETACHED_LIMIT_S = 24 * 3600.0
RUNS = "BIOKIT_RUNS"  # variable: the folder of all runs, in place of `runs`
INLINE = "module://matplotlib_inline"  # a kernel's way to draw, which no other process has


@dataclass(frozen=True)
class Launch:
    """All that is ready to be started."""

    folder: RunFolder
    order: Order
    variables: dict[str, str] = field(default_factory=dict)


@magics_class
class TorchrunMagics(Magics):
    """The magics that start runs."""

    @needs_local_scope
    @no_var_expand
    @line_cell_magic
    @told_shortly()
    def torchrun(self, line: str, cell: str | None = None, local_ns: Mapping[str, Any] | None = None) -> Any:
        """Run a script, or this cell, in every process that torchrun starts (`%torchrun --help`)."""
        names = {**self.shell.user_ns, **(local_ns or {})}
        try:
            asked = read_line(split_words(line, names), cell is not None)
            if asked.help:
                return print(describe_flags())
            if asked.attach or asked.stop or asked.status:
                return _look_up(asked)
            folder = RunFolder(Path(asked.run_dir) if asked.run_dir else new_folder())
            if cell is not None:
                check_cell(cell, asked, names)
            else:
                check_program(asked)
            if asked.dry_run:
                return print(describe_launch(Launch(folder, make_order(asked, folder, cell is not None))))
            launch = prepare_launch(asked, folder, cell, names)
        except BiokitError as error:  # the user's mistake, before anything is started
            raise UsageError(str(error)) from None
        if asked.background:
            return _start_background(launch, asked)
        values = run_foreground(launch, asked)
        self.shell.push(values)
        return None

    torchrun.getdoc = describe_flags  # what `%torchrun?` shows; made only when it is asked for


def check_cell(cell: str, asked: MagicLine, names: Mapping[str, Any]) -> None:
    """Refuse what cannot work before anything is started.

    Raises:
        ConfigError: the cell is no Python; a name for `--with` that is not there, one for `--out` that the cell does
            not make, a secret.
    """
    _check_python(cell)
    if mask(cell) != cell:
        raise ConfigError("the cell", "it spells out a secret of the environment", "Read it from os.environ")
    for name in asked.given:
        if name not in names:
            raise ConfigError(f"--with {name}", "the notebook has no such variable", "Define it first")
    made = _find_assigned(cell)
    for name in asked.out:
        if looks_secret(name):
            raise ConfigError(f"--out {name}", "it looks secret, and would be written to a file", "Use another name")
        if made and name not in made | set(asked.given):
            known = ", ".join(sorted(made)[:8])
            raise ConfigError(f"--out {name}", "the cell does not assign it", f"It assigns: {known}")


def prepare_launch(asked: MagicLine, folder: RunFolder, cell: str | None, names: Mapping[str, Any]) -> Launch:
    """Write down what the run needs.

    Raises:
        BiokitError: a value that is not data, a folder that cannot be made, or in which a run is alive.
    """
    folder.check_path()
    check_free(folder)
    variables = {}
    if cell is not None:
        variables = write_cell(folder, cell, {name: names[name] for name in asked.given})
    order = make_order(asked, folder, cell is not None)
    program, hidden = hide_words(order.program)
    if hidden and "--no-python" in order.torchrun:
        found = "a secret word would be written into the run folder"
        raise ConfigError("%torchrun --no-python", found, "Give it as an environment variable")
    folder.create()
    facts = {"line": shlex.join(mask_words(shlex.split(order.line())))}
    return Launch(folder, replace(order, program=program, facts=facts), variables | hidden)


def make_order(asked: MagicLine, folder: RunFolder, is_cell: bool) -> Order:
    """The order that a line stands for."""
    program = cell_words(folder, asked.out, asked.program) if is_cell else asked.program
    return Order(
        "cell" if is_cell else "script",
        program,
        asked.torchrun,
        asked.placement,
        asked.num_nodes,
        timeout_s=asked.timeout_s or (DETACHED_LIMIT_S if asked.detach else 0.0),
        environment=drawing_environment(),
    )


def drawing_environment() -> dict[str, str]:
    """What matplotlib needs in other processes than the kernel."""
    return {"MPLBACKEND": "agg"} if os.environ.get("MPLBACKEND", "").startswith(INLINE) else {}


def run_foreground(launch: Launch, asked: MagicLine) -> dict[str, Any]:
    """Start a run, show its output, and return the values that rank 0 gave back.

    Raises:
        RunFailed: it failed or timed out.
        RunError: it was stopped from outside before it gave its values.
        KeyboardInterrupt: it was ended.
    """
    first_life = launch.folder.last_life() + 1
    tail = OutputTail(launch.folder, asked.num_ranks > 1, first_life, has_own_output(launch.order))
    try:
        run = start_run(launch.folder, launch.order, variables=launch.variables)
    except KeyboardInterrupt:
        end_now(launch.folder)
        raise
    follow_run(run, tail)
    if not asked.out:
        return {}
    if not launch.folder.result_file.exists():
        raise RunError(f"--out {', '.join(asked.out)}", f"the run was {run.status} before its end", "Start it again")
    return run.result


def describe_launch(launch: Launch) -> str:
    """The command that would be run, and the files that there would be."""
    folder, order, life = launch.folder, launch.order, launch.folder.life(launch.folder.last_life() + 1)
    cell = [("cell.py", "the cell")] if order.kind == "cell" else []
    files = [
        ("launch.json", "what was asked for"),
        *cell,
        (life.output_file(0), "what rank 0 printed"),
        (life.error_file(0), "the error that ended it"),
        (folder.failure_file, "why the run failed"),
        (folder.result_file, "the values of --out"),
        (folder.logs / "supervisor.log", "what was done when"),
    ]
    command = shlex.join(mask_words(shlex.split(order.line())))
    lines = [f"command  {command}", f"folder   {folder.path}/"]
    for file, what in files:
        name = str(file.relative_to(folder.path)) if isinstance(file, Path) else file
        lines.append(f"           {name:<34}{what}")
    return "\n".join([*lines, "nothing was started (--dry-run)"])


def new_folder(group: str = "torchrun") -> Path:
    """A run folder that there is not yet: `runs/torchrun/<date-time>-<4 hex>`."""
    root = Path(os.environ.get(RUNS) or "runs")
    return root / group / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"


@context_matcher()
def complete_flags(context: CompletionContext) -> SimpleMatcherResult:
    """Flags on the line of one of biokit's magics."""
    begun = context.line_with_cursor[: context.cursor_position].lstrip()
    magic, space, _ = begun.partition(" ")
    if not space or not context.token.startswith("-"):
        return SimpleMatcherResult(completions=[])
    flags = [flag for flag in _list_flags(magic) if flag.startswith(context.token)]
    return SimpleMatcherResult(
        completions=[SimpleCompletion(flag, type="param") for flag in flags], suppress=bool(flags)
    )


def _list_flags(magic: str) -> list[str]:
    if magic in ("%torchrun", "%%torchrun"):
        return list_flags()
    if magic == "%submit":
        from biokit.launch.magics.slurm_magics import make_parser

        return flags_of(make_parser())
    from biokit.launch.magics.warm_magics import PARSERS

    return flags_of(PARSERS[magic]) if magic in PARSERS else []


def _start_background(launch: Launch, asked: MagicLine) -> Run:
    run = start_run(launch.folder, launch.order, asked.detach, variables=launch.variables)
    if asked.detach:
        hours = launch.order.timeout_s / 3600
        print(
            f"{launch.folder.path}: outlives this kernel, ends after {hours:.3g} h at the latest; "
            f"end it with %torchrun --stop {shlex.quote(str(launch.folder.path))}"
        )
    return run


def _look_up(asked: MagicLine) -> Any:
    if asked.status:
        return list_runs()
    run = find_run(asked.attach or asked.stop)
    if asked.stop:
        run.stop()
    return run


def check_program(asked: MagicLine) -> None:
    """Refuse a script, module or program that is not there.

    Raises:
        ConfigError: it is not.
    """
    script = asked.program[0]
    if script == "-m":
        name = asked.program[1]
        if not _is_module(name.partition(".")[0]):
            do = f"Check its name; this is {Path.cwd()}"
            raise ConfigError(f"%torchrun -m {name}", "there is no such module", do)
    elif "--no-python" in asked.torchrun:
        if shutil.which(script) is None:
            raise ConfigError(f"%torchrun --no-python {script}", "there is no such program", "Check its name")
    elif not _is_there(Path(script)):
        shown = script if len(script) <= MAX_SHOWN else f"{script[:MAX_SHOWN]}[...]"
        raise ConfigError(f"%torchrun {shown}", "there is no such file", f"Check the path; this is {Path.cwd()}")


def _is_there(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that no file can have
        return False


def _is_module(name: str) -> bool:
    """Whether Python finds a module, without importing it; the ranks look into this folder too."""
    with contextlib.suppress(ImportError, ValueError):
        return bool(importlib.machinery.PathFinder.find_spec(name, [str(Path.cwd())]) or importlib.util.find_spec(name))
    return False


def _check_python(cell: str) -> None:
    lines = cell.splitlines()
    try:
        compile(f"\n{cell}", "cell.py", "exec", dont_inherit=True)
    except SyntaxError as error:
        number = error.lineno or 2
        text = lines[number - 2] if 2 <= number < len(lines) + 2 else ""
        for at in (number, number - 1, number + 1):  # the mistake may be said of the line before or after
            line = lines[at - 2] if 2 <= at < len(lines) + 2 else ""
            if line.lstrip().startswith(("%", "!")):
                raise _refuse_line(at, line.strip()) from None
        found = f"line {number} is no Python ({error.msg}): {mask(text.strip())[:MAX_SHOWN]}"
        raise ConfigError("the cell", found, "Mend the line") from None
    except (ValueError, RecursionError, MemoryError, OverflowError) as error:
        raise ConfigError("the cell", f"Python cannot read it ({error})", "Mend it") from None


def _refuse_line(number: int, text: str) -> ConfigError:
    found = f"line {number} is IPython's: {text}"
    return ConfigError("the cell", found, "Leave it out: the processes run plain Python")


def _find_assigned(cell: str) -> set[str]:
    """Names that a cell's code makes; empty where that cannot be told from its text."""
    if any(word in cell for word in ("exec(", "globals(", "vars(", "import *", "setattr(", "__main__", "__dict__")):
        return set()
    top = symtable.symtable(cell, "cell.py", "exec")
    made = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_assigned() or symbol.is_imported()}
    tables: Sequence[symtable.SymbolTable] = top.get_children()
    while tables:
        made |= {s.get_name() for t in tables for s in t.get_symbols() if s.is_declared_global() and s.is_assigned()}
        tables = [child for table in tables for child in table.get_children()]
    return made
