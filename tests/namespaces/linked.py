"""A small training on two nodes with a link that can be cut: a supervisor on each, by `biokit launch`."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from biokit.config import RunConfig, config_from_dict, config_to_dict, config_to_yaml
from biokit.launch.torchrun import node_commands
from biokit.runs import RunFolder
from tests.drills.kill_a_rank import last_step
from tests.drills.kill_and_resume import make_config
from tests.namespaces.pair import HOSTS, NodePair

PORT = 29400
LIFE_S = 150.0
MARGIN_S = 5.0  # after the process groups' time limit, by which every rank must know


def configure(run_dir: Path, dataset_path: str, timeout_s: float, num_steps: int) -> RunConfig:
    """Data-parallel, one rank a node."""
    tree = config_to_dict(make_config(run_dir, dataset_path))
    tree |= {"strategy": "DDP", "parallel": {**tree["parallel"], "timeout_s": timeout_s}}
    tree["train"] |= {"device": "cpu", "train_iters": num_steps, "save_interval": 10, "eval_interval": 1_000_000}
    return config_from_dict(tree)


class LinkedRun:
    """The two supervisors of a run."""

    def __init__(self, nodes: NodePair, config: RunConfig, lives: int = 3) -> None:
        self.nodes, self.folder = nodes, RunFolder(config.run_dir)
        self.folder.create()
        asked = self.folder.path / "asked.yaml"
        asked.write_text(config_to_yaml(config), encoding="utf-8")
        commands = node_commands([str(asked)], 2, 1, HOSTS[0], PORT, ["--lives", str(lives)])
        variables = {"OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(self.folder.path / "state")}
        self.started = time.monotonic()
        self.processes = [
            nodes.start(node, shlex.split(command), variables, self.log_file(node))
            for node, command in enumerate(commands)
        ]

    def log_file(self, node: int) -> Path:
        """What `biokit launch` printed on a node."""
        return self.folder.logs / f"node_{node}.log"

    def wait_until(self, what: str, condition: Callable[[], object], timeout_s: float = LIFE_S) -> None:
        """Return when a condition holds.

        Raises:
            AssertionError: the supervisors ended before, or the time is over; with what they said.
        """
        end = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > end or all(process.poll() is not None for process in self.processes):
                raise AssertionError(f"{what} did not come:\n{self.logs()}")
            time.sleep(0.02)

    def reach(self, step: int) -> None:
        """Wait for a step of the training."""
        self.wait_until(f"step {step}", lambda: last_step(self.folder) >= step)

    def errors(self, life: int = 1) -> list[dict[str, Any]]:
        """What the ranks of a life have said before they ended, in the order of their nodes."""
        files = [self.folder.life(life).error_file(rank) for rank in range(2)]
        told = [json.loads(file.read_text(encoding="utf-8")) for file in files if file.exists()]
        return sorted(told, key=lambda error: error["host"])

    def wait(self, timeout_s: float = LIFE_S) -> list[int]:
        """Exit codes of the supervisors."""
        end = time.monotonic() + timeout_s
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.processes]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still running:\n{self.logs()}") from None

    def stop(self, node: int) -> None:
        """SIGTERM to a node's supervisor."""
        self.processes[node].send_signal(signal.SIGTERM)

    def logs(self) -> str:
        """What both said."""
        return "\n".join(f"--- {HOSTS[node]}\n{self.log_file(node).read_text()[-6000:]}" for node in range(2))
