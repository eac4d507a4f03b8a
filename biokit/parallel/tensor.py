"""Tensor parallelism: each layer's matrices cut over the tensor ranks, by Megatron-core's parallel layers.

A layer is built whole, then the modules that the model's plan names are swapped in place; parameters keep their names
and stay the same objects, so that tied ones stay tied. Source: Shoeybi et al. 2019 (arXiv 1909.08053, section 3);
sequence parallelism and the recompute of partitioned activations: Korthikanti et al. 2022 (arXiv 2205.05198).

Shapes: B batch, T target length, D hidden, V vocabulary (this rank's part of it in logits).
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

from biokit.errors import ConfigError, EngineError
from biokit.parallel.cuts import PLAN_WORDS, WHOLE, Cut, cut_tensor, find_cut, find_word, padded_size
from biokit.parallel.folding import checkpoint_layer
from biokit.parallel.grid import Layout, Place, check_sequence_parallel

FITTING = {"column": (nn.Linear,), "row": (nn.Linear,), "vocab": (nn.Linear, nn.Embedding), "local": (nn.Module,)}


def start_tensor_parallel(
    layout: Layout, device: torch.device, timeout_s: float, sequence_parallel: bool = False
) -> dist.ProcessGroup:
    """Megatron-core's process groups in the layout's order of ranks; returns this rank's tensor group.

    Args:
        timeout_s: after which a rank that waits for another one raises.

    Raises:
        EngineError: megatron-core is not installed.
        ConfigError: sequence parallelism on the CPU.
    """
    if sequence_parallel:
        check_sequence_parallel(device.type)
    # torch 2.13 renamed the collectives that Megatron-core calls
    warnings.filterwarnings("ignore", ".*(all_gather_into_tensor|reduce_scatter_tensor).* is deprecated", FutureWarning)
    _megatron("parallel_state").initialize_model_parallel(
        layout.tensor,
        layout.pipeline,
        order="tp-cp-ep-dp-pp",
        distributed_timeout_minutes=timeout_s / 60,
        create_gloo_process_groups=False,
    )
    return _tensor_group()


def stop_tensor_parallel() -> None:
    """Forget the groups of `start_tensor_parallel`; they end with the processes' group."""
    _megatron("parallel_state").destroy_model_parallel()


def check_plan(plan: Mapping[str, str], layers: Sequence[tuple[str, Callable[[], nn.Module]]]) -> None:
    """Check a plan against the whole model, which is built without storage.

    Args:
        layers: (name, builder) in order.

    Raises:
        ConfigError: an unknown word, a pattern that matches no module, or a word that does not fit a module.
    """
    with torch.device("meta"):
        modules = {
            f"{name}.{path}".rstrip("."): module for name, build in layers for path, module in build().named_modules()
        }
    for pattern, word in plan.items():
        asked = f"tensor-parallel plan {pattern}: {word}"
        if word not in PLAN_WORDS:
            raise ConfigError(asked, "there is no such word", f"Valid: {', '.join(PLAN_WORDS)}")
        matched = [name for name in modules if find_word({pattern: word}, name)]
        if not matched:
            raise ConfigError(asked, "it matches no module", f"Name modules of {', '.join(name for name, _ in layers)}")
        for name in matched:
            find_word(plan, name)
            _check_word(name, modules[name], word)


def _check_word(name: str, module: nn.Module, word: str) -> None:
    asked, kind = f"tensor-parallel plan {name}: {word}", type(module).__name__
    if not isinstance(module, FITTING[word]):
        kinds = " or ".join(kind.__name__ for kind in FITTING[word])
        raise ConfigError(asked, f"the module is a {kind}", f"{word} fits {kinds}")
    if word == "local" and any(True for _ in module.parameters()):
        raise ConfigError(asked, f"the {kind} has parameters", "local fits modules without parameters")
    if isinstance(module, nn.Embedding) and (module.padding_idx is not None or module.max_norm is not None):
        raise ConfigError(asked, "the Embedding has padding_idx or max_norm", "Leave them out, or replicate it")


def split_layer(
    layer: nn.Module,
    name: str,
    plan: Mapping[str, str],
    layout: Layout,
    place: Place,
    first: bool = False,
    sequence_parallel: bool = False,
) -> nn.Module:
    """Leave in a built layer only what this tensor rank holds; returns the layer.

    Weights are cut from those the layer was built with. Cut parameters are marked `tensor_model_parallel`: without
    the mark DeepSpeed counts only the first tensor rank's part in the gradient norm.

    Args:
        name: of the layer in the whole model, e.g. `encoder.0`; the plan's patterns begin with it.
        first: the layer takes ids alone. With sequence parallelism its float outputs are dealt by batch rows.
        sequence_parallel: between the matrices each tensor rank works on its rows of the batch.

    Raises:
        ConfigError: the number of tensor ranks does not divide a matrix, or a word does not fit its module.
    """
    for path, module in list(layer.named_modules()):
        full_name = f"{name}.{path}".rstrip(".")
        word = find_word(plan, full_name)
        if word is None:
            continue
        _check_word(full_name, module, word)
        if word == "local":
            if layout.tensor > 1:
                RankStream(place.tensor).attach(module)
            continue
        for key, parameter in module.named_parameters():
            _cut_parameter(parameter, f"{full_name}.{key}", find_cut(plan, f"{full_name}.{key}"), layout, place)
        swapped = _swap(module, word, layout, place, sequence_parallel)
        if path:
            layer.set_submodule(path, swapped)
        else:
            layer = swapped
    if sequence_parallel:
        _deal_rows(layer, first, layout, place)
    return layer


def _cut_parameter(parameter: nn.Parameter, name: str, cut: Cut, layout: Layout, place: Place) -> None:
    """Cut in place: a parameter that another module shares is cut once and stays shared."""
    marked = getattr(parameter, "tensor_parallel_cut", None)
    if marked not in (None, cut):
        raise ConfigError(f"tensor-parallel plan of {name}", f"it is tied to one cut as {marked}", "Cut both alike")
    if marked is None and cut != WHOLE:
        parameter.data = cut_tensor(parameter.data, cut, layout.tensor, place.tensor).clone()
        parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
        parameter.tensor_parallel_cut = cut  # type: ignore[attr-defined]


def _swap(module: nn.Module, word: str, layout: Layout, place: Place, sequence_parallel: bool) -> nn.Module:
    """Megatron-core's module around the parameters of a plain one, which are cut already."""
    column_type, row_type, embedding_type = _parallel_types()
    settings: dict[str, Any] = {
        "config": _megatron("model_parallel_config").ModelParallelConfig(
            tensor_model_parallel_size=layout.tensor,
            sequence_parallel=sequence_parallel and layout.tensor > 1,
            use_cpu_initialization=True,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
        ),
        "init_method": nn.init.zeros_,  # asked for, never called
        "tp_group": _tensor_group(),
    }
    with torch.device("meta"):
        if isinstance(module, nn.Embedding):
            num_rows = padded_size(module.num_embeddings, layout.tensor)
            embedding = embedding_type(num_rows, module.embedding_dim, **settings)
            embedding.weight = module.weight
            return embedding
        assert isinstance(module, nn.Linear)
        settings |= {"bias": module.bias is not None, "skip_bias_add": True}
        if word == "row":
            linear = row_type(module.in_features, module.out_features, input_is_parallel=True, **settings)
        else:
            num_columns = padded_size(module.out_features, layout.tensor)
            linear = column_type(module.in_features, num_columns, gather_output=False, **settings)
            own = num_columns // layout.tensor
            linear.num_padded = max(0, min(own, (place.tensor + 1) * own - module.out_features))
    linear.weight, linear.bias = module.weight, module.bias
    linear.sequence_parallel = sequence_parallel  # at size 1 too, where Megatron-core would leave it out
    linear._load_state_dict_pre_hooks.clear()  # they add an extra state, which PlainLinear has not
    return linear


class PlainLinear(nn.Module):
    """What nn.Linear promises, for Megatron-core's linear layers: a tensor in autocast's precision, no extra state.

    Attributes:
        num_padded: columns at the end that stand for no token; they come out as -inf.
    """

    num_padded = 0
    get_extra_state = nn.Module.get_extra_state
    set_extra_state = nn.Module.set_extra_state

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y, bias = super().forward(x)
        if bias is not None:
            y = y + bias.to(y.dtype)
        return F.pad(y[..., : -self.num_padded], (0, self.num_padded), value=float("-inf")) if self.num_padded else y

    def _forward_impl(self, input: torch.Tensor, weight: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Cast here: Megatron-core's backward pass knows autocast on CUDA only, and multiplies what was saved."""
        if torch.is_autocast_enabled(input.device.type):
            dtype = torch.get_autocast_dtype(input.device.type)
            input, weight = input.to(dtype), weight.to(dtype)
        kwargs["tp_group"] = self.tp_group  # the row layer leaves it out, which warns at every call
        return super()._forward_impl(input, weight, *args, **kwargs)  # type: ignore[misc]


@functools.cache
def _parallel_types() -> tuple[Any, Any, Any]:
    """(column, row, embedding): classes whose bases exist once megatron is imported."""
    layers = _megatron("tensor_parallel.layers")
    column = type("ColumnLinear", (PlainLinear, layers.ColumnParallelLinear), {})
    row = type("RowLinear", (PlainLinear, layers.RowParallelLinear), {})
    return column, row, layers.VocabParallelEmbedding


class RankStream:
    """Draws inside a module come from a stream of this tensor rank; outside, all ranks' streams go on alike.

    The stream follows from one draw of the shared one, so that whoever seeds that one repeats both.
    """

    def __init__(self, tensor_rank: int) -> None:
        self.tensor_rank = tensor_rank
        self.saved: list[tuple[torch.Generator, torch.Tensor]] = []

    def attach(self, module: nn.Module) -> None:
        """Enter with every call of the module, leave also where it raises (a recompute ends that way)."""
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not module.training:
            return
        draw = int(torch.randint(2**62, ()).item())  # on the CPU whatever the device: no wait
        device = (args[0] if isinstance(args[0], torch.Tensor) else args[0][0]).device
        on_cpu = device.type == "cpu"
        generator = torch.default_generator if on_cpu else torch.cuda.default_generators[device.index]
        self.saved.append((generator, generator.get_state()))
        generator.manual_seed((draw * 4099 + self.tensor_rank) % 2**63)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.saved:
            generator, state = self.saved.pop()
            generator.set_state(state)


def _deal_rows(layer: nn.Module, first: bool, layout: Layout, place: Place) -> None:
    """Sequence parallelism of one layer: rows of the batch in, or out of the first layer.

    Replicated parameters then see a part of the rows, so their gradients are summed; replicated dropouts draw a
    stream a rank.
    """
    if first:
        layer.register_forward_hook(_scatter_rows)
        return
    if layout.tensor > 1:
        RankStream(place.tensor).attach(layer)
    for parameter in layer.parameters():
        if not getattr(parameter, "tensor_model_parallel", False):
            parameter.register_hook(_sum_gradient)


def _scatter_rows(layer: nn.Module, args: tuple[Any, ...], carry: tuple[torch.Tensor, ...]) -> Any:
    scatter = _megatron("tensor_parallel.mappings").scatter_to_sequence_parallel_region
    group = _tensor_group()
    return tuple(scatter(value, group) if value.is_floating_point() else value for value in carry)


def _sum_gradient(gradient: torch.Tensor) -> torch.Tensor:
    total = gradient.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=_tensor_group())
    return total


def token_loss(logits_BTV: torch.Tensor, labels_BT: torch.Tensor, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """`folding.token_loss` of logits whose vocabulary is cut over the tensor ranks; the same on all of them.

    Returns:
        Summed cross entropy of the labels that are not `pad_id`, and (3,) float64 figures on the device: the loss, the
        number of right predictions, the number of labels that count.
    """
    valid_BT = labels_BT != pad_id
    # a copy: Megatron-core writes into its fp32 logits; and it has no ignored label
    copy_BTV = logits_BTV.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    cross_entropy = _megatron("tensor_parallel.cross_entropy").vocab_parallel_cross_entropy
    losses_BT = cross_entropy(copy_BTV, torch.where(valid_BT, labels_BT, 0))
    loss = torch.where(valid_BT, losses_BT, 0.0).sum()
    correct_BT = (_predict(logits_BTV.detach(), _tensor_group()) == labels_BT) & valid_BT
    return loss, torch.stack([loss.detach().double(), correct_BT.sum().double(), valid_BT.sum().double()])


def _predict(logits_BTV: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Ids (B,T) of the highest logits over all ranks; the lowest of equals, as argmax has it."""
    own_BT = logits_BTV.float().amax(-1)
    highest_BT = own_BT.clone()
    dist.all_reduce(highest_BT, dist.ReduceOp.MAX, group=group)
    ids_BT = logits_BTV.argmax(-1) + group.rank() * logits_BTV.shape[-1]
    ids_BT = torch.where(own_BT == highest_BT, ids_BT, torch.iinfo(torch.int64).max)
    dist.all_reduce(ids_BT, dist.ReduceOp.MIN, group=group)
    return ids_BT


class PartitionedCheckpoint:
    """Activation checkpointing that keeps 1/tp of a layer's float inputs, and gathers them for the backward pass.

    Takes the place of `folding.checkpoint_layer`. Layers must not write into their inputs, and these must be alike on
    the tensor ranks: not with sequence parallelism, where each rank's inputs are its own part already.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        # an input that a layer passes on unchanged is an input of the next one too: one part serves both
        self.parts: Any = WeakTensorKeyDictionary()

    def __call__(self, run: Callable[[Any], Any], carry: tuple[torch.Tensor, ...]) -> Any:
        """`run(carry)`, whose activations are made again in the backward pass."""
        whole, kept = [carry], [self._keep(value) for value in carry]
        del carry

        def run_again(_: None) -> Any:
            return run(whole.pop() if whole else tuple(gather() for gather in kept))

        return checkpoint_layer(run_again, None)

    def _keep(self, value: torch.Tensor) -> Callable[[], torch.Tensor]:
        if not value.is_floating_point():
            return lambda: value
        part = self.parts.get(value)
        if part is None:
            flat = value.detach().reshape(-1)
            padded = F.pad(flat, (0, -flat.numel() % self.group.size()))
            part = self.parts[value] = padded.chunk(self.group.size())[self.group.rank()].clone()
        shape, needs_grad = value.shape, value.requires_grad

        def gather() -> torch.Tensor:
            flat = part.new_empty(part.numel() * self.group.size())
            dist.all_gather(list(flat.chunk(self.group.size())), part, group=self.group)
            return flat[: shape.numel()].view(shape).requires_grad_(needs_grad)

        return gather


def _tensor_group() -> dist.ProcessGroup:
    return _megatron("parallel_state").get_tensor_model_parallel_group()


@functools.cache
def _megatron(module: str) -> Any:
    """A module of megatron.core, imported where it is first used: seconds that other strategies need not wait.

    Raises:
        EngineError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parts that are not used here (apex, transformer engine)
            return importlib.import_module(f"megatron.core.{module}")
    except ImportError as error:
        found = f"megatron-core is not installed ({error})"
        raise EngineError("strategy=ThreeD", found, 'Install it: pip install "biokit[distributed]"') from error
