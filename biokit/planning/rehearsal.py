"""What each layer of a model keeps, computes and sends: it is run forward and backward without storage, and watched.

The layers are the model's own, on torch's `meta` device, for one micro-batch of a run's configuration; equal layers
are run once. `stages` puts the layers of a rank together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from biokit.config import RunConfig
from biokit.errors import ConfigError
from biokit.exchange.source import Blueprint
from biokit.kernels.dispatch import reference_forced
from biokit.parallel.folding import PRECISIONS, checkpoint_layer, fold_layers, token_loss
from biokit.planning.cut_layers import PartitionedInputs, TensorRank, cut_layer, cut_loss
from biokit.planning.watching import Cost, DeviceKernels, Watch, address_of

LOSS = "loss"


@dataclass(frozen=True)
class Shape:
    """Of one tensor of a carry."""

    size: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.size).numel()

    @property
    def is_float(self) -> bool:
        return self.dtype.is_floating_point

    def make(self) -> torch.Tensor:
        """A tensor without storage; where it can take a gradient no leaf, which autograd would keep alive."""
        return torch.empty(self.size, dtype=self.dtype, device="meta", requires_grad=self.is_float).clone()


@dataclass(frozen=True)
class Output:
    """What a layer hands on.

    Attributes:
        source: the input that is handed on as it is; -1: made here.
        needs: the float inputs that its gradient goes back to.
        backward: cost of the backward pass of this output alone.
        kept: this layer itself keeps it for the backward pass.
    """

    shape: Shape
    source: int = -1
    needs: frozenset[int] = frozenset()
    backward: Cost = field(default_factory=Cost)
    kept: bool = False

    @property
    def is_made(self) -> bool:
        """Whether it is a float that the layer computes."""
        return self.shape.is_float and self.source < 0


@dataclass(frozen=True)
class LayerUse:
    """One layer's use of a device for one micro-batch; all sizes in bytes.

    Attributes:
        kept: made by the layer and kept for the backward pass, outputs left out.
        kept_inputs: of which inputs it keeps the tensor itself.
        parts: of each input, what it keeps of it instead (partitioned activations).
        forward, backward: what the passes cost, backward of all outputs together.
        forward_peak, backward_peak: the most that is alive in the pass, inputs left out; backward with the gradients of
            outputs and inputs, without those of parameters, which are there already.
        retained_peak: in a backward pass that keeps everything for another one.
        weights: elements of each parameter that the rank holds, by its name in the layer.
        gradient_order: these names in the order in which their gradients are ready.
    """

    name: str
    outputs: tuple[Output, ...]
    kept: int
    kept_inputs: frozenset[int]
    parts: tuple[int, ...]
    forward_peak: int
    backward_peak: int
    retained_peak: int
    forward: Cost
    backward: Cost
    weights: Mapping[str, int] = field(default_factory=dict)
    gradient_order: tuple[str, ...] = ()


class Rehearsal:
    """The layers of a configuration's model, rehearsed for layouts of any number of tensor ranks.

    Args:
        kind: of device, `cuda` or `cpu`: its kernels decide what is kept.
        length: tokens of every sequence; 0: `data.max_length`.

    Raises:
        ConfigError: the plain kernels are asked for.
    """

    def __init__(self, config: RunConfig, vocab_size: int, kind: str, length: int = 0) -> None:
        if reference_forced():
            found = "the plain cross entropy picks tokens by their values, and a rehearsal has none"
            raise ConfigError("a plan with BIOKIT_KERNELS=reference", found, "Unset BIOKIT_KERNELS")
        self.config, self.kind, self.blueprint = config, kind, Blueprint(config, vocab_size)
        self.length = length or config.data.max_length
        self._layers: dict[Any, LayerUse] = {}
        self._models: dict[Any, list[LayerUse]] = {}

    def layers(self, micro_batch_size: int, tensor: int, recompute: bool) -> list[LayerUse]:
        """Every layer in order, the loss last, of the last one of `tensor` ranks."""
        asked = micro_batch_size, tensor, recompute
        if asked not in self._models:
            self._models[asked] = self._rehearse_model(*asked)
        return self._models[asked]

    def _rehearse_model(self, micro_batch_size: int, tensor: int, recompute: bool) -> list[LayerUse]:
        parts = self.blueprint.parts
        kernels = DeviceKernels(self.kind, PRECISIONS[self.config.train.precision])
        carry: tuple[Shape, ...] = (Shape((micro_batch_size, self.length), torch.int64),) * (len(parts.batch_keys) - 1)
        labels, uses = carry[0], list[LayerUse]()
        for position, (name, build) in enumerate(parts.layers):
            key = tensor, recompute, carry, self._descriptions[position]
            if key not in self._layers:
                setup = self._start(kernels, tensor)
                with torch.device("meta"):
                    layer = build()
                if setup.rank is not None:
                    layer = cut_layer(layer, name, parts.plan, setup.rank, position == 0)
                self._layers[key] = _rehearse(name, layer, carry, recompute, setup)
            uses.append(replace(self._layers[key], name=name))
            carry = tuple(output.shape for output in uses[-1].outputs)
        setup = self._start(kernels, tensor)
        return [*uses, _rehearse(LOSS, _Loss(labels, setup.rank), carry, False, setup)]

    @cached_property
    def _descriptions(self) -> list[Any]:
        """Of each layer; equal where they do the same."""
        with torch.device("meta"):
            return [
                _describe(build(), name, position == 0)
                for position, (name, build) in enumerate(self.blueprint.parts.layers)
            ]

    def _start(self, kernels: DeviceKernels, num_ranks: int) -> _Setup:
        parallel, watch = self.config.parallel, Watch()
        dealt = parallel.sequence_parallel, parallel.partition_activations
        return _Setup(
            kernels, watch, TensorRank(num_ranks, watch.post, kernels.cast, *dealt) if num_ranks > 1 else None
        )


@dataclass(frozen=True)
class _Setup:
    """How a layer is rehearsed: the kernels of a device, a watch, and the tensor rank where layers are cut."""

    kernels: DeviceKernels
    watch: Watch
    rank: TensorRank | None


class _Loss(nn.Module):
    """The loss as one more layer."""

    def __init__(self, labels: Shape, rank: TensorRank | None) -> None:
        super().__init__()
        self.labels, self.rank = labels.make(), rank

    def forward(self, carry: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        logits_BTV = carry[0]
        if self.rank is not None:
            return cut_loss(logits_BTV, self.labels, self.rank)[:1]
        return token_loss(logits_BTV, self.labels, 0)[:1]


def _describe(layer: nn.Module, name: str, first: bool) -> tuple[Any, ...]:
    """Equal for layers that do the same; names matter to a plan of tensor parallelism, numbers in them do not."""
    pattern = ".".join("#" if part.isdigit() else part for part in name.split("."))
    plain = (bool, int, float, str)
    modules = tuple(
        (path, type(module).__name__, *((k, v) for k, v in vars(module).items() if isinstance(v, plain)))
        for path, module in layer.named_modules()
    )
    return pattern, first, modules, tuple((key, tuple(p.shape)) for key, p in layer.named_parameters())


def _rehearse(
    name: str,
    layer: nn.Module,
    carry: Sequence[Shape],
    recompute: bool,
    setup: _Setup,
) -> LayerUse:
    """Run one layer forward and backward under a watch."""
    rank, watch = setup.rank, setup.watch
    layer.train()
    parameters, order = dict(layer.named_parameters()), list[str]()
    for key, parameter in parameters.items():
        parameter.grad = torch.empty_like(parameter)  # as in every micro-batch but a step's first
        parameter.register_post_accumulate_grad_hook(lambda _, key=key: order.append(key))
    checkpointed: Any = PartitionedInputs(rank) if rank is not None and rank.inputs_dealt else checkpoint_layer

    def forward(carry: Any) -> Any:
        with setup.kernels:  # here: a recompute comes from the backward pass
            return layer(carry)

    def run(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        out = fold_layers([forward], inputs, 0, recompute, checkpointed=checkpointed)  # type: ignore[list-item]
        return out if isinstance(out, tuple) else (out,)

    watch.welcome([*layer.buffers(), *(t for p in parameters.values() for t in (p, p.grad) if t is not None)])
    if isinstance(layer, _Loss):
        watch.welcome([layer.labels])
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), watch:
        warnings.simplefilter("ignore")  # of torch's own, about tensors without storage
        passed = _pass(run, carry, watch)
        alone = _split_backward(run, carry, watch) if sum(output.is_made for output in passed.outputs) > 1 else {}
    parts = tuple(getattr(checkpointed, "parts", ()))[: len(carry)] or (0,) * len(carry)
    outputs = tuple(
        replace(output, backward=alone.get(place, passed.backward) if output.is_made else Cost())
        for place, output in enumerate(passed.outputs)
    )
    return LayerUse(
        name,
        outputs,
        kept=passed.kept - sum(output.shape.nbytes for output in outputs if output.kept) - sum(parts),
        kept_inputs=passed.kept_inputs,
        parts=parts,
        forward_peak=passed.forward_peak,
        backward_peak=passed.backward_peak,
        retained_peak=passed.retained_peak,
        forward=passed.forward,
        backward=passed.backward,
        weights={key: parameter.numel() for key, parameter in parameters.items()},
        gradient_order=tuple(order[: len(parameters)]),
    )


@dataclass
class _Passed:
    """What one forward and backward pass of a layer showed; all outputs go backward together."""

    outputs: list[Output]
    kept: int
    kept_inputs: frozenset[int]
    forward_peak: int
    backward_peak: int
    retained_peak: int
    forward: Cost
    backward: Cost


def _pass(run: Callable[[Any], tuple[torch.Tensor, ...]], carry: Sequence[Shape], watch: Watch) -> _Passed:
    inputs = tuple(shape.make() for shape in carry)
    watch.welcome(inputs)
    addresses, nodes = [address_of(given) for given in inputs], [given.grad_fn for given in inputs]
    watch.restart()
    before = watch.live
    out = run(inputs)
    forward_peak, forward = watch.peak - before, watch.restart()
    places = [address_of(value) for value in out]
    shapes = [Shape(tuple(value.shape), value.dtype) for value in out]
    needs = [frozenset(i for i, node in enumerate(nodes) if node in _list_nodes(value.grad_fn)) for value in out]
    # each output's gradient arrives as a tensor of its own, which the first operation that reads it can let go
    total = sum((value.mul(1.0).sum() for value in out if value.requires_grad), torch.zeros((), device="meta"))
    del inputs, out
    kept_inputs = frozenset(i for i, address in enumerate(addresses) if watch.is_alive(address))
    outputs = []
    for shape, place, needed in zip(shapes, places, needs, strict=True):
        source = addresses.index(place) if place in addresses else -1
        outputs.append(Output(shape, source, needed, kept=source < 0 and watch.is_alive(place)))
    kept = watch.live - before
    watch.restart()
    total.backward()
    backward_peak, retained_peak, backward = watch.peak - before, watch.retained_peak - before, watch.restart()
    backward.moved -= sum(2 * shape.nbytes for shape in shapes if shape.is_float)  # of the multiplications above
    backward.num_operations -= sum(shape.is_float for shape in shapes)
    return _Passed(outputs, kept, kept_inputs, forward_peak, backward_peak, retained_peak, forward, backward)


def _split_backward(
    run: Callable[[Any], tuple[torch.Tensor, ...]], carry: Sequence[Shape], watch: Watch
) -> dict[int, Cost]:
    """The costs of a backward pass of each output alone, with the graph kept."""
    inputs = tuple(shape.make() for shape in carry)
    costs = {}
    for place, value in enumerate(run(inputs)):
        watch.restart()
        if value.requires_grad:
            value.backward(torch.empty_like(value), retain_graph=True)
        costs[place] = watch.restart()
    return costs


def _list_nodes(start: Any) -> set[Any]:
    """All nodes of autograd's graph behind one."""
    found, waiting = set[Any](), [start]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found:
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return found
