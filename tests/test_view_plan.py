"""A plan can be drawn whatever its layout, and its words say what the picture shows."""

from dataclasses import replace

import pytest

from biokit.config import load_config
from biokit.planning.devices import find_device
from biokit.planning.plans import plan_run
from biokit.planning.report import write_report
from biokit.view.picture import PNG_SIGNATURE
from biokit.view.plan import PART_COLOURS, SPAN_COLOURS, TIME_COLOURS, WIDTH, show_plan


@pytest.fixture(scope="module")
def table():
    config = load_config("molbart_mini", ["train.global_batch_size=64", "train.micro_batch_size=2"])
    return plan_run(config, 8, find_device("h100"), gpus_per_node=4)


def with_best(table, **sizes):
    """The table as it would be if the first layout of such sizes were the best."""
    chosen = next(p for p in table.plans if all(getattr(p.case.layout, k) == v for k, v in sizes.items()))
    return replace(table, plans=[chosen, *(p for p in table.plans if p is not chosen)])


@pytest.mark.parametrize("sizes", [
    {"strategy": "DDP"},
    {"strategy": "Zero3"},
    {"pipeline": 8},
    {"tensor": 2, "pipeline": 2, "data": 2},
    {"tensor": 4},
], ids=str)  # fmt: skip
def test_every_layout_can_be_drawn(table, sizes):
    chosen = with_best(table, **sizes)
    picture = show_plan(chosen, title="Mine")
    assert picture.png.startswith(PNG_SIGNATURE)
    assert picture.size[0] == WIDTH and 400 < picture.size[1] < 1500
    lines = picture.alt.splitlines()
    layout = chosen.best.case.layout
    assert picture.alt.startswith(write_report(chosen))
    assert sum(line.startswith("  stage ") for line in lines) == layout.pipeline
    assert any(line.endswith("activations: of the micro-batch that is computed") for line in lines)


def test_words_give_the_memory_of_each_stage(table):
    chosen = with_best(table, pipeline=2, tensor=1)
    words = show_plan(chosen).alt
    for stage, peak in enumerate(chosen.best.peaks):
        assert f"  stage {stage}, {peak.where}: {peak.total / chosen.unit[1]:.2f}" in words
    assert "weights: weights in fp32" in words and "optimizer: DeepSpeed's copy of the weights" in words


def test_colours_of_a_key_differ():
    for colours in (PART_COLOURS, TIME_COLOURS, SPAN_COLOURS):
        assert len(set(colours.values())) == len(colours)
