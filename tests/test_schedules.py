"""Learning-rate formulas against values worked out by hand."""

import math

import pytest

from biokit.config import TrainConfig
from biokit.schedules import learning_rate


def rate(step, **keys):
    return learning_rate(TrainConfig(**{"train_iters": 100, "lr": 1.0, "lr_warmup_fraction": 0.1, **keys}), step, 256)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_warm_up_is_linear(schedule):
    assert [rate(step, lr_schedule=schedule) for step in (1, 5, 10)] == pytest.approx([0.1, 0.5, 1.0])


def test_linear():
    assert rate(55, lr_schedule="linear", min_lr=0.1) == pytest.approx(0.1 + 0.9 * 0.5)
    assert rate(100, lr_schedule="linear", min_lr=0.1) == pytest.approx(0.1)


def test_cosine():
    assert rate(40, lr_schedule="cosine", min_lr=0.1) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 3)))
    assert rate(100, lr_schedule="cosine", min_lr=0.1) == pytest.approx(0.1)


def test_version_1_1_5_decays_over_all_steps_with_a_floor():
    old = {"lr_schedule_version": "megatron-1.1.5", "lr_schedule": "linear"}
    assert rate(60, **old) == pytest.approx((100 - 50) / 100)
    assert rate(100, **old) == pytest.approx(0.1)
    assert rate(100, **old, min_lr=0.3) == pytest.approx(0.3)
    cosine = {"lr_schedule_version": "megatron-1.1.5", "lr_schedule": "cosine"}
    assert rate(60, **cosine) == pytest.approx(0.5 * (math.cos(math.pi * 50 / 100) + 1))


def test_noam():
    keys = {"lr_schedule": "noam", "train_iters": 80_000}  # warm-up 8,000
    assert rate(8000, **keys) == pytest.approx((256 * 8000) ** -0.5)
    assert rate(4000, **keys) == pytest.approx(0.5 * (256 * 8000) ** -0.5)
    assert rate(32_000, **keys) == pytest.approx(0.5 * (256 * 8000) ** -0.5)
    assert rate(32_000, **keys, min_lr=0.01) == 0.01
    assert rate(1, **keys, min_lr=0.01) < 0.01


def test_no_warm_up():
    assert rate(1, lr_warmup_fraction=0.0, lr_schedule="constant") == 1.0
    assert rate(100, lr_warmup_fraction=1.0, lr_schedule="cosine") == pytest.approx(1.0)
