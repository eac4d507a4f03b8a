"""What is to be started, as plain data: who asks writes it into the run folder, the supervisor carries it out."""

from __future__ import annotations

import itertools
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from biokit.errors import RunError
from biokit.runs import RunFolder, write_atomically
from biokit.safe_files import load_object, to_number

KINDS = ("train", "script", "cell", "ranks")
HERE, GIVEN, SLURM, NODES = "here", "given", "slurm", "nodes"
PLACEMENTS = (HERE, GIVEN, SLURM, NODES)
OWN_OUTPUT = {"--redirects", "--tee", "--log-dir"}  # torchrun's flags that say where the ranks' output goes
TRAIN = ("-m", "biokit", "train")  # how the program of a training begins


@dataclass(frozen=True)
class Order:
    """One run to start.

    Attributes:
        kind: `train` saves and ends at a step boundary when the STOP file appears; `script`, `cell` and `ranks` are
            ended from outside.
        program: what each rank runs, as Python takes it: `("-m", "biokit", "train", FILE)`, `("script.py", "--lr")`.
        torchrun: torchrun's flags, without those of the rendezvous unless the placement is `given`; empty: one process
            without torchrun.
        placement: `here`: all nodes' agents on this machine; `given`: the rendezvous flags stand in `torchrun`;
            `slurm`: one agent a node of the allocation, by srun; `nodes`: a supervisor on each node, which meet in
            the run folder.
        endpoint: `host:port` of node 0, for `nodes`; life k takes port + k - 1.
        timeout_s: of the whole run; 0: none. At its end the ranks' stacks are asked for, then all is ended.
        max_lives: launches in all; a failed one is followed by the next, up to this many.
        backoff_s: wait before the second life; doubled before each further one, up to a minute.
        environment: additions to the supervisor's own; never secrets.
        facts: the state of the code and the data that the run card shows.
    """

    kind: str
    program: tuple[str, ...]
    torchrun: tuple[str, ...] = ()
    placement: str = HERE
    num_nodes: int = 1
    endpoint: str = ""
    timeout_s: float = 0.0
    max_lives: int = 1
    backoff_s: float = 1.0
    environment: dict[str, str] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def is_elastic(self) -> bool:
        """Whether torchrun itself starts ranks again, or waits for nodes that come and go."""
        values = dict(flag_pairs(self.torchrun))
        return ":" in values.get("--nnodes", "") or values.get("--max-restarts", "0") != "0"

    @property
    def saves_on_sigterm(self) -> bool:
        """Whether it is a training of biokit, by whatever name, which saves a checkpoint before it ends."""
        return self.kind == "train" or self.program[: len(TRAIN)] == TRAIN

    def line(self) -> str:
        """The command line that starts the same by hand; words are quoted for a shell. Of several nodes it is each
        node's, and HOST:PORT stands for where they meet, which every life chooses anew.
        """
        if not self.torchrun:
            return shlex.join([sys.executable, *self.program])
        where = ["--standalone"] if self.placement == HERE else []
        if self.num_nodes > 1:
            where = ["--nnodes", str(self.num_nodes), "--rdzv-backend", "c10d"]
            where += ["--rdzv-endpoint", self.endpoint or "HOST:PORT"]
        return shlex.join([sys.executable, "-m", "torch.distributed.run", *where, *self.torchrun, *self.program])


def flag_name(word: str) -> str:
    """A flag of torchrun as its help spells it, without a value behind `=`: it takes underscores and letters too."""
    name = word.partition("=")[0]
    return name.replace("_", "-") if name.startswith("--") else {"-r": "--redirects", "-t": "--tee"}.get(name, word)


def flag_pairs(words: Sequence[str]) -> list[tuple[str, str]]:
    """Flags of torchrun, by `flag_name`, and what follows each, which may be the next flag."""
    joined = [(flag_name(word), word.partition("=")[2]) for word in words if word.startswith("-") and "=" in word]
    return joined + [(flag_name(word), value) for word, value in itertools.pairwise(words) if "=" not in word]


def has_own_output(order: Order) -> bool:
    """Whether torchrun's flags say where the ranks' output goes."""
    return not OWN_OUTPUT.isdisjoint(map(flag_name, order.torchrun))


def write_order(folder: RunFolder, order: Order) -> None:
    """Leave an order in a run folder."""
    write_atomically(folder.launch_file, json.dumps(asdict(order), indent=1) + "\n")


def read_order(folder: RunFolder) -> Order:
    """The order of a run.

    Raises:
        RunError: there is none, or it is not one.
    """
    asked = f"run {folder.path}"
    try:
        return order_from_dict(load_object(folder.launch_file))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(asked, f"its launch.json cannot be read ({error})", "Check the path") from error


def order_from_dict(values: Mapping[str, Any]) -> Order:
    """An order from plain values.

    Raises:
        ValueError: unknown or missing entries, or a kind or placement that there is not.
    """
    known = {f.name for f in fields(Order)}
    if unknown := set(values) - known:
        raise ValueError(f"unknown entries {', '.join(sorted(unknown))}")
    for name in ("environment", "facts"):
        if not isinstance(values.get(name, {}), Mapping):
            raise ValueError(f"{name} is no mapping")
    for name in ("num_nodes", "timeout_s", "max_lives", "backoff_s"):
        if to_number(values.get(name, 1), -1.0) < 0:
            raise ValueError(f"{name} is no number from 0 on")
    order = Order(**{**values, "program": tuple(values["program"]), "torchrun": tuple(values.get("torchrun", ()))})
    if order.kind not in KINDS or order.placement not in PLACEMENTS:
        raise ValueError(f"kind {order.kind!r}, placement {order.placement!r}")
    return order
