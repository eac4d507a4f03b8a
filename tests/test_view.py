"""Curves tell the truth in PNG and words; a run is followed to its end; the live panel stops it."""

from __future__ import annotations

import itertools
import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from biokit.errors import RunError
from biokit.runs import MetricsWriter, RunFolder
from biokit.view import live
from biokit.view.live import LivePanel
from biokit.view.picture import PNG_SIGNATURE
from biokit.view.training import RunState, describe_training, draw_training, follow, read_state, show_training

REPOSITORY = Path(__file__).parents[1]


class FakeRun:
    """A run that knows whether it is alive: it says so in `status`."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.started, self.status = folder, 0.0, "running"

    def raise_on_failure(self) -> None:
        if self.status == "failed":
            raise RunError(f"run {self.folder.path}", "the log's tail", "Mend it")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    """A run of 60 steps, still running, one second a step, with two validation points and one loss not finite."""
    run = RunFolder(tmp_path / "run")
    run.create()
    run.write_manifest({"status": "running", "step": 0, "train_iters": 100})
    _write_steps(run, range(1, 61))
    return run


def _write_steps(run: RunFolder, steps: range) -> None:
    lines = []
    for step in steps:
        line = {"step": step, "loss": 6.0 / step, "lr": 1e-3, "token_accuracy": step / 100, "tokens_per_s": 500.0}
        line |= {"val_loss": 6.5 / step} if step % 30 == 0 else {}
        lines.append(line | {"loss": math.nan} if step == 7 else line)
    writer = MetricsWriter(run, resume_step=10**9)
    writer.close()
    with run.metrics_file().open("a") as file:
        file.writelines(json.dumps({**line, "time": 1000.0 + line["step"]}) + "\n" for line in lines)


def _wait_until(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the awaited state did not come"
        time.sleep(0.02)


def test_the_curve_in_words(folder: RunFolder) -> None:
    picture = show_training(folder, title="Run A")
    lines = picture.alt.splitlines()
    assert lines[0] == "Run A: steps 1 to 60"
    assert lines[1] == ("loss (nats per token): 6 first, 0.1 last, 0.1 lowest, 6 highest (1 not finite, not drawn)")
    assert lines[2].startswith("loss (nats per token) on the validation part: 0.2167 first, 0.1083 last")
    assert picture.png.startswith(PNG_SIGNATURE)


def test_raw_points_are_drawn_beside_their_mean(folder: RunFolder) -> None:
    lines = folder.read_metrics()
    axes = draw_training(lines).axes[0]
    raw, smooth, validation = axes.get_lines()
    finite = [line for line in lines if math.isfinite(line["loss"])]
    assert list(raw.get_xdata()) == [line["step"] for line in finite]
    assert list(raw.get_ydata()) == [line["loss"] for line in finite]
    assert smooth.get_label() == "mean of the last 2"
    assert smooth.get_ydata()[5] == pytest.approx((6 / 6 + 6 / 8) / 2)  # of steps 6 and 8, drawn at 8: 7 is NaN
    assert smooth.get_xdata()[5] == 8
    assert list(validation.get_xdata()) == [30, 60]


def test_scales(folder: RunFolder) -> None:
    assert draw_training(folder.read_metrics(), scale="log").axes[0].get_yscale() == "log"
    with pytest.raises(RunError, match='scale is "cubic"'):
        show_training(folder, scale="cubic")


def test_long_runs_are_thinned_and_say_so() -> None:
    lines = [{"step": step, "loss": 1.0} for step in range(1, 10_001)]
    raw = draw_training(lines).axes[0].get_lines()[0]
    assert raw.get_label() == "1 step in 3"
    assert len(raw.get_xdata()) == 3334


@pytest.mark.parametrize("lines", [
    [],
    [{"step": 1, "loss": math.nan}],
    [{"step": 1, "loss": 0.0, "lr": 0.0}],
    [{"step": 1, "loss": -1.0}, {"step": 2, "loss": math.inf}],
    [{"step": 1, "val_loss": 2.0}],
])  # fmt: skip
@pytest.mark.parametrize("scale", ["linear", "log"])
def test_odd_metrics_still_give_a_picture(tmp_path: Path, lines: list[dict[str, Any]], scale: str) -> None:
    run = RunFolder(tmp_path / "run")
    run.create()
    run.metrics_file().write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert show_training(run, scale=scale).png.startswith(PNG_SIGNATURE)
    assert describe_training(lines).startswith("Training curve: ")


def test_no_run_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="there is no such run folder"):
        show_training(tmp_path / "nowhere")


def test_no_global_matplotlib_state(folder: RunFolder) -> None:
    code = (
        "import sys; from biokit.view.training import show_training, read_state; from biokit.view import live;"
        "assert 'matplotlib' not in sys.modules and 'ipywidgets' not in sys.modules;"
        f"read_state({str(folder.path)!r}); assert 'matplotlib' not in sys.modules;"
        f"show_training({str(folder.path)!r}); assert 'matplotlib.pyplot' not in sys.modules"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


# state


def test_state_has_step_loss_and_time_left(folder: RunFolder) -> None:
    state = read_state(folder)
    assert (state.status, state.step, state.num_steps, state.seconds_left) == ("running", 60, 100, 40.0)
    assert str(state) == "running: step 60 of 100, loss 0.1000, about 40 s left"
    folder.request_stop()
    assert read_state(folder).status == "stopping"


def test_the_run_decides_whether_it_has_ended(folder: RunFolder) -> None:
    run = FakeRun(folder)
    folder.write_manifest({"status": "finished", "step": 60})
    assert read_state(folder).ended
    assert read_state(run).status == "running"
    for status in ("finished", "failed", "lost", "timed out", "interrupted"):
        run.status = status
        assert (read_state(run).status, read_state(run).ended, read_state(run).step) == (status, True, 60)


def test_an_earlier_training_in_the_folder_is_not_taken_for_this_one(folder: RunFolder) -> None:
    run = FakeRun(folder)
    run.started, run.status = time.time() + 1000, "starting"
    state = read_state(run)
    assert (str(state), state.num_steps) == ("starting", 0)


# follow


def test_follow_prints_until_the_end(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run = FakeRun(folder)

    def end() -> None:
        folder.write_manifest({"status": "stopped", "step": 60})
        run.status = "stopped"

    timer = threading.Timer(0.3, end)
    timer.start()
    assert follow(run).status == "stopped"
    timer.join()
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("running: step 60 of 100") and out[-1].startswith("stopped: step 60")


def test_follow_is_never_silent_for_two_seconds(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    now, said = [0.0], [0.0]
    run = FakeRun(folder)

    def nap(seconds: float) -> None:
        now[0] += seconds
        run.status = "failed" if now[0] > 5 else "running"

    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monkeypatch.setattr(time, "sleep", nap)
    monkeypatch.setattr("builtins.print", lambda *_, **__: said.append(now[0]))
    with pytest.raises(RunError, match="the log's tail"):
        follow(run)
    assert len(said) > 4 and max(after - before for before, after in itertools.pairwise(said)) < 1.6


def test_follow_of_a_folder_raises_with_the_reason(folder: RunFolder) -> None:
    folder.write_manifest({"status": "failed", "step": 60, "error": "molecules.csv is gone"})
    with pytest.raises(RunError, match=r"failed: molecules\.csv is gone"):
        follow(folder)


def test_an_interrupt_stops_the_run_and_a_second_leaves(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []

    def nap(seconds: float) -> None:
        naps.append(seconds)
        raise KeyboardInterrupt

    monkeypatch.setattr(time, "sleep", nap)
    with pytest.raises(KeyboardInterrupt):
        follow(FakeRun(folder))
    assert folder.stop_requested() and len(naps) == 2


def test_a_stop_that_a_beginning_training_cleared_is_asked_for_again(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    naps: list[float] = []
    run = FakeRun(folder)

    def nap(seconds: float) -> None:
        naps.append(seconds)
        if len(naps) == 1:
            raise KeyboardInterrupt
        if len(naps) == 2:
            folder.clear_stop()
        elif folder.stop_requested():
            run.status = "stopped"

    monkeypatch.setattr(time, "sleep", nap)
    monkeypatch.setattr("biokit.view.training.LINE_EVERY_S", 0.01)
    assert follow(run, timeout_s=5).status == "stopped"


def test_an_interrupt_leaves_at_once_what_is_not_to_stop(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        follow(FakeRun(folder), stops=False)
    assert not folder.stop_requested()


def test_an_interrupt_while_the_folder_is_read_stops_too(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[int] = []

    def look(run: FakeRun) -> RunState:
        looks.append(1)
        if len(looks) == 1:
            raise KeyboardInterrupt
        run.status = "stopped"
        return read_state(run)

    monkeypatch.setattr("biokit.view.training.read_state", look)
    assert follow(FakeRun(folder)).status == "stopped" and folder.stop_requested()


def test_follow_gives_up_in_time(folder: RunFolder) -> None:
    with pytest.raises(RunError, match="still runs after 0 s"):
        follow(folder, timeout_s=0)


# the live panel


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "REFRESH_S", 0.05)
    monkeypatch.setattr(live, "DRAWING_SHARE", 1.0)


@pytest.mark.usefixtures("fast")
def test_the_button_stops_and_the_panel_ends_by_itself(folder: RunFolder) -> None:
    run = FakeRun(folder)
    panel = LivePanel(run)
    before = panel.picture.png
    _write_steps(folder, range(61, 71))
    _wait_until(lambda: "step 70 of 100" in panel._label.value)
    assert bytes(panel._image.value) != before
    panel._button.click()
    assert folder.stop_requested() and panel._button.disabled
    folder.clear_stop()  # as a training that only now starts would
    _wait_until(folder.stop_requested)
    folder.write_manifest({"status": "stopped", "step": 70})
    run.status = "stopped"
    assert panel.wait(30)
    assert panel._label.value.startswith("stopped: step 70") and panel._button.description == "Run stopped"


@pytest.mark.usefixtures("fast")
def test_the_panel_is_widget_png_and_words(folder: RunFolder) -> None:
    folder.write_manifest({"status": "finished", "step": 60})
    panel = LivePanel(folder)
    assert panel.wait(30)
    bundle = panel._repr_mimebundle_()
    assert set(bundle) == {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"}
    assert bundle["text/plain"].startswith("finished: step 60") and "loss (nats per token)" in bundle["text/plain"]


@pytest.mark.usefixtures("fast")
def test_the_panel_without_widgets_is_png_and_words(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    folder.write_manifest({"status": "finished", "step": 60})
    panel = LivePanel(folder)
    panel.wait(30)
    assert set(panel._repr_mimebundle_()) == {"image/png", "text/plain"}
    panel.stop()


@pytest.mark.usefixtures("fast")
def test_a_torn_metrics_file_does_not_end_the_panel(folder: RunFolder) -> None:
    run = FakeRun(folder)
    panel = LivePanel(run)
    good = folder.metrics_file().read_bytes()
    folder.metrics_file().write_bytes(b"{broken}\n")
    time.sleep(0.3)
    folder.metrics_file().write_bytes(good)
    _write_steps(folder, range(61, 63))
    _wait_until(lambda: panel.state.step == 62)
    folder.write_manifest({"status": "finished", "step": 62})
    run.status = "finished"
    assert panel.wait(30)


def test_python_can_end_while_a_panel_draws(folder: RunFolder) -> None:
    code = (  # what is registered first runs last
        "import atexit, os; atexit.register(lambda: os._exit(3 if panel._thread.is_alive() else 0));"
        f"from biokit.view.live import LivePanel; panel = LivePanel({str(folder.path)!r})"
    )
    assert os.spawnv(os.P_WAIT, sys.executable, [sys.executable, "-c", code]) == 0


def test_an_executed_notebook_keeps_the_last_picture(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As papermill runs it: the output of the panel's cell is replaced by the final curve when the run ends."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [
        nbformat.v4.new_code_cell(
            "from biokit.runs import RunFolder\nfrom biokit.view.live import LivePanel\n"
            f"run = RunFolder({str(folder.path)!r})\npanel = LivePanel(run)\npanel"
        ),
        nbformat.v4.new_code_cell(
            "from biokit.view.training import follow\nrun.write_manifest({'status': 'finished', 'step': 60})\n"
            "state = follow(run)\nassert panel.wait(30)"
        ),
    ]
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert output.output_type == "display_data"
    assert set(output.data) == {"image/png", "text/plain"}
    assert output.data["text/plain"].startswith("finished: step 60, loss 0.1000")
    assert notebook.cells[1].outputs[0].text.startswith("finished: step 60")
