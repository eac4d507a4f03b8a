"""Views: every one is PNG and words, whatever the input; curves tell the truth; the live panel stops its run."""

from __future__ import annotations

import base64
import json
import math
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nbclient import NotebookClient

from biokit.errors import DataError, RunError
from biokit.runs import MetricsWriter, RunFolder
from biokit.view import live
from biokit.view.canvas import printable
from biokit.view.live import LivePanel
from biokit.view.molecules import TokenRow, find_hidden, show_molecules, show_random_smiles, show_tokens
from biokit.view.picture import PNG_SIGNATURE, Picture
from biokit.view.training import describe_training, draw_training, follow, read_state, show_training

REPOSITORY = Path(__file__).parents[1]
ASPIRIN = "CC(=O)Oc1ccccc1C(=O)O"
UGLY = [
    "",
    " ",
    "C1CC(",
    "C" * 5000 + "(",
    "c1cc$x$µ漢\x00\n\t",
    "\ud800",
    "🙂" * 50,
    "C" * 30_000,
    "N[C@@H](C)C(=O)" * 500 + "O",
]


class FakeRun:
    """A background run without a process: `code` is what its process would have ended with."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder, self.started = folder, 0.0
        self.code: int | None = None

    def poll(self) -> int | None:
        return self.code

    def raise_on_failure(self) -> None:
        if self.code:
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


# pictures


def test_a_picture_is_a_bundle_of_png_and_words(tmp_path: Path) -> None:
    picture = show_molecules(["CCO"], title="Ethanol")
    bundle = picture._repr_mimebundle_()
    assert base64.b64decode(bundle["image/png"]) == picture.png and picture.png.startswith(PNG_SIGNATURE)
    assert bundle["text/plain"] == repr(picture) == picture.alt == "Ethanol: 1 molecule drawn\n1. CCO"
    assert picture.save(tmp_path / "new" / "a.png").read_bytes() == picture.png
    with pytest.raises(RunError, match=r'the ending is "\.svg"'):
        picture.save(tmp_path / "a.svg")
    with pytest.raises(RunError, match="are not a PNG"):
        Picture(b"GIF89a", "no")


def test_the_same_input_gives_the_same_bytes() -> None:
    assert show_molecules(["CCO", "C("]).png == show_molecules(["CCO", "C("]).png


def test_a_grid_shows_invalid_strings_as_text_and_says_so() -> None:
    picture = show_molecules(["CCO", "C1CC(", ""], ["good", "bad", "empty"])
    assert "3 molecules drawn, 2 of them as text because not valid" in picture.alt
    assert "2. C1CC( (bad) [not valid]" in picture.alt and "3. (empty) (empty) [not valid]" in picture.alt


@pytest.mark.parametrize("text", UGLY)
def test_no_string_breaks_a_grid(text: str) -> None:
    picture = show_molecules([text, ASPIRIN], title=text)
    assert picture.png.startswith(PNG_SIGNATURE)
    assert max(map(len, picture.alt.splitlines()), default=0) < 40_000
    assert show_molecules(["CCO"], [text]).png.startswith(PNG_SIGNATURE)


def test_no_molecules_is_a_picture_too() -> None:
    assert show_molecules([]).alt == "0 molecules drawn"
    assert show_random_smiles([]).png.startswith(PNG_SIGNATURE)
    assert show_tokens("", []).png.startswith(PNG_SIGNATURE)


def test_what_is_not_drawn_is_counted() -> None:
    small, large = show_molecules(["C"] * 8, max_molecules=8), show_molecules(["C"] * 30, max_molecules=8)
    assert "8 molecules drawn, 22 more not drawn" in large.alt
    assert large.size[1] > small.size[1]  # the line that says so


def test_large_molecules_get_larger_tiles() -> None:
    peptide = "N[C@@H](C)C(=O)" * 30 + "O"
    assert show_molecules([peptide, "CCO"]).size[1] > show_molecules(["CCO", "CCO"]).size[1] + 150
    assert show_molecules([ASPIRIN] * 8).size[0] <= 1000


def test_wrong_counts_are_refused() -> None:
    with pytest.raises(DataError, match="2 molecules but 1 legends"):
        show_molecules(["C", "C"], ["one"])
    with pytest.raises(DataError, match="columns=0"):
        show_molecules(["C"], columns=0)
    with pytest.raises(DataError, match="3 tokens but 1 marks"):
        TokenRow("row", ["C", "C", "O"], [True])


def test_token_rows_in_words() -> None:
    tokens = ["^", *ASPIRIN, "&"]
    masked = [*tokens[:3], "<MASK>", *tokens[6:]]
    hidden = find_hidden(tokens, masked)
    picture = show_tokens(ASPIRIN, [TokenRow("Original", tokens, hidden), TokenRow("Masked", masked)])
    assert "Original: ^ C C [(] [=] [O] ) O" in picture.alt and "Masked: ^ C C <MASK> ) O" in picture.alt


def test_hidden_tokens_are_found() -> None:
    assert find_hidden(list("CCO"), ["C", "<MASK>"]) == [False, True, True]
    assert find_hidden(list("CCO"), ["<MASK>", "<MASK>", "O"]) == [True, True, False]
    assert find_hidden(list("CCO"), list("CCO")) == [False] * 3
    assert find_hidden(list("CCO"), ["C", "<MASK>", "<MASK>", "<MASK>", "O"]) == [False, True, False]
    with pytest.raises(DataError, match="does not come from"):
        find_hidden(list("CCO"), ["N", "<MASK>"])
    with pytest.raises(DataError, match="does not come from"):
        find_hidden(list("CCO"), list("CC"))


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_hidden_tokens_explain_any_masking(data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.sampled_from(["C", "c", "(", "[nH]", "1"]), min_size=1, max_size=25))
    masked: list[str] = []
    position = 0
    while position < len(tokens):
        if data.draw(st.booleans()):
            masked += ["<MASK>"] * data.draw(st.integers(1, 3))
            position += data.draw(st.integers(1, 4))
        else:
            masked.append(tokens[position])
            position += 1
    hidden = find_hidden(tokens, masked)
    kept = [token for token, mark in zip(tokens, hidden, strict=True) if not mark]
    assert kept == [token for token in masked if token != "<MASK>"]


def test_random_smiles_of_one_molecule() -> None:
    picture = show_random_smiles([ASPIRIN, "c1(OC(=O)C)c(C(O)=O)cccc1"])
    assert picture.alt.endswith("2. c1(OC(=O)C)c(C(O)=O)cccc1")
    with pytest.raises(DataError, match='random SMILES 2 of 2: "C1CC" is not a molecule'):
        show_random_smiles([ASPIRIN, "C1CC"])
    with pytest.raises(DataError, match="is not the first molecule"):
        show_random_smiles([ASPIRIN, "CCO"])


def test_signs_without_a_glyph_are_written_as_codes() -> None:
    assert printable("C=O µ –") == "C=O µ –"
    assert printable("a\n\x00漢\ud800") == "a\\n\\x00\\u6f22\\ud800"


# curves


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
    import sys

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


def test_the_process_decides_whether_a_run_has_ended(folder: RunFolder) -> None:
    run = FakeRun(folder)
    folder.write_manifest({"status": "finished", "step": 60})
    assert read_state(folder).ended
    assert read_state(run).status == "ending"
    run.code = 0
    assert read_state(run).status == "finished"
    run.code = 1
    assert read_state(run).status == "failed"
    folder.write_manifest({"status": "running", "step": 60})
    run.code = 0
    assert read_state(run).status == "failed"  # it went without a word


def test_an_earlier_training_in_the_folder_is_not_taken_for_this_one(folder: RunFolder) -> None:
    run = FakeRun(folder)
    run.started = time.time() + 1000
    state = read_state(run)
    assert (str(state), state.num_steps) == ("starting: step 0", 0)
    folder.write_manifest({"status": "finished", "step": 60})
    run.code = 0
    assert read_state(run).status == "failed"  # the new one wrote no manifest


# follow


def test_follow_prints_until_the_end(folder: RunFolder, capsys: pytest.CaptureFixture[str]) -> None:
    run = FakeRun(folder)

    def end() -> None:
        folder.write_manifest({"status": "stopped", "step": 60})
        run.code = 0

    timer = threading.Timer(0.3, end)
    timer.start()
    assert follow(run).status == "stopped"
    timer.join()
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("running: step 60 of 100") and out[-1].startswith("stopped: step 60")


def test_follow_is_never_silent_for_two_seconds(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    naps: list[float] = []
    run = FakeRun(folder)

    def nap(seconds: float) -> None:
        naps.append(seconds)
        run.code = 1 if len(naps) == 3 else None

    monkeypatch.setattr(time, "sleep", nap)
    with pytest.raises(RunError, match="the log's tail"):
        follow(run)
    assert len(naps) == 3 and max(naps) < 2.0


def test_follow_of_a_folder_raises_with_the_reason(folder: RunFolder) -> None:
    folder.write_manifest({"status": "failed", "step": 60, "error": "molecules.csv is gone"})
    with pytest.raises(RunError, match=r"failed: molecules\.csv is gone"):
        follow(folder)


def test_an_interrupt_stops_the_run_and_a_second_leaves(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        follow(FakeRun(folder))
    assert folder.stop_requested()


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
    run.code = 0
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
    monkeypatch.setitem(__import__("sys").modules, "ipywidgets", None)
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
    run.code = 0
    assert panel.wait(30)


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
    assert set(output.data) == {"application/vnd.jupyter.widget-view+json", "image/png", "text/plain"}
    assert output.data["text/plain"].startswith("finished: step 60, loss 0.1000")
    assert notebook.cells[1].outputs[0].text.startswith("finished: step 60")
