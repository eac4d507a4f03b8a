"""What biokit gives `deepspeed.initialize`: made from the run's configuration, merged with a user's ds_config.json.

The user's file may add and tune, never contradict: what the run's configuration decides (batch sizes, ZeRO stage,
clipping, precision, offload, pipeline) must be the same there, left out, or "auto". Pure; DeepSpeed is not imported.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from biokit.config import RunConfig
from biokit.errors import ConfigError
from biokit.parallel.deepspeed_keys import INERT_KEYS, KNOWN_KEYS
from biokit.parallel.grid import STAGED, ZERO_STAGE, Layout
from biokit.process import choose_device
from biokit.schema import nearest_key

AUTO = "auto"  # Hugging Face's word for "fill it in"
NEVER = 2**31 - 1  # steps between DeepSpeed's own prints; biokit prints its metrics
BUCKET_SIZE = 50_000_000  # gradient elements reduced at a time; DeepSpeed's 5e8 is 2 GB of buffer whatever the model
PRECISION_GROUPS = {"fp16": "fp16", "bf16": "bf16", "bfloat16": "bf16"}
STAGES = "DDP for stage 0, Zero1 (or Pipeline, ThreeD), Zero2, Zero3 for stages 1 to 3"
BATCH_KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
OWN_OPTIMIZER = "biokit gives DeepSpeed its own AdamW"
FP32_WEIGHTS = "Weights stay in fp32; set train.precision"
OFFLOADS = ("offload_optimizer", "offload_param")
OLD_OFFLOADS = {"cpu_offload": "offload_optimizer", "cpu_offload_param": "offload_param"}


def effective_config(config: RunConfig, layout: Layout) -> dict[str, Any]:
    """The whole ds_config of a run, with the user's own file (`parallel.deepspeed_config`) merged in.

    Raises:
        ConfigError: the user's file cannot be read, has an unknown key, or contradicts the run's configuration.
    """
    ours = _own_config(config, layout)
    path = config.parallel.deepspeed_config
    if not path:
        return ours
    asked, _ = read_user_config(path)
    _check_batches(path, asked, layout)
    _check_precision(path, asked, config)
    decided = _decided(config, layout, ours)
    for key, value in _leaves(asked):
        if key in decided and value not in (decided[key][0], AUTO, None):
            found = f"{key} is {json.dumps(value)}, and for this run biokit gives {json.dumps(decided[key][0])}"
            raise ConfigError(path, found, f"{decided[key][1]}, or leave {key} out of the file")
    for group in PRECISION_GROUPS:
        asked.pop(group, None)
    return _merge(ours, asked, set(decided))


def read_user_config(path: str | Path) -> tuple[dict[str, Any], list[str]]:
    """A user's ds_config.json without the keys that do nothing here, and a line about each of those.

    Raises:
        ConfigError: no such file, not JSON (names the line), a key twice, an unknown key (names the nearest).
    """
    tree = _read_json(Path(path))
    _check_keys(tree, "", str(path))
    notes = []
    for dotted, reason in INERT_KEYS.items():
        parent, _, name = dotted.rpartition(".")
        inside = tree.get(parent) if parent else tree
        if isinstance(inside, dict) and name in inside:
            del inside[name]
            notes.append(f"{path}: {dotted} does nothing here: {reason}.")
    notes += _renew_offload(tree, str(path))
    for key, value in _leaves(tree):
        if value == AUTO and key.split(".")[0] == "zero_optimization" and key != "zero_optimization.stage":
            notes.append(f"{path}: {key}=\"auto\" takes biokit's value, or else DeepSpeed's default.")
    for group, precision in PRECISION_GROUPS.items():
        if group in tree:
            how = "with biokit's own loss scale " if precision == "fp16" else ""
            notes.append(
                f"{path}: {group} is not passed on: train.precision={precision} computes in {precision} "
                f"{how}over fp32 weights."
            )
    return tree, notes


def _own_config(config: RunConfig, layout: Layout) -> dict[str, Any]:
    train, micro = config.train, config.train.micro_batch_size
    per_update = micro * layout.data
    steps = 1 if config.data.max_tokens else train.global_batch_size // per_update
    ours: dict[str, Any] = {
        "train_batch_size": per_update * steps,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": steps,
        "gradient_clipping": train.clip_grad,  # left out it would be 1.0 (DeepSpeed 0.19)
        "zero_optimization": _zero_group(config, layout),
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # its own Adam would compile C++
        "steps_per_print": NEVER,
        "wall_clock_breakdown": False,
    }
    if layout.strategy in STAGED:
        # partitioned: a stage that sends two floats fails under tp > 1; reentrant: recompute drops gradients of tuples
        ours["pipeline"] = {"use_reentrant": False, "pipe_partitioned": False, "grad_partitioned": False}
    return ours


def _zero_group(config: RunConfig, layout: Layout) -> dict[str, Any]:
    on_cuda = choose_device(config.train.device).type == "cuda"
    group: dict[str, Any] = {
        "stage": ZERO_STAGE[layout.strategy],
        "contiguous_gradients": True,
        "reduce_scatter": True,
        "overlap_comm": on_cuda and config.parallel.overlap_comm,
        "reduce_bucket_size": BUCKET_SIZE,
        "allgather_bucket_size": BUCKET_SIZE,
    }
    if layout.strategy == "ZeroInf":
        device, folder = config.parallel.offload_device, config.parallel.offload_dir
        place = {"device": device, "pin_memory": on_cuda} | ({"nvme_path": folder} if device == "nvme" else {})
        group |= {name: dict(place) for name in OFFLOADS}
        if device == "nvme":
            group["offload_param"]["buffer_size"] = BUCKET_SIZE  # elements; five are reserved
    return group


def _decided(config: RunConfig, layout: Layout, ours: Mapping[str, Any]) -> dict[str, tuple[Any, str]]:
    """Dotted key -> (the value that the run's configuration gives it, what to do for another one)."""
    settings = {
        "train_batch_size": "Set train.global_batch_size",
        "train_micro_batch_size_per_gpu": "Set train.micro_batch_size",
        "gradient_accumulation_steps": "Set train.global_batch_size = micro batch x accumulation x data-parallel size",
        "gradient_clipping": "Set train.clip_grad",
        "zero_allow_untested_optimizer": OWN_OPTIMIZER,
        "zero_force_ds_cpu_optimizer": OWN_OPTIMIZER,
        "zero_optimization.stage": f"Set strategy={STAGES}",
        "zero_optimization.offload_optimizer.nvme_path": "Set parallel.offload_dir",
        "zero_optimization.offload_param.nvme_path": "Set parallel.offload_dir",
    }
    if config.data.max_tokens:
        settings |= dict.fromkeys(BATCH_KEYS, "data.max_tokens decides how many samples a batch has")
    flat = dict(_leaves(ours))
    decided = {key: (flat[key], do) for key, do in settings.items() if key in flat}
    for name in OFFLOADS:
        key = f"zero_optimization.{name}.device"
        decided[key] = (flat.get(key, "none"), "Set strategy=ZeroInf and parallel.offload_device")
    return decided | {
        "managed_gradient_accumulation": (True, "biokit counts on DeepSpeed's accumulation"),
        "gradient_allreduce_op": ("mean", "biokit weighs its losses for a mean"),
        "data_types.param_dtype": ("fp32", FP32_WEIGHTS),
        "fp16.initial_scale_power": (math.log2(config.train.initial_loss_scale), "Set train.initial_loss_scale"),
        "fp16.loss_scale_window": (config.train.loss_scale_window, "Set train.loss_scale_window"),
        "fp16.fp16_master_weights_and_grads": (False, FP32_WEIGHTS),
        "zero_optimization.compute_grad_norm": (True, "biokit reports the norm"),
        "pipeline.stages": (layout.pipeline, "Set parallel.pipeline_model_parallel_size"),
        "pipeline.seed_layers": (False, "It gives every layer of a stage the same dropout mask"),
        "pipeline.activation_checkpoint_interval": (0, "Set train.checkpoint_activations"),
        "pipeline.use_reentrant": (False, "Set train.checkpoint_activations"),
        "pipeline.pipe_partitioned": (False, "Stages send several tensors, which it does not cut"),
        "pipeline.grad_partitioned": (False, "Stages send several tensors, which it does not cut"),
    }


def _check_batches(path: str, asked: Mapping[str, Any], layout: Layout) -> None:
    """DeepSpeed's own rule, said in its own words before any comparison with the run's configuration."""
    numbers = [asked[key] for key in BATCH_KEYS if isinstance(asked.get(key), int)]
    if len(numbers) < len(BATCH_KEYS):
        return
    total, product = numbers[0], math.prod(numbers[1:]) * layout.data
    if total != product:
        sizes = " x ".join(f"{key}={asked[key]}" for key in BATCH_KEYS[1:])
        found = f"train_batch_size={total}, but {sizes} x {layout.data} data ranks = {product}"
        raise ConfigError(path, found, "Mend one of them, or leave all three out: biokit fills them in")


def _check_precision(path: str, asked: Mapping[str, Any], config: RunConfig) -> None:
    for group, precision in PRECISION_GROUPS.items():
        enabled = (asked.get(group) or {}).get("enabled", AUTO)
        wanted = precision == config.train.precision
        if enabled != AUTO and bool(enabled) != wanted:
            found = f"{group}.enabled is {json.dumps(enabled)}, and train.precision is {config.train.precision}"
            do = f"Set train.precision={precision if enabled else 'fp32'}, or leave {group} out of the file"
            raise ConfigError(path, found, do)


def _check_keys(tree: Mapping[str, Any], group: str, path: str) -> None:
    prefix = f"{group}." if group else ""
    known = KNOWN_KEYS[group] | {key[len(prefix) :] for key in INERT_KEYS if key.startswith(prefix)}
    for name, value in tree.items():
        if name not in known:
            homes = [other for other, keys in KNOWN_KEYS.items() if other and other != group and name in keys]
            do = f"Put it into {homes[0]}" if len(homes) == 1 else nearest_key(name, sorted(known), {})
            raise ConfigError(path, f'unknown key "{prefix}{name}"', do)
        inside = f"{prefix}{name}"
        if inside not in KNOWN_KEYS or value is None:
            continue
        if not isinstance(value, dict):
            do = f"It is a group of keys: {', '.join(sorted(KNOWN_KEYS[inside]))}"
            raise ConfigError(path, f"{inside} is {json.dumps(value)}", do)
        _check_keys(value, inside, path)


def _renew_offload(tree: dict[str, Any], path: str) -> list[str]:
    """Old files say `cpu_offload: true`; today's DeepSpeed has a group for it."""
    notes = []
    group = tree.get("zero_optimization")
    for old, new in OLD_OFFLOADS.items():
        if isinstance(group, dict) and old in group:
            if group.pop(old) is True:
                group.setdefault(new, {"device": "cpu"})
            notes.append(f"{path}: zero_optimization.{old} is read as {new}.device, its name today.")
    return notes


def _read_json(path: Path) -> dict[str, Any]:
    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        for index, (key, _) in enumerate(items):
            if any(key == earlier for earlier, _ in items[:index]):
                raise ConfigError(str(path), f'the key "{key}" stands there twice', "Keep one of them")
        return dict(items)

    try:
        tree = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise ConfigError(f"{path} {where}", f"it is not JSON ({error.msg})", "Mend that line") from error
    except (OSError, UnicodeDecodeError) as error:
        do = "Give the path of a JSON file in parallel.deepspeed_config"
        raise ConfigError(str(path), f"it cannot be read ({error})", do) from error
    if not isinstance(tree, dict):
        raise ConfigError(str(path), f"it holds a {type(tree).__name__}", "Write an object of keys and values")
    return tree


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _merge(ours: dict[str, Any], asked: Mapping[str, Any], decided: set[str]) -> dict[str, Any]:
    for key, value in _leaves(asked):
        if key in decided or value in (None, AUTO):
            continue
        *groups, name = key.split(".")
        inside = ours
        for group in groups:
            inside = inside.setdefault(group, {})
        inside[name] = value
    return ours
