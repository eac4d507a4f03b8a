"""The processes of a run: who they are, and what they agree on.

Figures, verdicts and tensors for checkpoints travel over a gloo group on the CPU, whatever the devices train with.
A process that torchrun (or Slurm, or MPI through `biokit launch`) did not start is alone: a world of one.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import itertools
import os
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from biokit.endings import PeerError
from biokit.errors import EngineError
from biokit.parallel.peers import Peers, open_door
from biokit.parallel.stores import LimitedStore, SilentStore, limited

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
WAIT_S, MEET_S = 0.05, 0.005
_runs = itertools.count()  # a store outlives a run; the keys in it are of one run only
_last_store: dict[tuple[str, str, int], dist.Store] = {}  # by address, port and world size: a port serves one store
# gloo groups of the last run. A group that goes while one of its threads still lets a tensor go waits for that thread,
# which waits for Python's lock: so they stay until the next run, when their threads have long been idle.
_ended_groups: list[Any] = []


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        group: a gloo group of all processes, for what is agreed on the CPU; None where there is one process and no
            engine asked for a group.
        store: the key-value store at which they met.
        peers: where the others can be asked whether they are there.
        meetings: numbers of those in the store, the same on every process.
    """

    rank: int = 0
    world_size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    group: Any = None
    store: LimitedStore | None = None
    peers: Peers = field(default_factory=Peers)
    meetings: Iterator[int] = field(default_factory=itertools.count)

    @property
    def is_main(self) -> bool:
        """True on the process that writes the run folder."""
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums over all processes of each value, in float64; the same on all of them."""
        if self.world_size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self.group)
        return tensor.tolist()

    @contextlib.contextmanager
    def main_first(self, what: str) -> Iterator[None]:
        """The body runs on the main process; the others wait for it without a time limit, then run it too.

        Raises:
            PeerError: the main process failed (it raises its own error).
            SilentStore: it hangs, or cannot be reached.
        """
        if self.is_main or self.store is None:
            outcome = "failed"
            try:
                yield
                outcome = "done"
            finally:
                if self.store is not None:
                    self.store.set(what, outcome)
            return
        try:
            while not self.store.check([what]):
                time.sleep(WAIT_S)
            done = self.store.get(what) == b"done"
        except SilentStore:
            raise
        except RuntimeError:  # the main process kept the store, and is gone
            done = False
        if not done:
            raise PeerError(what, "the main process (rank 0) failed", "See the error of rank 0")
        yield

    def barrier(self) -> None:
        """Wait for all."""
        if self.world_size > 1:
            dist.barrier(group=self.group)

    def share(self, value: torch.Tensor, source: int) -> torch.Tensor:
        """Fill a CPU tensor of the same shape on every process with that of rank `source`."""
        if self.world_size > 1:
            dist.broadcast(value, source, group=self.group)
        return value

    def send(self, tensor: torch.Tensor, target: int) -> None:
        """Hand a contiguous CPU tensor to another process, which receives it into one of the same form."""
        dist.send(tensor, target, group=self.group)

    def receive(self, tensor: torch.Tensor, source: int) -> torch.Tensor:
        """Fill a CPU tensor with what rank `source` sends."""
        dist.recv(tensor, source, group=self.group)
        return tensor

    def agree(self, text: str) -> str:
        """The main process's text, on all of them."""
        if self.world_size == 1:
            return text
        data = text.encode()
        length = self.share(torch.tensor([len(data)]), 0)
        shared = torch.zeros(int(length), dtype=torch.uint8)
        if self.is_main:
            shared[:] = torch.tensor(list(data), dtype=torch.uint8)
        return bytes(self.share(shared, 0).tolist()).decode()

    @contextlib.contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Leave only when every process has done its part, however long that takes; where one failed, all raise.

        Only for parts in which the processes do not wait for one another.

        Raises:
            PeerError: another process failed (it raises its own error).
            SilentStore: the main process hangs, or cannot be reached.
        """
        failure: BaseException | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failed = self._meet(f"together {next(self.meetings)}", failure is not None)
        if failure is not None:
            raise failure
        if failed:
            raise PeerError(what, f"rank {', '.join(map(str, failed))} failed", "See the error of that rank")

    def _meet(self, key: str, failed: bool) -> list[int]:
        """Wait in the store, which has no time limit, for every process; the ranks that failed."""
        if self.store is None or self.world_size == 1:
            return []
        if failed:
            self.store.set(f"{key}/failed/{self.rank}", "")
            self.store.add(f"{key}/failed", 1)
        self.store.add(f"{key}/here", 1)
        try:
            while self.store.add(f"{key}/here", 0) < self.world_size:
                time.sleep(MEET_S)
            if not self.store.add(f"{key}/failed", 0):
                return []
            return [rank for rank in range(self.world_size) if self.store.check([f"{key}/failed/{rank}"])]
        except SilentStore:
            raise
        except RuntimeError:  # the main process kept the store, and is gone
            return [0]


def count_processes() -> tuple[int, int]:
    """(rank, world size) as the launcher's environment says; (0, 1) without a launcher.

    Raises:
        EngineError: a part of the environment is missing or not a number.
    """
    if "WORLD_SIZE" not in os.environ:
        return 0, 1
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing and os.environ["WORLD_SIZE"] != "1":
        found = f"WORLD_SIZE={os.environ['WORLD_SIZE']}, but {', '.join(missing)} not set"
        raise EngineError("the processes of a run", found, "Start them with torchrun or `biokit launch`")
    try:
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ["WORLD_SIZE"])
    except ValueError as error:
        raise EngineError("RANK and WORLD_SIZE", f"they are not numbers ({error})", "Start with torchrun") from error
    if not 0 <= rank < size:
        raise EngineError(f"RANK={rank}, WORLD_SIZE={size}", "there is no such rank", "Start with torchrun")
    return rank, size


@contextlib.contextmanager
def join_processes(device: torch.device, timeout_s: float, needs_group: bool) -> Iterator[Processes]:
    """Join the other processes of the run, and leave them at the end.

    Args:
        device: `cuda` means the device of this process's LOCAL_RANK, and NCCL.
        timeout_s: after which a process that waits for another one raises; of every group.
        needs_group: an engine wants a process group even for one process.

    Raises:
        EngineError: no device for this process, or the processes do not find one another.
    """
    rank, world_size = count_processes()
    device = _own_device(device)
    if world_size == 1 and not needs_group:
        yield Processes(rank, world_size, device)
        return
    with _filled_environment():
        yield from _join(device, timeout_s, rank, world_size)


def _join(device: torch.device, timeout_s: float, rank: int, world_size: int) -> Iterator[Processes]:
    limit = dt.timedelta(seconds=timeout_s)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        store = dist.PrefixStore(f"biokit run {next(_runs)}", _find_store(limit, world_size))
        store.set_timeout(limit)
        dist.init_process_group(backend, store=store, timeout=limit, rank=rank, world_size=world_size)
        group = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo", timeout=limit)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        found = f"rank {rank} of {world_size} found no group at {where} ({str(error).splitlines()[0]})"
        do = "Check that all were started, on a free port; where nodes have several networks, set GLOO_SOCKET_IFNAME"
        raise EngineError("the processes of a run", found, do) from error
    try:
        master = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
        agreed = dist.PrefixStore("agreed", store)
        with limited(agreed, timeout_s, master[1]) as asked, open_door(asked, rank, world_size, master) as peers:
            yield Processes(rank, world_size, device, group, asked, peers)
            dist.barrier(group=group)  # without it ranks that end early take their peers with them
    finally:
        _ended_groups[:] = [group]
        dist.destroy_process_group()


def _find_store(limit: dt.timedelta, world_size: int) -> dist.Store:
    """The store at the launcher's address; that of the run before, where this process goes on in the same launch."""
    key = (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], world_size)
    if key not in _last_store:
        store, _, _ = next(dist.rendezvous("env://", timeout=limit))
        _last_store.clear()
        _last_store[key] = store
    return _last_store[key]


def _own_device(device: torch.device) -> torch.device:
    if device.type != "cuda":
        return device
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        found = f"this node has {torch.cuda.device_count()} CUDA devices"
        raise EngineError(f"a CUDA device for LOCAL_RANK={index}", found, "Start as many processes as devices")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


@contextlib.contextmanager
def _filled_environment() -> Iterator[None]:
    """A group of one needs the launcher's variables too; they are taken back, or a later launch would heed them."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        yield
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    defaults = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ |= added
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
