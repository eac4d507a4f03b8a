"""Seconds of a training step under a layout: an estimate from the work of a rehearsal and a device's figures.

Computing: matrix products at a share of the device's rate, all else at a share of its memory's, and not faster than
operations can be started. A message takes its latency and its bytes over the slowest link of its group: on a ring
(Patarasuk and Yuan 2009) 2(n-1)/n of them for all_reduce, (n-1)/n for all_gather and reduce_scatter. What is sent while
the backward pass goes on counts as far as it takes longer than that pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from biokit.parallel.grid import ZERO_STAGE, Layout
from biokit.planning.communication import (
    GRADIENTS,
    PASSES,
    SHAPES_BYTES,
    WEIGHTS,
    Traffic,
    group_size,
    list_traffic,
)
from biokit.planning.devices import HOP_S, LAUNCH_S, LINK_SHARE, MATMUL_SHARE, MEMORY_SHARE, Device
from biokit.planning.jobs import Case, Job
from biokit.planning.parts import RankShape
from biokit.planning.rehearsal import Shape
from biokit.planning.schedule import BACKWARD, FORWARD, Span, StageTimes, idle_share, play
from biokit.planning.watching import Cost

ADAMW_BYTES = 28  # an element: weight, gradient and moments read, all but the gradient written
CLIP_BYTES = 12  # the gradient read for the norm, read and written for the scale
ZERO_COPY_BYTES = 16  # the gradient flattened once more, the weight copied back
UPDATE, SEND = "update", "gradients and weights"


@dataclass(frozen=True)
class Machine:
    """Devices, and how they stand together."""

    device: Device
    gpus_per_node: int

    def compute_s(self, cost: Cost, precision: str) -> float:
        """Of a stretch of work, its messages left out."""
        matmul = cost.flops / (self.device.tflops[precision] * 1e12 * MATMUL_SHARE)
        other = cost.moved / (self.device.memory_gb_s * 1e9 * MEMORY_SHARE)
        return max(matmul + other, cost.num_operations * LAUNCH_S)

    def memory_s(self, nbytes: float) -> float:
        """To read or write so many bytes of the device's memory."""
        return nbytes / (self.device.memory_gb_s * 1e9 * MEMORY_SHARE)

    def host_s(self, nbytes: float) -> float:
        """To hand so many bytes to the host or take them, or to read or write them there."""
        return nbytes / (self.device.host_gb_s * 1e9 * LINK_SHARE)

    def message_s(self, kind: str, nbytes: float, layout: Layout, group: str) -> float:
        """Of one message among the ranks of a group."""
        size = group_size(layout, group)
        inside, rate = self._find_link(layout, group)
        share = {
            "all_reduce": 2 * (size - 1) / size,
            "all_gather": (size - 1) / size,
            "reduce_scatter": (size - 1) / size,
        }
        hops = {"all_reduce": 2 * math.ceil(math.log2(size)), "send": 1, "recv": 1}
        latency = HOP_S[inside] * hops.get(kind, math.ceil(math.log2(size)))
        return latency + share.get(kind, 1.0) * nbytes / (rate * 1e9 * LINK_SHARE)

    def _find_link(self, layout: Layout, group: str) -> tuple[bool, float]:
        """Whether a group stands in one node, and GB/s of its slowest link."""
        stride = {"data": layout.tensor, "pipeline": layout.tensor * layout.data}.get(group, 1)
        span = stride * group_size(layout, group) if group != "model" else layout.world_size
        if span <= self.gpus_per_node and self.gpus_per_node % span == 0:
            return True, self.device.link_gb_s
        if group == "pipeline":  # one rank talks to one: by its own adapter
            return False, min(self.device.link_gb_s, self.device.node_link_gb_s)
        num_inside = max(1, self.gpus_per_node // stride)  # adapters that the group's ring uses at a node's border
        return False, min(self.device.link_gb_s, num_inside * self.device.node_link_gb_s)


@dataclass(frozen=True)
class StepTime:
    """Where a step's time goes, in seconds, on the stage that computes longest.

    Attributes:
        parts: computing; waiting for tensor ranks; handing tensors to other stages; the pipeline's bubble; gradients
            and weights over the data ranks, as far as computing does not hide them; the update.
        hidden: of the messages over the data ranks, what computing hides.
        bubble_share: of the slots of a pipeline (1F1B), (p - 1) / (m + p - 1).
        idle: of all stages' time while micro-batches run, the part in which they wait.
        spans: what each stage does when.
    """

    parts: dict[str, float]
    hidden: float
    bubble_share: float
    idle: float
    spans: Sequence[Span] = field(repr=False, default=())

    @property
    def total(self) -> float:
        """Of the step."""
        return sum(self.parts.values())


def estimate_step(job: Job, case: Case, machine: Machine) -> StepTime:
    """The time of a step."""
    layout, precision = case.layout, job.config.train.precision
    stages = range(layout.pipeline)
    times, computing, tensor = [], [], []
    for stage, use in enumerate(job.stage_uses(case)):
        seconds = [machine.compute_s(cost, precision) for cost in use.costs]
        waits = [_posted_s(cost, layout, machine) for cost in use.costs]
        computing.append(sum(seconds))
        tensor.append(sum(waits))
        hands = _hand_over_s(use.outputs, layout, machine) if stage < layout.pipeline - 1 else (0.0, 0.0)
        times.append(StageTimes(seconds[0] + waits[0], seconds[1] + waits[1], *hands))
    spans = play(times, case.num_micros)
    length = max(span.end for span in spans)
    slowest = max(stages, key=lambda stage: computing[stage] + tensor[stage])
    shape, traffic = job.rank_shape(case, slowest), list_traffic(job, case, slowest)
    passes = case.num_micros * (computing[slowest] + tensor[slowest])
    handing = sum(s.end - s.start for s in spans if s.stage == slowest and s.what not in (FORWARD, BACKWARD))
    data, hidden = _data_s(shape, case.num_micros, traffic, times[slowest], machine)
    update = max(_update_s(job.rank_shape(case, stage), machine) for stage in stages)
    parts = {
        "compute": case.num_micros * computing[slowest],
        "tensor": case.num_micros * tensor[slowest],
        "pipeline": handing,
        "bubble": max(0.0, length - passes - handing),
        "data": data,
        "update": update,
    }
    num_stages, num_micros = layout.pipeline, case.num_micros
    return StepTime(
        parts,
        hidden,
        bubble_share=(num_stages - 1) / (num_micros + num_stages - 1),
        idle=idle_share(spans, num_stages),
        spans=[*spans, *_closing_spans(stages, length, data, update)],
    )


def _posted_s(cost: Cost, layout: Layout, machine: Machine) -> float:
    """Of the messages to the other tensor ranks, for which computing waits."""
    return sum(
        number * machine.message_s(kind, nbytes, layout, "tensor") for (kind, nbytes), number in cost.messages.items()
    )


def _hand_over_s(carry: Iterable[Shape], layout: Layout, machine: Machine) -> tuple[float, float]:
    """To hand a micro-batch's tensors to the next stage, and to take their gradients back."""
    sizes = [value.nbytes for value in carry]
    floats = [value.nbytes for value in carry if value.is_float]
    forward, backward = (
        sum(machine.message_s("send", nbytes, layout, "pipeline") for nbytes in some)
        for some in ([SHAPES_BYTES, *sizes], floats)
    )
    return forward, backward


def _data_s(
    shape: RankShape, num_micros: int, traffic: Sequence[Traffic], times: StageTimes, machine: Machine
) -> tuple[float, float]:
    """Gradients and weights over the data ranks: seconds that computing does not hide, and those that it does."""
    layout, stage = shape.layout, ZERO_STAGE.get(shape.layout.strategy, 0)
    sums, last = dict.fromkeys((PASSES, GRADIENTS, WEIGHTS), 0.0), 0.0
    for one in traffic:
        if one.when in sums and (one.group == "data" or one.when == GRADIENTS):
            took = machine.message_s(one.kind, one.nbytes, layout, one.group)
            sums[one.when] += one.num_messages * took
            last = took if one.when == GRADIENTS else last
    hides = layout.strategy == "DDP" or shape.overlap
    num_sent = num_micros if stage >= 2 else 1  # times that all gradients are sent in a step
    gradients = max(sums[GRADIENTS] - hides * num_sent * times.backward, last)  # nothing hides the last bucket
    gathers = max(0.0, sums[PASSES] - hides * num_micros * times.forward)
    exposed = gradients + gathers + sums[WEIGHTS]
    hidden = sum(sums.values()) - exposed
    if layout.strategy == "ZeroInf":  # for every micro-batch its weights come, once a step its gradients go
        exposed += machine.host_s(shape.whole / layout.data * (num_micros + 1))
    return exposed, hidden


def _update_s(shape: RankShape, machine: Machine) -> float:
    """AdamW and clipping, which read and write memory."""
    count, stage = sum(shape.counts), ZERO_STAGE.get(shape.layout.strategy, 0)
    if not stage:
        return machine.memory_s(count * (ADAMW_BYTES + CLIP_BYTES))
    nbytes = count / shape.layout.data * (ADAMW_BYTES + CLIP_BYTES + ZERO_COPY_BYTES)
    return machine.host_s(nbytes) if shape.layout.strategy == "ZeroInf" else machine.memory_s(nbytes)


def _closing_spans(stages: Iterable[int], length: float, data: float, update: float) -> list[Span]:
    spans = []
    for stage in stages:
        spans.append(Span(stage, SEND, -1, length, length + data))
        spans.append(Span(stage, UPDATE, -1, length + data, length + data + update))
    return spans
