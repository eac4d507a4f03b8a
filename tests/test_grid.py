"""Layouts: ranks stand as in Megatron and DeepSpeed, impossible layouts are refused with the valid choices."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from biokit.config import RunConfig, config_from_dict
from biokit.errors import ConfigError
from biokit.parallel.grid import (
    STRATEGY_NAMES,
    Layout,
    Place,
    balance_layers,
    deal_micro_batches,
    plan_layout,
    resolve_strategy,
)
from tests.distributed import ranks

SIZES = {"num_attention_heads": 6, "ffn_hidden_size": 24}
NUM_LAYERS = 8
LAYOUTS = st.builds(Layout, st.just("ThreeD"), *[st.integers(1, 5)] * 3)


def make(strategy: str = "ThreeD", tp: int = 1, pp: int = 0, **groups: dict) -> RunConfig:
    """48 rows a batch, 4 a micro-batch."""
    train = {"global_batch_size": 48, "micro_batch_size": 4} | groups.get("train", {})
    sizes = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    parallel = sizes | groups.get("parallel", {})
    return config_from_dict(
        {"strategy": strategy, "train": train, "parallel": parallel, "data": groups.get("data", {})}
    )


def plan(world_size: int, **keys) -> Layout:
    return plan_layout(make(**keys), world_size, SIZES, NUM_LAYERS)


@given(LAYOUTS)
def test_every_rank_has_one_place(layout):
    places = [layout.place(rank) for rank in range(layout.world_size)]
    assert [layout.rank(place) for place in places] == list(range(layout.world_size))
    assert len(set(places)) == layout.world_size
    assert places[-1] == Place(layout.pipeline - 1, layout.data - 1, layout.tensor - 1)


def test_a_rank_outside_is_refused():
    for rank in (-1, 4):
        with pytest.raises(ConfigError, match="4 processes"):
            Layout("DDP", data=4).place(rank)


def megatron_groups(tp, dp, pp):
    from megatron.core.parallel_state import RankGenerator

    generator = RankGenerator(tp=tp, ep=1, dp=dp, pp=pp, cp=1, order="tp-cp-ep-dp-pp")
    return [sorted(generator.get_ranks(token)) for token in ("tp", "dp", "pp")]


def deepspeed_places(tp, dp, pp):
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    topology = PipeModelDataParallelTopology(pp, tp, dp)
    coordinates = [topology.get_coord(rank) for rank in range(topology.world_size())]
    return [(at.pipe, at.data, at.model) for at in coordinates]


@pytest.mark.parametrize(("tp", "dp", "pp"), [(2, 2, 2), (1, 4, 2), (4, 1, 2), (2, 3, 1), (3, 2, 4)])
def test_ranks_stand_as_in_megatron_and_deepspeed(tp, dp, pp):
    layout = Layout("ThreeD", tensor=tp, data=dp, pipeline=pp)
    groups = [groups_along(layout, axis) for axis in ("tensor", "data", "pipeline")]
    assert ranks(1).run(megatron_groups, tp, dp, pp) == [groups]
    places = [layout.place(rank) for rank in range(layout.world_size)]
    assert ranks(1).run(deepspeed_places, tp, dp, pp) == [[(at.pipeline, at.data, at.tensor) for at in places]]


def groups_along(layout: Layout, axis: str) -> list[list[int]]:
    """Ranks that differ along one axis only."""
    groups: dict[tuple, list[int]] = {}
    for rank in range(layout.world_size):
        place = vars(layout.place(rank))
        groups.setdefault(tuple(value for name, value in place.items() if name != axis), []).append(rank)
    return sorted(groups.values())


def test_what_a_layout_says_of_itself():
    layout = plan(8, tp=2, pp=2)
    assert str(layout) == "ThreeD x tp2 x pp2 x dp2"
    assert layout.as_dict() == {"strategy": "ThreeD", "world_size": 8, "tensor": 2, "data": 2, "pipeline": 2}


@pytest.mark.parametrize(
    ("strategy", "world_size", "sizes"),
    [("Single", 1, (1, 1, 1)), ("DDP", 4, (1, 4, 1)), ("Zero0", 4, (1, 4, 1)), ("ZeroInf", 2, (1, 2, 1)),
     ("Pipeline", 4, (1, 1, 4)), ("ThreeD", 4, (1, 4, 1))],
)  # fmt: skip
def test_sizes_follow_from_the_strategy(strategy, world_size, sizes):
    layout = plan(world_size, strategy=strategy)
    assert (layout.tensor, layout.data, layout.pipeline) == sizes
    assert layout.strategy == ("DDP" if strategy == "Zero0" else strategy)


def test_names_that_run_another_strategy_or_none():
    assert resolve_strategy("DDP") == ("DDP", "")
    name, reason = resolve_strategy("Zero0")
    assert name == "DDP"
    assert "strategy=Zero0 runs DDP" in reason
    for refused in ("NNScaler", "Zero4"):
        with pytest.raises(ConfigError) as caught:
            resolve_strategy(refused)
        assert caught.value.do == f"Valid: {', '.join(STRATEGY_NAMES)}"


@pytest.mark.parametrize(
    ("world_size", "keys", "message"),
    [
        (4, {"tp": 4}, "tp=4: it does not divide num_attention_heads=6. Valid: 1, 2, 3, 6."),
        (9, {"pp": 9}, "pp=9: the model has 8 layers, embedding and head included. Valid: 1 to 8."),
        (6, {"tp": 2, "pp": 2}, "tp=2 x pp=2: 6 processes are started. Start a multiple of 4 processes, or"),
        (2, {"strategy": "Single"}, "2 processes are started. Give strategy=DDP"),
        (2, {"strategy": "DDP", "tp": 2}, "strategy=DDP with tp=2: it cuts no layer. Give strategy=ThreeD, or tp=1."),
        (2, {"strategy": "Pipeline", "tp": 2, "pp": 1}, "Give strategy=ThreeD, or tp=1."),
        (2, {"strategy": "Zero1", "pp": 2}, "it has no pipeline stages. Give strategy=Pipeline or ThreeD, or pp=1."),
        (2, {"strategy": "Zero2", "pp": 2}, "Give strategy=Pipeline (ZeRO-1), or pp=1."),
        (2, {"strategy": "Zero3", "pp": 2}, "Give strategy=Pipeline (ZeRO-1), or pp=1."),
        (2, {"strategy": "ZeroInf", "pp": 2}, "Give strategy=Pipeline (ZeRO-1), or pp=1."),
        (5, {"strategy": "DDP"}, "micro_batch_size=4 x 5 data ranks does not divide it. Valid micro batches: none; "
                                 "or give global_batch_size=60."),
        (8, {"strategy": "DDP"}, "Valid micro batches: 1, 2, 3, 6; or give global_batch_size=64."),
        (2, {"strategy": "Pipeline", "data": {"max_tokens": 512}}, "Give data.max_tokens=0, or strategy=DDP or Zero1"),
        (2, {"tp": 2, "data": {"max_tokens": 512}}, "needs the same number of samples in every micro-batch"),
        (2, {"strategy": "DDP", "parallel": {"sequence_parallel": True}}, "only ThreeD cuts layers"),
        (3, {"tp": 3, "parallel": {"sequence_parallel": True}}, "tp=3 does not divide train.micro_batch_size=4. "
                                                                "Give a multiple of 3."),
        (2, {"pp": 2, "parallel": {"partition_activations": True}}, "It needs tp above 1 and"),
        (2, {"tp": 2, "parallel": {"partition_activations": True}}, "train.checkpoint_activations=True."),
        (2, {"strategy": "DDP", "parallel": {"deepspeed_config": "ds.json"}}, "DDP does not use DeepSpeed"),
        (2, {"strategy": "ZeroInf", "parallel": {"offload_device": "nvme"}}, "Give a folder on a fast local disk"),
    ],
)  # fmt: skip
def test_impossible_layouts_are_refused(world_size, keys, message):
    with pytest.raises(ConfigError) as caught:
        plan(world_size, **keys)
    assert message in str(caught.value)


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))
def test_valid_choices_that_a_refusal_names_are_valid(tp, pp, dp, micro):
    config = make(tp=tp, pp=pp, train={"micro_batch_size": 48 // (48 // micro) if 48 % micro == 0 else 1})
    try:
        layout = plan_layout(config, tp * pp * dp, SIZES, NUM_LAYERS)
    except ConfigError as error:
        named = error.do.removeprefix("Valid micro batches: ").split(";")[0]
        for size in [] if named == "none" else map(int, named.split(", ")):
            config.train.micro_batch_size = size
            plan_layout(config, tp * pp * dp, SIZES, NUM_LAYERS)
        config.train.micro_batch_size = micro if 48 % micro == 0 else 1
        config.train.global_batch_size = int(error.do.rpartition("=")[2])
        layout = plan_layout(config, tp * pp * dp, SIZES, NUM_LAYERS)
    assert (layout.tensor, layout.data, layout.pipeline) == (tp, dp, pp)


@given(st.integers(0, 50), st.integers(1, 9))
def test_micro_batches_are_dealt_once_and_evenly(num_micros, num_ranks):
    dealt = [deal_micro_batches(num_micros, rank, num_ranks) for rank in range(num_ranks)]
    assert len({len(own) for own in dealt}) == 1
    indices = list(itertools.chain(*dealt))
    assert indices == list(range(len(indices)))
    assert num_micros <= len(indices) < num_micros + num_ranks


@given(st.lists(st.integers(0, 30), min_size=1, max_size=8), st.data())
def test_balance_is_as_good_as_trying_everything(costs, data):
    num_stages = data.draw(st.integers(1, len(costs)))
    bounds = balance_layers(costs, num_stages)
    assert bounds[0] == 0
    assert bounds[-1] == len(costs)
    assert len(bounds) == num_stages + 1
    assert all(start < end for start, end in itertools.pairwise(bounds))
    tried = itertools.combinations(range(1, len(costs)), num_stages - 1)
    assert dearest(costs, bounds) == min(dearest(costs, [0, *inner, len(costs)]) for inner in tried)


def dearest(costs: list[int], bounds: list[int]) -> int:
    return max(sum(costs[start:end]) for start, end in itertools.pairwise(bounds))


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ConfigError, match=r"pp=3: the model has 2 layers. Valid: 1 to 2\."):
        balance_layers([1, 1], 3)
