"""What the ranks of a run print, shown live: whole lines, labelled by rank, secrets masked."""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from biokit.runs import LifeFolder, RunFolder
from biokit.secrets import mask
from biokit.view.paths import show_near

MAX_LINES = 2000  # shown of a run
MAX_WIDTH = 4000  # characters shown of a line
READ_BYTES = 1 << 20  # of a file at a look
BAR_EVERY_S = 1.0  # at most, between two states of a progress bar;
BAR_SHARE = 0.05  # and at least this share of the time that the run has taken: an hour's bar is no 3600 lines
_MOVES = re.compile(r"\x1b\[[0-9;?]*[A-Za-ln-z]")  # of the cursor; colours (m) stay
_NUMBER = re.compile(r"(?:rank|node)_(\d+)\.log")


class OutputTail:
    """Prints what has been added to the output files of a run's ranks at each look.

    Args:
        labelled: whether lines begin with their rank.
        first_life: the launch to begin with; later ones follow by themselves.
        of_agents: show what torchrun's agents say instead (torchrun's own `--tee` prints there).
        say: takes the text to show, of one or more whole lines.
    """

    def __init__(
        self,
        folder: RunFolder,
        labelled: bool,
        first_life: int = 1,
        of_agents: bool = False,
        say: Callable[[str], None] = lambda text: print(text, flush=True),
    ) -> None:
        self._folder, self._labelled, self._of_agents, self._say = folder, labelled, of_agents, say
        self._life = first_life
        self._sources: dict[int, _Source] = {}
        self._num_shown = 0
        self._started = time.monotonic()

    def look(self, ended: bool = False) -> None:
        """Show the whole lines that are new.

        Args:
            ended: nothing more will come: show all of it, begun lines too.
        """
        while True:
            is_last = not self._folder.life(self._life + 1).path.is_dir()  # asked first: nothing comes in between
            self._show_life(ended or not is_last)
            if is_last:
                return
            self._life += 1
            self._say(f"[life {self._life}]")

    def begin(self) -> None:
        """Count what is shown anew: another cell of the same run begins. What was too much of the last is left out."""
        if self._num_shown >= MAX_LINES:
            for source in self._sources.values():
                source.skip()
        self._num_shown, self._started = 0, time.monotonic()

    def _show_life(self, ended: bool) -> None:
        for number, path in self._find_files():
            if number not in self._sources:
                self._sources[number] = _Source(path)
        wait_s = max(BAR_EVERY_S, BAR_SHARE * (time.monotonic() - self._started))
        for number, source in sorted(self._sources.items()):
            while self._num_shown < MAX_LINES:
                lines, more = source.read_lines(wait_s, ended)
                self._show(number, lines)
                if not (more and ended):
                    break
        if ended:
            for source in self._sources.values():
                source.close()
            self._sources = {}

    def _show(self, number: int, lines: list[str]) -> None:
        if not lines:
            return
        label = f"[rank {number}] " if self._labelled and not self._of_agents else ""
        shown = lines[: MAX_LINES - self._num_shown]
        self._num_shown += len(shown)
        if self._num_shown == MAX_LINES:
            shown.append(f"... {MAX_LINES:,} lines are shown; all of them are in {self._files_of_life()}")
        self._say("\n".join(f"{label}{line}" if line else label.rstrip() for line in shown))

    def _find_files(self) -> list[tuple[int, Path]]:
        found = [(_NUMBER.fullmatch(path.name), path) for path in self._files_of_life().glob("*.log")]
        return [(int(match[1]), path) for match, path in found if match]

    def _files_of_life(self) -> Path:
        life: LifeFolder = self._folder.life(self._life)
        return (life.agent_log(0) if self._of_agents else life.output_file(0)).parent


class _Source:
    """One file that grows."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._begun = b""
        self._num_cut = 0  # characters of the begun line that are not kept
        self._bar = ""
        self._bar_shown = 0.0

    def read_lines(self, wait_s: float, ended: bool) -> tuple[list[str], bool]:
        """New whole lines, and whether there may be more to read at once.

        Args:
            wait_s: between two states of a progress bar.
            ended: a begun line counts as whole.
        """
        new = self._file.read(READ_BYTES)
        data = self._begun + new
        more = len(new) == READ_BYTES
        end = len(data) if ended and not more else data.rfind(b"\n") + 1
        num_cut = self._num_cut if end else 0
        self._begun, self._num_cut = data[end:], 0 if end else self._num_cut
        self._cut_begun()
        text = mask(data[:end].decode("utf-8", errors="replace")).removesuffix("\n")
        text = _TRACEBACK.sub(lambda found: show_near(found[0]), text)
        whole = zip(text.split("\n"), itertools.chain([num_cut], itertools.repeat(0)), strict=False)
        lines = [seen for line, cut in whole if (seen := _last(line, cut)) is not None] if end else []
        if lines:
            self._bar = ""
        return lines + self._bar_due(wait_s), more

    def _cut_begun(self) -> None:
        """Keep of a very long line what will be shown of it: its begin, or the last states of a bar."""
        if len(self._begun) <= READ_BYTES:
            return
        half = READ_BYTES // 2
        if b"\r" in self._begun:
            self._begun = self._begun[-half:]
        else:
            self._num_cut += len(self._begun[half:].decode("utf-8", errors="ignore"))
            self._begun = self._begun[:half]

    def _bar_due(self, wait_s: float) -> list[str]:
        """The state of a progress bar: a begun line that was written over itself."""
        now = time.monotonic()
        if b"\r" not in self._begun or now - self._bar_shown < wait_s:
            return []
        state = _last(mask(self._begun.decode("utf-8", errors="replace")))
        if not state or state == self._bar:
            return []
        self._bar, self._bar_shown = state, now
        return [state]

    def skip(self) -> None:
        """Go on from the end of the file."""
        self._file.seek(0, os.SEEK_END)
        self._begun, self._num_cut = b"", 0

    def close(self) -> None:
        self._file.close()


_TRACEBACK = re.compile(r'(?<=File )"/[^"\n]+"(?=, line \d)')  # of a notebook, files are shown from its folder


def _last(line: str, num_cut: int = 0) -> str | None:
    """What is seen of a line in the end; None of one that only wiped itself out.

    Args:
        num_cut: characters of the line that are not here.
    """
    states = _MOVES.sub("", line).rstrip("\r").split("\r")
    seen = next((state for state in reversed(states) if state.strip()), "")
    if not seen and len(states) > 1:
        return None
    num_more = len(seen) + num_cut - MAX_WIDTH
    return seen if num_more <= 0 else f"{seen[:MAX_WIDTH]}... ({num_more:,} more characters)"
