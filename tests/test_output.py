"""The live output of ranks: whole lines, in order, labelled, masked, soon."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest

from biokit.launch import output
from biokit.launch.output import MAX_LINES, OutputTail
from biokit.runs import RunFolder

LATEST_S = 0.2  # from a rank's print to the line in the notebook


class Ranks:
    """Output files of a run that ranks would write, and what is shown of them."""

    def __init__(self, path: Path, labelled: bool = True) -> None:
        self.folder = RunFolder(path)
        self.files: dict[tuple[int, int], IO[bytes]] = {}
        self.shown: list[str] = []
        self.tail = OutputTail(self.folder, labelled, say=self.shown.append)

    def write(self, rank: int, text: str, life: int = 1) -> None:
        if (rank, life) not in self.files:
            self.folder.life(life).create()
            self.files[rank, life] = self.folder.life(life).output_file(rank).open("ab", buffering=0)
        self.files[rank, life].write(text.encode())

    def look(self, ended: bool = False) -> list[str]:
        self.shown.clear()
        self.tail.look(ended)
        return [line for text in self.shown for line in text.split("\n")]


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[Ranks]:
    made = Ranks(tmp_path)
    yield made
    made.look(ended=True)
    for file in made.files.values():
        file.close()


def test_whole_lines_with_their_rank(ranks: Ranks) -> None:
    assert ranks.look() == []
    ranks.write(0, "a\nb")
    ranks.write(1, "x\n\n")
    assert ranks.look() == ["[rank 0] a", "[rank 1] x", "[rank 1]"]
    ranks.write(0, "c ")
    assert ranks.look() == []
    ranks.write(0, "é\r\nlast")
    assert ranks.look() == ["[rank 0] bc é"]
    assert ranks.look(ended=True) == ["[rank 0] last"]


def test_one_rank_has_no_label(tmp_path: Path) -> None:
    single = Ranks(tmp_path, labelled=False)
    single.write(0, "a\nb\n")
    assert single.look(ended=True) == ["a", "b"]
    single.files[0, 1].close()


def test_a_character_in_two_pieces(ranks: Ranks) -> None:
    ranks.write(0, "")
    for byte in "é\n".encode():
        ranks.files[0, 1].write(bytes([byte]))
        shown = ranks.look()
    assert shown == ["[rank 0] é"]


def test_secrets_are_masked(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_abcdef")
    ranks.write(0, "token hf_abcdef\n 5% hf_abcdef\r")
    assert ranks.look() == ["[rank 0] token ***", "[rank 0]  5% ***"]


def test_a_progress_bar_shows_its_last_state_at_most_once_a_second(
    ranks: Ranks, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    ranks.tail = OutputTail(ranks.folder, True, say=ranks.shown.append)
    shown = []
    for percent in range(100):
        ranks.write(0, f"\r{percent:3}%")
        shown += ranks.look()
        now[0] += 0.125
    assert len(shown) == 13 and shown[:2] == ["[rank 0]   0%", "[rank 0]   8%"]
    ranks.write(0, "\r100%\x1b[A\n")
    assert ranks.look() == ["[rank 0] 100%"]
    ranks.write(0, "\r      \r\n\x1b[32mgreen\x1b[0m\n")
    assert ranks.look() == ["[rank 0] \x1b[32mgreen\x1b[0m"]


def test_an_hour_of_a_progress_bar_is_no_flood(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    ranks.tail = OutputTail(ranks.folder, True, say=ranks.shown.append)
    num_lines = 0
    for second in range(3600):
        now[0] = 1.0 + second
        ranks.write(0, f"\r{second}")
        num_lines += len(ranks.look())
    assert 60 < num_lines < 200


def test_a_flood_is_cut_and_the_rest_is_named(ranks: Ranks) -> None:
    ranks.write(0, "".join(f"line {i}\n" for i in range(3 * MAX_LINES)))
    ranks.write(1, "other\n")
    lines = ranks.look()
    assert len(lines) == MAX_LINES + 1 and lines[MAX_LINES - 1] == f"[rank 0] line {MAX_LINES - 1}"
    assert lines[-1].endswith(str(ranks.folder.life(1).output_file(0).parent))
    ranks.write(0, "more\n")
    assert ranks.look() == []


def test_large_output_and_long_lines(ranks: Ranks) -> None:
    ranks.write(0, "x" * 3_000_000 + "\nend\n")
    lines = ranks.look(ended=True)
    assert lines[-1] == "[rank 0] end" and all(len(line) < 5000 for line in lines)
    assert "more characters)" in lines[0]


def test_the_next_life_follows(ranks: Ranks) -> None:
    ranks.write(0, "first\nbegun")
    assert ranks.look() == ["[rank 0] first"]
    ranks.write(0, "second\n", life=2)
    assert ranks.look() == ["[rank 0] begun", "[life 2]", "[rank 0] second"]
    ranks.write(0, "third\n", life=3)
    assert ranks.look(ended=True) == ["[life 3]", "[rank 0] third"]


def test_agents_are_shown_where_torchrun_itself_prints(tmp_path: Path) -> None:
    folder, shown = RunFolder(tmp_path), []
    folder.life(1).create()
    folder.life(1).agent_log(0).write_text("[default0]:hello\n")
    OutputTail(folder, True, of_agents=True, say=shown.append).look(ended=True)
    assert shown == ["[default0]:hello"]


def test_a_line_is_shown_soon(tmp_path: Path) -> None:
    """From the print in a rank's process to the call that shows it, at the pace of a cell that waits."""
    folder = RunFolder(tmp_path)
    folder.life(1).create()
    delays: list[float] = []
    tail = OutputTail(
        folder, True, say=lambda text: delays.extend(time.time() - float(t.split()[2]) for t in text.split("\n"))
    )
    code = (
        "import sys, time; from pathlib import Path; from biokit.launch.supervision.rank import redirect_output\n"
        "redirect_output(Path(sys.argv[1]))\n"
        "for _ in range(20): print(time.time()); time.sleep(0.03)"
    )
    command = [sys.executable, "-c", code, str(folder.life(1).output_file(0))]
    with subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}) as rank:
        while rank.poll() is None:
            tail.look()
            time.sleep(0.05)
    tail.look(ended=True)
    assert len(delays) == 20 and sorted(delays)[10] <= LATEST_S


def test_a_very_long_line_is_one_line(ranks: Ranks) -> None:
    for _ in range(5):
        ranks.write(0, "x" * 1_000_000)
        assert ranks.look() == []
    ranks.write(0, "\nshort\n")
    long, short = ranks.look() + ranks.look() + ranks.look()
    assert long == f"[rank 0] {'x' * output.MAX_WIDTH}... (4,996,000 more characters)" and short == "[rank 0] short"
