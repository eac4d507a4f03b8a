"""`biokit launch`: what it starts, and where."""

import argparse
import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from biokit.__main__ import main
from biokit.config import RunConfig, config_from_dict, config_to_yaml, load_config
from biokit.errors import ConfigError
from biokit.flags import read_flags
from biokit.launch import torchrun
from biokit.launch.commands.launch import add_flags, run_launch
from biokit.launch.torchrun import plan_launch
from biokit.layouts import find_layout
from biokit.runs import RunFolder
from biokit.train import train
from tests.distributed import free_port
from tests.small_run import small_config, write_smiles

LOSS_BOUND = 4e-6  # 8 ulp of a loss between 4 and 8 (2^-21 each): its terms are summed in another order
WORDS = ["molbart_mini", "seed=2"]
RANK = ["-m", "biokit", "train", *WORDS]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
README = Path(__file__).parents[1] / "README.md"
NAMES = ("GPUS_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK")


def configure(strategy: str = "DDP", tensor: int = 1, pipeline: int = 0) -> RunConfig:
    sizes = {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}
    train_keys = {"device": "cpu", "micro_batch_size": 2, "global_batch_size": 16}
    return config_from_dict({"strategy": strategy, "train": train_keys, "parallel": sizes})


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment without a launcher's variables."""
    for name in [*NAMES, *(name for name in os.environ if name.startswith(torchrun.MPI))]:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.fixture
def network(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A machine with an address towards node0; what tells gloo of it."""
    monkeypatch.setattr(torchrun, "find_local_address", lambda endpoint: "10.0.0.7")
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: {"ib0": [SimpleNamespace(address="10.0.0.7")]})
    return {"GLOO_SOCKET_IFNAME": "ib0"}


@pytest.mark.parametrize(
    ("environment", "options"),
    [
        ({}, ["--standalone", "--nproc-per-node", "1"]),
        ({"GPUS_PER_NODE": "4"}, ["--standalone", "--nproc-per-node", "4"]),
        ({"GPUS_PER_NODE": "4", "NNODES": "1", "NODE_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "6000"},
         ["--nnodes", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:6000", "--rdzv-id",
          "biokit-molbart_mini", "--rdzv-conf", "is_host=1", "--nproc-per-node", "4"]),
        ({"GPUS_PER_NODE": "2", "NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node0", "MASTER_PORT": "6000"},
         ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:6000", "--rdzv-id",
          "biokit-molbart_mini", "--rdzv-conf", "is_host=1", "--local-addr", "10.0.0.7", "--nproc-per-node", "2"]),
        ({"GPUS_PER_NODE": "2", "OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1",
          "OMPI_COMM_WORLD_LOCAL_SIZE": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
          "MASTER_ADDR": "node0", "MASTER_PORT": "6000"},
         ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:6000", "--rdzv-id",
          "biokit-molbart_mini", "--rdzv-conf", "is_host=0", "--local-addr", "10.0.0.7", "--nproc-per-node", "2"]),
    ],
)  # fmt: skip
def test_the_command_that_the_environment_asks_for(
    environment: dict[str, str], options: list[str], network: dict[str, str]
) -> None:
    plan = plan_launch(configure(), WORDS, environment)
    assert plan.command == [*TORCHRUN, *options, *RANK]
    assert plan.environment == {"OMP_NUM_THREADS": "1"} | (network if "--local-addr" in options else {})
    assert ("mpirun" in plan.note) == ("OMPI_COMM_WORLD_SIZE" in environment)


def test_a_process_that_mpirun_started_beside_others_is_a_rank() -> None:
    environment = {
        "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
        "OMPI_COMM_WORLD_LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "12345", "OMP_NUM_THREADS": "2",
    }  # fmt: skip
    plan = plan_launch(configure("ThreeD", tensor=2, pipeline=2), WORDS, environment)
    assert plan.command == [sys.executable, "-m", "biokit", "train", *WORDS]
    assert plan.environment == {
        "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node0", "MASTER_PORT": "12345",
    }  # fmt: skip
    assert plan.note == "mpirun started one process a rank: this is rank 3, and needs no torchrun."
    with pytest.raises(ConfigError, match="2 of them on other nodes, and MASTER_ADDR or MASTER_PORT not set"):
        plan_launch(configure(), WORDS, {**environment, "MASTER_PORT": ""})
    with pytest.raises(ConfigError, match="GPUS_PER_NODE=8: OMPI_COMM_WORLD_LOCAL_SIZE=2"):
        plan_launch(configure(), WORDS, {**environment, "GPUS_PER_NODE": "8"})


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"GPUS_PER_NODE": "four"}, "GPUS_PER_NODE=four: it is not a number that can be. Valid: 1 or more."),
        ({"GPUS_PER_NODE": "0"}, "GPUS_PER_NODE=0: "),
        ({"NNODES": "1:4"}, "NNODES=1:4: "),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK=2: it is not a number that can be. Valid: 0 to 1."),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT=65536: it is not a number that can be. Valid: 1 to 65535."),
        ({"MASTER_PORT": "0"}, "MASTER_PORT=0: "),
        ({"NNODES": "2", "NODE_RANK": "0"}, "NNODES=2: MASTER_ADDR, MASTER_PORT not set."),
        ({"NNODES": "3", "OMPI_COMM_WORLD_SIZE": "2"}, "NNODES=3: OMPI_COMM_WORLD_SIZE=2: mpirun started as many"),
        ({"TORCHELASTIC_RUN_ID": "x"}, "torchrun has started this process. Give torchrun `-m biokit train"),
        ({"GPUS_PER_NODE": "3"}, "tp=2 x pp=2: 3 processes are started."),
    ],
)
def test_environments_that_cannot_be(environment: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        plan_launch(configure("ThreeD", tensor=2, pipeline=2), WORDS, environment)
    assert message in str(caught.value)


def test_dry_run_prints_what_it_would_become(
    bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bare.chdir(tmp_path)
    bare.setenv("GPUS_PER_NODE", "4")
    bare.setenv("OMP_NUM_THREADS", "1")
    words = ["--strategy", "ThreeD", "--mp_size", "2", "--pp-size=2", "run_dir=my run"]
    assert main(["launch", "--dry-run", "molbart_mini", *words]) == 0
    printed = capsys.readouterr()
    assert "ThreeD x tp2 x pp2: 4 processes." in printed.err
    started: list[list[str]] = []
    bare.setattr(os, "execve", lambda path, command, environment: started.append([path, *command]))
    main(["launch", "molbart_mini", *words])
    assert started == [[sys.executable, *shlex.split(printed.out)]]
    assert started[0][-1] == "run_dir=my run"
    assert not list(tmp_path.iterdir())


FLAGS = ["--nnodes", "2", "--nproc_per_node=4", "--master-addr", "node 0", "--strategy", "DDP", "train.lr=1e-3"]


def test_flags_say_what_the_environment_says(
    bare: pytest.MonkeyPatch, network: dict[str, str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bare.setenv("MASTER_PORT", "7000")
    bare.setenv("NNODES", "3")
    words = ["molbart_mini", *FLAGS, "--cpu", "--batch-size", "4", f"run_dir={tmp_path / 'x'}"]
    assert main(["launch", *words, "--node-rank", "1", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint 'node 0:7000' --rdzv-id biokit-x" in printed
    assert "is_host=0 --local-addr 10.0.0.7 --nproc-per-node 4 -m biokit train molbart_mini strategy=DDP" in printed
    assert main(["launch", "--node-rank", "2", *words, "--dry-run"]) == 2
    assert "NODE_RANK=2: it is not a number that can be. Valid: 0 to 1." in capsys.readouterr().err
    assert main(["launch", *words, "--lives"]) == 2
    assert "flag --lives: it has no value. Write --lives VALUE." in capsys.readouterr().err


def test_one_command_a_node_for_copying(
    bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["molbart_mini", *FLAGS, "--cpu", "--batch-size", "4", f"run_dir={tmp_path / 'my run'}", "--lives", "3"]
    assert main(["launch", *words, "--node-commands"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    for node, line in enumerate(lines):
        python, *rest = shlex.split(line)
        assert (python, rest[:3]) == (sys.executable, ["-m", "biokit", "launch"])
        bare.setattr(torchrun, "find_local_address", lambda endpoint: "")
        assert main([*rest[2:], "--dry-run"]) == 0
        planned = capsys.readouterr().out
        assert f"--rdzv-endpoint 'node 0:29500' --rdzv-id 'biokit-my run' --rdzv-conf is_host={1 - node}" in planned
        assert "--nproc-per-node 4 -m biokit train molbart_mini strategy=DDP train.lr=1e-3" in planned
        assert shlex.split(line)[-8:-2] == ["--master-addr", "node 0", "--master-port", "29500", "--lives", "3"]
    bad = ["molbart_mini", "--strategy", "ThreeD", "--mp_size", "8", "--nnodes", "2", "--master-addr", "a"]
    assert main(["launch", *bad, "--nproc-per-node", "4", "--node-commands"]) == 2
    assert "tp=8: it does not divide num_attention_heads=4" in capsys.readouterr().err
    assert main(["launch", "molbart_mini", "--nnodes", "2", "--node-commands"]) == 2
    assert "NNODES=2: MASTER_ADDR not set." in capsys.readouterr().err


def test_impossible_layouts_start_nothing(
    bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bare.setenv("GPUS_PER_NODE", "8")
    bare.setattr(os, "execve", lambda *_: pytest.fail("it was started"))
    assert main(["launch", "molbart_mini", "--strategy", "ThreeD", "--mp_size", "8", f"run_dir={tmp_path / 'r'}"]) == 2
    error = capsys.readouterr().err
    assert error == "biokit: tp=8: it does not divide num_attention_heads=4. Valid: 1, 2, 4.\n"
    assert not (tmp_path / "r").exists()


def test_a_port_that_is_in_use_is_refused_before_torchrun(
    bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    started: list[str] = []
    bare.setattr(os, "execve", lambda path, command, environment: started.append(path))
    variables = {"MASTER_ADDR": "localhost", "NNODES": "2", "NODE_RANK": "0", "OMP_NUM_THREADS": "1"}
    words = ["molbart_mini", "--strategy", "DDP", "--cpu", "--batch-size", "16"]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for name, value in {**variables, "MASTER_PORT": str(port)}.items():
            bare.setenv(name, value)
        assert main(["launch", *words]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"biokit: MASTER_PORT={port}: port {port} is in use on this machine. "
            "Give another MASTER_PORT, the same on every node."
        )
        assert main(["launch", *words, "--dry-run"]) == 0
        assert started == []
        bare.setenv("NODE_RANK", "1")  # it opens no port
        assert main(["launch", *words]) == 0
        for name in ("NNODES", "NODE_RANK"):
            bare.delenv(name)
        for rank, status in ((1, 0), (0, 2)):
            for name, number in {"SIZE": 2, "RANK": rank, "LOCAL_SIZE": 2, "LOCAL_RANK": rank}.items():
                bare.setenv(f"OMPI_COMM_WORLD_{name}", str(number))
            assert main(["launch", *words]) == status
    assert started == [sys.executable] * 2
    bare.setenv("MASTER_PORT", str(free_port()))
    assert main(["launch", *words]) == 0
    assert started == [sys.executable] * 3


def readme_lines(*programs: str) -> list[str]:
    """The lines of README's code blocks that start one of these programs."""
    blocks = re.findall(r"^```\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if re.match(rf"([A-Z_]+=\S+ +)*({'|'.join(programs)}) ", line)]


@pytest.mark.parametrize("line", readme_lines("biokit launch", "torchrun"))
def test_a_launch_line_of_the_readme_can_be_started(
    line: str, bare: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(line, comments=True)
    variables = {"GPUS_PER_NODE": "2"}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        variables[name] = value
    if words[0] == "biokit":
        for name, value in variables.items():
            bare.setenv(name, value)
        status = main([*words[1:], "--dry-run", "--cpu"])  # whatever devices this machine has
        assert status == 0, capsys.readouterr().err
    else:
        _, (name, *overrides), _ = read_flags([*words[words.index("train") + 1 :], "--cpu"])
        num_processes = int(words[words.index("--nproc-per-node") + 1])
        assert find_layout(load_config(name, overrides), num_processes).world_size == num_processes


def test_the_readme_has_both_ways_to_launch() -> None:
    assert len(readme_lines("torchrun")) >= 1 and len(readme_lines("biokit launch")) >= 2


@pytest.mark.full
def test_torchrun_starts_three_dimensions_by_flags(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = [
        *TORCHRUN, "--standalone", "--nproc-per-node", "4", "-m", "biokit", "train", "molbart_mini",
        "--strategy", "ThreeD", "--tensor_model_parallel_size", "2", "--pipeline_model_parallel_size", "2",
        "--num-layers", "2", "--hidden-size", "32", "--num-attention-heads", "4", "--train-iters", "3", "--cpu",
        "--batch-size", "4", "train.global_batch_size=8", "train.tensorboard=False", "train.eval_molecules=0",
        f"data.dataset_path={write_smiles(tmp_path)}", "data.split_ratio=70,20,10", f"run_dir={tmp_path / 'run'}",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("finished at step 3 of 3") == 1
    run = RunFolder(tmp_path / "run")
    manifest = run.read_manifest()
    assert manifest["layout"] == {"strategy": "ThreeD", "world_size": 4, "tensor": 2, "data": 1, "pipeline": 2}
    assert (manifest["status"], len(run.read_metrics())) == ("finished", 3)
    settings = json.loads(run.deepspeed_file.read_text())
    sizes = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    assert [settings[size] for size in sizes] == [8, 4, 2]
    assert settings["zero_optimization"]["stage"] == 1


def pair(folder: Path, run: str = "run", **keys: object) -> RunConfig:
    """A small DDP run whose configuration also stands in a file."""
    config = small_config(folder, run, **{"device": "cpu", "train_iters": 3, **keys})
    config.strategy = "DDP"
    (folder / f"{run}.yaml").write_text(config_to_yaml(config))
    return config


def test_launch_trains_on_two_ranks_as_one_does(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pair(tmp_path)
    command = [sys.executable, "-m", "biokit", "launch", str(tmp_path / "run.yaml"), "--train-iters", "4"]
    environment = {**os.environ, "GPUS_PER_NODE": "2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "biokit: DDP x dp2: 2 processes." in done.stderr
    assert done.stdout.count("finished at step 4 of 4") == 1
    train(small_config(tmp_path, "single", device="cpu", train_iters=4))
    curves = [[line["loss"] for line in RunFolder(tmp_path / run).read_metrics()] for run in ("run", "single")]
    assert len(curves[0]) == 4
    assert curves[0] == pytest.approx(curves[1], abs=LOSS_BOUND, rel=0)


@pytest.mark.full
def test_two_processes_of_mpirun_are_two_ranks(bare: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pair(tmp_path)
    command = [sys.executable, "-m", "biokit", "launch", str(tmp_path / "run.yaml"), "--train-iters", "2"]
    port = str(30000 + os.getpid() % 10000)
    started = []
    for rank in range(2):
        mpi = {"SIZE": 2, "RANK": rank, "LOCAL_SIZE": 2, "LOCAL_RANK": rank}
        own = {f"OMPI_COMM_WORLD_{name}": str(number) for name, number in mpi.items()}
        environment = {**os.environ, **own, "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
    said = [process.communicate(timeout=120)[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    assert "finished at step 2 of 2" in said[0]
    assert RunFolder(tmp_path / "run").read_manifest()["layout"]["data"] == 2


@pytest.mark.parametrize("words", [["--timeout=-5"], ["--timeout=nan"], ["--lives=-3"]])
def test_impossible_times_and_lives_are_refused(words):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    with pytest.raises(ConfigError, match=words[0].partition("=")[0]):
        run_launch(parser.parse_args(words))
