"""Bytes that a rank has at its fullest instants in a training step, by part: what a layout needs, before it is queued.

Weights, gradients and moments follow from the layout (Rajbhandari et al. 2020, arXiv 1910.02054, section 5),
activations from a rehearsal of the model's own layers, buffers from what torch's DDP and DeepSpeed do.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from biokit.parallel.grid import ZERO_STAGE
from biokit.planning.holdings import rank_memory
from biokit.planning.parts import Instant, Item, RankShape, activations
from biokit.planning.zero_memory import list_zero3_instants, list_zero_instants


def list_instants(shape: RankShape) -> list[Instant]:
    """The instants of a step at which a rank may be fullest."""
    stage = ZERO_STAGE.get(shape.layout.strategy, 0)
    instants = (_list_plain_instants, list_zero_instants, list_zero_instants, list_zero3_instants)[stage](shape)
    fixed, found = _fixed_items(shape), []
    for where, items in instants:
        there = [item for item in (*fixed, *items) if item.nbytes > 0]
        found.append(
            Instant(where, tuple(replace(item, on_host=False) if shape.shares_memory else item for item in there))
        )
    return found


def find_peak(shape: RankShape) -> Instant:
    """The fullest one."""
    return max(list_instants(shape), key=lambda instant: instant.total)


def _fixed_items(shape: RankShape) -> list[Item]:
    """What is there at every instant."""
    offloaded = shape.layout.strategy == "ZeroInf"
    memory = rank_memory(shape.layout, sum(shape.counts))
    return [
        Item("weights", "weights in fp32", memory.weights, offloaded),
        Item("optimizer", "AdamW's moments", memory.moments, offloaded),
        Item("optimizer", "DeepSpeed's copy of the weights", memory.copies, offloaded),
        Item("buffers", "the model's buffers and ids", shape.resident),
        Item("buffers", "the batch", shape.batch, on_host=True),
    ]


def _list_plain_instants(shape: RankShape) -> Iterator[tuple[str, list[Item]]]:
    """Single and DDP, whose buckets hold the gradients between steps too.

    DDP gathers the gradients of all micro-batches but the last outside its buckets.
    """
    several, in_buckets = shape.num_micros > 1, shape.layout.strategy == "DDP"
    buckets = Item("gradients", "DDP's buckets", shape.whole * in_buckets)
    for moment in shape.use.forward:
        yield moment.where, [activations(moment), buckets, _whole_gradients(shape.whole * several)]
    for number, moment in enumerate(shape.use.backward):
        so_far = 0 if in_buckets else shape.ready_bytes(number, own=True)
        yield moment.where, [activations(moment), buckets, _whole_gradients(shape.whole if several else so_far)]
    yield "update", [buckets, _whole_gradients(shape.whole * (not in_buckets))]


def _whole_gradients(nbytes: int) -> Item:
    return Item("gradients", "gradients in fp32", nbytes)
