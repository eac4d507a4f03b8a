"""One pass through a model's layers, its loss over tokens, and its optimizer: the same under every strategy.

Shapes: B batch, T target length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from biokit.config import TrainConfig
from biokit.kernels.cross_entropy import cross_entropy_sum

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Fold(nn.Module):
    """A model as one call: its layers in order, under the run's precision, dropout seeds and recompute.

    Args:
        model: has `layers()`, each `forward(carry) -> carry`.
    """

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        super().__init__()
        self.model, self.config, self.device_type = model, config, device.type

    def forward(self, inputs: Sequence[torch.Tensor], seed: int | None) -> torch.Tensor:
        """Logits (B,T,V); with a seed, dropout draws from it, and activations are made again where configured."""
        layers: list[nn.Module] = self.model.layers()  # type: ignore[operator]
        recompute = self.config.checkpoint_activations and seed is not None
        with autocast(self.config, self.device_type):
            return fold_layers(layers, tuple(inputs), seed, recompute)


def autocast(config: TrainConfig, device_type: str) -> AbstractContextManager[Any]:
    """The precision in which layers run; weights and optimizer stay in fp32."""
    dtype = PRECISIONS[config.precision]
    return nullcontext() if dtype == torch.float32 else torch.autocast(device_type, dtype=dtype)


def checkpoint_layer(run: Callable[[Any], Any], carry: Any) -> Any:
    """`run(carry)`, whose activations are made again in the backward pass; `run` seeds its own dropout."""
    return checkpoint(run, carry, use_reentrant=False, preserve_rng_state=False)


def fold_layers(
    layers: list[nn.Module],
    carry: Any,
    seed: int | None,
    recompute: bool,
    first_position: int = 0,
    checkpointed: Callable[[Callable[[Any], Any], Any], Any] = checkpoint_layer,
) -> torch.Tensor:
    """Run layers in order; with a seed, each draws its dropout from (seed, its position in the whole model).

    Args:
        recompute: make the activations inside a layer again in the backward pass, under the same masks.
        first_position: of the first of these layers in the whole model (a pipeline stage holds a part).
        checkpointed: how a layer is recomputed (`tensor.PartitionedCheckpoint` keeps a part of its inputs).
    """
    for position, layer in enumerate(layers, start=first_position):
        run = layer if seed is None else _seeded(layer, seed * 4099 + position)
        carry = checkpointed(run, carry) if recompute else run(carry)
    return carry


def _seeded(layer: nn.Module, seed: int) -> Callable[[Any], Any]:
    def run(carry: Any) -> Any:
        # not torch.manual_seed: without CUDA it formats a traceback for each kind of device, at every layer
        torch.default_generator.manual_seed(seed & (2**63 - 1))
        if torch.cuda.is_initialized():
            torch.cuda.manual_seed(seed & (2**63 - 1))
        return layer(carry)

    return run


def token_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross entropy of the labels that are not `pad_id`, and (3,) float64 figures on the device.

    The figures are the loss, the number of right predictions and the number of labels that count.
    """
    loss = cross_entropy_sum(logits_BTV.flatten(0, 1), labels_BT.flatten(), pad_id)
    valid_BT = labels_BT != pad_id
    correct_BT = (logits_BTV.detach().argmax(-1) == labels_BT) & valid_BT
    return loss, torch.stack([loss.detach().double(), correct_BT.sum().double(), valid_BT.sum().double()])


def move_batch(
    batch: Mapping[str, torch.Tensor], keys: Sequence[str], device: torch.device
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """(inputs of the first layer in order, labels) on a device."""
    *inputs, labels_BT = (batch[key].to(device, non_blocking=True) for key in keys)
    return inputs, labels_BT


def build_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), fused, for the weights that are trained; weight decay on matrices only."""
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.dim() >= 2]
    others = [p for p in trained if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = (config.adam_beta1, config.adam_beta2)
    used = [group for group in groups if group["params"]]
    return torch.optim.AdamW(used, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)
