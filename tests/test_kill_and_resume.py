"""One trial of each kind of the kill-and-resume drill; `make drills` runs many."""

import random

from tests.drills.kill_and_resume import run_trial, undisturbed_run, upper_bound


def test_a_killed_run_ends_as_if_nobody_had_disturbed_it(tmp_path):
    reference, seconds = undisturbed_run(tmp_path)
    assert len(reference.read_metrics()) == 24
    trials = [run_trial(number, tmp_path, reference, seconds, random.Random(number)) for number in (0, 1)]
    assert [trial.faults for trial in trials] == [[], []]
    assert sum(trial.kills for trial in trials) >= 1


def test_upper_bound():
    assert abs(upper_bound(0, 50) - (1 - 0.05 ** (1 / 50))) < 1e-9
    assert upper_bound(3, 3) == 1.0
    assert 0.1 < upper_bound(1, 30) < 0.16
