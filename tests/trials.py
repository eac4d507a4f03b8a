"""Short trainings on N gloo ranks whose records the parity tests compare; cut into micro-batches as training cuts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from biokit.checkpoint import load_checkpoint
from biokit.config import DataConfig, ParallelConfig, RunConfig, TrainConfig
from biokit.data.batching import rank_rows
from biokit.data.micro_batches import own_micro_batches
from biokit.parallel.grid import Layout, deal_micro_batches, plan_layout
from biokit.parallel.processes import join_processes
from biokit.parallel.strategy import ModelParts, Strategy, TokenSums, make_strategy
from tests.distributed import TIMEOUT_S, ranks

NUM_ROWS = 16
BUDGET_ROWS = (16, 3, 7, 1, 12)  # as a token budget gives them; of 1 row most data ranks have no share
EVALUATED_STEP = 99
SINGLE = Layout()

States = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]  # (model, optimizer)
Batch = dict[str, np.ndarray]


@dataclass(frozen=True)
class Trial:
    """A short training. `mutation` is a fault that the checks must find (`_train`)."""

    layout: Layout
    micro_batch_size: int = 2
    clip_grad: float = 0.0
    dropout: float = 0.0
    precision: str = "fp32"
    sgd: bool = False  # one step, see above
    recompute: bool = False
    partition_activations: bool = False
    token_budget: bool = False
    steps: tuple[int, int] = (0, 8)
    keep_states: bool = False
    mutation: str = ""
    timeout_s: float = TIMEOUT_S  # of the process groups

    @classmethod
    def accumulating(cls, layout: Layout, accumulation: int, **keys: Any) -> Trial:
        """With so many micro-batches a rank."""
        return cls(layout, micro_batch_size=NUM_ROWS // (accumulation * layout.data), **keys)

    def alone(self) -> Trial:
        """The same on one process."""
        return replace(self, layout=SINGLE, mutation="", partition_activations=False)


@dataclass
class Record:
    """What a trial gave, from the main process.

    Attributes:
        forwards: how often each layer of this rank was called for a micro-batch of the last update, by position.
        loaded: states as gathered right after the load.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    num_valid: list[int] = field(default_factory=list)
    sums: TokenSums = field(default_factory=TokenSums)
    forwards: list[float] = field(default_factory=list)
    loaded: States = ({}, {})
    states: States = ({}, {})


@cache
def play_once(model: Any, trial: Trial) -> Record:
    """`play` from the initial weights, once a session."""
    return play(model, trial, None)


def play(model: Any, trial: Trial, checkpoint: Path | None) -> Record:
    """Run a trial of a model (a subclass of StrategyParity), on as many ranks as its layout has, from a checkpoint."""
    return ranks(trial.layout.world_size).run(_run, model, trial, checkpoint)[0]


def _run(model: Any, trial: Trial, checkpoint: Path | None) -> Record:
    """On every rank."""
    with start_strategy(model, trial) as (config, strategy):
        return _train(model, trial, config, strategy, checkpoint)


@contextmanager
def start_strategy(model: Any, trial: Trial) -> Iterator[tuple[RunConfig, Strategy]]:
    """A trial's model under its layout, on every rank of it."""
    config = _make_config(model, trial)
    with join_processes(torch.device("cpu"), trial.timeout_s, trial.layout != SINGLE) as processes:
        args = (config.model, model.vocab_size, model.max_positions, 1)
        spec = model.spec
        build, tied = partial(spec.build, *args), spec.tied_parameters(config.model)
        parts = ModelParts(spec.layers(*args), build, spec.tensor_parallel_plan, tied, spec.batch_keys, model.pad_id)
        sizes = spec.resolve(config.model)
        divided = {name: sizes[name] for name in spec.divided}
        layout = plan_layout(config, processes.world_size, divided, len(parts.layers))
        assert layout == trial.layout
        strategy = make_strategy(parts, config, layout, processes)
        try:
            yield config, strategy
        finally:
            strategy.close()


def _train(model: Any, trial: Trial, config: RunConfig, strategy: Strategy, checkpoint: Path | None) -> Record:
    record, lr = Record(), config.train.lr * (1.001 if trial.mutation == "rate" else 1.0)
    if checkpoint:
        saved = load_checkpoint(checkpoint, check=strategy.processes.is_main)
        strategy.load(saved.model, saved.optimizer, {})
        record.loaded = strategy.model_state(), strategy.optimizer_state()
    for step in range(*trial.steps):
        micros, seeds, num_valid = cut_batch(model, trial, strategy, step)
        if trial.mutation == "missing" and strategy.place.data == strategy.layout.data - 1:
            labels = model.spec.batch_keys[-1]
            micros = [{**micro, labels: torch.full_like(micro[labels], model.pad_id)} for micro in micros]
        if trial.mutation == "seed":
            seeds = [seed + 1 for seed in seeds]
        scaled: Any = num_valid * (1 - 1e-5) if trial.mutation == "scale" else num_valid
        with _counted_forwards(strategy.model) as counts:
            done = strategy.train_batch(micros, scaled, seeds, lr)
        record.forwards = [count / len(micros) for count in counts]
        record.losses.append(done.sums.loss / num_valid)
        record.norms.append(done.grad_norm)
        record.num_valid.append(num_valid)
        assert trial.mutation == "missing" or done.sums.num_valid == num_valid
    record.sums = strategy.evaluate(cut_batch(model, trial, strategy, EVALUATED_STEP)[0])
    if trial.sgd or trial.keep_states:
        record.states = strategy.model_state(), strategy.optimizer_state()
    return record


@contextmanager
def _counted_forwards(model: Any) -> Iterator[list[int]]:
    """Calls of each layer of a rank's model inside the block. Before the layer: recompute leaves it half-way."""
    layers = model.layers if isinstance(model.layers, nn.ModuleList) else model.layers()  # of a stage, of a model
    counts = [0] * len(layers)

    def count(position: int, *_: Any) -> None:
        counts[position] += 1

    hooks = [layer.register_forward_pre_hook(partial(count, position)) for position, layer in enumerate(layers)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def cut_batch(
    model: Any, trial: Trial, strategy: Strategy, step: int
) -> tuple[list[dict[str, torch.Tensor]], list[int], int]:
    """This data rank's micro-batches, their seeds, and the labels that count in the global batch."""
    num_rows = BUDGET_ROWS[step % len(BUDGET_ROWS)] if trial.token_budget else NUM_ROWS
    size, data_rank, num_ranks = trial.micro_batch_size, strategy.place.data, strategy.layout.data
    batch: Batch = model.make_batch(step, num_rows)
    own = deal_micro_batches(-(-num_rows // size), data_rank, num_ranks)
    rows = rank_rows(num_rows, size, data_rank, num_ranks)
    share = {key: array[rows] if rows.start < rows.stop else array[:1] for key, array in batch.items()}
    keys = model.spec.batch_keys
    micros = own_micro_batches(share, size, model.pad_id, keys, num_rows, own)
    return micros, [1000 * step + index for index in own], int((batch[keys[-1]] != model.pad_id).sum())


def _make_config(model: Any, trial: Trial) -> RunConfig:
    layout = trial.layout
    optimizer: dict[str, float] = {"lr": 1e-3, "weight_decay": 0.01}
    if trial.sgd:
        optimizer = {"lr": 2.0**29, "adam_beta1": 0.0, "adam_eps": 2.0**30}
    train = TrainConfig(
        device="cpu",
        micro_batch_size=trial.micro_batch_size,
        global_batch_size=NUM_ROWS,
        clip_grad=trial.clip_grad * (1 + 1e-5) if trial.mutation == "clip" else trial.clip_grad,
        precision=trial.precision,
        checkpoint_activations=trial.recompute,
        **optimizer,  # type: ignore[arg-type]
    )
    parallel = ParallelConfig(
        tensor_model_parallel_size=layout.tensor,
        pipeline_model_parallel_size=layout.pipeline,
        partition_activations=trial.partition_activations,
        timeout_s=trial.timeout_s,
    )
    return RunConfig(
        strategy=layout.strategy,
        data=DataConfig(max_tokens=1000 if trial.token_budget else 0),
        model=replace(model.model, dropout=trial.dropout),
        train=train,
        parallel=parallel,
    )
