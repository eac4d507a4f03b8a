"""How a model is run and updated: one small interface, chosen by name. `Single` is one device.

A strategy is prepared with a model, then per step: `backward` for every micro-batch, `step` once.
Shapes: B batch, T target length, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from biokit.config import TrainConfig
from biokit.errors import ConfigError
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


class Single:
    """One process, one device: autocast with fp32 master weights, AdamW, clipping by global norm."""

    def __init__(self, model: nn.Module, config: TrainConfig, pad_id: int, device: torch.device) -> None:
        self.model = model.to(device)
        self.device, self.pad_id, self.config = device, pad_id, config
        self.dtype = PRECISIONS[config.precision]
        self.optimizer = build_optimizer(self.model, config, device)
        self.scaler = torch.amp.GradScaler(
            device.type,
            init_scale=config.initial_loss_scale,
            growth_interval=config.loss_scale_window,
            enabled=config.precision == "fp16",
        )

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
        """Clip, update, clear the gradients; returns (gradient norm before clipping, whether fp16 skipped it)."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        limit = self.config.clip_grad or float("inf")
        norm = float(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
        scale_before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm, self.scaler.get_scale() < scale_before

    def model_state(self) -> dict[str, torch.Tensor]:
        """Every parameter by name."""
        return {name: parameter.detach() for name, parameter in self.model.named_parameters()}

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """`<moment>.<parameter name>` -> tensor; empty before the first step."""
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {
            f"{moment}.{names[id(parameter)]}": torch.as_tensor(value)
            for parameter, moments in self.optimizer.state.items()
            for moment, value in moments.items()
        }

    def scaler_state(self) -> dict[str, Any]:
        """Loss scale and its growth counter (fp16), plain numbers."""
        return self.scaler.state_dict()

    def load(
        self, model: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor], scaler: Mapping[str, Any]
    ) -> None:
        """Take over states that `model_state`, `optimizer_state` and `scaler_state` gave."""
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(model[name])
        parameters = dict(self.model.named_parameters())
        self.optimizer.state.clear()
        for key, value in optimizer.items():
            moment, name = key.split(".", 1)
            parameter = parameters[name]
            self.optimizer.state[parameter][moment] = value if moment == "step" else value.to(parameter.device)
        if scaler:
            self.scaler.load_state_dict(dict(scaler))

    def autocast(self) -> AbstractContextManager[Any]:
        """The precision in which the model runs."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def _loss(self, batch: Mapping[str, torch.Tensor], seed: int | None) -> tuple[TokenSums, torch.Tensor]:
        src_BS, tgt_BT, labels_BT = (
            batch[key].to(self.device, non_blocking=True) for key in ("encoder_ids", "decoder_ids", "labels")
        )
        with self.autocast():
            logits_BTV = fold_layers(
                self.model.layers(),  # type: ignore[operator]
                (src_BS, tgt_BT),
                seed,
                self.config.checkpoint_activations and seed is not None,
            )
        loss = cross_entropy_sum(logits_BTV.flatten(0, 1), labels_BT.flatten(), self.pad_id)
        valid_BT = labels_BT != self.pad_id
        correct_BT = (logits_BTV.detach().argmax(-1) == labels_BT) & valid_BT
        return TokenSums(loss.item(), int(correct_BT.sum()), int(valid_BT.sum())), loss


def fold_layers(layers: list[nn.Module], carry: Any, seed: int | None, recompute: bool) -> torch.Tensor:
    """Run layers in order; with a seed, each draws its dropout from (seed, its position), on whichever rank it is.

    With `recompute`, activations inside a layer are made again in the backward pass, under the same masks.
    """
    for position, layer in enumerate(layers):
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
