"""Pipeline and ThreeD: a model's layers dealt to stages that run at once, by DeepSpeed's pipeline engine with ZeRO-1.

A stage is a stretch of the model's layers, built on its own ranks only. Micro-batches flow through the stages one
after another, forward and backward in turn (1F1B: Narayanan et al. 2021, arXiv 2104.04473, section 2.2.1); the
optimizer's state is cut over the data ranks (ZeRO-1: Rajbhandari et al. 2020, arXiv 1910.02054, section 5.1).

Shapes: B batch, T target length, V vocabulary.
"""

from __future__ import annotations

import bisect
import contextlib
import io
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from biokit.config import ParallelConfig, RunConfig, TrainConfig
from biokit.errors import ConfigError
from biokit.parallel.deepspeed_config import effective_config
from biokit.parallel.folding import autocast, build_optimizer, checkpoint_layer, fold_layers, move_batch, token_loss
from biokit.parallel.grid import ZERO_STAGE, Layout
from biokit.parallel.processes import Processes
from biokit.parallel.strategy import ModelParts, StepResult, TokenSums
from biokit.parallel.zero import LossScale, Zero, limit_bucket, start_deepspeed, start_engine


class Stage(nn.Module):
    """Consecutive layers of the model, as one layer of DeepSpeed's pipeline.

    Args:
        parts: of the whole model; only the layers of this stage are built.
        first, last: positions in the whole model; `last` is not included.
        split: (layer, its name, whether it is the model's first) -> what this tensor rank keeps of it.
        checkpointed: how a layer's activations are made again.

    Attributes:
        weights: this rank's parameters by their name in the whole model; tied ones have the earlier name, and are one
            parameter where several are in this stage.
        seeds: of the micro-batches to come, in order (None: no dropout). A stage sees all of them in the same order
            as every other stage, so that each draws the masks that one process would draw.
    """

    def __init__(
        self,
        parts: ModelParts,
        first: int,
        last: int,
        config: TrainConfig,
        device: torch.device,
        split: Callable[[nn.Module, str, bool], nn.Module] | None,
        checkpointed: Callable[[Callable[[Any], Any], Any], Any],
    ) -> None:
        super().__init__()
        self.first, self.config, self.device_type, self.checkpointed = first, config, device.type, checkpointed
        self.seeds: Iterator[int | None] = iter(())
        built, self.weights = {}, dict[str, nn.Parameter]()
        for name, build in parts.layers[first:last]:
            layer = build()
            self.weights |= {f"{name}.{key}": parameter for key, parameter in layer.named_parameters()}
            # cut before the next one is built: memory holds one whole layer
            built[name] = layer if split is None else split(layer, name, name == parts.layers[0][0])
        self._tie(built, parts.tied)
        self.layers = nn.ModuleList(built.values())
        # every stage needs both of the optimizer's groups: ZeRO adds up the norm over the stages a group at a time
        dims = [weight.dim() for weight in self.weights.values() if weight.requires_grad]
        self.idle_vector = None if any(dim < 2 for dim in dims) else nn.Parameter(torch.zeros(1))
        self.idle_matrix = None if any(dim >= 2 for dim in dims) else nn.Parameter(torch.zeros(1, 1))

    def _tie(self, layers: Mapping[str, nn.Module], tied: Mapping[str, str]) -> None:
        for name, earlier in tied.items():
            if name in self.weights:
                weight = self.weights.setdefault(earlier, self.weights.pop(name))
                layer_name = next(layer for layer in layers if name.startswith(f"{layer}."))
                path, _, key = name[len(layer_name) + 1 :].rpartition(".")
                setattr(layers[layer_name].get_submodule(path), key, weight)

    def forward(self, carry: Any) -> Any:
        """The next micro-batch's carry after this stage's layers."""
        seed = next(self.seeds)
        recompute = self.config.checkpoint_activations and seed is not None
        with autocast(self.config, self.device_type):
            carry = fold_layers(list(self.layers), carry, seed, recompute, self.first, self.checkpointed)
        if isinstance(carry, torch.Tensor):
            return carry
        # the engine receives into buffers that it takes again without a look at their dtype
        carry = tuple(value.float() if value.is_floating_point() else value for value in carry)
        # the engine sends a gradient back for every float, also for what frozen layers alone have made
        frozen = [v.is_floating_point() and torch.is_grad_enabled() and not v.requires_grad for v in carry]
        return tuple(v.detach().requires_grad_() if f else v for v, f in zip(carry, frozen, strict=True))


class Staged(Zero):
    """Pipeline stages x data ranks x tensor ranks over DeepSpeed's pipeline engine; see `Strategy`.

    States are read and written as with ZeRO-1, each stage those of its own layers.
    """

    def __init__(self, parts: ModelParts, config: RunConfig, layout: Layout, processes: Processes) -> None:
        self.layout, self.processes, self.config, self.parts = layout, processes, config.train, parts
        self.stage, self.plan, self.template = ZERO_STAGE[layout.strategy], parts.plan, parts.template()
        self.bounds = parts.stage_bounds(layout.pipeline)
        self.engine_settings = settings = limit_bucket(effective_config(config, layout), self.template)
        deepspeed = start_deepspeed(processes.device, config.parallel.timeout_s)
        self.tools, self.loaded_step = deepspeed.utils, None
        self.split: Callable[[nn.Module, str, bool], nn.Module] | None = None
        self.rows_of = layout.tensor if config.parallel.sequence_parallel else 1  # rows are dealt to the tensor ranks
        self.checkpointed, self.token_loss = checkpoint_layer, token_loss
        if layout.tensor > 1 or config.parallel.sequence_parallel:
            self._start_tensor_parallel(config.parallel)
        with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its topology
            module = self._build_stage()
            self.optimizer = build_optimizer(self.own, config.train)
            self.engine = start_engine(module, self.optimizer, settings, config.parallel.deepspeed_config)
        self.figures: list[torch.Tensor] = []
        self.scale = 0.0
        train = config.train
        self.scaler = LossScale(train.precision == "fp16", train.initial_loss_scale, train.loss_scale_window)
        self.start_load()

    def _start_tensor_parallel(self, parallel: ParallelConfig) -> None:
        from biokit.parallel import tensor

        tensor.check_plan(self.plan, self.parts.layers)
        device, rows_dealt = self.processes.device, parallel.sequence_parallel
        group = tensor.start_tensor_parallel(self.layout, device, parallel.timeout_s, rows_dealt)
        self.token_loss = tensor.token_loss
        if parallel.partition_activations:
            self.checkpointed = tensor.PartitionedCheckpoint(group)

        def split(layer: nn.Module, name: str, first: bool) -> nn.Module:
            return tensor.split_layer(layer, name, self.plan, self.layout, self.place, first, rows_dealt)

        self.split = split

    def _build_stage(self) -> nn.Module:
        """DeepSpeed's module of this rank's layers; no other layer is built."""
        from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
        from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

        layout, copies, specs = self.layout, self._find_copies(), []
        for number, (first, last) in enumerate(itertools.pairwise(self.bounds)):
            args = (self.parts, first, last, self.config, self.processes.device, self.split, self.checkpointed)
            if number in copies:
                specs.append(TiedLayerSpec("tied", Stage, *args, tied_weight_attr=copies[number]))
            else:
                specs.append(LayerSpec(Stage, *args))
        module: Any = PipelineModule(
            specs,
            topology=PipeModelDataParallelTopology(layout.pipeline, layout.tensor, layout.data),
            loss_fn=self._scaled_loss,
            partition_method="uniform",  # one spec a stage: "parameters" would build every layer on every rank
            dynamic_shape=True,  # without it evaluation of changing shapes is silently wrong
        )
        (self.own,) = module.forward_funcs
        self.model, self.parameters = self.own, self.own.weights
        for name, weight in self.parameters.items():
            # DeepSpeed leaves out a whole layer with a copy from the gradient norm; only the copy counts twice
            weight.ds_pipe_replicated = self.owner_stage(name) != self.place.pipeline  # type: ignore[attr-defined]
        return module

    def _find_copies(self) -> dict[int, list[str]]:
        """Stages that share tensors with other stages -> the attributes of their `Stage` that hold them."""
        copies: dict[int, list[str]] = {}
        for name, earlier in self.parts.tied.items():
            places = [self._find_layer(one) for one in (earlier, name)]
            if places[0][0] != places[1][0]:
                for (stage, position), one in zip(places, (earlier, name), strict=True):
                    key = one[len(self.parts.layers[position][0]) + 1 :]
                    copies.setdefault(stage, []).append(f"layers.{position - self.bounds[stage]}.{key}")
        if len({len(owned) for owned in copies.values()}) > 1 or len(copies) > 2:
            found = f"pp={self.layout.pipeline} spreads them over stages {', '.join(map(str, sorted(copies)))}"
            raise ConfigError(f"tied parameters {', '.join(self.parts.tied)}", found, "Give a smaller pp")
        return copies

    def train_batch(
        self, micro_batches: Sequence[Mapping[str, torch.Tensor]], num_valid: int, seeds: Sequence[int], lr: float
    ) -> StepResult:
        """One update over a global batch; see `Strategy.train_batch`."""
        rows = self.engine.train_micro_batch_size_per_gpu() * self.layout.data
        self.engine.set_train_batch_size(rows * len(micro_batches))  # an epoch's last batch may have fewer
        # the engine divides by the micro-batches of a rank, and averages over the data ranks
        self.scale = len(micro_batches) * self.layout.data / num_valid
        self.own.seeds = iter(seeds)
        self._prepare_step(lr)
        self.engine.train_batch(self._feed(micro_batches))
        return self._judge_step(self._sum_figures())

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> TokenSums:
        """Sums without dropout; see `Strategy.evaluate`."""
        self.own.seeds = itertools.repeat(None)
        if micro_batches:
            count = len(micro_batches)
            self.engine.eval_batch(self._feed(micro_batches), num_micro_batches=count, bcast_loss=False)
        return self._sum_figures()

    def _feed(
        self, micro_batches: Sequence[Mapping[str, torch.Tensor]]
    ) -> Iterator[tuple[tuple[torch.Tensor, ...], torch.Tensor]]:
        for micro in micro_batches:
            inputs, labels_BT = move_batch(micro, self.parts.batch_keys, self.processes.device)
            missing = -len(labels_BT) % self.rows_of
            if missing:  # repeat the first row, with no label that counts
                inputs = [torch.cat([ids, ids[:1].expand(missing, -1)]) for ids in inputs]
                labels_BT = F.pad(labels_BT, (0, 0, 0, missing), value=self.parts.pad_id)
            yield tuple(inputs), labels_BT

    def _scaled_loss(self, logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
        loss, figures = self.token_loss(logits_BTV, labels_BT, self.parts.pad_id)
        self.figures.append(figures)
        # a loss that is not finite can have finite gradients; these would be taken before any rank has seen the loss
        return loss * torch.where(loss.detach().isfinite(), self.scale, math.nan)

    def _sum_figures(self) -> TokenSums:
        """Over the micro-batches since the last call, of all data ranks; the last stage has them."""
        figures, self.figures = self.figures, []
        return self.sum_figures(figures, counts=self.place.tensor == 0)

    def read_piece(self, name: str, moment: str | None) -> torch.Tensor | None:
        """A parameter of this stage, or one of its moments; see `Strategy.read_piece`."""
        return super().read_piece(name, moment) if self.holds(name) else None

    def holds(self, name: str) -> bool:
        """Whether this stage has that parameter, or a copy of it in a layer that is tied to it."""
        return name in self.parameters

    def owner_stage(self, name: str) -> int:
        """The stage of the layer that a parameter belongs to."""
        return self._find_layer(name)[0]

    def whole_model(self) -> nn.Module | None:
        """The whole model in evaluation mode on the main process, None on the others. All call it together."""
        state = self.model_state()
        if not self.processes.is_main:
            return None
        model = self.parts.build_untrained()
        for name, parameter in model.named_parameters():
            parameter.data.copy_(state.pop(name))
        return model.eval()  # on the CPU: it need not fit the device

    def close(self) -> None:
        """Give back what the engine holds."""
        super().close()
        if self.split is not None:
            from biokit.parallel.tensor import stop_tensor_parallel

            stop_tensor_parallel()

    def _find_layer(self, name: str) -> tuple[int, int]:
        """(stage, position in the whole model) of the layer that a parameter belongs to."""
        names = [layer for layer, _ in self.parts.layers]
        position = next(i for i, layer in enumerate(names) if name.startswith(f"{layer}."))
        return bisect.bisect_right(self.bounds, position) - 1, position
