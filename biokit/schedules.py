"""Learning rate as a pure function of the step (1 is the first step).

Two versions of Megatron's formulas exist and differ after warm-up: `megatron-2` (v2.0 and later: from lr down to
min_lr over the decay steps) and `megatron-1.1.5` (the v1.1.5 `AnnealingLR` that Megatron MolBART used: from lr
towards 0 over *all* steps counted after warm-up, with min_lr as a floor).
"""

from __future__ import annotations

import math

from biokit.config import TrainConfig


def learning_rate(config: TrainConfig, step: int, hidden_size: int) -> float:
    """Learning rate of step `step` (from 1) of `config.train_iters`.

    `noam` reads `train.lr` as a factor (about 1.0), as the source systems do: its peak is
    lr * (hidden_size * warm-up steps)^-0.5 (Vaswani et al. 2017, section 5.3).
    """
    warmup = config.lr_warmup_fraction * config.train_iters
    if config.lr_schedule == "noam":
        warmup = max(warmup, 1.0)
        noam = config.lr * hidden_size**-0.5 * min(step**-0.5, step * warmup**-1.5)
        return max(noam, config.min_lr) if step > warmup else noam
    if warmup and step <= warmup:
        return config.lr * step / warmup
    if config.lr_schedule == "constant":
        return config.lr
    decay = _decay_megatron_1 if config.lr_schedule_version == "megatron-1.1.5" else _decay_megatron_2
    return decay(config, step, warmup)


def _decay_megatron_2(config: TrainConfig, step: int, warmup: float) -> float:
    steps = config.train_iters - warmup
    ratio = min((step - warmup) / steps, 1.0) if steps else 1.0
    remaining = 0.5 * (1.0 + math.cos(math.pi * ratio)) if config.lr_schedule == "cosine" else 1.0 - ratio
    return config.min_lr + (config.lr - config.min_lr) * remaining


def _decay_megatron_1(config: TrainConfig, step: int, warmup: float) -> float:
    ratio = (step - warmup) / config.train_iters
    remaining = 0.5 * (1.0 + math.cos(math.pi * ratio)) if config.lr_schedule == "cosine" else 1.0 - ratio
    return max(config.lr * remaining, config.min_lr)
