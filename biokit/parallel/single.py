"""One process and one device (Single), and copies of it that average their gradients (DDP): torch alone.

Shapes: B batch, S source length, T target length, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from biokit.config import TrainConfig
from biokit.errors import RunError
from biokit.parallel.folding import Fold, build_optimizer, move_batch, token_loss
from biokit.parallel.grid import Layout
from biokit.parallel.processes import Processes
from biokit.parallel.strategy import BATCH_KEYS, StepResult, Strategy, TokenSums


class Single(Strategy):
    """One process, one device: autocast with fp32 master weights, AdamW, clipping by global norm.

    Args:
        model: has `layers()`.
        batch_keys: the arrays of a batch: inputs of the first layer in order, labels last.
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        pad_id: int,
        device: torch.device,
        batch_keys: tuple[str, ...] = BATCH_KEYS,
    ) -> None:
        self.model = model.to(device)
        self.layout, self.processes = Layout(), Processes(device=device)
        self.device, self.pad_id, self.config, self.batch_keys = device, pad_id, config, batch_keys
        self.parameters = dict(self.model.named_parameters())
        self.template = {name: parameter.detach().to("meta") for name, parameter in self.parameters.items()}
        self.fold: nn.Module = Fold(self.model, config, device)
        self.optimizer = build_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(
            device.type,
            init_scale=config.initial_loss_scale,
            growth_interval=config.loss_scale_window,
            enabled=config.precision == "fp16",
        )

    def train_batch(
        self, micro_batches: Sequence[Mapping[str, torch.Tensor]], num_valid: int, seeds: Sequence[int], lr: float
    ) -> StepResult:
        """One update over a global batch; see `Strategy.train_batch`."""
        figures = []
        scale = self.layout.data / num_valid  # gradients are averaged over the data ranks
        for index, (micro, seed) in enumerate(zip(micro_batches, seeds, strict=True)):
            with self._gradients_travel(index + 1 == len(micro_batches)):
                figures.append(self._backward(micro, scale, seed))
        sums = self.sum_figures(figures)
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
        return TokenSums.of(self._backward(batch, scale, seed).tolist())

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> TokenSums:
        """Sums without dropout; see `Strategy.evaluate`."""
        self.model.eval()
        return self.sum_figures([self._loss(micro, None)[1] for micro in micro_batches])

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

    def read_piece(self, name: str, moment: str | None) -> torch.Tensor:
        """A parameter, or one of its moments."""
        parameter = self.parameters[name]
        if moment is None:
            return parameter.detach()
        moments = self.optimizer.state.get(parameter)
        if not moments:
            return torch.zeros(() if moment == "step" else parameter.shape)
        return torch.as_tensor(moments[moment]).detach()

    def start_load(self) -> None:
        """Forget the moments."""
        self.optimizer.state.clear()

    @torch.no_grad()
    def write_piece(self, name: str, moment: str | None, piece: torch.Tensor) -> None:
        """Set a parameter, or one of its moments."""
        parameter = self.parameters[name]
        if moment is None:
            parameter.copy_(piece)
        elif parameter.requires_grad:
            self.optimizer.state[parameter][moment] = piece.to(parameter.device, copy=True)

    def scaler_state(self) -> dict[str, Any]:
        """Loss scale and its growth counter (fp16), plain numbers."""
        return self.scaler.state_dict()

    def load_scaler(self, state: Mapping[str, Any]) -> None:
        """Take over what `scaler_state` gave."""
        if state:
            self.scaler.load_state_dict(dict(state))

    def _gradients_travel(self, now: bool) -> AbstractContextManager[Any]:
        """Whether the coming backward pass averages the gradients over the data ranks."""
        return nullcontext()

    def _backward(self, batch: Mapping[str, torch.Tensor], scale: float, seed: int) -> torch.Tensor:
        self.model.train()
        loss, figures = self._loss(batch, seed)
        self.scaler.scale(loss * scale).backward()
        return figures

    def _loss(self, batch: Mapping[str, torch.Tensor], seed: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels_BT = move_batch(batch, self.batch_keys, self.device)
        return token_loss(self.fold(inputs, seed), labels_BT, self.pad_id)


class DDP(Single):
    """Single on every process, gradients averaged while the backward pass goes on (Li et al. 2020, PyTorch DDP)."""

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        pad_id: int,
        processes: Processes,
        batch_keys: tuple[str, ...] = BATCH_KEYS,
    ) -> None:
        super().__init__(model, config, pad_id, processes.device, batch_keys)
        self.layout, self.processes = Layout("DDP", data=processes.world_size), processes
        self.copies = nn.parallel.DistributedDataParallel(
            self.fold, forward_sync_buffers=False, gradient_as_bucket_view=True
        )
        self.fold = self.copies
        self.buckets_settled = False

    def train_batch(
        self, micro_batches: Sequence[Mapping[str, torch.Tensor]], num_valid: int, seeds: Sequence[int], lr: float
    ) -> StepResult:
        """One update over a global batch; see `Strategy.train_batch`."""
        if not self.buckets_settled:
            # torch deals the gradients to other buckets after the first backward pass, and their sums round otherwise
            # in the last bit: a pass that counts for nothing, so that a run that goes on does not differ from another
            self._backward(micro_batches[0], 0.0, seeds[0])
            self.optimizer.zero_grad(set_to_none=True)
            self.buckets_settled = True
        return super().train_batch(micro_batches, num_valid, seeds, lr)

    def _gradients_travel(self, now: bool) -> AbstractContextManager[Any]:
        return nullcontext() if now else self.copies.no_sync()
