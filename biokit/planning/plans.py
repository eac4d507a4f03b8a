"""The plan of a run: every layout of so many devices, what it needs and how long its step takes, the best first."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from biokit.config import RunConfig
from biokit.errors import ConfigError
from biokit.planning.candidates import global_batch_size, list_cases, with_smaller_micro_batch
from biokit.planning.communication import Traffic, list_traffic
from biokit.planning.devices import Device
from biokit.planning.holdings import read_vocab_size
from biokit.planning.jobs import Case, Job
from biokit.planning.memory import find_peak
from biokit.planning.parts import Instant
from biokit.planning.timing import Machine, StepTime, estimate_step

GIB = 2**30
RESERVE_GIB = {"cuda": 4.0, "cpu": 0.0}  # for the CUDA context, NCCL's buffers and the allocator's gaps
TOLERANCE = 0.02  # of the time: closer ones cannot be told apart
SIMPLEST = ("Single", "DDP", "Zero1", "Zero2", "Zero3", "Pipeline", "ThreeD", "ZeroInf")
MOST_TIMES = 8  # as many devices are tried where no layout fits


@dataclass(frozen=True)
class Plan:
    """One layout's need and time.

    Attributes:
        peaks: the fullest instant of each pipeline stage.
    """

    job: Job
    case: Case
    machine: Machine
    peaks: Sequence[Instant]
    limit: float

    @property
    def worst_stage(self) -> int:
        """The stage whose ranks need most."""
        return max(range(len(self.peaks)), key=lambda stage: self.peaks[stage].total)

    @property
    def peak(self) -> Instant:
        """Of the fullest rank."""
        return self.peaks[self.worst_stage]

    @property
    def fits(self) -> bool:
        """Whether the fullest rank stays below the limit."""
        return self.peak.total <= self.limit

    @cached_property
    def step(self) -> StepTime:
        """The estimated time of a step."""
        return estimate_step(self.job, self.case, self.machine)

    @cached_property
    def traffic(self) -> list[list[Traffic]]:
        """Messages of a rank in a step, by pipeline stage."""
        return [list_traffic(self.job, self.case, stage) for stage in range(self.case.layout.pipeline)]

    def __str__(self) -> str:
        return f"{self.case.layout}{' with recompute' if self.case.recompute else ''}"


@dataclass(frozen=True)
class PlanTable:
    """All layouts of a run.

    Attributes:
        plans: those that fit, fastest first (the simplest of those within TOLERANCE of it).
        too_large: those that do not, the one that needs least first.
        memory_gib: of a device; of which `reserve_gib` are not planned with.
    """

    job: Job
    machine: Machine
    num_gpus: int
    memory_gib: float
    reserve_gib: float
    plans: Sequence[Plan]
    too_large: Sequence[Plan]

    @property
    def best(self) -> Plan:
        """The first."""
        return self.plans[0]

    @property
    def unit(self) -> tuple[str, int]:
        """In which sizes are written: its name and its bytes."""
        return ("MiB", GIB >> 10) if max(plan.peak.total for plan in self.plans) < GIB else ("GiB", GIB)

    @property
    def limit(self) -> float:
        """Bytes that a rank may have."""
        return (self.memory_gib - self.reserve_gib) * GIB

    def __str__(self) -> str:
        from biokit.planning.report import write_report

        return write_report(self)

    __repr__ = __str__


def plan_run(
    config: RunConfig,
    num_gpus: int,
    device: Device,
    *,
    memory_gib: float = 0.0,
    gpus_per_node: int = 8,
    vocab_size: int = 0,
    length: int = 0,
    reserve_gib: float = -1.0,
) -> PlanTable:
    """Plan a configuration's training on so many devices; starts nothing.

    Args:
        memory_gib: of each device; 0: the device's own.
        vocab_size: 0: of `data.vocab_file`, or of the packaged vocabulary.
        length: tokens of every sequence; 0: `data.max_length`, the most that a batch can have.
        reserve_gib: left to the driver and the libraries; below 0: RESERVE_GIB.

    Raises:
        ConfigError: sizes that do not fit one another, or no layout that fits; says what would help.
    """
    _check_sizes(config, num_gpus, gpus_per_node, length)
    if vocab_size < 0:
        raise ConfigError(f"a vocabulary of {vocab_size} entries", "it is below 0", "Give 1 or more")
    if not 0 <= memory_gib < math.inf or math.isnan(reserve_gib):
        asked = f"GPU memory {memory_gib:g} GiB, {reserve_gib:g} of them left"
        raise ConfigError(asked, "that is no size", "Give GiB, above 0")
    reserve = RESERVE_GIB[device.kind] if reserve_gib < 0 else reserve_gib
    memory = memory_gib or device.memory_gib
    if memory <= reserve:
        found = f"{reserve:g} GiB of it are left to the driver and the libraries"
        raise ConfigError(f"GPU memory {memory:g} GiB", found, "Give more, or a smaller --reserve")
    job = Job(config, vocab_size or read_vocab_size(config), device.kind, length)
    machine, limit = Machine(device, gpus_per_node), (memory - reserve) * GIB
    found_plans = _make_plans(job, machine, num_gpus, limit)
    fitting = _rank([plan for plan in found_plans if plan.fits])
    if not fitting:
        raise _no_fit(job, machine, num_gpus, found_plans, limit, reserve)
    too_large = sorted((plan for plan in found_plans if not plan.fits), key=lambda plan: plan.peak.total)
    return PlanTable(job, machine, num_gpus, memory, reserve, fitting, too_large)


def _make_plans(job: Job, machine: Machine, num_gpus: int, limit: float) -> list[Plan]:
    """One of each layout, with a smaller micro-batch where the first does not fit.

    Raises:
        ConfigError: no layout is possible.
    """
    return [_fit(job, machine, case, limit) for case in list_cases(job, num_gpus)]


def _rank(plans: Sequence[Plan]) -> list[Plan]:
    """Fastest first; of those that are as fast as the fastest, within TOLERANCE, the simplest first."""
    ranked = sorted(plans, key=lambda plan: plan.step.total)
    equal = [plan for plan in ranked if plan.step.total <= (1 + TOLERANCE) * ranked[0].step.total]
    simplest = sorted(equal, key=lambda plan: (plan.case.recompute, SIMPLEST.index(plan.case.layout.strategy)))
    return simplest + ranked[len(equal) :]


def _fit(job: Job, machine: Machine, case: Case, limit: float) -> Plan:
    while True:
        peaks = [find_peak(job.rank_shape(case, stage)) for stage in range(case.layout.pipeline)]
        plan = Plan(job, case, machine, peaks, limit)
        growing = max(1, plan.peak.parts()["activations"])  # with the micro-batch
        room = limit - plan.peak.total + growing
        smaller = None if plan.fits else with_smaller_micro_batch(job, case, case.micro_batch_size * room / growing)
        if smaller is None:
            return plan
        case = smaller


def _check_sizes(config: RunConfig, num_gpus: int, gpus_per_node: int, length: int) -> None:
    """Refuse numbers that cannot be.

    Raises:
        ConfigError: names it.
    """
    if num_gpus < 1 or gpus_per_node < 1:
        asked = f"{num_gpus} GPUs, {gpus_per_node} a node"
        raise ConfigError(asked, "there must be one at least", "Give positive numbers")
    if not _fill_nodes(num_gpus, gpus_per_node):
        near = -(-num_gpus // gpus_per_node) * gpus_per_node
        found = f"they do not fill nodes of {gpus_per_node}"
        raise ConfigError(f"{num_gpus} GPUs", found, f"Give a multiple, e.g. {near}, or another --gpus-per-node")
    if length > config.data.max_length or length < 0:
        found = f"the model has positions for data.max_length={config.data.max_length}"
        raise ConfigError(f"sequences of {length} tokens", found, f"Give 1 to {config.data.max_length}")


def _fill_nodes(num_gpus: int, gpus_per_node: int) -> bool:
    """Whether so many stand in one node or in full ones."""
    return num_gpus <= gpus_per_node or num_gpus % gpus_per_node == 0


def _no_fit(
    job: Job, machine: Machine, num_gpus: int, plans: Sequence[Plan], limit: float, reserve: float
) -> ConfigError:
    """What the least one needs, and what would help: recompute and small micro-batches have been tried."""
    least = min(plans, key=lambda plan: plan.peak.total)
    parts, total = least.peak.parts(), least.peak.total / GIB
    largest = max(parts, key=lambda part: parts[part])
    found = (
        f"no layout fits into {limit / GIB:.1f} GiB a rank, with recompute and small micro-batches neither: the least, "
        f"{least} with micro-batches of {least.case.micro_batch_size}, needs {total:.1f} GiB, of which "
        f"{parts[largest] / GIB:.1f} are {largest}"
    )
    helps = [f"GPUs of {math.ceil(total + reserve)} GiB"]
    more = _try_more_gpus(job, machine, num_gpus, limit)
    if more:
        helps.append(f"{more.case.layout.world_size} GPUs ({more}, micro-batches of {more.case.micro_batch_size})")
    if least.case.micro_batch_size == 1 and largest == "activations":
        helps.append(f"a smaller data.max_length than {job.config.data.max_length}")
    return ConfigError(f"a plan for {num_gpus} GPUs", found, f"What would help: {'; or '.join(helps)}")


def _try_more_gpus(job: Job, machine: Machine, num_gpus: int, limit: float) -> Plan | None:
    """The fastest layout of the smallest multiple of the devices that fits; None: of no multiple up to MOST_TIMES."""
    for number in (2 * num_gpus, 4 * num_gpus, MOST_TIMES * num_gpus):
        plans = list[Plan]()
        if _fill_nodes(number, machine.gpus_per_node):
            with contextlib.suppress(ConfigError):  # the batch cannot be dealt to so many
                plans = [plan for plan in _make_plans(job, machine, number, limit) if plan.fits]
        if plans:
            return min(plans, key=lambda plan: plan.step.total)
    return None


def samples_per_step(table: PlanTable) -> int:
    """Of the global batch."""
    return global_batch_size(table.job.config, table.job.rehearsal.length)
