"""The peers of `strategies`: the same model trained by a script that uses torch or DeepSpeed directly, and no more.

No token figures, no check of the loss, no seeds of dropout, no autocast; the same layers, ds_config, AdamW, clipping.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from biokit.parallel.cuts import find_word, padded_size
from biokit.parallel.deepspeed_config import effective_config
from biokit.parallel.strategy import ModelParts
from tests.bench.rigs import PAD, Micros, Rig

Step = Callable[[Micros], object]


@contextlib.contextmanager
def start_bare(rig: Rig) -> Iterator[Step]:
    """A function that does one step on a rank's micro-batches; the rig's strategy must have been started before it.

    Both live in one process group, and DeepSpeed's and Megatron's groups are global.
    """
    if rig.layout.strategy in ("Single", "DDP"):
        yield _torch_step(rig)
        return
    import deepspeed

    config = rig.config
    staged = rig.layout.strategy in ("Pipeline", "ThreeD")
    with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed prints its topology
        model = _pipeline_module(rig) if staged else rig.parts.build()
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=_adamw(model, rig),
            config=effective_config(config, rig.layout),
            dist_init_required=False,
        )
    try:
        yield _pipeline_step(engine) if staged else _deepspeed_step(engine)
    finally:
        engine.destroy()


def _adamw(model: nn.Module, rig: Rig) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=rig.config.train.lr, weight_decay=0.0, fused=True)


def _loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_BTV.flatten(0, 1), labels_BT.flatten(), ignore_index=PAD)


def _torch_step(rig: Rig) -> Step:
    model = rig.parts.build()
    optimizer, alone = _adamw(model, rig), rig.layout.data == 1
    copies = model if alone else nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    def step(micros: Micros) -> None:
        for index, micro in enumerate(micros):
            travels = alone or index + 1 == len(micros)
            with contextlib.nullcontext() if travels else copies.no_sync():  # type: ignore[operator]
                logits_BTV = copies(micro["encoder_ids"], micro["decoder_ids"])
                (_loss(logits_BTV, micro["labels"]) / len(micros)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), rig.config.train.clip_grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _deepspeed_step(engine: Any) -> Step:
    def step(micros: Micros) -> None:
        for micro in micros:
            logits_BTV = engine(micro["encoder_ids"], micro["decoder_ids"])
            engine.backward(_loss(logits_BTV, micro["labels"]))
            engine.step()

    return step


def _pipeline_step(engine: Any) -> Step:
    def step(micros: Micros) -> None:
        engine.train_batch(iter([((m["encoder_ids"], m["decoder_ids"]), m["labels"]) for m in micros]))

    return step


def _pipeline_module(rig: Rig) -> nn.Module:
    from deepspeed.pipe import PipelineModule
    from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology

    layout, parts = rig.layout, rig.parts
    layers = [build() for _, build in parts.layers]
    if layout.tensor > 1:
        _swap_linears(layers, parts, layout.tensor)
    return PipelineModule(
        layers,
        topology=PipeModelDataParallelTopology(layout.pipeline, layout.tensor, layout.data),
        loss_fn=_vocab_parallel_loss if layout.tensor > 1 else _loss,
        partition_method="parameters",
        dynamic_shape=True,  # batches from length buckets have several shapes
    )


def _swap_linears(layers: Sequence[nn.Module], parts: ModelParts, tensor: int) -> None:
    """Megatron-core's own layers in place of the model's, as the words of the plan say; `local` has no peer there."""
    from megatron.core.model_parallel_config import ModelParallelConfig
    from megatron.core.tensor_parallel import layers as megatron

    config = ModelParallelConfig(tensor_model_parallel_size=tensor, use_cpu_initialization=True)
    settings: dict[str, Any] = {"config": config, "init_method": nn.init.xavier_uniform_}
    for (name, _), layer in zip(parts.layers, layers, strict=True):
        for path, module in list(layer.named_modules()):
            word = find_word(parts.plan, f"{name}.{path}")
            if isinstance(module, nn.Embedding):
                num_rows = padded_size(module.num_embeddings, tensor)
                layer.set_submodule(path, megatron.VocabParallelEmbedding(num_rows, module.embedding_dim, **settings))
            elif isinstance(module, nn.Linear) and word == "row":
                sizes = module.in_features, module.out_features
                row = megatron.RowParallelLinear(
                    *sizes, bias=True, input_is_parallel=True, skip_bias_add=False, **settings
                )
                layer.set_submodule(path, _WithoutBias(row))
            elif isinstance(module, nn.Linear):
                sizes = module.in_features, padded_size(module.out_features, tensor)
                column = megatron.ColumnParallelLinear(*sizes, gather_output=False, **settings)
                layer.set_submodule(path, _WithoutBias(column))


class _WithoutBias(nn.Module):
    """The first of the two results of a layer of Megatron-core."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)[0]


def _vocab_parallel_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    valid_BT = labels_BT != PAD
    losses_BT = vocab_parallel_cross_entropy(logits_BTV.contiguous(), labels_BT)
    return (losses_BT * valid_BT).sum() / valid_BT.sum()
