"""An ensemble of small networks on molecule vectors, with the encoder below it frozen or tuned.

Deep ensembles (Lakshminarayanan, Pritzel and Blundell 2017): in regression every member predicts a mean and a variance
and is trained by the Gaussian likelihood; in classification it predicts a logit. The members lie in the same tensors
and are trained side by side, each from its own start, in its own order of the molecules, to its own best epoch.

Shapes: M members, N molecules, B batch, S tokens, D hidden, W width, K outputs (2 in regression, 1 in classification).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from biokit.generate.inputs import Hiddens, check_ranges
from biokit.generate.latent import mean_of
from biokit.models.molbart import PAD_ID, MolBART
from biokit.tasks.property_baselines import Prediction, combine_members

MIN_VARIANCE = 1e-4  # of standardised targets
VALIDATION_BATCH = 512


@dataclass(frozen=True)
class HeadOptions:
    """How a head is trained.

    Attributes:
        width: of its hidden layer.
        lr, encoder_lr: AdamW's learning rates of the head and (tuned) of the encoder; the latter suits the `mini`
            preset, larger ones want less.
        patience: epochs without a better validation loss of any member before training ends.
    """

    width: int = 256
    dropout: float = 0.1
    lr: float = 1e-3
    encoder_lr: float = 5e-4
    weight_decay: float = 1e-2
    batch_size: int = 64
    max_epochs: int = 200
    patience: int = 20

    def check(self) -> None:
        """Raises ConfigError for a value outside its range."""
        counts = {name: getattr(self, name) for name in ("width", "batch_size", "max_epochs", "patience")}
        check_ranges({name: (value, value >= 1) for name, value in counts.items()}, "1 or more")
        rates = {name: getattr(self, name) for name in ("lr", "encoder_lr")}
        check_ranges({name: (value, 0 < value <= 1) for name, value in rates.items()}, "above 0, at most 1")
        check_ranges({"dropout": (self.dropout, 0 <= self.dropout < 1)}, "0 or more, less than 1")
        check_ranges({"weight_decay": (self.weight_decay, 0 <= self.weight_decay < math.inf)}, "0 or more")


FROZEN = HeadOptions()
TUNED = HeadOptions(batch_size=32, max_epochs=30, patience=6)


class EnsembleHead(nn.Module):
    """M networks of one hidden layer on standardised vectors."""

    def __init__(self, num_members: int, hidden_size: int, kind: str, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.kind, self.dropout = kind, dropout
        num_outputs = 2 if kind == "regression" else 1
        self.up_MDW = nn.Parameter(torch.randn(num_members, hidden_size, width) / math.sqrt(hidden_size))
        self.up_bias_M1W = nn.Parameter(torch.zeros(num_members, 1, width))
        self.down_MWK = nn.Parameter(torch.randn(num_members, width, num_outputs) / math.sqrt(width))
        self.down_bias_M1K = nn.Parameter(torch.zeros(num_members, 1, num_outputs))
        self.center_D: torch.Tensor
        self.scale_D: torch.Tensor
        self.target_center: torch.Tensor
        self.target_scale: torch.Tensor
        self.register_buffer("center_D", torch.zeros(hidden_size))
        self.register_buffer("scale_D", torch.ones(hidden_size))
        self.register_buffer("target_center", torch.zeros(1))
        self.register_buffer("target_scale", torch.ones(1))

    @property
    def num_members(self) -> int:
        return len(self.up_MDW)

    def standardise(self, vectors_ND: torch.Tensor, targets_N: torch.Tensor) -> None:
        """Take the centres and scales of what is learnt from."""
        self.center_D.copy_(vectors_ND.mean(0))
        self.scale_D.copy_(vectors_ND.std(0).clamp(min=1e-6))
        if self.kind == "regression":
            self.target_center.fill_(targets_N.mean())
            self.target_scale.fill_(targets_N.std())

    def forward(self, vectors_MBD: torch.Tensor) -> torch.Tensor:
        """Outputs (M,B,K): of standardised targets the mean and a number that becomes the variance, or a logit."""
        x_MBD = (vectors_MBD - self.center_D) / self.scale_D
        x_MBW = F.gelu(torch.baddbmm(self.up_bias_M1W, x_MBD, self.up_MDW))
        return torch.baddbmm(self.down_bias_M1K, F.dropout(x_MBW, self.dropout, self.training), self.down_MWK)

    def loss(self, outputs_MBK: torch.Tensor, targets_MB: torch.Tensor) -> torch.Tensor:
        """Mean negative log likelihood (M) of targets in their own unit."""
        if self.kind == "classification":
            return F.binary_cross_entropy_with_logits(outputs_MBK[..., 0], targets_MB, reduction="none").mean(1)
        wanted_MB = (targets_MB - self.target_center) / self.target_scale
        return F.gaussian_nll_loss(
            outputs_MBK[..., 0], wanted_MB, _variance(outputs_MBK), eps=MIN_VARIANCE, reduction="none"
        ).mean(1)

    @torch.no_grad()
    def predict(self, vectors_ND: torch.Tensor) -> Prediction:
        """Predictions in the target's own unit; the head is left in evaluation mode."""
        self.eval()
        outputs_MNK = self(vectors_ND.expand(self.num_members, -1, -1)).double()
        if self.kind == "classification":
            mean_MN = outputs_MNK[..., 0].sigmoid().cpu().numpy()
            return combine_members(mean_MN, mean_MN * (1 - mean_MN))
        mean_MN = (outputs_MNK[..., 0] * self.target_scale + self.target_center).cpu().numpy()
        variance_MN = (_variance(outputs_MNK) * self.target_scale**2).cpu().numpy()
        return combine_members(mean_MN, variance_MN)


def _variance(outputs_MBK: torch.Tensor) -> torch.Tensor:
    return F.softplus(outputs_MBK[..., 1]) + MIN_VARIANCE


@dataclass(frozen=True)
class Part:
    """What is learnt from, or what training is stopped by: vectors (N,D), or ids (N,S) of a tuned encoder; targets."""

    inputs: torch.Tensor
    targets: torch.Tensor


def train_frozen(
    train: Part, val: Part, kind: str, num_members: int, seed: int, options: HeadOptions = FROZEN
) -> EnsembleHead:
    """A head on vectors that stay as they are: a pure function of its arguments."""
    with _seeded(seed):
        head = EnsembleHead(num_members, train.inputs.shape[1], kind, options.width, options.dropout)
        head.to(train.inputs.device).standardise(train.inputs, train.targets)
        _Training(head, nn.Identity(), shared=False, options=options).run(train, val)
    return head


def train_tuned(
    encoder: MolBART, train: Part, val: Part, kind: str, num_members: int, seed: int, options: HeadOptions = TUNED
) -> EnsembleHead:
    """A head, and the encoder below it, which is changed in place (its decoder is not): all members share it."""
    with _seeded(seed):
        pooled = PooledEncoder(encoder)
        vectors_ND = pooled.vectors(train.inputs)
        head = EnsembleHead(num_members, vectors_ND.shape[1], kind, options.width, options.dropout)
        head.to(vectors_ND.device).standardise(vectors_ND, train.targets)
        _Training(head, pooled, shared=True, options=options).run(train, val)
    encoder.eval()
    return head


class PooledEncoder(nn.Module):
    """The half of a model that makes one vector of a molecule: the mean of its hiddens, as `generate.embed` does."""

    def __init__(self, model: MolBART) -> None:
        super().__init__()
        self.embedding, self.layers = model.embed.embedding, model.encoder
        self._encode = model.encode

    def forward(self, ids_BS: torch.Tensor) -> torch.Tensor:
        ids_BS = ids_BS[:, : int((ids_BS != PAD_ID).sum(1).max())]
        return mean_of(Hiddens(self._encode(ids_BS), ids_BS != PAD_ID))

    @torch.no_grad()
    def vectors(self, ids_NS: torch.Tensor) -> torch.Tensor:
        """Vectors (N,D), batch by batch, in evaluation mode."""
        self.eval()
        return torch.cat([self(ids_BS) for ids_BS in ids_NS.split(VALIDATION_BATCH)])


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Draws inside depend on the seed alone, and leave the process's own stream as it was."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


class _Training:
    """Epochs until no member gets better; each member ends with the weights of its own best epoch.

    Args:
        features: inputs of a batch -> vectors.
        shared: whether all members see the same batches through `features`, and so end at the same epoch.
    """

    def __init__(self, head: EnsembleHead, features: nn.Module, shared: bool, options: HeadOptions) -> None:
        self.head, self.features, self.shared, self.options = head, features, shared, options
        groups: list[dict[str, Any]] = [{"params": list(head.parameters()), "lr": options.lr}]
        if encoder := list(features.parameters()):
            groups.append({"params": encoder, "lr": options.encoder_lr})
        self.optimizer = torch.optim.AdamW(groups, weight_decay=options.weight_decay)
        self.weights = [weight for group in groups for weight in group["params"]]

    def run(self, train: Part, val: Part) -> None:
        members = self.head.num_members
        best_M = torch.full((members,), math.inf, device=train.targets.device)
        kept = [weight.detach().clone() for weight in self.weights]
        waited = 0
        for _ in range(self.options.max_epochs):
            self._learn(train)
            val_M = self._validate(val)
            better_M = (val_M.mean() < best_M.mean()).expand(members) if self.shared else val_M < best_M
            best_M = torch.where(better_M, val_M, best_M)
            self._keep(kept, better_M)
            waited = 0 if bool(better_M.any()) else waited + 1
            if waited >= self.options.patience:
                break
        with torch.no_grad():
            for weight, value in zip(self.weights, kept, strict=True):
                weight.copy_(value)
        self.head.eval()

    def _learn(self, train: Part) -> None:
        """One epoch; a last batch of a single molecule goes to the one before it."""
        self.head.train(), self.features.train()
        members, number = self.head.num_members, len(train.targets)
        orders = [torch.randperm(number) for _ in range(1 if self.shared else members)]
        order_MN = torch.stack(orders).to(train.targets.device).expand(members, -1)
        for start in range(0, number - 1, self.options.batch_size):
            end = start + self.options.batch_size
            rows_MB = order_MN[:, start : number if end == number - 1 else end]
            loss = self.head.loss(self.head(self._vectors(train, rows_MB)), train.targets[rows_MB]).sum()
            self.optimizer.zero_grad()
            loss.backward()
            if self.shared:
                nn.utils.clip_grad_norm_(self.features.parameters(), 1.0)
            self.optimizer.step()

    def _vectors(self, part: Part, rows_MB: torch.Tensor) -> torch.Tensor:
        if self.shared:
            return self.features(part.inputs[rows_MB[0]]).expand(len(rows_MB), -1, -1)
        return self.features(part.inputs[rows_MB])

    @torch.no_grad()
    def _validate(self, val: Part) -> torch.Tensor:
        """The loss (M) of every member on all of the validation part."""
        self.head.eval(), self.features.eval()
        members = self.head.num_members
        vectors_ND = torch.cat([self.features(inputs) for inputs in val.inputs.split(VALIDATION_BATCH)])
        return self.head.loss(self.head(vectors_ND.expand(members, -1, -1)), val.targets.expand(members, -1))

    @torch.no_grad()
    def _keep(self, kept: list[torch.Tensor], better_M: torch.Tensor) -> None:
        """Copy the weights of the members that got better; those of a shared encoder go with all of them."""
        num_own = len(list(self.head.parameters()))
        for number, (old, weight) in enumerate(zip(kept, self.weights, strict=True)):
            if number < num_own:
                torch.where(better_M[:, None, None], weight, old, out=old)
            elif bool(better_M[0]):
                old.copy_(weight)
