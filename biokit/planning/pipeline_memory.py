"""What the engine of DeepSpeed's pipeline holds beside the micro-batch that is computed.

It computes with a clone of what it received; it keeps what came and what went for each micro-batch in flight, one
place for each tensor that arrives, and on the last stage the logits of the micro-batch before: these hold its graph,
and so the tensors that were received for it and their gradients.
"""

from __future__ import annotations

from itertools import zip_longest

from biokit.planning.parts import Item, RankShape
from biokit.planning.schedule import count_in_flight


def list_pipeline_items(shape: RankShape, sent: bool) -> list[Item]:
    """While a micro-batch is computed and as many others as can be are in flight; none without a pipeline's engine.

    Args:
        sent: its forward pass is over, and its outputs are there.
    """
    if not shape.is_staged:
        return []
    num_others = count_in_flight(shape.num_micros, shape.layout.pipeline, shape.stage) - 1
    received, outputs = _received_bytes(shape), _output_bytes(shape)
    others = num_others * (shape.use.kept + received + outputs)
    return [
        Item("activations", f"of {num_others} more micro-batches in flight", others),
        Item("buffers", "received and sent of this micro-batch", received + outputs * sent),
        *list_leftovers(shape, idle=False, sent=sent),
    ]


def list_leftovers(shape: RankShape, idle: bool, sent: bool = False) -> list[Item]:
    """What stays from one micro-batch to the next; `idle`: after a step's last one."""
    if not shape.is_staged:
        return []
    use = shape.use
    arriving = [] if shape.stage == 0 else [value.nbytes for value in use.inputs]
    returning = [] if shape.is_last else [value.nbytes for value in use.outputs if value.is_float]
    places = sum(max(pair) for pair in zip_longest(arriving, returning, fillvalue=0))
    items = [Item("buffers", "places for tensors that arrive", places)]
    if shape.is_last:
        gradients = sum(value.nbytes for value in use.inputs if value.is_float) if shape.stage else 0
        slots = min(shape.num_micros, 2)  # what is in one stays until there is something new
        others = slots if idle else max(slots - 1, 1 - sent)
        one = _output_bytes(shape) + _received_bytes(shape) + gradients
        items.append(Item("buffers", "logits of the micro-batches before, and what they hold", others * one))
    return items


def _received_bytes(shape: RankShape) -> int:
    return sum(value.nbytes for value in shape.use.inputs)


def _output_bytes(shape: RankShape) -> int:
    """Outputs of a micro-batch that the stage has made itself; of the last stage the logits."""
    layer = shape.use.layers[-2 if shape.is_last else -1]
    return sum(output.shape.nbytes for output in layer.outputs if output.source < 0)
