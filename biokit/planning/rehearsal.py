"""What each layer of a model keeps, computes and sends: it is run forward and backward without storage, and watched.

The layers are the model's own, on torch's `meta` device, for one micro-batch of a run's configuration; equal layers
are run once. `stages` puts the layers of a rank together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from biokit.config import RunConfig
from biokit.exchange.source import Blueprint
from biokit.models import find_model
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
        kept: this layer itself keeps it for the backward pass.
        backward: cost of the backward pass of this output alone.
    """

    shape: Shape
    source: int = -1
    needs: frozenset[int] = frozenset()
    kept: bool = False
    backward: Cost = field(default_factory=Cost)


@dataclass(frozen=True)
class LayerUse:
    """One layer's use of a device for one micro-batch; all sizes in bytes.

    Attributes:
        kept: made by the layer and kept for the backward pass, outputs left out.
        kept_inputs: of which inputs it keeps the tensor itself.
        parts: of each input, what it keeps of it instead (partitioned activations).
        forward_peak, backward_peak: the most that is alive in the pass, inputs left out; backward with the gradients of
            outputs and inputs, without those of parameters, which are there already.
        weights: elements of each parameter that the rank holds, in order.
        gradient_order: numbers of the parameters in the order in which their gradients are ready.
    """

    name: str
    outputs: tuple[Output, ...]
    kept: int
    kept_inputs: frozenset[int]
    parts: tuple[int, ...]
    forward_peak: int
    backward_peak: int
    forward: Cost
    weights: tuple[int, ...] = ()
    gradient_order: tuple[int, ...] = ()

    @property
    def backward(self) -> Cost:
        """Of all outputs."""
        return sum((output.backward for output in self.outputs), Cost())


class Rehearsal:
    """The layers of a configuration's model, rehearsed for layouts of any number of tensor ranks.

    Args:
        kind: of device, `cuda` or `cpu`: its kernels decide what is kept.
        length: tokens of every sequence; 0: `data.max_length`.
    """

    def __init__(self, config: RunConfig, vocab_size: int, kind: str, length: int = 0) -> None:
        self.config, self.kind, self.blueprint = config, kind, Blueprint(config, vocab_size)
        self.length = length or config.data.max_length
        self._done: dict[Any, LayerUse] = {}

    def layers(self, micro_batch_size: int, tensor: int, recompute: bool) -> list[LayerUse]:
        """Every layer in order, the loss last, of the last one of `tensor` ranks."""
        config, parts = self.config, self.blueprint.parts
        kernels = DeviceKernels(self.kind, PRECISIONS[config.train.precision])
        carry: tuple[Shape, ...] = (Shape((micro_batch_size, self.length), torch.int64),) * (len(parts.batch_keys) - 1)
        labels, uses = carry[0], list[LayerUse]()
        for position, (name, build) in enumerate(parts.layers):
            with torch.device("meta"):
                layer = build()
            key = (tensor, recompute, carry, *_describe(layer, name, position == 0))
            if key not in self._done:
                rank = self._rank(kernels, tensor)
                if rank is not None:
                    layer = cut_layer(layer, name, parts.plan, rank, position == 0)
                self._done[key] = _rehearse(name, layer, carry, recompute, kernels, rank)
            uses.append(_renamed(self._done[key], name))
            carry = tuple(output.shape for output in uses[-1].outputs)
        rank = self._rank(kernels, tensor)
        uses.append(_rehearse(LOSS, _Loss(labels, rank), carry, False, kernels, rank))
        return uses

    def _rank(self, kernels: DeviceKernels, tensor: int) -> TensorRank | None:
        parallel = self.config.parallel
        if tensor == 1:
            return None
        return TensorRank(tensor, _Post(), kernels.cast, parallel.sequence_parallel, parallel.partition_activations)


class _Post:
    """Where a rank's messages go: to the watch that is looking."""

    watch: Watch

    def __call__(self, kind: str, size: int) -> None:
        self.watch.post(kind, size)


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


def _renamed(use: LayerUse, name: str) -> LayerUse:
    return LayerUse(**{**vars(use), "name": name})


def _rehearse(
    name: str,
    layer: nn.Module,
    carry: Sequence[Shape],
    recompute: bool,
    kernels: DeviceKernels,
    rank: TensorRank | None,
) -> LayerUse:
    """Run one layer forward and backward under a watch."""
    layer.train()
    parameters, order = list(layer.parameters()), list[int]()
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.empty_like(parameter)  # as in every micro-batch but a step's first
        parameter.register_post_accumulate_grad_hook(lambda _, number=number: order.append(number))
    checkpointed: Any = PartitionedInputs(rank) if rank is not None and rank.inputs_dealt else checkpoint_layer

    def forward(carry: Any) -> Any:
        with kernels:  # here: a recompute comes from the backward pass
            return layer(carry)

    def run(inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        out = fold_layers([forward], inputs, 0, recompute, checkpointed=checkpointed)  # type: ignore[list-item]
        return out if isinstance(out, tuple) else (out,)

    watch = Watch()
    if rank is not None:
        rank.post.watch = watch  # type: ignore[attr-defined]
    watch.welcome([*layer.buffers(), *(t for p in parameters for t in (p, p.grad) if t is not None)])
    if isinstance(layer, _Loss):
        watch.welcome([layer.labels])
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(), watch:
        warnings.simplefilter("ignore")  # of torch's own, about tensors without storage
        needs, costs = _separate_outputs(run, carry, watch)
        order.clear()
        return _measure(name, run, carry, watch, needs, costs, parameters, order, getattr(checkpointed, "parts", []))


def _measure(
    name: str,
    run: Callable[[Any], tuple[torch.Tensor, ...]],
    carry: Sequence[Shape],
    watch: Watch,
    needs: Sequence[frozenset[int]],
    costs: Sequence[Cost],
    parameters: Sequence[nn.Parameter],
    order: list[int],
    parts: list[int],
) -> LayerUse:
    """The pass that counts: all outputs go backward together."""
    parts.clear()
    inputs = tuple(shape.make() for shape in carry)
    watch.welcome(inputs)
    addresses = [address_of(value) for value in inputs]
    watch.restart()
    before = watch.live
    out = run(inputs)
    forward_peak, forward = watch.peak - before, watch.restart()
    shapes = [Shape(tuple(value.shape), value.dtype) for value in out]
    sources = [addresses.index(place) if (place := address_of(value)) in addresses else -1 for value in out]
    places = [address_of(value) for value in out]
    # each output's gradient arrives as a tensor of its own, which the first operation that reads it can let go
    total = sum((value.mul(1.0).sum() for value in out if value.requires_grad), torch.zeros((), device="meta"))
    del inputs, out
    kept_inputs = frozenset(i for i, address in enumerate(addresses) if watch.is_alive(address))
    kept = [source < 0 and watch.is_alive(place) for source, place in zip(sources, places, strict=True)]
    live = watch.live - before
    watch.restart()
    total.backward()
    outputs = tuple(map(Output, shapes, sources, needs, kept, costs))
    return LayerUse(
        name,
        outputs,
        kept=live - sum(output.shape.nbytes for output in outputs if output.kept) - sum(parts[: len(carry)]),
        kept_inputs=kept_inputs,
        parts=tuple(parts[: len(carry)]) or (0,) * len(carry),
        forward_peak=forward_peak,
        backward_peak=watch.peak - before,
        forward=forward,
        weights=tuple(parameter.numel() for parameter in parameters),
        gradient_order=tuple(order),
    )


def _separate_outputs(
    run: Callable[[Any], tuple[torch.Tensor, ...]], carry: Sequence[Shape], watch: Watch
) -> tuple[list[frozenset[int]], list[Cost]]:
    """For each output the float inputs that its gradient reaches, and the cost of its backward pass alone."""
    inputs = tuple(shape.make() for shape in carry)
    for given in inputs:
        if given.requires_grad:
            given.retain_grad()
    watch.welcome(inputs)
    out, needs, costs = run(inputs), [], []
    for value in out:
        watch.restart()
        if value.requires_grad and all(value is not given for given in inputs):
            value.backward(torch.empty_like(value), retain_graph=True)
        costs.append(watch.restart())
        needs.append(frozenset(i for i, given in enumerate(inputs) if given.grad is not None))
        for given in inputs:
            given.grad = None
    return needs, costs


def rehearse_model(config: RunConfig, vocab_size: int, kind: str, length: int = 0) -> Rehearsal:
    """A rehearsal of a configuration's model.

    Raises:
        ConfigError: no such model or preset.
    """
    find_model(config.model.name)
    return Rehearsal(config, vocab_size, kind, length)
