"""One training under many layouts: each rank's part of the model, and what a micro-batch does on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch

from biokit.config import RunConfig
from biokit.exchange.source import Blueprint
from biokit.parallel.cuts import cut_tensor
from biokit.parallel.deepspeed_config import effective_config, read_user_config
from biokit.parallel.grid import STAGED, ZERO_STAGE, Layout, balance_layers
from biokit.planning.parts import RankShape, count_groups
from biokit.planning.rehearsal import LayerUse, Rehearsal, Shape
from biokit.planning.stages import StageUse, use_stage

ID_BYTES = 8


@dataclass(frozen=True)
class Case:
    """A layout, and the sizes of a step under it.

    Attributes:
        num_micros: micro-batches of a data rank in a step.
        recompute: `train.checkpoint_activations`.
    """

    layout: Layout
    micro_batch_size: int
    num_micros: int
    recompute: bool

    def settings(self) -> dict[str, Any]:
        """Keys of a configuration that make it run so."""
        layout = self.layout
        sizes = {"parallel.tensor_model_parallel_size": layout.tensor} if layout.strategy == "ThreeD" else {}
        if layout.strategy in STAGED:
            sizes["parallel.pipeline_model_parallel_size"] = layout.pipeline
        return {
            "strategy": layout.strategy,
            **sizes,
            "train.micro_batch_size": self.micro_batch_size,
            "train.checkpoint_activations": self.recompute,
        }


class Job:
    """A configuration's training on devices of one kind.

    Args:
        kind: `cuda` or `cpu`.
        length: tokens of every sequence; 0: `data.max_length`.
    """

    def __init__(self, config: RunConfig, vocab_size: int, kind: str, length: int = 0) -> None:
        self.config, self.kind = config, kind
        self.rehearsal = Rehearsal(config, vocab_size, kind, length)
        self._uses: dict[Any, list[StageUse]] = {}
        self._stage_bounds: dict[int, list[int]] = {}

    @property
    def blueprint(self) -> Blueprint:
        """The model's parameters and how they are cut."""
        return self.rehearsal.blueprint

    @cached_property
    def num_parameters(self) -> int:
        return sum(weight.numel() for weight in self.blueprint.template.values())

    def configure(self, case: Case) -> RunConfig:
        """The configuration under a case; options that its strategy has not are off."""
        config, layout = self.config, case.layout
        cuts = layout.strategy == "ThreeD" and layout.tensor > 1
        parallel = replace(
            config.parallel,
            tensor_model_parallel_size=layout.tensor,
            pipeline_model_parallel_size=layout.pipeline if layout.strategy in STAGED else 0,
            sequence_parallel=config.parallel.sequence_parallel and cuts,
            partition_activations=config.parallel.partition_activations and cuts and case.recompute,
            deepspeed_config=config.parallel.deepspeed_config if layout.strategy in ZERO_STAGE else "",
        )
        train = replace(
            config.train, micro_batch_size=case.micro_batch_size, checkpoint_activations=case.recompute, device="cpu"
        )
        return replace(config, strategy=layout.strategy, parallel=parallel, train=train)

    def stage_uses(self, case: Case) -> list[StageUse]:
        """What one micro-batch does on each pipeline stage."""
        layout, staged = case.layout, case.layout.strategy in STAGED
        key = case.micro_batch_size, layout.tensor, layout.pipeline, case.recompute, staged
        if key not in self._uses:
            layers = self.rehearsal.layers(case.micro_batch_size, layout.tensor, case.recompute)
            bounds = self._bounds(layout.pipeline)
            uses = []
            for stage, (first, end) in enumerate(pairwise(bounds)):
                last = stage == layout.pipeline - 1
                own = layers[first:end] + layers[-1:] * last
                uses.append(use_stage(own, self._inputs(case, layers, first), staged, last))
            self._uses[key] = uses
        return self._uses[key]

    def rank_shape(self, case: Case, stage: int) -> RankShape:
        """What the memory of a stage's ranks depends on."""
        layout, config = case.layout, self.config
        zero = self.zero_settings(case)
        sizes = [tuple(self._cut(name, layout.tensor).shape) for name in self.stage_parameters(layout, stage)]
        ids = len(self.blueprint.parts.batch_keys) * case.micro_batch_size * self.rehearsal.length * ID_BYTES
        on_cpu = self.kind == "cpu"
        staged = layout.strategy in STAGED  # DeepSpeed takes overlap_comm back for a pipeline
        return RankShape(
            layout,
            stage,
            count_groups(sizes),
            self.stage_uses(case)[stage],
            case.num_micros,
            bucket=min(int(zero.get("reduce_bucket_size", 0)), self.num_parameters),
            zero=zero,
            overlap=not staged and not on_cpu and bool(zero.get("overlap_comm", config.parallel.overlap_comm)),
            resident=self._buffer_bytes(layout.pipeline)[stage] + ids * (not on_cpu),
            batch=ids * case.num_micros,
            shares_memory=on_cpu,
        )

    def zero_settings(self, case: Case) -> Mapping[str, Any]:
        """DeepSpeed's `zero_optimization` group; empty where torch works alone.

        Raises:
            ConfigError: the user's ds_config.json cannot be used with the case.
        """
        if case.layout.strategy not in ZERO_STAGE:
            return {}
        config = self.configure(case)
        group = dict(effective_config(config, case.layout)["zero_optimization"])
        if self.kind == "cuda":  # made on a machine that may have no such device
            path = config.parallel.deepspeed_config
            asked = read_user_config(path)[0].get("zero_optimization", {}) if path else {}
            own = asked.get("overlap_comm", "auto")
            group["overlap_comm"] = config.parallel.overlap_comm if own in ("auto", None) else own
        return group

    def stage_parameters(self, layout: Layout, stage: int) -> list[str]:
        """Names of the parameters that a stage holds, with its copies of those that another stage holds too."""
        first, end = self._bounds(layout.pipeline)[stage : stage + 2]
        layers = list(self.blueprint.layers)[first:end]
        names = [name for layer in layers for name in self.blueprint.layers[layer]]
        for name, earlier in self.blueprint.parts.tied.items():
            if earlier not in names and any(name.startswith(f"{layer}.") for layer in layers):
                names.append(earlier)
        return names

    def tied_bytes(self, layout: Layout, stage: int) -> int:
        """Of gradients that a stage sums with another one's."""
        if layout.pipeline == 1:
            return 0
        held = [set(self.stage_parameters(layout, other)) for other in range(layout.pipeline)]
        shared = [name for name in held[stage] if sum(name in names for names in held) > 1]
        return 4 * sum(self._cut(name, layout.tensor).numel() for name in shared)

    def _bounds(self, num_stages: int) -> list[int]:
        """Positions of the layers at which stages begin, and the end: as `ModelParts.stage_bounds`."""
        if num_stages not in self._stage_bounds:
            layers = self.blueprint.layers.values()
            costs = [sum(self.blueprint.template[name].numel() for name in names) for names in layers]
            self._stage_bounds[num_stages] = balance_layers(costs, num_stages)
        return self._stage_bounds[num_stages]

    def _inputs(self, case: Case, layers: list[LayerUse], first: int) -> tuple[Shape, ...]:
        if first:
            return tuple(output.shape for output in layers[first - 1].outputs)
        ids = Shape((case.micro_batch_size, self.rehearsal.length), torch.int64)
        return (ids,) * (len(self.blueprint.parts.batch_keys) - 1)

    def _cut(self, name: str, num_ranks: int) -> torch.Tensor:
        """The last tensor rank's part of a parameter, without storage."""
        return cut_tensor(self.blueprint.template[name], self.blueprint.cut("weight", name), num_ranks, num_ranks - 1)

    def _buffer_bytes(self, num_stages: int) -> list[int]:
        """Of the model's own buffers, by stage."""
        bounds = self._bounds(num_stages)
        return [sum(self._layer_buffers[first:end]) for first, end in pairwise(bounds)]

    @cached_property
    def _layer_buffers(self) -> list[int]:
        with torch.device("meta"):
            return [sum(buffer.nbytes for buffer in build().buffers()) for _, build in self.blueprint.parts.layers]
