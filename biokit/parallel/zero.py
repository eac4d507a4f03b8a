"""ZeRO by DeepSpeed's engine (Rajbhandari et al. 2020, 2021): weights, gradients and moments cut over the data ranks.

Zero1 cuts AdamW's moments, Zero2 the gradients too, Zero3 the weights too; ZeroInf keeps what is cut in CPU memory or
on an NVMe disk. The engine runs in fp32; low precision is autocast inside the layers, as with Single.

Shapes: B batch, T target length, V vocabulary.
"""

from __future__ import annotations

import datetime as dt
import logging
import math
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from biokit.config import RunConfig
from biokit.errors import CheckpointError, ConfigError, EngineError, RunError
from biokit.parallel.deepspeed_config import effective_config
from biokit.parallel.folding import Fold, build_optimizer, move_batch, token_loss
from biokit.parallel.grid import ZERO_STAGE, Layout
from biokit.parallel.processes import Processes
from biokit.parallel.strategy import MOMENTS, ModelParts, StepResult, Strategy, TokenSums

PLAIN_LINEAR = F.linear


@dataclass
class LossScale:
    """The factor of fp16's losses, by the rule of torch's GradScaler: halved on overflow, doubled after a window.

    DeepSpeed's own scaling belongs to its fp16 weights, which a CPU refuses; given from outside, a scale works with
    fp32 weights on every device, and checkpoints carry it to and from Single and DDP.
    """

    enabled: bool
    scale: float
    window: int
    num_good_steps: int = 0

    def update(self, overflow: bool) -> None:
        """After a step, or after one that an overflow forbade."""
        self.num_good_steps = 0 if overflow else self.num_good_steps + 1
        if overflow:
            self.scale /= 2
        elif self.num_good_steps == self.window:
            self.scale, self.num_good_steps = self.scale * 2, 0

    def state(self) -> dict[str, Any]:
        """As GradScaler's `state_dict`; empty where nothing is scaled."""
        if not self.enabled:
            return {}
        rule = {"growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": self.window}
        return {"scale": self.scale, **rule, "_growth_tracker": self.num_good_steps}

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what `state`, or GradScaler's `state_dict`, gave."""
        if self.enabled and state:
            self.scale, self.window = float(state["scale"]), int(state["growth_interval"])
            self.num_good_steps = int(state["_growth_tracker"])


class Zero(Strategy):
    """Zero1, Zero2, Zero3 and ZeroInf: each data rank computes its micro-batches and updates its part of the weights.

    Args:
        layout: of one tensor rank and one pipeline stage.
    """

    def __init__(self, parts: ModelParts, config: RunConfig, layout: Layout, processes: Processes) -> None:
        deepspeed = start_deepspeed(processes.device, config.parallel.timeout_s)
        settings = effective_config(config, layout)
        if layout.strategy == "ZeroInf" and config.parallel.offload_device == "nvme":
            prepare_nvme(Path(config.parallel.offload_dir), processes)
        self.parts, self.config, self.layout, self.processes = parts, config.train, layout, processes
        self.stage = ZERO_STAGE[layout.strategy]
        self.model = parts.build()
        self.parameters = dict(self.model.named_parameters())
        self.template = {name: parameter.detach().to("meta") for name, parameter in self.parameters.items()}
        self.engine_settings = settings = limit_bucket(settings, self.template)
        self.optimizer = build_optimizer(self.model, config.train)
        fold = Fold(self.model, config.train, processes.device)
        if self.stage == 3:  # cut a parameter at a time: the engine would first move the whole model to the device
            deepspeed.zero.Init(module=fold, config_dict_or_path=settings)
        self.engine = start_engine(fold, self.optimizer, settings, config.parallel.deepspeed_config)
        self.tools, self.gather = deepspeed.utils, deepspeed.zero.GatheredParameters
        self.loaded_step: float | None = None
        train = config.train
        self.scaler = LossScale(train.precision == "fp16", train.initial_loss_scale, train.loss_scale_window)
        self.start_load()

    def train_batch(
        self, micro_batches: Sequence[Mapping[str, torch.Tensor]], num_valid: int, seeds: Sequence[int], lr: float
    ) -> StepResult:
        """One update over a global batch; see `Strategy.train_batch`."""
        self.engine.train()
        self._prepare_step(lr)
        figures, last = [], len(micro_batches) - 1
        for index, (micro, seed) in enumerate(zip(micro_batches, seeds, strict=True)):
            self.engine.set_gradient_accumulation_boundary(index == last)
            loss, part = self._loss(micro, seed)
            figures.append(part)
            if index == last:
                sums = self.sum_figures(figures)
                if not math.isfinite(sums.loss):
                    loss = loss * math.nan  # so that the engine drops the gradients of the whole batch
            # gradients are averaged over the data ranks; the engine's own division by its accumulation is left out
            self.engine.backward(loss * (self.layout.data / num_valid), scale_wrt_gas=False)
        self.engine.step()
        return self._judge_step(sums)

    def _prepare_step(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        if self.scaler.enabled:
            self.engine.optimizer.override_loss_scale(self.scaler.scale)

    def _judge_step(self, sums: TokenSums) -> StepResult:
        """What the engine's last update did; where it was not finite, the engine has left the weights as they were."""
        norm, applied = float(self.engine.get_global_grad_norm()), self.engine.was_step_applied()
        if not math.isfinite(sums.loss):
            raise RunError("training", f"the loss is {sums.loss}", "Lower train.lr, or look at the batch's molecules")
        if not applied and not (self.scaler.enabled and self.scaler.scale > 1.0):
            raise RunError("training", f"the gradient norm is {norm}", "Lower train.lr, or train.precision=fp32")
        if self.scaler.enabled:
            self.scaler.update(overflow=not applied)
        return StepResult(sums, norm, not applied)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> TokenSums:
        """Sums without dropout; see `Strategy.evaluate`."""
        self.engine.eval()
        return self.sum_figures([self._loss(micro, None)[1] for micro in micro_batches])

    def read_piece(self, name: str, moment: str | None) -> torch.Tensor | None:
        """A parameter, or one of its moments; see `Strategy.read_piece`."""
        parameter = self.parameters[name]
        if not parameter.requires_grad:
            if moment is not None:
                return torch.zeros(() if moment == "step" else self.template[name].shape)
            with self.gather([parameter]) if self.stage == 3 else nullcontext():
                whole = parameter.detach().clone()
        elif moment is None:
            whole = self.tools.safe_get_full_fp32_param(parameter)
        elif moment == "step":
            whole = self.optimizer.state[self._partitions()[0]]["step"]
        else:
            whole = self.tools.safe_get_full_optimizer_state(parameter, moment)
        return whole.detach().float()

    def start_load(self) -> None:
        """Moments of zero, for AdamW to go on from and for `write_piece` to fill."""
        zero, self.loaded_step = self.engine.optimizer, None
        for index, partition in enumerate(self._partitions()):
            on_disk = self.stage == 3 and zero._swappable_optimizer_subgroup(index)
            if on_disk:
                zero._optimizer_states_and_gradient_swap_in(index)
            zeros = {moment: torch.zeros_like(partition) for moment in MOMENTS if moment != "step"}
            self.optimizer.state[partition] = {"step": torch.zeros((), device=partition.device), **zeros}
            if on_disk:
                zero._optimizer_states_and_gradient_swap_out(index)
        if self.stage < 3:  # tell each parameter where its share of the moments lies
            zero._hp_optimizer_states_linked = False
            zero._lazy_init_hp_params_optimizer_state()

    @torch.no_grad()
    def write_piece(self, name: str, moment: str | None, piece: torch.Tensor) -> None:
        """Set a parameter, in the weights that are computed with too, or one of its moments.

        Raises:
            CheckpointError: parameters with different numbers of steps.
        """
        parameter = self.parameters[name]
        if not parameter.requires_grad:  # it has no moments
            if moment is None:
                with self.gather([parameter], modifier_rank=0) if self.stage == 3 else nullcontext():
                    parameter.copy_(piece)
            return
        if moment == "step":
            self._write_step(float(piece))
            return
        piece = piece.to(self.processes.device)
        if self.stage < 3:
            if moment is not None:
                self.tools.safe_set_full_optimizer_state(parameter, piece, moment)
                return
            self.tools.safe_set_full_fp32_param(parameter, piece)
            parameter.copy_(piece)
            return
        share = self._share(parameter, piece)
        if moment is not None:
            self.tools.safe_set_local_optimizer_state(parameter, share, moment)
            return
        self.tools.safe_set_local_fp32_param(parameter, share)
        with self.gather([parameter], modifier_rank=0):
            parameter.copy_(piece)

    def _share(self, parameter: Any, piece: torch.Tensor) -> torch.Tensor:
        """This rank's part under ZeRO-3, flat; padded, which DeepSpeed's setters of whole tensors forget."""
        size, world_size = parameter.partition_numel(), self.processes.world_size
        padded = F.pad(piece.flatten(), (0, size * world_size - piece.numel()))
        return padded.narrow(0, size * self.processes.rank, size)

    def _write_step(self, step: float) -> None:
        if self.loaded_step not in (None, step):
            found = f"parameters after {self.loaded_step:.0f} and after {step:.0f} steps"
            do = f"{self.layout.strategy} counts the steps of all together: load it with strategy=Single or DDP"
            raise CheckpointError("optimizer state", found, do)
        self.loaded_step = step
        for partition in self._partitions():
            self.optimizer.state[partition]["step"].fill_(step)

    def scaler_state(self) -> dict[str, Any]:
        """Loss scale and its growth counter (fp16), plain numbers."""
        return self.scaler.state()

    def load_scaler(self, state: Mapping[str, Any]) -> None:
        """Take over what `scaler_state` gave."""
        self.scaler.load(state)

    def whole_model(self) -> nn.Module | None:
        """The whole model in evaluation mode on the main process, None on the others. All call it together."""
        if self.stage < 3:
            return super().whole_model()
        model = self.parts.build_untrained() if self.processes.is_main else None
        own = dict(model.named_parameters()) if model else {}
        for name in self.parameters:
            whole = self.read_piece(name, None)
            if name in own and whole is not None:
                own[name].data.copy_(whole)
        return model.eval() if model else None  # on the CPU: it need not fit the device

    def close(self) -> None:
        """Give back what the engine holds."""
        self.engine.destroy()
        F.linear = PLAIN_LINEAR  # ZeRO-3 put its own in place, for the whole process

    def _partitions(self) -> list[torch.Tensor]:
        """The flat fp32 tensors of this rank that AdamW updates, each with a share of many parameters."""
        zero = self.engine.optimizer
        return zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups

    def _loss(self, batch: Mapping[str, torch.Tensor], seed: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, labels_BT = move_batch(batch, self.parts.batch_keys, self.processes.device)
        return token_loss(self.engine(inputs, seed), labels_BT, self.parts.pad_id)


def start_deepspeed(device: torch.device, timeout_s: float) -> Any:
    """The module `deepspeed`, ready for an engine in the process group that is there.

    Args:
        timeout_s: after which a process that waits for another one raises, in each group that DeepSpeed makes.

    Raises:
        EngineError: it is not installed.
    """
    asked, before = "strategies of DeepSpeed", os.environ.get("DS_ACCELERATOR")
    os.environ["DS_ACCELERATOR"] = device.type  # read while it is imported; not for other programs
    try:
        import deepspeed
        from deepspeed.accelerator import get_accelerator
        from deepspeed.utils import groups

        found_kind = get_accelerator().device_name()
    except ImportError as error:
        found = f"DeepSpeed cannot be imported ({error})"
        raise EngineError(asked, found, "Run pip install 'biokit[distributed]'") from error
    finally:
        del os.environ["DS_ACCELERATOR"]
        os.environ |= {"DS_ACCELERATOR": before} if before is not None else {}
    if found_kind != device.type:
        found = f"in this process DeepSpeed has begun with {found_kind}"
        raise EngineError(f"{asked} on {device.type}", found, "Start again in a new process (restart the kernel)")
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # else it compiles C++ for minutes
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # collectives that torch renamed; said at every step
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+_tensor` is deprecated", FutureWarning)
    groups._release_process_group_references()  # those of an earlier run in this process are gone
    deepspeed.comm.comm.cdb = _limit_waits(dt.timedelta(seconds=timeout_s))  # its "current backend"
    return deepspeed


def _limit_waits(limit: dt.timedelta) -> Any:
    """DeepSpeed's own layer over torch, with a limit for the groups that it makes: it gives them none.

    Given when a group is made: later it would not hold for what is sent from one rank to another.
    """
    from deepspeed.comm.torch import TorchBackend

    class LimitedBackend(TorchBackend):
        def new_group(self, ranks: Sequence[int]) -> Any:
            return torch.distributed.new_group(ranks, timeout=limit)

    return LimitedBackend(torch.distributed.get_backend(), limit, init_method=None)


def limit_bucket(settings: dict[str, Any], template: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """No larger a bucket of gradients than the model fills: stage 3 holds it for ever, whatever the model."""
    group = settings["zero_optimization"]
    group["reduce_bucket_size"] = min(group["reduce_bucket_size"], sum(weight.numel() for weight in template.values()))
    return settings


def start_engine(model: nn.Module, optimizer: torch.optim.Optimizer, settings: dict[str, Any], user_file: str) -> Any:
    """DeepSpeed's engine; what it refuses in a user's own file is told as such.

    Raises:
        ConfigError: a value in `user_file` that DeepSpeed does not take.
    """
    import deepspeed

    try:
        return deepspeed.initialize(model=model, optimizer=optimizer, config=settings, dist_init_required=False)[0]
    except (ValueError, TypeError, ImportError) as error:  # pydantic's ValidationError is a ValueError
        if not user_file:
            raise
        found = f"DeepSpeed does not take a value in it ({' '.join(str(error).split())[:300]})"
        raise ConfigError(user_file, found, "Mend the value, or leave it out") from error


def prepare_nvme(folder: Path, processes: Processes) -> None:
    """Build and load DeepSpeed's operator for asynchronous file access, and make the folder.

    Raises:
        EngineError: the operator cannot be built here, or the folder cannot be made.
    """
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils.cpp_extension import _get_build_directory

    asked, builder = "parallel.offload_device=nvme", AsyncIOBuilder()
    other = "or give parallel.offload_device=cpu"
    with processes.together(asked):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise EngineError(f"parallel.offload_dir={folder}", str(error), f"Give another folder, {other}") from error
        missing = [tool for tool in ("c++", "ninja") if shutil.which(tool) is None]
        if missing or not builder.is_compatible(verbose=False):
            found = f"DeepSpeed's async_io cannot be built: {', '.join(missing) or 'libaio and its headers'} not found"
            raise EngineError(asked, found, f"Install libaio-dev, g++ and ninja, {other}")
        # an ended build leaves its lock, and the next one would wait for ever
        for name in ("pin_memory", builder.name):
            lock = Path(_get_build_directory(name, verbose=False)) / "lock"
            if lock.exists():
                do = f"Wait for it; where none is running, remove {lock}"
                raise EngineError(asked, "a build of DeepSpeed's operators is under way, or was ended", do)
    try:
        builder.load(verbose=False)
    except (RuntimeError, ImportError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise EngineError(asked, f"DeepSpeed's async_io cannot be built ({reason})", f"Mend it, {other}") from error
