"""Makes two network namespaces with a link between them, starts processes in them, and removes it all by name."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

HOSTS = ("n1", "n2")
ADDRESSES = ("10.77.0.1", "10.77.0.2")
FILES = Path("/etc/netns")
ENTER = 'hostname "$0"; exec "$@"'  # of sh, in a UTS namespace of its own
TOOL_S = 20.0


def missing_parts() -> str:
    """Why namespaces cannot be made here; empty where they can."""
    if os.geteuid() != 0:
        return "they take root"
    if absent := [tool for tool in ("ip", "unshare", "hostname") if shutil.which(tool) is None]:
        return f"{', '.join(absent)} not found (Debian: iproute2, util-linux, hostname)"
    try:
        with NodePair():
            return ""
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


class NodePair:
    """Two nodes, `n1` and `n2`, each with its own host name, addresses and hosts file; they share the disk.

    Attributes:
        names: of the namespaces; they hold this process's id, so that what a killed one left is told apart.
    """

    def __init__(self) -> None:
        self.names = [f"biokit-{os.getpid()}-{node}" for node in range(2)]
        self.links = [f"bk{os.getpid()}v{node}" for node in range(2)]  # at most 15 signs

    def __enter__(self) -> NodePair:
        remove_left_over()
        try:
            self._make()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _make(self) -> None:
        for name in self.names:
            ip("netns", "add", name)
        first, second = self.names
        ip("link", "add", self.links[0], "netns", first, "type", "veth", "peer", "name", self.links[1], "netns", second)
        hosts = ["127.0.0.1 localhost", *(f"{a} {h}" for a, h in zip(ADDRESSES, HOSTS, strict=True))]
        for node, name in enumerate(self.names):
            ip("-n", name, "address", "add", f"{ADDRESSES[node]}/24", "dev", self.links[node])
            for device in ("lo", self.links[node]):
                ip("-n", name, "link", "set", device, "up")
            folder = FILES / name
            folder.mkdir(parents=True)
            (folder / "hosts").write_text("\n".join(hosts) + "\n")
            (folder / "resolv.conf").write_text("")
            (folder / "nsswitch.conf").write_text("hosts: files\n")

    def close(self) -> None:
        """End what runs in the namespaces, and remove them."""
        for name in self.names:
            remove_namespace(name)

    def start(self, node: int, command: Sequence[str], variables: Mapping[str, str], log: Path) -> subprocess.Popen:
        """Start a command on a node; the process is the command's own."""
        enter = ["ip", "netns", "exec", self.names[node], "unshare", "--uts", "sh", "-c", ENTER, HOSTS[node]]
        with log.open("ab") as file:
            return subprocess.Popen(
                [*enter, *command],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
                env={**os.environ, **variables}, start_new_session=True,
            )  # fmt: skip

    def cut(self) -> None:
        """Take the link away."""
        ip("-n", self.names[0], "link", "set", self.links[0], "down")

    def mend(self) -> None:
        """Bring the link back."""
        ip("-n", self.names[0], "link", "set", self.links[0], "up")

    def end_all(self) -> None:
        """SIGKILL to every process on the nodes."""
        for name in self.names:
            end_processes(name)

    def pids(self) -> list[int]:
        """Processes on the nodes."""
        return [pid for name in self.names for pid in pids_in(name)]


def ip(*words: str) -> str:
    """Run `ip`; what it prints."""
    return subprocess.run(["ip", *words], check=True, capture_output=True, text=True, timeout=TOOL_S).stdout


def pids_in(name: str) -> list[int]:
    """Processes in a namespace."""
    return [int(pid) for pid in ip("netns", "pids", name).split()]


def end_processes(name: str) -> None:
    """SIGKILL to the processes in a namespace."""
    end = time.monotonic() + TOOL_S
    while (pids := pids_in(name)) and time.monotonic() < end:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def remove_namespace(name: str) -> None:
    """Remove a namespace, its processes and its files; nothing where there is none."""
    with contextlib.suppress(subprocess.CalledProcessError):
        end_processes(name)
        ip("netns", "delete", name)
    shutil.rmtree(FILES / name, ignore_errors=True)


def remove_left_over() -> None:
    """Remove what killed processes of this kind have left."""
    for line in ip("netns", "list").splitlines():
        name = line.split()[0]
        owner = re.fullmatch(r"biokit-(\d+)-\d", name)
        if owner and not Path(f"/proc/{owner[1]}").exists():
            remove_namespace(name)
