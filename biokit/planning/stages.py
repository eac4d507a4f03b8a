"""Layers put together: what one micro-batch keeps alive on a rank, from its first layer to its last gradient."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

from biokit.planning.rehearsal import LayerUse, Shape
from biokit.planning.watching import Cost


@dataclass(frozen=True)
class Moment:
    """An instant of a micro-batch's passes at which much is alive.

    Attributes:
        layer: its name.
        what: the pass.
        activations: bytes that this micro-batch has alive.
        num_ready: elements of parameters whose gradients the backward pass has made by then.
    """

    layer: str
    what: str
    activations: int
    num_ready: int = 0

    @property
    def where(self) -> str:
        """In words."""
        return f"{self.what} pass of {self.layer}"


@dataclass
class StageUse:
    """A stretch of layers' use of a device for one micro-batch; sizes in bytes.

    Attributes:
        kept: alive between the forward and the backward pass.
        forward, backward: instants of each pass, in order.
        costs: of the two passes, in which a layer may be passed through twice.
        inputs, outputs: the carry before the first and behind the last layer.
        num_repeated: layers through which DeepSpeed's pipeline goes back more than once for the same output.
    """

    layers: Sequence[LayerUse]
    inputs: Sequence[Shape]
    outputs: Sequence[Shape] = ()
    kept: int = 0
    forward: list[Moment] = field(default_factory=list)
    backward: list[Moment] = field(default_factory=list)
    costs: tuple[Cost, Cost] = field(default_factory=lambda: (Cost(), Cost()))
    num_repeated: int = 0


@dataclass
class _Storage:
    """One tensor of a carry: who made it, who keeps it first (numbers of layers)."""

    nbytes: int
    maker: int
    keeper: int = -1


def use_stage(layers: Sequence[LayerUse], inputs: Sequence[Shape], own_inputs: bool, last: bool) -> StageUse:
    """Put layers together that run one after another.

    Args:
        own_inputs: the first layer's inputs are this rank's copies, to be counted; else they are the batch itself.
        last: the loss is among them. Without it DeepSpeed's pipeline sends a gradient back for each float that was
            sent on, one after another, and keeps the graph until the last.
    """
    use, ledger = StageUse(layers, inputs), _Ledger()
    ledger.enter(inputs, own_inputs)
    for number, layer in enumerate(layers):
        alive = ledger.alive_forward()
        ledger.run(number, layer)
        use.forward.append(Moment(layer.name, "forward", alive + layer.forward_peak))
    use.kept, use.outputs = ledger.kept(), [output.shape for output in layers[-1].outputs]
    backward = _Backward(use, ledger)
    if last:
        backward.go(set(range(len(use.outputs))), retain=False)
    else:
        floats = [number for number, shape in enumerate(use.outputs) if shape.is_float]
        for number in floats:
            backward.go({number}, retain=number != floats[-1])
    use.costs = sum((layer.forward for layer in layers), Cost()), backward.cost
    use.num_repeated = len({number for (number, _), times in backward.times.items() if times > 1})
    return use


class _Ledger:
    """Which tensors are alive after each layer: a tensor that several layers keep counts once."""

    def __init__(self) -> None:
        self.storages: dict[object, _Storage] = {}
        self.own: list[int] = []  # bytes of each layer's own
        self._names = count()
        self.carry: list[object] = []

    def enter(self, inputs: Sequence[Shape], own: bool) -> None:
        for shape in inputs:
            self.carry.append(self._make(shape.nbytes if own else 0, -1))

    def _make(self, nbytes: int, maker: int) -> object:
        name = next(self._names)
        self.storages[name] = _Storage(nbytes, maker)
        return name

    def run(self, number: int, layer: LayerUse) -> None:
        for place in layer.kept_inputs:
            self._keep(self.carry[place], number)
        for place, nbytes in enumerate(layer.parts):
            if nbytes:
                part = "part", self.carry[place]
                self.storages.setdefault(part, _Storage(nbytes, -1))
                self._keep(part, number)
        before, self.carry = self.carry, []
        for output in layer.outputs:
            name = before[output.source] if output.source >= 0 else self._make(output.shape.nbytes, number)
            self.carry.append(name)
            if output.kept:
                self._keep(name, number)
        self.own.append(layer.kept)

    def _keep(self, name: object, number: int) -> None:
        storage = self.storages[name]
        storage.keeper = number if storage.keeper < 0 else min(storage.keeper, number)

    def kept(self) -> int:
        """After the forward pass, its outputs left out."""
        return sum(self.own) + sum(s.nbytes for s in self.storages.values() if s.keeper >= 0)

    def alive_forward(self) -> int:
        """Before the next layer: what was kept, and its inputs."""
        inputs = {name: self.storages[name].nbytes for name in self.carry}
        kept = {name: s.nbytes for name, s in self.storages.items() if s.keeper >= 0}
        return sum(self.own) + sum((inputs | kept).values())

    def alive_backward(self, number: int, gone: set[int]) -> int:
        """In a layer's backward pass, beside what is its own.

        Args:
            gone: layers whose own tensors are let go of already.
        """
        own = sum(size for layer, size in enumerate(self.own) if layer != number and layer not in gone)
        there = (s for s in self.storages.values() if s.keeper >= 0 and s.maker != number)
        return own + sum(s.nbytes for s in there if s.keeper <= number or s.keeper not in gone)


class _Backward:
    """Backward passes through a stage, layer by layer."""

    def __init__(self, use: StageUse, ledger: _Ledger) -> None:
        self.use, self.ledger, self.gone, self.cost = use, ledger, set[int](), Cost()
        self.times: Counter[tuple[int, int]] = Counter()  # of each output of each layer
        self.ready, self.num_ready = set[int](), 0

    def go(self, active: set[int], retain: bool) -> None:
        """From these outputs of the last layer back to the first; `retain`: another pass will follow."""
        for number in reversed(range(len(self.use.layers))):
            layer = self.use.layers[number]
            made = [place for place in active if layer.outputs[place].is_made]
            passed = {layer.outputs[place].source for place in active} - {-1}
            active = passed.union(*(layer.outputs[place].needs for place in made))
            if not made:
                continue
            self.cost += layer.outputs[made[0]].backward if len(made) == 1 else layer.backward
            alive = self.ledger.alive_backward(number, self.gone)
            peak = layer.retained_peak if retain else layer.backward_peak
            self.use.backward.append(Moment(layer.name, "backward", alive + peak, self.num_ready))
            self.num_ready += 0 if number in self.ready else sum(layer.weights.values())
            self.ready.add(number)
            self.times.update((number, place) for place in made)
            if not retain:
                self.gone.add(number)
