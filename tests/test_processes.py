"""What processes agree on: sums, shared tensors, verdicts, and clear errors where they do not find one another."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from biokit.errors import DataError, EngineError, RunError
from biokit.parallel.processes import VARIABLES, Processes, count_processes, join_processes
from tests.distributed import TIMEOUT_S, RanksFailed, free_port, ranks

CPU = torch.device("cpu")


def join(timeout_s=TIMEOUT_S):
    return join_processes(CPU, timeout_s, needs_group=True)


def agree():
    with join() as processes:
        rank, size = processes.rank, processes.world_size
        total = processes.sum([1.0, rank, 2.0**-20 if rank else 2.0**20])  # a float32 sum would lose the last
        shared = processes.share(torch.full((3,), float(rank)), source=size - 1).tolist()
        if rank == 1:
            processes.send(torch.arange(4), 0)
        received = processes.receive(torch.empty(4, dtype=torch.int64), 1).tolist() if rank == 0 else []
        processes.barrier()
        return rank, processes.is_main, total, shared, received


def fail_together(failing):
    with join() as processes:
        try:
            with processes.together("saving"):
                if processes.rank in failing:
                    raise DataError("a file", f"rank {processes.rank} cannot read it", "Mend it")
        except (DataError, RunError) as error:
            caught = type(error).__name__, str(error)
        else:
            caught = "", ""
        return caught, processes.sum([1.0])[0]  # the group works on


def wait_for_one_that_does_not_come(timeout_s):
    with join(timeout_s) as processes:
        if processes.rank == 0:
            time.sleep(3 * timeout_s)
            return
        processes.barrier()


def time_outs(timeout_s):
    with join(timeout_s) as processes:
        backend = processes.group._get_backend(CPU)
        return backend.options._timeout.total_seconds()


def meet_nobody():
    os.environ["MASTER_PORT"] = str(free_port()) if os.environ["RANK"] == "1" else os.environ["MASTER_PORT"]
    with join(2.0):
        pass


def world_of_one():
    before = dist.is_initialized()
    with join_processes(CPU, TIMEOUT_S, needs_group=False) as alone:
        without = alone.group, dist.is_initialized()
    with join() as processes:
        within = processes.group is not None, dist.get_world_size(), processes.sum([3.0]), processes.is_main
    return before, without, within, dist.is_initialized()


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_agree(size):
    total = [float(size), float(size * (size - 1) // 2), 2.0**20 + (size - 1) * 2.0**-20]
    last = [size - 1.0] * 3
    expected = [(rank, rank == 0, total, last, [] if rank else [0, 1, 2, 3]) for rank in range(size)]
    assert total[2] != 2.0**20
    assert ranks(size).run(agree) == expected


def test_nobody_fails_alone():
    results = ranks(4).run(fail_together, (1, 3))
    for rank, (caught, alive) in enumerate(results):
        name, message = caught
        assert alive == 4.0
        if rank in (1, 3):
            assert (name, message) == ("DataError", f"a file: rank {rank} cannot read it. Mend it.")
        else:
            assert (name, message) == ("PeerError", "saving: rank 1, 3 failed. See the error of that rank.")
    assert ranks(4).run(fail_together, ()) == [(("", ""), 4.0)] * 4


def test_a_group_has_the_time_out_that_was_asked_for():
    assert ranks(2).run(time_outs, 37.0) == [37.0, 37.0]


def test_one_that_does_not_come_is_not_waited_for_longer_than_asked():
    with pytest.raises(RanksFailed) as caught:
        ranks(2).run(wait_for_one_that_does_not_come, 2.0)
    assert "imed out" in str(caught.value.errors[1])


def test_processes_that_do_not_meet_say_where_they_looked():
    with pytest.raises(RanksFailed) as caught:
        ranks(2).run(meet_nobody)
    error = next(iter(caught.value.errors.values()))
    assert isinstance(error, EngineError)
    assert "found no group at 127.0.0.1:" in str(error)
    assert "of 2" in str(error)


def test_a_world_of_one_needs_no_group_unless_asked():
    assert ranks(1).run(world_of_one) == [(False, (None, False), (True, 1, [3.0], True), False)]


def test_one_process_agrees_with_itself():
    alone, ones = Processes(), torch.ones(2)
    assert alone.sum([1.0, 2.0]) == [1.0, 2.0]
    assert alone.share(ones, 0) is ones
    alone.barrier()
    with pytest.raises(DataError), alone.together("x"):
        raise DataError("a", "b", "c")


@pytest.fixture
def environment(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_no_launcher_means_alone(environment):
    assert count_processes() == (0, 1)
    with join_processes(CPU, TIMEOUT_S, needs_group=False) as processes:
        assert (processes.rank, processes.world_size, processes.group) == (0, 1, None)


def test_the_launchers_environment(environment):
    for name, value in zip(VARIABLES, ("2", "4", "0", "here", "1234"), strict=True):
        environment.setenv(name, value)
    assert count_processes() == (2, 4)


@pytest.mark.parametrize("missing", [name for name in VARIABLES if name != "WORLD_SIZE"])
def test_a_part_of_the_environment_is_missing(environment, missing):
    for name in VARIABLES:
        environment.setenv(name, "2")
    environment.setenv(missing, "")
    with pytest.raises(EngineError, match=f"WORLD_SIZE=2, but {missing} not set. Start them with torchrun or"):
        count_processes()


@pytest.mark.parametrize(
    ("rank", "size", "message"),
    [("4", "4", "RANK=4, WORLD_SIZE=4: there is no such rank"), ("-1", "4", "no such rank"), ("one", "4", "not num")],
)
def test_a_rank_that_cannot_be(environment, rank, size, message):
    for name in VARIABLES:
        environment.setenv(name, "1")
    environment.setenv("RANK", rank)
    environment.setenv("WORLD_SIZE", size)
    with pytest.raises(EngineError, match=message):
        count_processes()


def test_a_device_that_is_not_there(environment):
    environment.setenv("LOCAL_RANK", str(torch.cuda.device_count()))
    with (
        pytest.raises(EngineError, match="Start as many processes as devices"),
        join_processes(torch.device("cuda"), TIMEOUT_S, needs_group=False),
    ):
        pass


def join_often(ports):
    """A group of its own each time, with a model whose copies are let go right after the last sum."""
    for port in ports:
        os.environ["MASTER_PORT"] = str(port)
        _join_and_sum()
    return len(ports)


def _join_and_sum():
    model = torch.nn.Linear(300, 300)
    with join() as processes:
        copies = torch.nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)
        return [processes.sum([1.0]) for _ in range(3)], copies


def test_groups_end_while_their_threads_still_let_tensors_go():
    assert ranks(2).run(join_often, [free_port() for _ in range(25)]) == [25, 25]


def agree_on_texts():
    with join() as processes:
        return [processes.agree(text) for text in (f"rank {processes.rank}: ü/ä", "")]


def test_the_main_process_decides():
    assert ranks(2).run(agree_on_texts) == [["rank 0: ü/ä", ""]] * 2


def wait_longer_than_the_group(timeout_s):
    with join(timeout_s) as processes:
        with processes.together("saving"):
            if processes.is_main:
                time.sleep(2 * timeout_s)
        return processes.sum([1.0])[0]


def test_a_long_part_is_waited_for():
    assert ranks(2).run(wait_longer_than_the_group, 2.0) == [2.0, 2.0]


def environment_after_a_world_of_one():
    for name in VARIABLES:
        os.environ.pop(name, None)
    with join() as processes:
        within = [name in os.environ for name in VARIABLES]
        assert processes.world_size == 1
    return within, [name for name in VARIABLES if name in os.environ]


def test_a_world_of_one_leaves_no_variables_behind():
    assert ranks(1).run(environment_after_a_world_of_one) == [([True] * len(VARIABLES), [])]
