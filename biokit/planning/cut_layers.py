"""Layers as one tensor rank has them, without a process group: what they keep and send is that of the real ones.

Stand-ins for Megatron-core's parallel layers as `biokit.parallel.tensor` uses them (Shoeybi et al. 2019, section 3;
with sequence parallelism Korthikanti et al. 2022, section 4.2.2): the same shapes, the same tensors kept for the
backward pass, each message noted instead of sent. The rank is the last one, whose part of the vocabulary is padded.

Shapes: B batch rows, T target length, I and O features, V vocabulary (this rank's part of it).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from biokit.parallel.cuts import Cut, cut_tensor, find_cut, find_word, padded_size
from biokit.parallel.folding import checkpoint_layer


@dataclass(frozen=True)
class TensorRank:
    """The last one of `size` tensor ranks.

    Attributes:
        post: (kind, bytes) is called for every message.
        cast: as autocast does before a matrix product.
        rows_dealt: sequence parallelism: between the matrices each rank has its share of the rows.
        inputs_dealt: partitioned activations: of a layer's inputs each rank keeps its share for the recompute.
    """

    size: int
    post: Callable[[str, int], None]
    cast: Callable[[Any], Any]
    rows_dealt: bool = False
    inputs_dealt: bool = False

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """All ranks' rows."""
        whole = x.new_empty(x.shape[0] * self.size, *x.shape[1:])
        self.post("all_gather", whole.nbytes)
        return whole

    def scatter(self, x: torch.Tensor) -> torch.Tensor:
        """This rank's rows of the sum."""
        self.post("reduce_scatter", x.nbytes)
        return x.new_empty(x.shape[0] // self.size, *x.shape[1:])

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks, in place."""
        self.post("all_reduce", x.nbytes)
        return x


class _Product(torch.autograd.Function):
    """x (B,...,I) times the transposed weight (O,I); `column`: the gradient of x is summed over the ranks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight_OI: torch.Tensor, rank: TensorRank, column: bool) -> torch.Tensor:
        ctx.save_for_backward(x, weight_OI)
        ctx.rank, ctx.column = rank, column
        whole = rank.gather(x) if column and rank.rows_dealt else x
        return torch.matmul(whole, weight_OI.t())

    @staticmethod
    def backward(ctx: Any, grad_y: torch.Tensor) -> Any:
        x, weight_OI = ctx.saved_tensors
        rank, dealt = ctx.rank, ctx.column and ctx.rank.rows_dealt
        whole = rank.gather(x) if dealt else x
        grad_x = grad_y.matmul(weight_OI)
        if ctx.column:
            grad_x = rank.scatter(grad_x) if dealt else rank.sum(grad_x)
        grad_weight = grad_y.contiguous().flatten(0, -2).t().matmul(whole.flatten(0, -2))
        return grad_x, grad_weight, None, None


class _Sum(torch.autograd.Function):
    """The sum over the tensor ranks, forward; the gradient goes back as it is (to this rank's rows: gathered)."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, rank: TensorRank, dealt: bool) -> torch.Tensor:
        ctx.rank, ctx.dealt = rank, dealt
        return rank.scatter(y) if dealt else rank.sum(y)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return ctx.rank.gather(grad) if ctx.dealt else grad, None, None


class CutLinear(nn.Module):
    """This rank's columns (or rows) of a linear layer."""

    def __init__(self, linear: nn.Linear, word: str, rank: TensorRank) -> None:
        super().__init__()
        self.weight, self.bias, self.rank, self.word = linear.weight, linear.bias, rank, word
        self.num_padded = padded_size(linear.out_features, rank.size) - linear.out_features if word == "vocab" else 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        cast, column = self.rank.cast, self.word != "row"
        y = _Product.apply(cast(x), cast(self.weight), self.rank, column)
        if not column:
            y = _Sum.apply(y, self.rank, self.rank.rows_dealt)
        if self.bias is not None:
            y = y + self.bias.to(y.dtype)
        return F.pad(y[..., : -self.num_padded], (0, self.num_padded)) if self.num_padded else y


class CutEmbedding(nn.Module):
    """This rank's rows of a token table: ids of others give zeros, which the sum fills in."""

    def __init__(self, embedding: nn.Embedding, rank: TensorRank) -> None:
        super().__init__()
        self.weight, self.rank = embedding.weight, rank

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        others = (ids < 0) | (ids >= len(self.weight))
        own = ids.masked_fill(others, 0)
        return _Sum.apply(F.embedding(own, self.weight).masked_fill_(others[..., None], 0.0), self.rank, False)


def cut_layer(layer: nn.Module, name: str, plan: Mapping[str, str], rank: TensorRank, first: bool) -> nn.Module:
    """Leave in a layer without storage what the rank holds, as `biokit.parallel.tensor.split_layer` does."""
    for path, module in list(layer.named_modules()):
        word = find_word(plan, f"{name}.{path}".rstrip("."))
        if word is None or word == "local":
            continue
        for key, parameter in module.named_parameters():
            _cut(parameter, find_cut(plan, f"{name}.{path}.{key}"), rank)
        swapped = CutEmbedding(module, rank) if isinstance(module, nn.Embedding) else None
        layer.set_submodule(path, swapped or CutLinear(module, word, rank))
    if rank.rows_dealt:
        _deal_rows(layer, rank, first)
    return layer


def _cut(parameter: nn.Parameter, cut: Cut, rank: TensorRank) -> None:
    if not getattr(parameter, "is_cut", False):  # a tied one is met twice
        parameter.data = cut_tensor(parameter.data, cut, rank.size, rank.size - 1).clone()
        parameter.is_cut = cut.dim is not None  # type: ignore[attr-defined]


def _deal_rows(layer: nn.Module, rank: TensorRank, first: bool) -> None:
    """Sequence parallelism: rows out of the first layer; gradients of parameters that are not cut are summed."""
    if first:

        def deal(_: nn.Module, args: Any, carry: tuple[torch.Tensor, ...]) -> Any:
            return tuple(x.chunk(rank.size)[-1].contiguous() if x.is_floating_point() else x for x in carry)

        layer.register_forward_hook(deal)
        return
    for parameter in layer.parameters():
        if not getattr(parameter, "is_cut", False):
            parameter.register_hook(lambda gradient: rank.sum(gradient.clone()))


class PartitionedInputs:
    """Activation checkpointing that keeps 1/tp of a layer's float inputs (`tensor.PartitionedCheckpoint`).

    Attributes:
        parts: bytes kept of each input.
    """

    def __init__(self, rank: TensorRank) -> None:
        self.rank, self.parts = rank, list[int]()

    def __call__(self, run: Callable[[Any], Any], carry: tuple[torch.Tensor, ...]) -> Any:
        whole, kept = [carry], [self._keep(value) for value in carry]
        del carry

        def run_again(_: None) -> Any:
            return run(whole.pop() if whole else tuple(gather() for gather in kept))

        return checkpoint_layer(run_again, None)

    def _keep(self, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        if not value.is_floating_point():
            self.parts.append(0)
            return lambda: value
        size = padded_size(value.numel(), self.rank.size) // self.rank.size
        part, shape = value.detach().new_empty(size), value.shape
        self.parts.append(part.nbytes)

        def gather() -> torch.Tensor:
            return self.rank.gather(part)[: shape.numel()].view(shape).requires_grad_()

        return gather


def cut_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor, rank: TensorRank) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and figures as `biokit.parallel.tensor.token_loss` makes them from a rank's part of the vocabulary."""
    copy_BTV = logits_BTV.to(torch.float32, copy=True)
    loss = _CrossEntropy.apply(copy_BTV, labels_BT, rank).sum()
    own_BT = logits_BTV.detach().float().amax(-1)
    highest_BT, ids_BT = rank.sum(own_BT.clone()), rank.sum(logits_BTV.argmax(-1) + 0)
    return loss, torch.stack([(ids_BT == labels_BT).sum(), (own_BT == highest_BT).sum()])


class _CrossEntropy(torch.autograd.Function):
    """Summed over the ranks' parts of the vocabulary; works inside its fp32 logits, which it keeps."""

    @staticmethod
    def forward(ctx: Any, logits_BTV: torch.Tensor, labels_BT: torch.Tensor, rank: TensorRank) -> torch.Tensor:
        highest_BT = rank.sum(logits_BTV.amax(-1))
        logits_BTV -= highest_BT.unsqueeze(-1)
        own_BT = labels_BT.clone()
        picked_BT = rank.sum(logits_BTV.gather(-1, own_BT.unsqueeze(-1)).squeeze(-1))
        logits_BTV.exp_()
        total_BT = rank.sum(logits_BTV.sum(-1))
        logits_BTV.div_(total_BT.unsqueeze(-1))
        ctx.save_for_backward(logits_BTV, own_BT)
        return total_BT.log() - picked_BT

    @staticmethod
    def backward(ctx: Any, grad_BT: torch.Tensor) -> Any:
        softmax_BTV, own_BT = ctx.saved_tensors
        softmax_BTV.scatter_add_(-1, own_BT.unsqueeze(-1), -torch.ones_like(softmax_BTV[..., :1]))
        return softmax_BTV.mul_(grad_BT.unsqueeze(-1)), None, None
