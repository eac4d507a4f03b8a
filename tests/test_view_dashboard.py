"""The dashboard: what it reads of many ranks, what it draws of it, and that it follows a run to its end."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from biokit.endings import RankError
from biokit.errors import RunError
from biokit.failures import Failure, save_failure
from biokit.runs import RunFolder
from biokit.view import dashboard, live
from biokit.view.dashboard import Dashboard, Spread, draw_dashboard, read_ranks, show_dashboard, spread_over
from biokit.view.picture import PNG_SIGNATURE
from biokit.view.training import RunState, read_state

NOTHING = Spread((), (), ())


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run on three ranks, of which rank 1 is slow and takes ever more memory."""
    run = RunFolder(tmp_path / "run")
    run.create()
    run.write_manifest({"status": "running", "step": 4, "train_iters": 10, "layout": {"world_size": 3}})
    for rank in range(3):
        write_lines(run, rank, range(1, 5))
    return run


def write_lines(run: RunFolder, rank: int, steps: range, **more: Any) -> None:
    with run.metrics_file(rank).open("a") as file:
        for step in steps:
            slow = rank == 1
            line = {"step": step, "loss": 6.0 / step, "tokens_per_s": 100.0, "step_s": 0.1 + 0.1 * slow + 0.01 * rank}
            line |= {"memory_bytes": 2**30 * (1 + slow * step / 4), "time": 1000.0 + step, **more}
            file.write(json.dumps(line) + "\n")


def wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the awaited state did not come"
        time.sleep(0.02)


def test_the_steps_that_all_ranks_have(folder: RunFolder) -> None:
    write_lines(folder, 0, range(5, 7))  # one is ahead
    with folder.metrics_file(2).open("a") as file:
        file.write('{"step": 5, "step_s": 0.')
    write_lines(folder, 3, range(1, 3))  # of an earlier layout with more ranks
    seconds = spread_over(read_ranks(folder), "step_s")
    assert (seconds.ranks, seconds.steps) == ((0, 1, 2), (1, 2, 3, 4))
    assert seconds.ends(3) == pytest.approx((0.1, 0.12, 0.21))
    assert seconds.often_most == (1, 1.0)
    folder.manifest_file.unlink()  # then all there are
    assert spread_over(read_ranks(folder), "step_s").steps == (1, 2)


def test_a_rank_stands_out_where_it_is_no_chance() -> None:
    even = Spread((0, 5), (1, 2, 3, 4), ((1.0, 2.0, 2.0, 1.0), (2.0, 1.0, 1.0, 2.0)))
    assert even.often_most == (-1, 0.0)
    assert Spread((0, 5), (1, 2), ((1.0, 1.0), (2.0, 2.0))).often_most == (5, 1.0)


def test_of_long_files_the_ends_are_read(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "MAX_BYTES", 3 * 300)
    steps = spread_over(read_ranks(folder), "step_s").steps
    assert 0 < len(steps) < 4 and steps[-1] == 4


def test_ranks_that_do_not_tell_are_left_out(folder: RunFolder) -> None:
    folder.metrics_file(1).write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "step_s": NaN}\n')
    assert spread_over(read_ranks(folder), "step_s").ranks == (0, 2)
    assert spread_over(read_ranks(folder), "no_such_key") == NOTHING


def test_what_is_drawn(folder: RunFolder) -> None:
    ranks = read_ranks(folder)
    seconds, memory = spread_over(ranks, "step_s"), spread_over(ranks, "memory_bytes")
    figure = draw_dashboard(folder.read_metrics(), seconds, memory, ["head $x^", "second"])
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == [
        "loss (nats per token)",
        "tokens per second",
        "a rank's own seconds a step, 3 ranks",
        "memory a rank (GiB)",
    ]
    (median,) = figure.axes[2].get_lines()
    assert list(median.get_ydata()) == pytest.approx([0.12] * 4)
    (band,) = figure.axes[2].collections
    assert band.get_label() == "least to most (most: rank 1 in 100% of the steps)"
    lines = figure.axes[3].get_lines()
    assert [line.get_label() for line in lines] == ["rank 0", "rank 1", "rank 2"]
    assert list(lines[1].get_ydata()) == [1.25, 1.5, 1.75, 2.0]
    assert draw_dashboard([], NOTHING, NOTHING, [""]).axes[3].texts[0].get_text() == "not in the metrics yet"


def test_many_ranks_are_a_band(folder: RunFolder) -> None:
    memory = Spread(tuple(range(9)), (1, 2), tuple((float(2**20 * rank),) * 2 for rank in range(9)))
    axes = draw_dashboard([], NOTHING, memory, [""]).axes[3]
    assert axes.get_title(loc="left") == "memory a rank (MiB)" and len(axes.get_lines()) == 1
    assert list(axes.get_lines()[0].get_ydata()) == [4.0, 4.0]


def test_the_dashboard_in_words(folder: RunFolder) -> None:
    picture = show_dashboard(folder, read_state(folder))
    assert picture.png.startswith(PNG_SIGNATURE)
    lines = picture.alt.splitlines()
    assert lines[0].startswith("running: step 4 of 10") and lines[2].startswith(
        "loss (nats per token): 6 first, 1.5 last"
    )
    assert lines[-2:] == [
        "a rank's own seconds at step 4: 0.1 least, 0.12 median, 0.21 most of 3 ranks; "
        "slowest in 100% of the steps: rank 1",
        "memory a rank: 1 GiB least, 2 GiB most (rank 1)",
    ]


def test_a_failed_run_says_why(folder: RunFolder) -> None:
    cause = RankError(1, 1.0, "h", "ValueError", "x\x00$^$")
    save_failure(folder, Failure("rank 1 failed: $^$ 漢", (cause,), (), 1))
    failed = RunState("failed", 4, 10, 1.5, 0.0)
    assert show_dashboard(folder, failed).alt.splitlines()[1] == "rank 1 failed: $^$ 漢"
    running = RunState("running", 4, 10, 1.5, 0.0)  # a new life: that failure is past
    assert "rank 1 failed" not in show_dashboard(folder, running).alt
    folder.failure_file.write_text("{torn")
    assert show_dashboard(folder, failed).alt.splitlines()[0] == "failed: step 4 of 10, loss 1.5000"


@pytest.mark.parametrize(
    "line", ["[]", "{}", '{"step": "x"}', '{"step": 1e400, "step_s": []}', "\x00", '{"step": 1' * 9]
)
def test_odd_lines_do_not_end_it(folder: RunFolder, line: str) -> None:
    for rank in (0, 1, 2):
        folder.metrics_file(rank).write_text(f"{line}\n" + '{"step": 2, "loss": 1.0, "step_s": 1.0}\n')
    ranks = read_ranks(folder)
    assert spread_over(ranks, "step_s").steps == (2,)
    assert spread_over(ranks, "memory_bytes") == NOTHING
    folder.write_manifest({"layout": line})
    assert read_ranks(folder) == ranks


def test_no_run_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no such run folder"):
        Dashboard(tmp_path / "nowhere")


def test_it_follows_a_run_that_lives_elsewhere(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "REFRESH_S", 0.05)
    monkeypatch.setattr(live, "DRAWING_SHARE", 1.0)
    board = Dashboard(folder.path)
    before = board.picture.png
    code = (  # another process writes
        "import sys; from biokit.runs import MetricsWriter, RunFolder; folder = RunFolder(sys.argv[1])\n"
        "for rank in range(3):\n    writer = MetricsWriter(folder, rank, resume_step=4)\n"
        "    writer.write({'step': 5, 'loss': 1.0, 'step_s': 9.0, 'memory_bytes': 2**20})\n    writer.close()\n"
    )
    subprocess.run([sys.executable, "-c", code, str(folder.path)], check=True)
    wait_until(lambda: "own seconds at step 5: 9 least" in board.picture.alt)
    assert board.picture.alt.startswith("run\n")  # its name: the state stands beside the button
    assert bytes(board._image.value) != before
    board._button.click()
    assert folder.stop_requested()
    folder.write_manifest({"status": "stopped", "step": 5, "layout": {"world_size": 3}})
    assert board.wait(30) and board.picture.alt.startswith("stopped: step 5")
    bundle = board._repr_mimebundle_()
    assert {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"} == set(bundle)
    assert repr(board).startswith("Dashboard(")


def test_without_widgets_it_is_a_png(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    folder.write_manifest({"status": "finished", "step": 4})
    board = Dashboard(folder)
    board.wait(30)
    assert set(board._repr_mimebundle_()) == {"image/png", "text/plain"}
