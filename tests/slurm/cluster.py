"""Starts Slurm on this machine: munged, slurmctld and two slurmd, all in a scratch folder, on free ports, as root.

Every process is known by its id and ended by it. `missing_parts()` says why a machine cannot have such a cluster.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

NODES = ("node1", "node2")
CPUS_PER_NODE = 8
START_S, STOP_S = 30.0, 10.0
NODE_LOST_S = 12  # without an answer, a node counts as lost
PARTS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel", "setpriv")
CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={root}/munge.sock,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool.%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd.%n.pid
SlurmctldLogFile={root}/slurmctld.log
SlurmdLogFile={root}/slurmd.%n.log
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SwitchType=switch/none
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
ReturnToService=2
KillWait=10
SlurmctldTimeout=30
SlurmdTimeout={node_lost_s}
Epilog={root}/epilog
{nodes}
PartitionName=lab Nodes={names} Default=YES MaxTime=60 State=UP
"""


def missing_parts() -> str:
    """What this machine lacks for a cluster of its own; empty: nothing."""
    if os.geteuid() != 0:
        return "a Slurm of one's own needs root"
    absent = [name for name in PARTS if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    try:
        import pwd

        pwd.getpwnam("munge")
    except KeyError:
        return "there is no user munge"
    return ""


class Cluster:
    """Two nodes that are slurmd daemons of this machine. Use as a context; leaving it ends all that it started."""

    def __init__(self) -> None:
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def environment(self) -> dict[str, str]:
        """This process's environment, with the cluster's configuration."""
        return {**os.environ, "SLURM_CONF": str(self.root / "slurm.conf")}

    def __enter__(self) -> Cluster:
        self.root = Path(tempfile.mkdtemp(prefix="biokit-slurm-"))  # short: it holds a socket
        self.root.chmod(0o755)  # munged runs as another user
        try:
            self._write_files()
            self._start_munge()
            self._start("slurmctld", ["slurmctld", "-D"])
            for node in NODES:
                self.start_node(node)
            wait_until(lambda: self.ask("sinfo", "-h", "-t", "idle", "-o", "%D") == "2", START_S, self.read_logs)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if "slurmctld" in self._daemons:
            self.ask("scancel", "--user", "root", check=False)
            with contextlib.suppress(AssertionError):
                wait_until(lambda: not self.ask("squeue", "-h", check=False), STOP_S)
        for name in (*NODES, "slurmctld", "munged"):
            self._end(name)
        shutil.rmtree(self.root, ignore_errors=True)

    def ask(self, *words: str, check: bool = True) -> str:
        """What a Slurm command prints, stripped."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=60)
        assert not check or done.returncode == 0, f"{words} ended with {done.returncode}: {done.stderr}"
        return done.stdout.strip()

    def start_node(self, node: str) -> None:
        """Start (again) the daemon of a node."""
        self._start(node, ["slurmd", "-D", "-N", node])

    def lose_node(self, node: str) -> int:
        """SIGKILL a node's daemon and everything below it at one moment, as a loss of power; how many that were."""
        family = self.processes_of(node)
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.suspend()  # first stop them all: none may notice the end of another
        family = list({*family, *self.processes_of(node)})
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._daemons.pop(node).wait()
        return len(family)

    def processes_of(self, node: str) -> list[psutil.Process]:
        """A node's daemon, what is below it, and jobs' tasks there, known by their environment, with their parents."""
        daemon = psutil.Process(self._daemons[node].pid)
        found = {daemon, *daemon.children(recursive=True)}
        for task in processes_with("SLURMD_NODENAME", node):
            with contextlib.suppress(psutil.NoSuchProcess):
                found |= {task, *(parent for parent in task.parents() if parent.name().startswith("slurmstepd"))}
        return list(found)

    def use_epilog(self, is_on: bool) -> None:
        """Whether Slurm runs `epilog.py` at the end of each job on a node."""
        script = f"#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name('epilog.py')}\n"
        (self.root / "epilog").write_text(script if is_on else "#!/bin/sh\nexit 0\n")
        (self.root / "epilog").chmod(0o755)

    def read_logs(self) -> str:
        """The ends of the daemons' logs."""
        return "\n".join(f"{p.name}:\n{p.read_text(errors='replace')[-1500:]}" for p in self.root.glob("*.log"))

    def _write_files(self) -> None:
        ports, host = free_ports(1 + len(NODES)), socket.gethostname()
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={CPUS_PER_NODE} RealMemory=8000"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        text = CONFIGURATION.format(
            host=host,
            ports=ports,
            root=self.root,
            nodes="\n".join(lines),
            names=",".join(NODES),
            node_lost_s=NODE_LOST_S,
        )
        (self.root / "slurm.conf").write_text(text)
        (self.root / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\n")
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (self.root / name).mkdir()
        self.use_epilog(False)

    def _start_munge(self) -> None:
        folder = self.root / "munge"
        folder.mkdir(mode=0o700)
        key = folder / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        for path in (folder, key):
            shutil.chown(path, "munge", "munge")
        socket_path = self.root / "munge.sock"
        files = {"key-file": key, "socket": socket_path, "pid-file": folder / "pid", "seed-file": folder / "seed"}
        options = [f"--{name}={path}" for name, path in {**files, "log-file": folder / "log"}.items()]
        shutil.chown(self.root, "munge", "munge")  # the socket stands here, where every user may come
        self._start("munged", ["munged", "-F", *options], ["--reuid", "munge", "--regid", "munge", "--clear-groups"])
        wait_until(socket_path.exists, START_S)

    def _start(self, name: str, command: Sequence[str], privileges: Sequence[str] = ()) -> None:
        """Start a daemon, which also ends where the process of the tests is killed."""
        with (self.root / f"{name}.out").open("ab") as output:
            self._daemons[name] = subprocess.Popen(
                ["setpriv", *privileges, "--pdeathsig", "TERM", *command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _end(self, name: str) -> None:
        daemon = self._daemons.pop(name, None)
        if daemon is None:
            return
        below = psutil.Process(daemon.pid).children(recursive=True) if daemon.poll() is None else []
        daemon.terminate()
        try:
            daemon.wait(STOP_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        for process in below:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()


def processes_with(name: str, value: str) -> list[psutil.Process]:
    """All processes that have a variable of this value in the environment they were started with."""
    found, wanted = [], f"{name}={value}".encode()
    for process in psutil.process_iter():
        with contextlib.suppress(OSError, psutil.Error):
            variables = Path(f"/proc/{process.pid}/environ").read_bytes().split(b"\0")
            if wanted in variables and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody uses."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


def wait_until(condition: Callable[[], bool], timeout_s: float, explain: Callable[[], str] = str) -> None:
    """Return when a condition holds.

    Raises:
        AssertionError: it does not hold after `timeout_s`; the message holds what `explain` says then.
    """
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"the awaited state did not come in {timeout_s:g} s. {explain()}"
        time.sleep(0.1)
