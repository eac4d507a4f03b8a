"""A few trials of each fault drill; `make drills` runs many."""

import random

import pytest

from tests.drills import cut_checkpoints, kill_a_rank
from tests.drills.kill_and_resume import run_trial, undisturbed_run
from tests.drills.outcome import upper_bound


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


@pytest.mark.parametrize("strategy", kill_a_rank.LAYOUTS)
def test_a_run_that_lost_a_rank_goes_on(strategy):
    outcome = kill_a_rank.run_drill(1, 0, strategy)
    assert outcome.failed == 0, outcome.row


@pytest.mark.parametrize(
    ("drill", "trials"),
    [(cut_checkpoints.cut_saves, 6), (cut_checkpoints.fill_the_disk, 4), (cut_checkpoints.flip_bits, 20)],
)
def test_checkpoints_survive(drill, trials):
    outcome = drill(trials, 0)
    assert (outcome.trials, outcome.failed) == (trials, 0), outcome.row
