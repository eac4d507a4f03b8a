"""A rank's memory by part, and what it depends on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from biokit.parallel.grid import STAGED, Layout
from biokit.planning.holdings import FLOAT_BYTES
from biokit.planning.stages import Moment, StageUse

PARTS = ("weights", "gradients", "optimizer", "activations", "buffers")
Groups = tuple[tuple[int, ...], ...]
# DeepSpeed's defaults of zero_optimization, in elements
ZERO_DEFAULTS = {
    "stage3_max_live_parameters": 10**9,
    "stage3_max_reuse_distance": 10**9,
    "stage3_prefetch_bucket_size": 5 * 10**7,
    "stage3_param_persistence_threshold": 10**5,
}


@dataclass(frozen=True)
class Item:
    """Some bytes of a rank.

    Attributes:
        part: one of PARTS.
        what: in words.
        on_host: in the host's memory, not the device's.
    """

    part: str
    what: str
    nbytes: int
    on_host: bool = False


@dataclass(frozen=True)
class Instant:
    """All that a rank holds at one instant of a step."""

    where: str
    items: tuple[Item, ...]

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(item.nbytes for item in self.items if not item.on_host)

    @property
    def host(self) -> int:
        """Bytes in the host's memory."""
        return sum(item.nbytes for item in self.items if item.on_host)

    def parts(self) -> dict[str, int]:
        """Bytes on the device by part."""
        sums = dict.fromkeys(PARTS, 0)
        for item in self.items:
            sums[item.part] += 0 if item.on_host else item.nbytes
        return sums


@dataclass(frozen=True)
class RankShape:
    """What a rank's memory depends on.

    Attributes:
        stage: of the pipeline.
        groups: elements of each parameter that its stage and tensor rank hold, by group of the optimizer.
        use: what one micro-batch keeps.
        num_micros: micro-batches of a data rank in a step.
        bucket: elements of DeepSpeed's bucket of gradients.
        zero: DeepSpeed's `zero_optimization` group.
        overlap: gradients are sent while the backward pass goes on, from a second bucket.
        resident: bytes of the model's buffers and of one micro-batch's ids.
        batch: bytes of all micro-batches' ids, in the host's memory.
        shares_memory: the device is the CPU: what is on the host counts too.
    """

    layout: Layout
    stage: int
    groups: Groups
    use: StageUse
    num_micros: int
    bucket: int
    zero: Mapping[str, Any]
    overlap: bool
    resident: int
    batch: int
    shares_memory: bool

    @property
    def counts(self) -> list[int]:
        """Elements of each parameter."""
        return [count for group in self.groups for count in group]

    @property
    def whole(self) -> int:
        """Bytes of all parameters' gradients."""
        return FLOAT_BYTES * sum(self.counts)

    @property
    def bucket_bytes(self) -> int:
        return FLOAT_BYTES * self.bucket

    @property
    def is_staged(self) -> bool:
        """Whether DeepSpeed's pipeline engine runs it."""
        return self.layout.strategy in STAGED

    @property
    def is_last(self) -> bool:
        """Whether its stage computes the loss."""
        return self.stage == self.layout.pipeline - 1

    def setting(self, name: str) -> int:
        """Of DeepSpeed, in elements."""
        value = self.zero.get(name, "auto")
        return int(ZERO_DEFAULTS[name] if value in ("auto", None) else value)

    def most_gathered(self) -> int:
        """Elements of large parameters that ZeRO-3 has whole at a time, at most: there and back again within reach."""
        live = self.setting("stage3_max_live_parameters")
        return max(live, self.setting("stage3_max_reuse_distance") // 2)

    def ready_bytes(self, number: int, own: bool = False) -> int:
        """Gradients that the backward pass has made before its number-th instant; `own`: with that layer's."""
        moments = self.use.backward[number + own :]
        # a tied parameter is met in two layers
        return min(self.whole, FLOAT_BYTES * moments[0].num_ready) if moments else self.whole

    def share_bytes(self) -> int:
        """Of the optimizer's largest group, a data rank's part."""
        return max(FLOAT_BYTES * -(-sum(group) // self.layout.data) for group in self.groups)

    def partition_bytes(self) -> int:
        """Whole gradients of all parameters that a data rank's part touches, on the rank where they are most."""
        data = self.layout.data
        sums = [0] * data
        for group in self.groups:
            size, start = -(-sum(group) // data), 0
            for count in group:
                for rank in range(start // size, (start + count - 1) // size + 1):
                    sums[rank] += count
                start += count
        return FLOAT_BYTES * max(sums)


def activations(moment: Moment) -> Item:
    """What the micro-batch that is computed keeps."""
    return Item("activations", "of the micro-batch that is computed", moment.activations)


def count_groups(sizes: Sequence[Sequence[int]]) -> Groups:
    """Elements of parameters of these shapes, by group of the optimizer: those with weight decay, then the others."""
    groups = ([s for s in sizes if len(s) >= 2], [s for s in sizes if len(s) < 2])
    return tuple(tuple(math.prod(size) for size in group) for group in groups if group)
