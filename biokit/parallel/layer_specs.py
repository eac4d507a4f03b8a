"""DeepSpeed layer specs that load a pretrained layer on the stage that owns it, for pipelines of one's own layers.

    PipelineModule([PretrainedLayerSpec(Block, config, pretrained_ckpt_path=folder / f"model.layers.{i}.pt") for i ...])

DeepSpeed's default `partition_method="parameters"` builds every layer on every rank to count it: give "uniform", or
count inside `with torch.device("meta")`, where `build` reads no file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from biokit.errors import ConfigError, EngineError
from biokit.parallel.layer_files import Share
from biokit.parallel.layer_loading import LayerSource, build_layer
from biokit.parallel.lora import LORA_MODES, LoraConfig, set_trainable

logger = logging.getLogger(__name__)


class PretrainedLayerSpec:
    """A layer that is built from its own file when, and where, the pipeline builds it.

    Instances are DeepSpeed `LayerSpec`s as well.

    Args:
        typename: the layer's class; it is called with `module_args` and the other keywords, for the shapes that this
            tensor rank has and, where tokens are added, for `new_num_tokens`.
        pretrained_ckpt_path: the layer's file, `.safetensors` or `.pt`, of the whole layer.
        load_ckpt: False builds the layer as its class initialises it, and reads nothing.
        lora_mode: `full` (all of it is trained), `lora` (adapters on frozen linear layers), `freeze` (nothing is).
        new_num_tokens: rows that the token table or output projection grows to; 0: those of the file. New rows are
            the mean of the old ones.
        tp_model_size, tp_rank: tensor ranks, and which of them this is; above 1 `plan` says how parameters are cut.
        plan: tensor-parallel plan (`biokit.parallel.cuts`) in which `layer_name` is the name of this layer.
        lora: of the adapters.

    Raises:
        ConfigError: arguments that contradict one another.
        EngineError: DeepSpeed is not installed.
    """

    typename: type[nn.Module]
    module_args: tuple[Any, ...]
    module_kwargs: dict[str, Any]
    global_rank: int

    def __new__(cls, *_: Any, **__: Any) -> PretrainedLayerSpec:
        return object.__new__(_with_engine(cast(Any, cls), "LayerSpec"))

    def __init__(
        self,
        typename: type[nn.Module],
        *module_args: Any,
        pretrained_ckpt_path: str | Path = "",
        load_ckpt: bool = True,
        lora_mode: str = "full",
        new_num_tokens: int = 0,
        tp_model_size: int = 1,
        tp_rank: int = 0,
        plan: Mapping[str, str] | None = None,
        layer_name: str = "",
        lora: LoraConfig | None = None,
        **module_kwargs: Any,
    ) -> None:
        self._start_engine_spec(typename, *module_args, **module_kwargs)
        self.path, self.load_ckpt = Path(pretrained_ckpt_path), load_ckpt
        self.lora_mode, self.lora = lora_mode, lora or LoraConfig()
        self.share = Share(plan or {}, layer_name, tp_model_size, tp_rank, new_num_tokens)
        asked = f"PretrainedLayerSpec({typename.__name__})"
        if load_ckpt and not str(pretrained_ckpt_path):
            raise ConfigError(asked, "load_ckpt=True without a file", "Give pretrained_ckpt_path, or load_ckpt=False")
        if lora_mode not in LORA_MODES:
            raise ConfigError(f"lora_mode={lora_mode}", "there is no such mode", f"Valid: {', '.join(LORA_MODES)}")
        if not 0 <= tp_rank < tp_model_size:
            raise ConfigError(
                f"tp_rank={tp_rank}", f"tp_model_size={tp_model_size}", "Give 0 <= tp_rank < tp_model_size"
            )
        if tp_model_size > 1 and load_ckpt and not (plan and layer_name):
            found = f"tp_model_size={tp_model_size} without a plan: how a tensor is cut cannot be told from its shape"
            raise ConfigError(asked, found, "Give plan={...} and layer_name")
        if tp_model_size > 1 and lora_mode == "lora":
            found = "adapters on a cut layer would be another model on each tensor rank"
            raise ConfigError(f"lora_mode=lora with tp_model_size={tp_model_size}", found, "Give tp_model_size=1")

    def _start_engine_spec(self, *args: Any, **keywords: Any) -> None:
        super().__init__(*args, **keywords)  # DeepSpeed's class, which __new__ put behind this one

    def build(self, log: bool = False) -> nn.Module:
        """The layer, filled and set trainable as asked; inside `with torch.device("meta")` nothing is read.

        Raises:
            CheckpointError: the file, or a tensor in it that is missing, extra or misshapen.
        """
        if log:
            logger.info("rank %d builds %r", self.global_rank, self)
        make = partial(self.typename, *self.module_args, **self.module_kwargs)
        layer = build_layer(make, LayerSource(self.path, self.share)) if self.load_ckpt else make()
        set_trainable(layer, self.lora_mode, self.lora, self.share.layer_name or self.path.stem)
        return layer

    def count_parameters(self) -> int:
        """Trainable parameters of the layer, counted without storage."""
        with torch.device("meta"):
            return sum(weight.numel() for weight in self.build().parameters() if weight.requires_grad)


class TiedPretrainedLayerSpec(PretrainedLayerSpec):
    """The same for layers that share weights across stages: those with one `key` are one module on each stage.

    Instances are DeepSpeed `TiedLayerSpec`s as well. Give `forward_fn` to the later specs of a key only: DeepSpeed's
    own checkpoints leave a layer out whose first spec has one.

    Args:
        key: of the layers that are tied.
        forward_fn: (module, inputs) -> outputs, in place of the module's own forward.
        tied_weight_attr: names of the shared parameters.
    """

    def __new__(cls, *_: Any, **__: Any) -> TiedPretrainedLayerSpec:
        return object.__new__(_with_engine(cast(Any, cls), "TiedLayerSpec"))

    def __init__(
        self,
        key: str,
        typename: type[nn.Module],
        *module_args: Any,
        forward_fn: Callable[[nn.Module, Any], Any] | None = None,
        tied_weight_attr: str | list[str] = "weight",
        **keywords: Any,
    ) -> None:
        self.key, self.forward_fn, self.tied_weight_attr = key, forward_fn, tied_weight_attr
        super().__init__(typename, *module_args, **keywords)

    def _start_engine_spec(self, *args: Any, **keywords: Any) -> None:
        tie = {"forward_fn": self.forward_fn, "tied_weight_attr": self.tied_weight_attr}
        super()._start_engine_spec(self.key, *args, **tie, **keywords)


@cache
def _with_engine(cls: type, kind: str) -> type:
    """`cls` as a DeepSpeed spec too: PipelineModule takes no other; made late, as importing DeepSpeed takes seconds."""
    try:
        import deepspeed.pipe
    except ImportError as error:
        raise EngineError("DeepSpeed", f"it cannot be imported ({error})", "Run pip install deepspeed") from error
    engine = getattr(deepspeed.pipe, kind)
    return cls if issubclass(cls, engine) else type(cls.__name__, (cls, engine), {})
