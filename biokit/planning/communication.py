"""Messages of a rank in a training step, by kind and group, as torch's DDP, DeepSpeed 0.19 and Megatron-core send them.

Sizes are those of the tensors handed to torch.distributed: what is reduced, what is gathered in all, what is scattered
in all. Groups of one rank send nothing. The trainer's own few numbers a step are left out.

- DDP reduces its buckets, in the order in which the gradients come, once a step.
- ZeRO-1 and ZeRO-2 reduce whole buckets too (their "reduce-scatter" is an all_reduce of which a rank keeps its part),
  ZeRO-2 for every micro-batch, and gather the updated weights.
- ZeRO-3 gathers large weights for every micro-batch (once more for the backward pass what it could not keep) and
  small ones once a step, and scatters every bucket.
- A stage hands on every tensor of a micro-batch after a message about their shapes, and takes the floats' gradients.
- Each tensor rank sums what its matrices make of the others' parts, again where a layer is recomputed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from biokit.parallel.grid import ZERO_STAGE, Layout
from biokit.planning.holdings import FLOAT_BYTES
from biokit.planning.jobs import Case, Job
from biokit.planning.parts import RankShape

FIRST_BUCKET_BYTES, BUCKET_BYTES = 2**20, 25 * 2**20  # of torch's DDP
SHAPES_BYTES = 1024  # DeepSpeed's message about the tensors that will come
FIGURES_BYTES = 24  # loss, right predictions and labels in fp64
NORM_BYTES = {0: 4, 1: 4, 2: 4, 3: 8}  # by ZeRO stage; 0: from the host
LOSSES_BYTES = 8  # DeepSpeed's own, fp32
# where in a step
PASSES, GRADIENTS, WEIGHTS, FIGURES = "passes", "gradients", "weights", "figures"


@dataclass(frozen=True)
class Traffic:
    """Messages of one kind and size.

    Attributes:
        kind: as torch.distributed names it: `all_reduce`, `reduce_scatter`, `all_gather`, `broadcast`, `send`, `recv`.
        group: the ranks that take part: `tensor`, `data`, `pipeline`, `model` (tensor x pipeline) or `world`.
        when: in the passes of each micro-batch, for gradients, for updated weights, or for figures.
        nbytes: of one message.
    """

    kind: str
    group: str
    when: str
    nbytes: int
    num_messages: int = 1

    @property
    def total(self) -> int:
        """Bytes of all of them."""
        return self.nbytes * self.num_messages


def list_traffic(job: Job, case: Case, stage: int = 0) -> list[Traffic]:
    """What a rank of a stage sends and receives in a step."""
    shape, layout = job.rank_shape(case, stage), case.layout
    data = _data_traffic(shape, _ready_order(job, shape))
    model = _pipeline_traffic(shape, job.tied_bytes(layout, stage)) if shape.is_staged else []
    return _merge(
        traffic
        for traffic in (*data, *model, *_tensor_traffic(shape), Traffic("all_reduce", "world", FIGURES, FIGURES_BYTES))
        if group_size(layout, traffic.group) > 1
    )


def sum_traffic(traffic: Iterable[Traffic]) -> dict[str, tuple[int, int]]:
    """Kind -> (messages, bytes)."""
    sums: dict[str, tuple[int, int]] = {}
    for one in traffic:
        messages, nbytes = sums.get(one.kind, (0, 0))
        sums[one.kind] = messages + one.num_messages, nbytes + one.total
    return sums


def group_size(layout: Layout, group: str) -> int:
    """Ranks that take part."""
    sizes = {"tensor": layout.tensor, "data": layout.data, "pipeline": layout.pipeline, "world": layout.world_size}
    return sizes.get(group, layout.tensor * layout.pipeline)


def _data_traffic(shape: RankShape, ready: Sequence[int]) -> list[Traffic]:
    """Over the data ranks: gradients, weights, norms."""
    strategy, zero = shape.layout.strategy, ZERO_STAGE.get(shape.layout.strategy, 0)
    if not zero:
        return [Traffic("all_reduce", "data", GRADIENTS, FLOAT_BYTES * size) for size in _fill_ddp(ready)] * (
            strategy == "DDP"
        )
    size = NORM_BYTES[0 if strategy == "ZeroInf" else zero]
    norms = [Traffic("all_reduce", "data", FIGURES, size)] * len(shape.groups)
    norms += [Traffic("all_reduce", "model", FIGURES, size)] * len(shape.groups) * shape.is_staged
    if zero == 3:
        return [*_zero3_traffic(shape, ready), *norms]
    in_order = shape.counts if zero == 1 and not shape.overlap else ready
    times = shape.num_micros if zero == 2 else 1
    buckets = [
        Traffic("all_reduce", "data", GRADIENTS, FLOAT_BYTES * size, times) for size in _fill(in_order, shape.bucket)
    ]
    unit = 2 * shape.layout.data  # a group's flat weights are padded to whole units
    flat = [-(-sum(group) // unit) * unit for group in shape.groups]
    return [*buckets, *norms, *(Traffic("all_gather", "data", WEIGHTS, FLOAT_BYTES * size) for size in flat)]


def _zero3_traffic(shape: RankShape, ready: Sequence[int]) -> list[Traffic]:
    data, small = shape.layout.data, shape.setting("stage3_param_persistence_threshold")

    def padded(counts: Iterable[int]) -> int:
        return FLOAT_BYTES * sum(-(-count // data) * data for count in counts)

    large = [count for layer in shape.use.layers for count in layer.weights.values() if count > small]
    ahead = shape.setting("stage3_prefetch_bucket_size")
    sums = list(accumulate(large))
    again = [count for count, upto in zip(large, sums, strict=True) if upto <= sums[-1] - shape.most_gathered()]
    fetched = _reach(large, ahead) + _reach(again, ahead)
    return [
        *(Traffic("all_gather", "data", PASSES, padded(counts), shape.num_micros) for counts in fetched),
        *(
            Traffic("reduce_scatter", "data", GRADIENTS, padded(counts), shape.num_micros)
            for counts in _fill_lists(ready, shape.bucket)
        ),
        *(Traffic("all_gather", "data", WEIGHTS, padded([count])) for count in shape.counts if count <= small),
    ]


def _pipeline_traffic(shape: RankShape, tied_bytes: int) -> list[Traffic]:
    use, times, traffic = shape.use, shape.num_micros, []
    if shape.stage:
        traffic += [Traffic("recv", "pipeline", PASSES, size, times) for size in _carry_sizes(use.inputs)]
        traffic += [Traffic("send", "pipeline", PASSES, x.nbytes, times) for x in use.inputs if x.is_float]
    if not shape.is_last:
        traffic += [Traffic("send", "pipeline", PASSES, size, times) for size in _carry_sizes(use.outputs)]
        traffic += [Traffic("recv", "pipeline", PASSES, x.nbytes, times) for x in use.outputs if x.is_float]
    if tied_bytes:
        traffic.append(Traffic("all_reduce", "pipeline", GRADIENTS, tied_bytes))
    if shape.is_last:
        traffic.append(Traffic("all_reduce", "data", FIGURES, LOSSES_BYTES // 2))
    return [*traffic, Traffic("broadcast", "pipeline", FIGURES, LOSSES_BYTES)]


def _carry_sizes(carry: Iterable) -> list[int]:
    """Of the messages that hand a carry on."""
    return [SHAPES_BYTES, *(value.nbytes for value in carry)]


def _tensor_traffic(shape: RankShape) -> list[Traffic]:
    forward, backward = shape.use.costs
    messages = forward.messages + backward.messages
    return [
        Traffic(kind, "tensor", PASSES, nbytes, number * shape.num_micros)
        for (kind, nbytes), number in messages.items()
    ]


def _ready_order(job: Job, shape: RankShape) -> list[int]:
    """Elements of the stage's parameters in the order in which their gradients are ready."""
    tied, counts, waiting = job.blueprint.parts.tied, list[int](), set(job.blueprint.parts.tied.values())
    names = {f"{layer.name}.{key}" for layer in shape.use.layers for key in layer.weights}
    for layer in reversed(shape.use.layers):
        for key in layer.gradient_order:
            name = f"{layer.name}.{key}"
            if name in tied and tied[name] in names and tied[name] in waiting:
                continue  # of one tensor with an earlier layer's, whose gradient comes later
            counts.append(layer.weights[key])
    return counts


def _fill_ddp(counts: Sequence[int]) -> list[int]:
    """Elements of DDP's buckets: one is closed when it has reached its size, the first a smaller one."""
    sizes, filled = list[int](), 0
    for count in counts:
        filled += count
        if FLOAT_BYTES * filled >= (BUCKET_BYTES if sizes else FIRST_BUCKET_BYTES):
            sizes.append(filled)
            filled = 0
    return [*sizes, filled] if filled else sizes


def _fill(counts: Sequence[int], size: int) -> list[int]:
    return [sum(bucket) for bucket in _fill_lists(counts, size)]


def _fill_lists(counts: Sequence[int], size: int) -> list[list[int]]:
    """DeepSpeed's buckets: one is sent before it would hold more than `size` elements."""
    buckets = [[]]  # type: list[list[int]]
    for count in counts:
        if buckets[-1] and sum(buckets[-1]) + count > size:
            buckets.append([])
        buckets[-1].append(count)
    return [bucket for bucket in buckets if bucket]


def _reach(counts: Sequence[int], size: int) -> list[list[int]]:
    """What ZeRO-3 fetches at a time: at least `size` elements, where there are so many."""
    groups = [[]]  # type: list[list[int]]
    for count in counts:
        if sum(groups[-1]) >= size:
            groups.append([])
        groups[-1].append(count)
    return [group for group in groups if group]


def _merge(traffic: Iterable[Traffic]) -> list[Traffic]:
    """Equal messages in one entry."""
    numbers: Counter[tuple[str, str, str, int]] = Counter()
    for one in traffic:
        numbers[one.kind, one.group, one.when, one.nbytes] += one.num_messages
    return [Traffic(*key, number) for key, number in numbers.items()]
