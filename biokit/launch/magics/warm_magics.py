"""`%%ranks`, `%ranks` and `%check_parallel`."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import psutil
from IPython.core.error import UsageError
from IPython.core.magic import Magics, line_cell_magic, line_magic, magics_class, no_var_expand
from IPython.display import display

from biokit.config import RunConfig, config_to_yaml, load_config
from biokit.errors import ConfigError, DataError, RunError
from biokit.launch.failed_run import RunFailed, told_shortly
from biokit.launch.magics.magic_line import MagicLine, refuse_given_flag, split_words
from biokit.launch.magics.torchrun_magics import check_cell, drawing_environment, new_folder
from biokit.launch.output import OutputTail
from biokit.launch.started import check_free
from biokit.launch.values import check_values, part_secrets, read_values
from biokit.launch.warm.pool import Cell, CellEnd, Pool
from biokit.runs import RunFolder
from biokit.secrets import looks_secret
from biokit.view.cards import failure_card, hang_card
from biokit.view.table import Table

if TYPE_CHECKING:
    from biokit.launch.check_parallel import ParallelCheck

NUM_RANKS = 2
LOST = "The ranks have been ended, and their variables are lost; the next cell starts new ones."
GROUPS_ENDED = "The ranks keep their variables, but the process groups are ended: initialise them again."


@magics_class
class WarmMagics(Magics):
    """Cells in persistent ranks, and the comparison of layouts."""

    def __init__(self, shell: Any) -> None:
        super().__init__(shell)
        self.pool: Pool | None = None
        self._tail: OutputTail | None = None

    @no_var_expand
    @line_cell_magic
    @told_shortly()
    def ranks(self, line: str, cell: str | None = None) -> Any:
        """Run a cell in persistent processes, each of which keeps its variables for the next one.

        %%ranks [-n N] [--out NAMES] [--with NAMES] [--timeout S] [--run-dir DIR]
            -n N, --nproc-per-node N  how many; the first cell starts them (2), later ones take those that there are
            --out NAMES       variables of rank 0 that come back when the cell ends, separated by commas
            --with NAMES      variables of the notebook that every rank gets first
            --timeout S       end the ranks after S seconds, and show where each stood
            --run-dir DIR     the run folder, for the cell that starts them (default: a new one under runs/ranks)
        %ranks                who they are
        %ranks --show x,loss  these variables on each rank
        %ranks --restart [-n N] [--run-dir DIR]  new processes, without variables
        %ranks --stop         end them
        """
        names = self.shell.user_ns
        try:
            words = split_words(line, names, "%ranks" if cell is None else "%%ranks")
            options = (_LINE if cell is None else _CELL).read(words)
            if cell is None:
                return self._steer(options)
            check_cell(cell, MagicLine(given=options.given), names)
            if secret := [name for name in options.out if looks_secret(name)]:
                found = "it looks secret, and would be written to a file"
                raise ConfigError(f"%%ranks --out {secret[0]}", found, "Use another name")
            given = {name: names[name] for name in options.given}
            secrets, plain = part_secrets(given)
            check_values(plain, "--with", secrets.values())
            pool = self._find_pool(options.num_ranks, options.run_dir)
            number = len(self.shell.history_manager.input_hist_parsed) - 1  # of this cell, as the notebook shows it
            wanted = Cell(cell, f"cell_{number}", given, options.out, options.timeout_s)
        except (ConfigError, DataError) as error:  # the user's mistake, before anything is started
            raise UsageError(str(error)) from None
        return self._run(pool, wanted)

    @no_var_expand
    @line_magic
    @told_shortly()
    def check_parallel(self, line: str) -> ParallelCheck:
        """Train a few steps of a configuration under several layouts, and show that the curves are the same.

        %check_parallel CONFIG [key=value ...] LAYOUT LAYOUT ... [--steps N]
            CONFIG   a packaged name, a YAML file, or a variable that holds a RunConfig
            LAYOUT   1, dp2, tp2, pp2, combined with x (tp2xpp2), with a strategy's name before it (Zero2:dp2)
        """
        from biokit.launch.check_parallel import NUM_STEPS, check_parallel

        try:
            options = _CHECK.read(split_words(line, self.shell.user_ns, "%check_parallel"))
            overrides = [word for word in options.words if "=" in word]
            layouts = [word for word in options.words if "=" not in word]
            config = self._find_config(options.config, overrides)
            check = check_parallel(config, layouts, options.steps or NUM_STEPS)
        except ConfigError as error:
            raise UsageError(str(error)) from None
        if not check.within:  # a cell that fails shows no value
            display(check)
        check.raise_if_outside()
        return check

    def _steer(self, options: argparse.Namespace) -> Any:
        """What the line magic asks for."""
        if options.stop or options.restart:
            num_ranks = options.num_ranks or (len(self.pool.members) if self.pool else NUM_RANKS)
            folder = self._find_folder(options.run_dir)  # before the old ranks are ended
            if self.pool is not None:
                self.pool.end()
                self.pool = None
            if options.restart:
                self._start(num_ranks, folder)
            return None
        pool = self._pool_now()
        if pool is None:
            print("no warm ranks; a %%ranks cell starts them")
            return None
        shown = show_variables(pool, options.show) if options.show else show_ranks(pool)
        self._pool_now()  # a value whose own code ended its rank has lost the others too
        return shown

    def _find_pool(self, num_ranks: int, run_dir: str) -> Pool:
        """The pool for a cell; 0: of whatever size; "": in whatever folder.

        Raises:
            ConfigError: there is one of another size, or in another folder.
            RunError: a new one does not come up.
        """
        pool = self._pool_now()
        if pool is None:
            return self._start(num_ranks or NUM_RANKS, self._find_folder(run_dir))
        if run_dir and Path(run_dir).absolute() != pool.folder.path.absolute():
            found = f"the ranks that are there have {pool.folder.path}"
            raise ConfigError(
                f"%%ranks --run-dir {run_dir}", found, f"Start new ones: %ranks --restart --run-dir {run_dir}"
            )
        if num_ranks not in (0, len(pool.members)):
            found = f"{len(pool.members)} ranks are there, with variables that would be lost"
            raise ConfigError(f"%%ranks -n {num_ranks}", found, f"Start new ones: %ranks --restart -n {num_ranks}")
        return pool

    def _run(self, pool: Pool, cell: Cell) -> None:
        assert self._tail is not None
        self._tail.begin()
        end = pool.run(cell, self._tail.look)
        self._tail.look(ended=end.lost)
        if end.lost:
            self.pool = None
        tell(end)
        if cell.wanted:
            self.shell.push(read_values(end.result))

    def _pool_now(self) -> Pool | None:
        """The pool, where all of it is there; what is left of one that is not is ended."""
        if self.pool is not None and not self.pool.alive:
            self.pool.end(at_once=True)
            self.pool = None
            print("The ranks have ended since the last cell, and their variables are lost.")
        return self.pool

    def _find_folder(self, run_dir: str) -> RunFolder:
        """The folder for new ranks; "": a new one.

        Raises:
            ConfigError: it cannot be one, or another run is alive in it.
        """
        folder = RunFolder(Path(run_dir) if run_dir else new_folder("ranks"))
        try:
            folder.check_path()
            if self.pool is None or folder.path.resolve() != self.pool.folder.path.resolve():
                check_free(folder)
        except RunError as error:
            raise ConfigError(error.asked, error.found, error.do) from error
        return folder

    def _start(self, num_ranks: int, folder: RunFolder) -> Pool:
        print(f"starting {num_ranks} warm rank{'s' if num_ranks > 1 else ''}", flush=True)
        self.pool = Pool(folder, num_ranks, drawing_environment())
        self._tail = OutputTail(folder, labelled=num_ranks > 1, first_life=self.pool.life)
        return self.pool

    def _find_config(self, name: str, overrides: Sequence[str]) -> RunConfig:
        """The configuration of a name: a variable of the notebook goes before a file."""
        value = self.shell.user_ns.get(name)
        if not isinstance(value, RunConfig):
            return load_config(name, overrides)
        with tempfile.TemporaryDirectory(prefix="biokit-") as folder:
            path = Path(folder) / "config.yaml"
            path.write_text(config_to_yaml(value), encoding="utf-8")
            return load_config(path, overrides)


def tell(end: CellEnd) -> None:
    """Say what became of the ranks, and raise where the cell did not end well.

    Raises:
        RunFailed: a rank failed, is gone, or the time was up.
        KeyboardInterrupt: the user interrupted.
    """
    if end.lost or end.groups_ended:
        print(LOST if end.lost else GROUPS_ENDED)
    if end.failure is not None:
        found = f"{failure_card(end.failure).text}\n"
        raise RunFailed("%%ranks", found, "Mend the cause and run the cell again", end.failure)
    if end.interrupted:
        if end.hang is not None:
            display(hang_card(end.hang))
        raise KeyboardInterrupt
    if end.hang is not None:
        found = f"{hang_card(end.hang).text}\n"
        raise RunFailed("%%ranks", found, "Mend the cause, or give more time", None, end.hang)


def show_ranks(pool: Pool) -> Table:
    """Who the ranks are."""
    rows = []
    for member in pool.members:
        state, memory = "gone", 0.0
        with contextlib.suppress(psutil.Error):
            state, memory = member.process.status(), member.process.memory_info().rss / 2**30
        rows.append([str(member.rank), str(member.process.pid), state, f"{memory:.2f} GiB"])
    return Table(["rank", "process", "state", "memory"], rows)


def show_variables(pool: Pool, names: Sequence[str]) -> Table:
    """The variables of these names on each rank."""
    rows, answers = [], pool.show(names)
    for rank in (member.rank for member in pool.members):
        missing = "(not there)" if rank in answers else "(its rank has ended)"
        for name in names:
            about = answers.get(rank, {}).get(name, {"type": missing, "about": "", "text": ""})
            rows.append([name, str(rank), about["type"], about["about"], about["text"]])
    rows.sort(key=lambda row: (names.index(row[0]), int(row[1])))
    return Table(["name", "rank", "type", "form", "value"], rows)


class _Words(argparse.ArgumentParser):
    """The words of a magic; a mistake is an error like any other, not the end of Python."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog=prog, add_help=False, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(self.prog, message, f"See {self.prog.split()[0].lstrip('%').join(('%', '?'))}")

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        for word in words:
            refuse_given_flag(word, self.prog)
        return self.parse_intermixed_args(list(words))


def _number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a number above 0")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a time above 0 s")
    return seconds


def _names(text: str) -> tuple[str, ...]:
    names = tuple(filter(None, (name.strip() for name in text.split(","))))
    if wrong := [name for name in names if not name.isidentifier()]:
        raise argparse.ArgumentTypeError(f"{wrong[0]} is not the name of a variable")
    return names


_CELL, _LINE, _CHECK = _Words("%%ranks"), _Words("%ranks"), _Words("%check_parallel")
for _words in (_CELL, _LINE):
    _words.add_argument("-n", "--nproc-per-node", "--nproc_per_node", dest="num_ranks", type=_number, default=0)
for _words in (_CELL, _LINE):
    _words.add_argument("--run-dir", default="")
_CELL.add_argument("--out", type=_names, default=())
_CELL.add_argument("--with", dest="given", type=_names, default=())
_CELL.add_argument("--timeout", dest="timeout_s", type=_seconds, default=0.0)
_LINE.add_argument("--show", type=_names, default=())
_LINE.add_argument("--restart", action="store_true")
_LINE.add_argument("--stop", action="store_true")
_CHECK.add_argument("config")
_CHECK.add_argument("words", nargs="*")
_CHECK.add_argument("--steps", type=_number, default=0)
PARSERS = {"%%ranks": _CELL, "%ranks": _LINE, "%check_parallel": _CHECK}  # for completion
