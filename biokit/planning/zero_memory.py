"""What DeepSpeed 0.19 holds of gradients, and in its buffers, at the instants of a step.

- ZeRO trains an fp32 copy of its part of the weights, also of fp32 weights (counted in `memory`).
- Stage 1 keeps whole gradients until the update, stage 2 those of a rank's part. Both copy gradients into a bucket,
  flatten the bucket to send it, copy the rank's part out of it, and flatten that once more for AdamW.
- Stage 3 keeps a bucket and its part of the gradients for ever, and small parameters whole between updates. Every
  module that runs, a dropout too, fetches another `stage3_prefetch_bucket_size` elements ahead, and what was fetched
  ahead of its second use stays for it: soon all weights are there, up to `stage3_max_live_parameters` (or half of
  `stage3_max_reuse_distance`), and each goes after its backward pass. The bucket that is being unpacked stands there
  twice.
"""

from __future__ import annotations

from collections.abc import Iterator

from biokit.parallel.grid import ZERO_STAGE
from biokit.planning.holdings import FLOAT_BYTES, rank_memory
from biokit.planning.parts import Item, RankShape, activations
from biokit.planning.pipeline_memory import list_leftovers, list_pipeline_items

DOUBLE_BYTES = 8  # norms are taken in fp64
Instants = Iterator[tuple[str, list[Item]]]


def list_zero_instants(shape: RankShape) -> Instants:
    """Zero1 and Zero2, and the pipeline's engine over ZeRO-1."""
    return _list_cut_instants(shape) if ZERO_STAGE[shape.layout.strategy] == 2 else _list_whole_instants(shape)


def _list_whole_instants(shape: RankShape) -> Instants:
    """Stage 1: whole gradients, and a bucket from the first one on."""
    several = shape.num_micros > 1 or shape.is_staged
    part, flat, bucket = shape.partition_bytes(), min(shape.whole, shape.bucket_bytes), _bucket(shape)
    for moment in shape.use.forward:
        items = [_whole(shape.whole), bucket] if several else []
        yield moment.where, [activations(moment), *list_pipeline_items(shape, sent=False), *items]
    for number, moment in enumerate(shape.use.backward):
        ready = shape.ready_bytes(number, own=True)
        items = [_whole(shape.whole if several else ready)] + [bucket] * (several or ready > 0)
        if shape.overlap and shape.ready_bytes(number) >= shape.bucket_bytes:
            items.append(_flattened(flat))
        yield moment.where, [activations(moment), *list_pipeline_items(shape, sent=True), *items]
    idle = list_leftovers(shape, idle=True)
    # what moves into the bucket leaves its place to the flattened bucket; then the rank's part is copied out of it
    second = [bucket] if shape.is_staged else []  # the pipeline's engine asks for one more
    yield "gradients sent", [*idle, _whole(shape.whole), bucket, *second, _part(max(0, part - flat))]
    yield from _list_update(shape, part, idle)


def _list_cut_instants(shape: RankShape) -> Instants:
    """Stage 2: a rank's part of the gradients, of earlier micro-batches and of this one."""
    part, flat, bucket = shape.partition_bytes(), min(shape.whole, shape.bucket_bytes), _bucket(shape)
    earlier = _part(part * (shape.num_micros > 1))
    for moment in shape.use.forward:
        yield moment.where, [activations(moment), earlier]
    for number, moment in enumerate(shape.use.backward):
        items = [bucket] if shape.ready_bytes(number, own=True) else []
        if shape.ready_bytes(number) >= shape.bucket_bytes:
            items += [_part(part), _flattened(flat)]
        yield moment.where, [activations(moment), earlier, *items]
    yield "gradients sent", [earlier, bucket, _flattened(max(flat, part))]
    yield from _list_update(shape, part, [])


def _list_update(shape: RankShape, part: int, idle: list[Item]) -> Instants:
    norm = Item("buffers", "a gradient in fp64, for the norm", DOUBLE_BYTES * max(shape.counts))
    yield "norm", [*idle, _part(part), norm]
    yield "update", [*idle, _part(part), Item("gradients", "the rank's part, flattened", shape.share_bytes())]


def list_zero3_instants(shape: RankShape) -> Instants:
    """Zero3, and ZeroInf with its states on the host."""
    offloaded = shape.layout.strategy == "ZeroInf"
    part = rank_memory(shape.layout, sum(shape.counts)).gradients
    small = shape.setting("stage3_param_persistence_threshold")
    kept = [
        Item("gradients", "the rank's part", part, offloaded),
        Item("gradients", "its copy for AdamW", part * offloaded, offloaded),
        _bucket(shape),
    ]
    whole = Item("weights", "small parameters, whole", FLOAT_BYTES * sum(n for n in shape.counts if n <= small))
    large = {layer.name: sum(n for n in layer.weights.values() if n > small) for layer in shape.use.layers}
    gathered = FLOAT_BYTES * min(sum(large.values()), shape.most_gathered())
    ahead = FLOAT_BYTES * shape.setting("stage3_prefetch_bucket_size")
    buffer = min(gathered, ahead) * (shape.layout.data > 1)
    last = [name for name, count in large.items() if count][-1:]
    for moment in shape.use.forward:
        if [moment.layer] == last:
            buffer = 0  # all of it has been fetched
        items = [_gathered(gathered), Item("buffers", "weights fetched ahead", buffer)]
        yield moment.where, [*kept, whole, activations(moment), *items]
    flat = min(shape.whole, shape.bucket_bytes)
    for number, moment in enumerate(shape.use.backward):
        sending = flat if shape.ready_bytes(number) >= shape.bucket_bytes else 0
        yield moment.where, [*kept, whole, activations(moment), _gathered(gathered), _flattened(sending)]
        gathered = max(0, gathered - FLOAT_BYTES * large[moment.layer])
    copy = Item("buffers", "gloo's copy of a bucket", flat * shape.shares_memory)
    yield "gradients sent", [*kept, whole, _flattened(flat), copy]
    share = 0 if offloaded else shape.share_bytes()
    yield "update", [*kept, Item("gradients", "the rank's part, flattened", share)]


def _whole(nbytes: int) -> Item:
    return Item("gradients", "gradients in fp32", nbytes)


def _part(nbytes: int) -> Item:
    return Item("gradients", "the rank's part of the gradients", nbytes)


def _bucket(shape: RankShape) -> Item:
    num_buckets = 2 if shape.overlap and ZERO_STAGE[shape.layout.strategy] < 3 else 1
    return Item("buffers", "DeepSpeed's bucket of gradients", shape.bucket_bytes * num_buckets)


def _flattened(nbytes: int) -> Item:
    return Item("buffers", "a bucket flattened to be sent", nbytes)


def _gathered(nbytes: int) -> Item:
    return Item("buffers", "gathered weights", nbytes)
