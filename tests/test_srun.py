"""How agents come to the nodes of an allocation, and end there; Slurm's commands are stand-ins."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from biokit.errors import BiokitError, EngineError, RunError
from biokit.launch import states
from biokit.launch.magics.magic_line import read_line
from biokit.launch.orders import Order
from biokit.launch.slurm import jobs, node, srun
from biokit.runs import RunFolder
from tests.fake_slurm import INSIDE, FakeSlurm


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
    """A Slurm that is none."""
    return FakeSlurm.install(tmp_path, monkeypatch)


ON_TWO = Order("train", ("-m", "biokit"), ("--nproc-per-node", "8"), placement="slurm", num_nodes=2)


def test_sruns_words(fake: FakeSlurm, tmp_path: Path) -> None:
    fake.answer(scontrol=(0, "n1\nn2\nn3\nNodeName=n1 NodeAddr=10.0.0.1 NodeHostName=x\n", ""))
    odd = tmp_path / "it's; $(x)"
    site = {"BIOKIT_SRUN": "--mpi=none '--comment=a b'", "BIOKIT_CONTAINER": "apptainer exec '/my image.sif'"}
    words = srun.srun_command(ON_TWO, odd, 1, {**INSIDE, **site})
    assert words[0] == "srun" and {"--nodes=2", "--ntasks=2", "--nodelist=n1,n2", "--kill-on-bad-exit=1"} <= set(words)
    assert {"--cpus-per-task=6", "--cpu-bind=none"} <= set(words) and "--comment=a b" in words
    start = words.index("apptainer")
    assert words[start + 2] == "/my image.sif" and words[-3:-1] == [str(odd), "1"]
    host, _, port = words[-1].partition(":")
    assert host == "10.0.0.1" and 20_000 <= int(port) < 30_000
    fake.answer(scontrol=(0, "n1\nn2\nn3\nNodeAddr=10.0.0.1\nTaskPlugin              = task/none\n", ""))
    again = srun.srun_command(ON_TWO, odd, 2, INSIDE)
    assert again[-1].partition(":")[2] != port and "--cpu-bind=none" not in again
    with pytest.raises(EngineError, match="not inside a Slurm allocation of so many"):
        srun.srun_command(replace(ON_TWO, num_nodes=4), odd, 1, INSIDE)


def test_a_life_needs_all_its_nodes(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in INSIDE.items():
        monkeypatch.setenv(name, value)
    srun.check_nodes(2)
    fake.answer(srun=(1, "", "Task launch failed on node n2\n"))
    srun.check_nodes(1)  # of the first life srun itself tells
    with pytest.raises(RunError, match="life 2: a node does not answer: Task launch failed on node n2"):
        srun.check_nodes(2)


def test_inside_an_allocation_nodes_are_its_nodes(fake: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    """For `%%torchrun --nnodes 2` and `start_training(..., num_nodes=2)` alike."""
    words = ["--nnodes", "2", "--nproc-per-node", "4"]
    assert jobs.choose_placement(2) == "here"
    with pytest.raises(BiokitError, match="--nnodes 2"):
        read_line(words, is_cell=True)
    for name, value in INSIDE.items():
        monkeypatch.setenv(name, value)
    assert [jobs.choose_placement(count) for count in (1, 2, 3, 4)] == ["here", "slurm", "slurm", "here"]
    line = read_line(words, is_cell=True)
    assert (line.placement, line.num_nodes, line.num_ranks) == ("slurm", 2, 8) and "--nnodes" not in line.torchrun
    told = [*words, "--rdzv-backend", "c10d", "--rdzv-endpoint", "n1:29500"]
    assert read_line(told, is_cell=True).placement == "given"  # the user says where they meet


def test_what_an_earlier_life_left_is_ended(fake: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = srun.step_name(tmp_path)
    monkeypatch.setattr(srun, "STEP_END_S", 0.5)
    fake.answer(squeue=(0, f"7.0|{name}\n7.1|other\n7.batch|batch\n", ""))
    with pytest.raises(RunError, match=r"steps 7\.0 of an earlier life have not ended"):
        srun.end_steps(tmp_path, INSIDE)
    assert ["scancel", "7.0"] in fake.said and not any("7.1" in words for words in fake.said)
    fake.answer(squeue=(0, "7.1|other\n", ""))
    srun.end_steps(tmp_path, INSIDE)


def test_a_node_hears_of_its_lifes_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the supervisor's file alone: an srun that was killed tells nobody."""
    folder = RunFolder(tmp_path)
    monkeypatch.setattr(node, "LOOK_S", 0.0)
    said = states.SupervisorState.of_this_process(3)
    leader = node.Leader(folder, 2)
    assert leader.gone() == ""  # the file has not come yet
    for life, state, gone in ((1, "running", False), (2, "running", False), (2, "waiting", True)):
        said.life, said.state = life, state
        states.write_state(folder, said)
        assert bool(node.Leader(folder, 2).gone()) == gone, (life, state)
    said.life, said.state = 3, "running"
    states.write_state(folder, said)
    assert "has gone on" in node.Leader(folder, 2).gone()
    said.life = 2
    states.write_state(folder, said)
    silent = node.Leader(folder, 2)
    assert silent.gone() == ""
    monkeypatch.setattr(node, "SILENT_S", 0.05)
    time.sleep(0.1)
    assert "has said nothing" in silent.gone()
