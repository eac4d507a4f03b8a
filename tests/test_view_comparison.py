"""Curves of several runs beside one another: the differences that the table names are those of the metrics."""

import base64
import json
import math
import re

import pytest

from biokit.errors import RunError
from biokit.parallel.grid import Layout
from biokit.runs import RunFolder
from biokit.view.comparison import FLOAT_EPS, compare_curves, difference_table, loss_bound, summarize_run
from biokit.view.picture import PNG_SIGNATURE

LOSSES = [6.0, 5.0, 4.0]


@pytest.fixture
def make_run(tmp_path):
    def make(name, losses, layout=None, first_step=1):
        run = RunFolder(tmp_path / name)
        run.create()
        run.write_manifest({"status": "finished", "layout": (layout or Layout()).as_dict()})
        lines = [
            {"step": first_step + i, "loss": loss, "num_tokens": 100, "tokens_per_s": 1.0 if not i else 50.0, "time": i}
            for i, loss in enumerate(losses)
        ]
        run.metrics_file().write_text("".join(json.dumps(line) + "\n" for line in lines))
        return run

    return make


def test_a_run_in_short(make_run):
    found = summarize_run(make_run("a", LOSSES, Layout("ThreeD", tensor=2, pipeline=2)))
    assert (found.layout, found.num_processes, found.step_s) == ("ThreeD x tp2 x pp2", 4, 2.0)  # the first took 100 s
    assert found.losses == {1: 6.0, 2: 5.0, 3: 4.0}
    assert summarize_run(make_run("two", [6.0, 5.0])).step_s == 2.0
    assert summarize_run(make_run("one", [6.0])).step_s == 100.0


def test_the_table_names_the_largest_difference(make_run):
    others = {
        "near": make_run("near", [6.0, 5.0 - 2e-7, 4.0 + 1e-7], Layout("DDP", data=2)),
        "far": make_run("far", [6.0, 5.0, 4.001]),
    }
    table = difference_table(make_run("reference", LOSSES), others)
    near, far = table.rows
    assert near.largest == pytest.approx(2e-7, rel=1e-6) and (near.step, near.num_steps) == (2, 3)
    assert near.bound == loss_bound({1: 6.0, 2: 5.0, 3: 4.0}) == 7 * 6.0 * FLOAT_EPS
    assert near.within and not far.within and not table.within
    head, reference, first, second = repr(table).splitlines()
    assert head.split()[:2] == ["run", "strategy"] and reference.startswith("the reference  Single")
    assert re.search(r"near +DDP x dp2 +2 +2\.00 s +3 +2\.0e-07 at step 2 +5\.0e-06 +within$", first)
    assert second.endswith("OUTSIDE")


def test_the_bound_can_tell_a_wrong_layout_from_a_right_one():
    """Over 12 steps of molbart mini: a mean of means was off by 8.7e-4, right orders of the sums by at most 3.7e-7."""
    bound = loss_bound(dict.fromkeys(range(1, 13), 6.0))
    assert 10 * 3.7e-7 < bound < 8.7e-4 / 10


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_outside(make_run, value):
    table = difference_table(make_run("reference", LOSSES), {"odd": make_run("odd", [6.0, value, 5.0])})
    assert not table.within and table.rows[0].step == 2


def test_a_notebook_gets_html_and_words(make_run):
    table = difference_table(make_run("reference", LOSSES), {"<b>&": make_run("a", LOSSES)})
    bundle = table._repr_mimebundle_()
    assert bundle["text/plain"] == repr(table) and ">&lt;b&gt;&amp;</th>" in bundle["text/html"]
    assert table.rows[0].largest == 0.0 and table.within


def test_only_common_steps_count(make_run):
    reference = make_run("reference", LOSSES)
    (row,) = difference_table(reference, {"later": make_run("later", [5.0, 4.0, 3.0], first_step=2)}).rows
    assert (row.num_steps, row.largest) == (2, 0.0)
    with pytest.raises(RunError, match=r"far: it has no step in common .*\(steps 9 to 11\)"):
        difference_table(reference, {"far": make_run("far", LOSSES, first_step=9)})


def test_curves_in_words_and_pixels(make_run):
    runs = {
        "one": make_run("a", LOSSES),
        "two": make_run("b", [6.0, 5.0, 4.5]),
        "three": make_run("c", [math.nan, 5.0]),
    }
    picture = compare_curves(runs)
    assert base64.b64decode(picture._repr_mimebundle_()["image/png"]).startswith(PNG_SIGNATURE)
    assert "one (Single): loss 6.0000 at step 1, 4.0000 at step 3" in picture.alt
    assert "two differs from one by at most 5.0e-01 over 3 common steps" in picture.alt
    assert compare_curves({str(i): runs["one"] for i in range(20)}).png != picture.png


def test_runs_that_are_none_are_refused(make_run, tmp_path):
    with pytest.raises(RunError, match="there are none"):
        compare_curves({})
    with pytest.raises(RunError, match="manifest cannot be read"):
        compare_curves({"a": tmp_path / "nothing"})
    with pytest.raises(RunError, match="no step is finished"):
        difference_table(make_run("a", LOSSES), {"b": make_run("b", [])})
