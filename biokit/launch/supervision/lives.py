"""One launch of a run's processes on this machine, as the supervisor holds it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Collection, Mapping

import psutil

from biokit.errors import RunError
from biokit.launch.orders import Order
from biokit.launch.supervision.agent_file import PARENT, note_end
from biokit.launch.supervision.placement import Agent, place_agents
from biokit.launch.tree import end_tree, reap_adopted, signal_tree
from biokit.runs import RunFolder
from biokit.safe_files import read_object, to_whole


class Life:
    """The agents of one launch, from their start until nothing of them is left.

    Args:
        spared: descendants of this process that are none of the life's.

    Raises:
        ConfigError: the order has a placement that this machine cannot carry out.
    """

    def __init__(
        self, folder: RunFolder, order: Order, number: int, node_rank: int, spared: Collection[psutil.Process]
    ) -> None:
        self.folder, self.number, self.files = folder, number, folder.life(number)
        self._spared = spared
        self.is_training, self.is_elastic = order.kind == "train", order.is_elastic
        self.files.create()
        self.agents = place_agents(order, self.files, number, node_rank)
        self._before = self._manifest_time()
        environment = {**os.environ, **order.environment, PARENT: str(os.getpid())}
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            for agent in self.agents:
                self.processes.append(self._start(agent, environment))
        except BaseException:
            self.end(0)
            raise

    def _start(self, agent: Agent, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
        with self.files.agent_log(agent.node).open("ab") as log:
            return subprocess.Popen(
                agent.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=dict(environment),
                start_new_session=True,  # a Ctrl-C in a terminal is the supervisor's to deal with
            )

    def poll(self) -> list[int | None]:
        """Exit codes of the agents; None: it runs."""
        return [process.poll() for process in self.processes]

    def codes(self) -> list[int | None]:
        """As `poll`, but an agent that has left word of its end is taken at that, whatever became of it after."""
        return [self._told(agent, code) for agent, code in zip(self.agents, self.poll(), strict=True)]

    def _told(self, agent: Agent, code: int | None) -> int | None:
        said = read_object(self.files.agent_file(agent.node)).get("code") if agent.tells_its_end else None
        return code if said is None else to_whole(said, 1)

    def lingering(self) -> list[int]:
        """Nodes whose agent has left word of its end, and is still there."""
        there = [agent for agent, code in zip(self.agents, self.poll(), strict=True) if code is None]
        return [one.node for one in there if one.tells_its_end and self.files.agent_file(one.node).exists()]

    @property
    def is_over(self) -> bool:
        """Whether all agents have ended."""
        return None not in self.poll()

    @property
    def is_alone(self) -> bool:
        """Whether it has no agent but one."""
        return len(self.agents) == 1

    def terminate(self) -> None:
        """Send all that is left SIGTERM, and wait for nothing."""
        signal_tree(signal.SIGTERM, self._spared)

    def end(self, grace_s: float) -> None:
        """End all that is left: SIGTERM, after `grace_s` seconds SIGKILL."""
        left = end_tree(grace_s=grace_s, spared=self._spared)
        for process in self.processes:
            if process.pid not in [hung.pid for hung in left]:
                process.wait()
        reap_adopted([process.pid for process in self._spared])
        for agent, process in zip(self.agents, self.processes, strict=False):
            if process.returncode is not None:
                self._note_end(agent, process)

    def _note_end(self, agent: Agent, process: subprocess.Popen[bytes]) -> None:
        """In place of an agent that could not say it itself, or that there was not."""
        if self.files.agent_file(agent.node).exists():
            return
        code, ranks = process.returncode, {}
        if agent.is_rank and code:
            ranks = {"0": {"exit_code": code, "time": time.time(), "pid": process.pid}}
        with contextlib.suppress(OSError):
            note_end(self.files, agent.node, code, ranks)

    def training_status(self) -> str:
        """What a training of this life says in the manifest; empty where it has not written any."""
        if not self.is_training or self._manifest_time() == self._before:
            return ""
        with contextlib.suppress(RunError):
            return str(self.folder.read_manifest().get("status", ""))
        return ""

    def _manifest_time(self) -> int:
        with contextlib.suppress(OSError):
            return self.folder.manifest_file.stat().st_mtime_ns
        return 0
