"""Carries out the order of a run: one launch after another until it finished, was stopped or may not go on.

`python -m biokit.launch.supervision.supervisor RUN_DIR [--node-rank N] [--owner PID]`. Everybody else only reads and
writes files of the run folder; this process alone starts and ends the run's processes, all its descendants.

Asked to end: SIGTERM, SIGUSR2, SIGHUP and the STOP file let a training save a checkpoint, and so does the first SIGINT
in a terminal; any other SIGINT, the time limit and the end of the owner do not.
"""

from __future__ import annotations

import argparse
import contextlib
import enum
import math
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from biokit import failures, stacks
from biokit.errors import BiokitError, RunError
from biokit.launch import states
from biokit.launch.orders import NODES, Order, read_order
from biokit.launch.register import register_run
from biokit.launch.states import SupervisorState, write_state
from biokit.launch.supervision.lives import Life
from biokit.launch.supervision.watchdog import Watchdog
from biokit.launch.tree import become_subreaper, end_tree, list_descendants
from biokit.runs import RunFolder, take_lock
from biokit.secrets import mask_file

EXIT_USER_ERROR = 2
MAX_BACKOFF_S = 60.0
MAX_MASKED = 1 << 28  # bytes of a log


@dataclass(frozen=True)
class Limits:
    """How long a supervisor waits for what, in seconds."""

    checkpoint_s: float = 25.0  # from SIGTERM to the training's checkpoint
    grace_s: float = 5.0  # from SIGTERM to SIGKILL of the processes
    interrupt_s: float = 2.0  # the same after SIGINT
    watchdog_s: float = 10.0  # that an agent may live without its rank, and that a rank may be stopped
    poll_s: float = 0.05
    beat_s: float = 3.0


class Ask(enum.IntEnum):
    """What is wanted of a run, the harder the higher."""

    NOTHING = 0
    STOP = 1  # the STOP file
    TERMINATE = 2
    TIME_OUT = 3
    INTERRUPT = 4
    ORPHAN = 5  # the owner is gone


def supervise(
    folder: RunFolder,
    order: Order,
    node_rank: int = 0,
    owner: int = 0,
    limits: Limits | None = None,
    in_terminal: bool = False,
) -> int:
    """Carry out an order in this process, from its main thread.

    Args:
        node_rank: of this machine, where several have supervisors.
        owner: process that started this one and with which the run ends; 0: none.
        in_terminal: the first Ctrl-C lets a training save a checkpoint; the second one ends it.

    Returns:
        0: finished or stopped; 1: failed; 124: timed out; 130: interrupted.

    Raises:
        RunError: another supervisor is at work in the folder.
    """
    make: Callable[..., Supervisor] = Supervisor
    if order.placement == NODES:
        from biokit.launch.supervision.nodes import supervisor_of_node as make
    supervisor = make(folder, order, node_rank, owner, limits or Limits())
    supervisor.spares_interrupt = in_terminal and order.kind == "train"
    return supervisor.run()


class Supervisor:
    """One supervisor at work."""

    def __init__(self, folder: RunFolder, order: Order, node_rank: int, owner: int, limits: Limits) -> None:
        self.folder, self.order, self.node_rank, self.owner, self.limits = folder, order, node_rank, owner, limits
        self.state = SupervisorState.of_this_process(order.max_lives)
        self.spares_interrupt = False  # the first one asks for a checkpoint
        self._was_interrupted = False
        self._failure: failures.Failure | None = None
        self._spared: list[psutil.Process] = []
        self._signal = Ask.NOTHING
        self._asked_before = Ask.NOTHING
        self._stop_looked_at = 0.0
        self._terminated = 0  # the life that was sent SIGTERM
        self._term_at = math.inf
        self._end_at = time.monotonic() + order.timeout_s if order.timeout_s > 0 else math.inf

    def run(self) -> int:
        """From the first life to the last."""
        self._spared = list_descendants()
        become_subreaper()
        with _locked(self.folder, self.node_rank), self._signals():
            outcome = states.FAILED
            self._register()
            try:
                outcome = self._run_lives()
            except BiokitError as error:
                say(str(error))
            except BaseException:
                say(f"the supervisor itself failed:\n{traceback.format_exc()}")
            finally:
                if left := end_tree(grace_s=0, spared=self._spared):
                    say(f"could not be ended: processes {', '.join(str(process.pid) for process in left)}")
                if self.node_rank == 0:
                    self.folder.clear_stop()
                code = states.EXIT_CODES[outcome]
                say(f"ended: {outcome}, exit code {code}")
                self._write(state=states.ENDED, outcome=outcome, ended=time.time(), code=code, next_life_at=0.0)
        return code

    def _run_lives(self) -> str:
        first = self.folder.last_life() + 1
        self._write(state=states.STARTING, first_life=first)
        backoff_s = self.order.backoff_s
        for number in range(first, first + self.order.max_lives):
            if self._ask():
                return self._end_without_life()
            outcome = self._run_life(number)
            if outcome != states.FAILED:
                return outcome
            if self._ask() or number == first + self.order.max_lives - 1 or self._is_hopeless(number):
                break
            self._wait(min(backoff_s, MAX_BACKOFF_S), number + 1)
            backoff_s *= 2
        return states.FAILED

    def _run_life(self, number: int) -> str:
        """One launch; how it ended."""
        self._write(state=states.RUNNING, life=number, next_life_at=0.0)
        life = Life(self.folder, self.order, number, self.node_rank, self._spared)
        say(f"life {number}: begun")
        watchdog = Watchdog(life, self.limits.watchdog_s)
        outcome = ""
        while not outcome and not life.is_over:
            outcome = self._look_after(life, watchdog)
            time.sleep(self.limits.poll_s)
        if not outcome:
            outcome = self._judge(life)
            life.end(self.limits.grace_s)  # what the program left running
        return self._conclude(life, outcome)

    def _conclude(self, life: Life, outcome: str) -> str:
        """Leave what there is to tell of a life that is over; its outcome."""
        self._mask(life)
        say(f"life {life.number}: {outcome}, exit codes of its agents: {life.codes()}")
        if outcome in (states.FAILED, states.TIMED_OUT):
            self._note_failure(life.number)
        return outcome

    def _look_after(self, life: Life, watchdog: Watchdog) -> str:
        """Do what is asked, and end a life that has got stuck; its outcome where that ended it, else empty."""
        self._beat()
        ask = self._ask()
        if ask >= Ask.TIME_OUT:
            return self._cut(life, ask)
        if ask in (Ask.STOP, Ask.TERMINATE):
            if not self.order.saves_on_sigterm:
                life.end(self.limits.grace_s)
                return states.STOPPED
            self._ask_to_save(life)
            if time.monotonic() > self._term_at + self.limits.checkpoint_s:
                say(f"no checkpoint within {self.limits.checkpoint_s:g} s")
                life.end(self.limits.grace_s)
                return states.INTERRUPTED
        if hang := watchdog.look():
            self._note_hang(life, hang)
        if watchdog.fault:
            say(f"life {life.number}: {watchdog.fault}")
            if watchdog.rank_is_stopped:
                self._note_hang(life, watchdog.fault)
            life.end(0)
            return self._judge(life) if set(life.codes()) == {0} else states.FAILED
        return ""

    def _ask_to_save(self, life: Life) -> None:
        """Of a training: by the STOP file, which is its own; of a program that is one, elsewhere, by SIGTERM, once."""
        if self.order.kind == "train":
            if not self.folder.stop_requested():  # again and again: a training that just starts clears an older one
                self.folder.request_stop()
        elif self._terminated != life.number:
            self._terminated = life.number
            self._term_at = min(self._term_at, time.monotonic())
            life.terminate()

    def _cut(self, life: Life, ask: Ask) -> str:
        """End a life without waiting for a checkpoint."""
        if ask == Ask.TIME_OUT:
            self._note_hang(life, f"the run did not end in {self.order.timeout_s:g} s")
        life.end(self.limits.interrupt_s if ask == Ask.INTERRUPT else self.limits.grace_s)
        return states.TIMED_OUT if ask == Ask.TIME_OUT else states.INTERRUPTED

    def _judge(self, life: Life) -> str:
        """The outcome of a life that ended by itself."""
        if self._terminated == life.number:
            return states.STOPPED
        status = life.training_status()
        if any(life.codes()) and not (self._ask() and status in (states.STOPPED, states.FINISHED)):
            return states.FAILED
        return states.STOPPED if status == states.STOPPED else states.FINISHED

    def _end_without_life(self) -> str:
        """Asked to end between two lives, or before the first."""
        ask = self._ask()
        if ask == Ask.TIME_OUT:
            return states.TIMED_OUT
        return states.INTERRUPTED if ask > Ask.TIME_OUT or self._was_interrupted else states.STOPPED

    def _wait(self, seconds: float, number: int) -> None:
        """Until the next life is due, or something is asked."""
        say(f"life {number} follows in {seconds:g} s")
        self._write(state=states.WAITING, next_life_at=time.time() + seconds)
        due = time.monotonic() + seconds
        while time.monotonic() < due and not self._ask():
            self._beat()
            time.sleep(self.limits.poll_s)

    def _ask(self) -> Ask:
        """The hardest that is wanted now; what was once wanted stays so."""
        now = time.monotonic()
        ask = max(self._signal, self._asked_before)
        if now - self._stop_looked_at > 0.25:
            self._stop_looked_at = now
            if self.folder.stop_requested():
                ask = max(ask, Ask.STOP)
            if not self.folder.launch_file.exists() and not self.folder.path.is_dir():  # removed: nobody would find it
                ask = max(ask, Ask.INTERRUPT)
        if now > self._end_at:
            ask = max(ask, Ask.TIME_OUT)
        if self.owner and os.getppid() != self.owner:
            ask = Ask.ORPHAN
        if ask > self._asked_before:
            say(f"asked to end: {ask.name.lower().replace('_', ' ')}")
            if ask >= Ask.TERMINATE:
                self._term_at = min(self._term_at, now)
        self._asked_before = ask
        return ask

    def _is_hopeless(self, number: int) -> bool:
        """Whether a next life would fail the same way: the user's mistake, on every rank that ended by itself."""
        failure = self._failure
        if failure is None or failure.life != number or not failure.causes:
            return False
        mistakes = {cause.kind.rpartition(".")[2] for cause in failure.causes}
        if not mistakes <= {"ConfigError", "EngineError"}:
            return False
        say("no further life: it would fail the same way")
        return True

    def _note_failure(self, number: int) -> None:
        try:
            self._failure = failures.collect_failure(self.folder, number)
            failures.save_failure(self.folder, self._failure)
            say(f"life {number}: {self._failure.headline}")
        except Exception:  # the lives go on, whatever cannot be read
            say(f"life {number}: why it failed cannot be told:\n{traceback.format_exc()}")

    def _mask(self, life: Life) -> None:
        """Take out secrets that came past the ranks' own streams: from their children, from libraries in C."""
        for path in (*life.files.path.glob("output/*.log"), *life.files.path.glob("agents/*.log")):
            try:
                if path.stat().st_size <= MAX_MASKED:
                    mask_file(path)
            except OSError as error:
                say(f"{path.name} was not looked through for secrets ({error})")

    def _note_hang(self, life: Life, reason: str) -> None:
        try:
            stacks.save_hang(self.folder, stacks.find_hang(life.files, reason))
        except Exception:
            say(f"life {life.number}: where the ranks stand cannot be told:\n{traceback.format_exc()}")

    def _register(self) -> None:
        try:
            register_run(self.folder)
        except OSError as error:
            say(f"the run is not in the list of runs ({error})")

    def _beat(self) -> None:
        if time.time() - self.state.beat > self.limits.beat_s:
            self._write()

    def _write(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self.state, name, value)
        try:
            write_state(self.folder, self.state, self.node_rank)
        except OSError as error:  # a full disk: the run goes on
            say(f"the supervisor's file cannot be written ({error})")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Note what signals ask for; only in the main thread."""
        asks = {
            signal.SIGTERM: Ask.TERMINATE,
            signal.SIGUSR2: Ask.TERMINATE,
            signal.SIGHUP: Ask.TERMINATE,
            signal.SIGINT: Ask.INTERRUPT,
        }

        def note(number: int, _frame: Any) -> None:
            ask = asks[signal.Signals(number)]
            if ask == Ask.INTERRUPT and self.spares_interrupt:
                self.spares_interrupt, self._was_interrupted, ask = False, True, Ask.TERMINATE
            self._signal = max(self._signal, ask)

        if threading.current_thread() is not threading.main_thread():
            yield
            return
        old = {number: signal.signal(number, note) for number in asks}
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)


@contextlib.contextmanager
def _locked(folder: RunFolder, node_rank: int) -> Iterator[None]:
    """Hold a run for one supervisor a node; the lock ends with the process, however it ends."""
    path = folder.supervisor_file(node_rank).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = take_lock(path)
    except OSError as error:
        busy = isinstance(error, BlockingIOError)
        found = f"{'another supervisor is at work in it' if busy else 'it cannot be locked'} ({error.strerror})"
        raise RunError(f"run {folder.path}", found, "Stop it, or give another run_dir") from error
    with lock:
        yield


def say(text: str) -> None:
    """A line of the supervisor's log."""
    with contextlib.suppress(OSError):  # a full disk must not end the run
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="biokit.launch.supervision.supervisor", description=__doc__)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--node-rank", type=int, default=0)
    parser.add_argument("--owner", type=int, default=0, help="process with which the run ends")
    options = parser.parse_args()
    folder = RunFolder(options.run_dir)
    try:
        return supervise(folder, read_order(folder), options.node_rank, options.owner)
    except BiokitError as error:
        say(str(error))
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main())
