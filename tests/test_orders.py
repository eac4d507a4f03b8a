"""What is to be started, as plain data."""

from __future__ import annotations

import pytest

from biokit.launch.orders import GIVEN, HERE, NODES, SLURM, Order, has_own_output


@pytest.mark.parametrize(
    ("flags", "elastic"),
    [
        ((), False),
        (("--nproc-per-node", "2", "--max-restarts", "0"), False),
        (("--max_restarts=3",), True),
        (("--max-restarts", "3"), True),
        (("--nnodes", "1:2"), True),
        (("--nnodes=2",), False),
        (("--max_restarts=0", "--standalone"), False),
        (("--nnodes=1:2", "--standalone"), True),
    ],
)
def test_whose_torchrun_starts_ranks_again(flags: tuple[str, ...], elastic: bool) -> None:
    assert Order("script", ("x.py",), flags, GIVEN).is_elastic == elastic


@pytest.mark.parametrize("flag", ["--tee", "-t", "--log_dir=x", "--redirects", "-r"])
def test_who_says_where_output_goes(flag: str) -> None:
    assert has_own_output(Order("script", ("x.py",), (flag, "3")))
    assert not has_own_output(Order("script", ("x.py", flag), ("--nproc-per-node", "2")))


def test_trainings_save_when_they_are_told_to_end() -> None:
    assert Order("script", ("-m", "biokit", "train", "x.yaml"), ("--nproc-per-node", "2")).saves_on_sigterm
    assert not Order("script", ("train.py", "-m", "biokit", "train")).saves_on_sigterm


@pytest.mark.parametrize(
    ("placement", "num_nodes", "endpoint", "words"),
    [
        (HERE, 1, "", "--standalone --nproc-per-node 2 x.py"),
        (HERE, 2, "", "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint HOST:PORT --nproc-per-node 2 x.py"),
        (SLURM, 3, "", "--nnodes 3 --rdzv-backend c10d --rdzv-endpoint HOST:PORT --nproc-per-node 2 x.py"),
        (NODES, 2, "a:1", "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint a:1 --nproc-per-node 2 x.py"),
        (GIVEN, 1, "", "--nproc-per-node 2 x.py"),
    ],
)
def test_the_line_to_start_it_by_hand(placement: str, num_nodes: int, endpoint: str, words: str) -> None:
    order = Order("script", ("x.py",), ("--nproc-per-node", "2"), placement, num_nodes, endpoint)
    assert order.line().endswith(f" -m torch.distributed.run {words}")
