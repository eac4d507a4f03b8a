"""The error of a run that ended otherwise than it should: the failure card, wherever it is raised."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from biokit.errors import RunError
from biokit.failures import Failure, read_failure
from biokit.runs import RunFolder
from biokit.stacks import Hang, read_hang
from biokit.view.cards import Card, failure_card, hang_card

TAIL_LINES = 20


class RunFailed(RunError):
    """A run that ended otherwise than it should; IPython shows it as the failure card.

    Attributes:
        failure: why, where the run left word of it.
        hang: where its ranks stood, where the time was up.
    """

    def __init__(
        self, asked: str, found: str, do: str, failure: Failure | None = None, hang: Hang | None = None
    ) -> None:
        super().__init__(asked, found, do)
        self.failure, self.hang = failure, hang
        self._is_shown = False

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return type(self), (self.asked, self.found, self.do, self.failure, self.hang)

    def _render_traceback_(self) -> list[str]:
        """What IPython prints in place of a traceback: nobody's mistake is in the cell that waited."""
        card = card_of(self.failure, self.hang)
        if card is None:
            return [f"{type(self).__name__}: {self}"]
        if not self._is_shown:  # IPython asks twice: for the reader, and for its history
            from IPython.display import display

            display(card)
            self._is_shown = True
        return [f"{type(self).__name__}: {self.found.splitlines()[0]}"]


class Interrupted(KeyboardInterrupt):
    """An interrupt of a cell; IPython shows one line of it, as what it met is nobody's mistake."""

    def _render_traceback_(self) -> list[str]:
        return ["KeyboardInterrupt: the cell was interrupted"]


Interrupted.__name__ = "KeyboardInterrupt"  # what is said of it in a notebook


@contextlib.contextmanager
def told_shortly() -> Iterator[None]:
    """Have a notebook show an interrupt in one line, without what it interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted from None


def card_of(failure: Failure | None, hang: Hang | None) -> Card | None:
    """The failure card; where there is only a hang, where the ranks stood."""
    if failure is not None:
        return failure_card(failure)
    return hang_card(hang) if hang is not None else None


def explain_end(folder: RunFolder, status: str, kind: str) -> RunFailed:
    """The error of a run that has ended with this status.

    Args:
        kind: of its order.
    """
    failure, hang = read_failure(folder), read_hang(folder)
    failure = failure if failure and failure.life == folder.last_life() else None  # an earlier life's is no cause
    hang = hang if hang and hang.life == folder.last_life() else None
    card = card_of(failure, hang)
    found = card.text if card else f"{status}\n{_last_words(folder, kind)}"
    if not folder.path.is_dir():
        return RunFailed(f"run {folder.path}", f"{status}\nIts folder is gone.\n", "Start it again", failure, hang)
    goes_on = "it goes on from its last checkpoint" if kind == "train" else f"see {folder.path}"
    do = f"Mend the cause and start it again: {goes_on}"
    return RunFailed(f"run {folder.path}", f"{found}\n", do, failure, hang)


def _last_words(folder: RunFolder, kind: str) -> str:
    """The end of what was said by whom it may concern, where no card says it."""
    with contextlib.suppress(RunError):
        error = folder.read_manifest().get("error")
        if error and kind == "train":
            return str(error)
    log = folder.logs / "supervisor.log"
    if log.exists():
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join([f"The end of {log}:", *lines[-TAIL_LINES:]])
    return "Nobody said why."
