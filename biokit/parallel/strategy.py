"""How a model is run and updated: one small interface, chosen by name. `Single` is one device.

`train_batch` does one update over a global batch that is cut into micro-batches: a pipeline needs them all at once.
Shapes: B batch, T target length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from biokit.config import TrainConfig
from biokit.errors import ConfigError, RunError
from biokit.kernels.cross_entropy import cross_entropy_sum

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class TokenSums:
    """Sums over valid tokens, to be divided by their number in the global batch."""

    loss: float = 0.0
    num_correct: int = 0
    num_valid: int = 0

    def __add__(self, other: TokenSums) -> TokenSums:
        return TokenSums(self.loss + other.loss, self.num_correct + other.num_correct, self.num_valid + other.num_valid)


@dataclass
class StepResult:
    """What one update did: token sums, gradient norm before clipping, whether fp16 left the weights as they were."""

    sums: TokenSums
    grad_norm: float
    skipped: bool


class Single:
    """One process, one device: autocast with fp32 master weights, AdamW, clipping by global norm.

    Args:
        batch_keys: the arrays of a batch: inputs of the first layer in order, labels last.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        pad_id: int,
        device: torch.device,
        batch_keys: tuple[str, ...] = ("encoder_ids", "decoder_ids", "labels"),
    ) -> None:
        self.model = model.to(device)
        self.device, self.pad_id, self.config, self.batch_keys = device, pad_id, config, batch_keys
        self.dtype = PRECISIONS[config.precision]
        self.optimizer = build_optimizer(self.model, config, device)
        self.scaler = torch.amp.GradScaler(
            device.type,
            init_scale=config.initial_loss_scale,
            growth_interval=config.loss_scale_window,
            enabled=config.precision == "fp16",
        )

    def train_batch(
        self, micro_batches: Sequence[Mapping[str, torch.Tensor]], num_valid: int, seeds: Sequence[int], lr: float
    ) -> StepResult:
        """One update over a global batch.

        Args:
            num_valid: tokens that count in the global batch.
            seeds: of the dropout masks, one a micro-batch of the *global* batch, whichever rank computes it.

        Raises:
            RunError: a loss or gradient that is not finite (fp16: after the loss scale has come down to 1).
        """
        sums = TokenSums()
        for micro, seed in zip(micro_batches, seeds, strict=True):
            sums += self.backward(micro, 1.0 / num_valid, seed)
        if not math.isfinite(sums.loss):
            raise RunError("training", f"the loss is {sums.loss}", "Lower train.lr, or look at the batch's molecules")
        grad_norm, skipped = self.step(lr)
        return StepResult(sums, grad_norm, skipped)

    def backward(self, batch: Mapping[str, torch.Tensor], scale: float, seed: int) -> TokenSums:
        """Add this micro-batch's gradient of `scale` times its summed loss.

        Args:
            batch: encoder_ids (B,S), decoder_ids (B,T), labels (B,T) on any device.
            scale: 1 / number of valid tokens in the global batch.
            seed: of the dropout masks; each layer draws from (seed, its position).
        """
        self.model.train()
        sums, loss = self._loss(batch, seed)
        self.scaler.scale(loss * scale).backward()
        return sums

    @torch.no_grad()
    def evaluate(self, batch: Mapping[str, torch.Tensor]) -> TokenSums:
        """Sums of a batch without dropout."""
        self.model.eval()
        return self._loss(batch, None)[0]

    def step(self, lr: float) -> tuple[float, bool]:
        """Clip, update, clear the gradients; returns (gradient norm before clipping, whether fp16 skipped it).

        Raises:
            RunError: a gradient is not finite (fp16: and the loss scale is 1 already); the weights are as before.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        limit = self.config.clip_grad or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        scale_before = self.scaler.get_scale()
        if not math.isfinite(norm) and scale_before <= 1.0:  # a disabled scaler's scale is 1
            self.optimizer.zero_grad(set_to_none=True)
            raise RunError("training", f"the gradient norm is {norm}", "Lower train.lr, or train.precision=fp32")
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, self.scaler.get_scale() < scale_before

    def model_state(self) -> dict[str, torch.Tensor]:
        """Every parameter and persistent buffer by name."""
        return self.model.state_dict()

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """`<moment>.<parameter name>` -> tensor; empty before the first step."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {
            f"{moment}.{names[id(parameter)]}": torch.as_tensor(value)
            for parameter, moments in self.optimizer.state.items()
            for moment, value in moments.items()
        }

    def optimizer_template(self) -> dict[str, torch.Tensor]:
        """Names and shapes that `optimizer_state` has after a step."""
        shapes = {"exp_avg": None, "exp_avg_sq": None, "step": torch.zeros(())}
        return {
            f"{moment}.{name}": parameter.detach() if scalar is None else scalar
            for name, parameter in self.model.named_parameters()
            for moment, scalar in shapes.items()
        }

    def scaler_state(self) -> dict[str, Any]:
        """Loss scale and its growth counter (fp16), plain numbers."""
        return self.scaler.state_dict()

    def load(
        self, model: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor], scaler: Mapping[str, Any]
    ) -> None:
        """Take over states that `model_state`, `optimizer_state` and `scaler_state` gave."""
        self.model.load_state_dict(dict(model))
        parameters = dict(self.model.named_parameters())
        self.optimizer.state.clear()
        for key, value in optimizer.items():
            moment, name = key.split(".", 1)
            parameter = parameters[name]
            self.optimizer.state[parameter][moment] = value.to(parameter.device)
        if scaler:
            self.scaler.load_state_dict(dict(scaler))

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision in which the model runs."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _loss(self, batch: Mapping[str, torch.Tensor], seed: int | None) -> tuple[TokenSums, torch.Tensor]:
        *inputs, labels_BT = (batch[key].to(self.device, non_blocking=True) for key in self.batch_keys)
        with self.autocast():
            logits_BTV = fold_layers(
                self.model.layers(),  # type: ignore[operator]
                tuple(inputs),
                seed,
                self.config.checkpoint_activations and seed is not None,
            )
        loss = cross_entropy_sum(logits_BTV.flatten(0, 1), labels_BT.flatten(), self.pad_id)
        valid_BT = labels_BT != self.pad_id
        correct_BT = (logits_BTV.detach().argmax(-1) == labels_BT) & valid_BT
        figures = torch.stack([loss.detach().double(), correct_BT.sum().double(), valid_BT.sum().double()])
        loss_sum, num_correct, num_valid = figures.tolist()  # one wait for the device
        return TokenSums(loss_sum, int(num_correct), int(num_valid)), loss


def fold_layers(
    layers: list[nn.Module], carry: Any, seed: int | None, recompute: bool, first_position: int = 0
) -> torch.Tensor:
    """Run layers in order; with a seed, each draws its dropout from (seed, its position in the whole model).

    Args:
        recompute: make the activations inside a layer again in the backward pass, under the same masks.
        first_position: of the first of these layers in the whole model (a pipeline stage holds a part).
    """
    for position, layer in enumerate(layers, start=first_position):
        run = layer if seed is None else _seeded(layer, seed * 4099 + position)
        carry = checkpoint(run, carry, use_reentrant=False, preserve_rng_state=False) if recompute else run(carry)
    return carry


def _seeded(layer: nn.Module, seed: int) -> Callable[[Any], Any]:
    def run(carry: Any) -> Any:
        torch.manual_seed(seed & (2**63 - 1))
        return layer(carry)

    return run


def build_optimizer(model: nn.Module, config: TrainConfig, device: torch.device) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), fused; weight decay on matrices only."""
    decayed = [p for p in model.parameters() if p.dim() >= 2]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    betas = (config.adam_beta1, config.adam_beta2)
    return torch.optim.AdamW(groups, lr=config.lr, betas=betas, eps=config.adam_eps, fused=True)


STRATEGIES: dict[str, type[Single]] = {"Single": Single}


def find_strategy(name: str) -> type[Single]:
    """The strategy of that name.

    Raises:
        ConfigError: there is none; names those there are.
    """
    if name not in STRATEGIES:
        raise ConfigError(f"strategy={name}", "there is no such strategy", f"Valid: {', '.join(STRATEGIES)}")
    return STRATEGIES[name]
