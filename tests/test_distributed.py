"""The test helper itself: results by rank, errors with their rank's traceback, ranks that die or hang, clean state."""

import os
import signal
import time
import warnings

import psutil
import pytest
import torch
import torch.distributed as dist

from biokit.errors import ConfigError
from biokit.parallel.processes import join_processes
from tests.distributed import TIMEOUT_S, Ranks, RanksFailed, free_port, ranks

CPU = torch.device("cpu")


def who(word):
    with join_processes(CPU, TIMEOUT_S, needs_group=True) as processes:
        total = processes.sum([1.0])[0]
    return word, processes.rank, total, os.environ["LOCAL_RANK"], torch.get_num_threads()


def port():
    return os.environ["MASTER_PORT"], os.environ.get("EXTRA")


def fail_on(rank):
    print(f"printed by {os.environ['RANK']}")
    with join_processes(CPU, TIMEOUT_S, needs_group=True) as processes:
        if processes.rank == rank:
            raise ConfigError("tp=4", "it does not divide", "Give 2")
        processes.barrier()


def die_on(rank):
    with join_processes(CPU, TIMEOUT_S, needs_group=True) as processes:
        if processes.rank == rank:
            os.kill(os.getpid(), signal.SIGKILL)
        processes.barrier()


def hang_on(rank):
    while int(os.environ["RANK"]) == rank:
        time.sleep(1)


def leave_group():
    dist.init_process_group("gloo")


def warn_as_others():
    exec(compile("import warnings; warnings.warn('third party')", "x", "exec"), {"__name__": "third"})


def warn_as_ours():
    warnings.warn("ours", stacklevel=1)


def touch_engines(look):
    from deepspeed.utils import groups
    from megatron.core import parallel_state

    if look:
        return groups.mesh_device, parallel_state._TENSOR_MODEL_PARALLEL_GROUP, dict(groups._EXPERT_PARALLEL_GROUP)
    groups.mesh_device = parallel_state._TENSOR_MODEL_PARALLEL_GROUP = "used"
    groups._EXPERT_PARALLEL_GROUP["x"] = 1


@pytest.mark.parametrize("size", [2, 4])
def test_results_come_by_rank(size):
    for word in ("a", "b"):
        assert ranks(size).run(who, word) == [(word, rank, float(size), str(rank), 1) for rank in range(size)]


def test_every_run_has_a_port_of_its_own():
    ports = [ranks(2).run(port, environment={"EXTRA": str(i)}) for i in range(3)]
    assert [len(set(found)) for found in ports] == [1, 1, 1]
    assert len({found[0][0] for found in ports}) == 3
    assert ranks(2).run(port)[0][1] is None
    assert free_port() != free_port()


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_comes_with_its_ranks_traceback(rank):
    with pytest.raises(RanksFailed) as caught:
        ranks(2).run(fail_on, rank)
    first = next(iter(caught.value.errors))
    assert isinstance(caught.value.errors[rank], ConfigError)
    assert f"rank {rank} of 2 failed: ConfigError: tp=4: it does not divide. Give 2." in str(caught.value)
    assert f"output of rank {first}" in str(caught.value)
    assert "in fail_on" in str(caught.value)
    assert [found[1] for found in ranks(2).run(who, "again")] == [0, 1]


def test_a_rank_that_dies_is_noticed():
    with pytest.raises(RanksFailed, match="rank 1 of 2 failed: ChildProcessError: rank 1 died: signal SIGKILL"):
        ranks(2).run(die_on, 1)
    assert len(ranks(2).run(who, "again")) == 2


def test_a_rank_that_hangs_shows_its_stack():
    with Ranks(2) as own, pytest.raises(RanksFailed, match="rank 1 of 2 did not end in time") as caught:
        own.run(hang_on, 1, timeout_s=3.0)
    assert "in hang_on" in str(caught.value)


def test_nothing_is_left_behind():
    with Ranks(2) as own:
        own.run(port)
        pids = own.pids
        assert all(map(psutil.pid_exists, pids))
    assert own.pids == []
    assert not any(map(psutil.pid_exists, pids))


def test_a_group_that_is_left_behind_is_an_error():
    with pytest.raises(RanksFailed, match="leave_group left a process group behind"):
        ranks(2).run(leave_group)


def test_warnings_of_others_are_not_errors():
    ranks(2).run(warn_as_others)
    with pytest.raises(RanksFailed, match="UserWarning: ours"):
        ranks(2).run(warn_as_ours)


def test_engines_are_as_new_in_every_run():
    pool = ranks(2)
    pool.run(touch_engines, False)
    assert pool.run(touch_engines, True) == [(None, None, {})] * 2
