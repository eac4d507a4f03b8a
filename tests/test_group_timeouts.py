"""Process groups have the run's time limit, whoever made them: torch gives the engines' own half an hour."""

import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from biokit.parallel.grid import Layout
from biokit.parallel.processes import join_processes
from biokit.parallel.tensor import start_tensor_parallel, stop_tensor_parallel
from biokit.parallel.zero import start_deepspeed
from tests.distributed import ranks
from tests.parity import PP2, TP2_PP2
from tests.test_parity import TestMolBART as MolBART
from tests.test_parity import TestTiedMolBART as TiedMolBART
from tests.trials import Trial, cut_batch, start_strategy

CPU = torch.device("cpu")
LIMIT_S, MARGIN_S = 2.0, 5.0


def limits():
    """(seconds, global ranks) of each process group in which this process is."""
    groups = distributed_c10d._world.pg_map
    return [
        (group._get_backend(CPU).options._timeout.total_seconds(), tuple(dist.get_process_group_ranks(group)))
        for group in groups
    ]


def train_and_look(model, trial):
    with start_strategy(model, trial) as (config, strategy):
        micros, seeds, num_valid = cut_batch(model, trial, strategy, 0)
        strategy.train_batch(micros, num_valid, seeds, config.train.lr)
        strategy.evaluate(micros)
        strategy.model_state(), strategy.optimizer_state()
        found = limits()
        dist.new_group(range(dist.get_world_size()))
        return found, limits()[len(found) :]


@pytest.mark.parametrize(
    ("model", "layout", "num_groups"),
    [
        (MolBART, Layout("DDP", data=2), 1),
        (MolBART, Layout("Zero2", data=2), 2),
        (TiedMolBART, PP2, 6),
        (MolBART, TP2_PP2, 20),
    ],
    ids=lambda value: getattr(value, "strategy", None),
)
def test_every_group_of_a_strategy_has_the_limit_of_the_run(model, layout, num_groups):
    trial = Trial(layout, timeout_s=37.0)
    for found, unlimited in ranks(layout.world_size).run(train_and_look, model, trial):
        assert len(found) >= num_groups
        assert {seconds for seconds, _ in found} == {37.0}, [group for group in found if group[0] != 37.0]
        assert [seconds for seconds, _ in unlimited] == [1800.0]  # what the check must be able to see


def wait_in_a_sub_group(engine, what):
    """The message and seconds of rank 0, whose peer does not come."""
    with join_processes(CPU, LIMIT_S, needs_group=True) as processes:
        if engine == "deepspeed":
            group = start_deepspeed(CPU, LIMIT_S).comm.new_group([0, 1])
        else:
            group = start_tensor_parallel(Layout("ThreeD", tensor=2), CPU, LIMIT_S)
        assert group is not dist.group.WORLD
        processes.barrier()
        started = time.monotonic()
        try:
            if processes.rank == 0:
                what(torch.ones(2), group)
            time.sleep(1.75 * LIMIT_S)
            return "", time.monotonic() - started
        except RuntimeError as error:
            return str(error), time.monotonic() - started
        finally:
            if engine == "megatron":
                stop_tensor_parallel()


def add(tensor, group):
    dist.all_reduce(tensor, group=group)


def receive(tensor, group):
    dist.recv(tensor, 1, group=group)


@pytest.mark.parametrize(
    ("engine", "what"),
    [("deepspeed", receive), ("megatron", add), pytest.param("deepspeed", add, marks=pytest.mark.full)],
)
def test_one_that_waits_in_an_engines_group_is_told_in_time(engine, what):
    (message, seconds), other = ranks(2).run(wait_in_a_sub_group, engine, what)
    assert "imed out" in message
    assert LIMIT_S <= seconds < LIMIT_S + MARGIN_S
    assert other[0] == ""
