"""The configuration of a run: one dataclass a module, composed into `RunConfig`; YAML and dotted overrides.

Keys bear Megatron's names. An unknown key fails and names the nearest valid one; a wrong type or an impossible
value fails before any work. `model.data.*` (BioNeMo) is an alias of `data.*`, `++key=value` of `key=value`.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from biokit.errors import ConfigError
from biokit.schema import bounded, build, choice, leaf_types, list_divisors, nearest_key

CONFIG_DIR = Path(__file__).parent / "configs"
OTHER_NAMES = {  # what other systems call a key; used only to name the right one in an error
    "learning_rate": "train.lr",
    "max_steps": "train.train_iters",
    "batch_size": "train.micro_batch_size",
    "grad_clip": "train.clip_grad",
    "gradient_clip_val": "train.clip_grad",
    "warmup": "train.lr_warmup_fraction",
    "output_dir": "run_dir",
    "data_path": "data.dataset_path",
}


@dataclass(kw_only=True)
class DatasetConfig:
    """Files of each part, relative to `data.dataset_path`; ranges `x[000..099]` or `x_OP_000..099_CL_` allowed."""

    train: str = ""
    val: str = ""
    test: str = ""


@dataclass(kw_only=True)
class DataConfig:
    """Where the molecules come from, how they are cleaned, and how they become batches."""

    dataset_path: str = "wehi_mols"  # a named data set, a file, a folder, or a folder that `biokit preprocess` made
    dataset: DatasetConfig = field(default_factory=DatasetConfig)
    store_dir: str = ""  # where token stores are written; empty: <run_dir>/data
    limit_rows: int = bounded(0, 0)  # read at most so many rows; 0: all
    smiles_column: str = ""  # empty: guessed from name and content
    split_column: str = ""  # empty: `set` or `split` where there is one
    split: str = choice("auto", "auto", "column", "ratio", "random", "scaffold")  # auto: column if any, else random
    split_ratio: str = "90,5,5"  # train, val, test
    on_bad: str = choice("drop", "drop", "raise")  # what to do with a row that cannot be used; drops are reported
    salts: str = choice("strip", "strip", "keep")
    atom_maps: str = choice("strip", "strip", "keep")
    neutralize: bool = False
    canonical_tautomer: bool = False
    duplicates: str = choice("smiles", "smiles", "inchikey", "keep")
    unknown_tokens: str = choice("drop", "drop", "keep")
    max_length: int = bounded(512, 3, 65535)  # tokens a side, begin and end included
    vocab_file: str = ""  # empty: the packaged vocabulary
    pool: int = bounded(0, 0, 1000)  # random SMILES stored a molecule
    cache_molecules: bool = True  # store parsed molecules, so that random SMILES need no parsing
    task: str = choice("mask", "mask", "aug", "mask_aug")
    mask_scheme: str = choice("span", "span", "replace")
    mask_prob: float = bounded(0.10, 0.0, 1.0)
    span_lambda: float = bounded(3.0, 0.0, 100.0)
    show_mask_token_prob: float = bounded(1.0, 0.0, 1.0)  # `replace` only
    length_buckets: bool = True
    max_tokens: int = bounded(0, 0)  # padded tokens a batch (token budget); 0: train.global_batch_size samples
    num_workers: int = bounded(0, 0, 1024)  # processes that make batches; the batches do not depend on it


@dataclass(kw_only=True)
class ModelConfig:
    """Shape of the model. A preset sets the sizes; a size that is given (not 0) overrides the preset's."""

    name: str = "molbart"
    preset: str = "mini"
    num_layers: int = bounded(0, 0, 10_000)  # a side
    hidden_size: int = bounded(0, 0)
    num_attention_heads: int = bounded(0, 0)
    ffn_hidden_size: int = bounded(0, 0)
    dropout: float = bounded(0.1, 0.0, 0.999)
    tie_word_embeddings: bool = False  # one table for the inputs and the output projection


@dataclass(kw_only=True)
class TrainConfig:
    """Optimisation, precision and intervals, under Megatron's names."""

    train_iters: int = bounded(1000, 1)
    micro_batch_size: int = bounded(32, 1)
    global_batch_size: int = bounded(32, 1)
    lr: float = bounded(1e-3, 0.0)
    min_lr: float = bounded(0.0, 0.0)
    lr_schedule: str = choice("cosine", "noam", "linear", "cosine", "constant")
    lr_schedule_version: str = choice("megatron-2", "megatron-2", "megatron-1.1.5")
    lr_warmup_fraction: float = bounded(0.01, 0.0, 1.0)
    weight_decay: float = bounded(0.0, 0.0)
    adam_beta1: float = bounded(0.9, 0.0, 0.999999)
    adam_beta2: float = bounded(0.999, 0.0, 0.999999)
    adam_eps: float = bounded(1e-8, 0.0)
    clip_grad: float = bounded(1.0, 0.0)  # global norm; 0: off
    precision: str = choice("fp32", "fp32", "bf16", "fp16")
    loss_scale_window: int = bounded(1000, 1)  # fp16: steps without overflow before the scale doubles
    initial_loss_scale: float = bounded(65536.0, 1.0)  # fp16
    checkpoint_activations: bool = False
    log_interval: int = bounded(1, 1)
    eval_interval: int = bounded(0, 0)  # steps; 0: only at the end
    eval_iters: int = bounded(0, 0)  # batches an evaluation; 0: the whole part
    eval_molecules: int = bounded(0, 0)  # molecules decoded an evaluation (exact match, invalid fraction); 0: none
    save_interval: int = bounded(0, 0)  # steps; 0: only at the end
    async_save: bool = False  # write checkpoints beside the training, from a copy of the state
    keep_last: int = bounded(0, 0)  # newest checkpoints kept; 0: all, unless keep_best is set
    keep_best: int = bounded(0, 0)  # best checkpoints by `best_metric` kept as well; 0: none
    best_metric: str = choice("val_loss", "val_loss", "loss", "val_token_accuracy", "val_exact_match")
    early_stopping_patience: int = bounded(0, 0)  # evaluations without a better val loss; 0: off
    tensorboard: bool = True
    progress: bool = True
    num_threads: int = bounded(0, 0, 1024)  # 0: torch's choice
    device: str = choice("auto", "auto", "cpu", "cuda")


@dataclass(kw_only=True)
class ParallelConfig:
    """How a model is spread over processes; `strategy` names the engine. Sizes of 0: what the strategy needs."""

    tensor_model_parallel_size: int = bounded(1, 1)  # ThreeD
    pipeline_model_parallel_size: int = bounded(0, 0)  # Pipeline, ThreeD; 0: all processes under Pipeline, else 1
    sequence_parallel: bool = False  # ThreeD on CUDA: norms and dropouts on a part of the batch a tensor rank
    partition_activations: bool = False  # ThreeD with train.checkpoint_activations: a tensor rank keeps its part
    overlap_comm: bool = True  # on CUDA: reduce gradients while the backward pass goes on
    offload_device: str = choice("cpu", "cpu", "nvme")  # ZeroInf
    offload_dir: str = ""  # ZeroInf on nvme: a folder on a fast local disk
    deepspeed_config: str = ""  # your own ds_config.json; it is merged and checked
    timeout_s: float = bounded(600.0, 1.0)  # of every process group


@dataclass(kw_only=True)
class RunConfig:
    """Everything that decides a run. The same file drives a notebook and the command line."""

    run_dir: str = "runs/molbart_mini"
    seed: int = bounded(1234, 0, 2**63 - 1)
    do_training: bool = True
    strategy: str = "Single"
    resume: bool = True  # go on from the newest checkpoint in run_dir
    load: str = ""  # a checkpoint or a run to go on from (a model or layer files to start from) where run_dir has none
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)


def load_config(source: str | Path, overrides: Iterable[str] = ()) -> RunConfig:
    """Read a packaged configuration (`molbart_mini`) or a YAML file, then apply `key=value` overrides.

    Raises:
        ConfigError: no such file, text that is not YAML, an unknown key, a wrong type, an impossible value.
    """
    tree = _expand_aliases(_read_yaml(_find(source)), str(source))
    for text in overrides:
        _apply_override(tree, text)
    return config_from_dict(tree, where=str(source))


def config_from_dict(tree: Mapping[str, Any], where: str = "config") -> RunConfig:
    """Build and validate a `RunConfig` from nested mappings.

    Raises:
        ConfigError: an unknown key, a wrong type, an impossible value.
    """
    config: RunConfig = build(RunConfig, _expand_aliases(tree, where), where, _nearest)
    _validate(config, where)
    return config


def config_to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested plain values, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def config_to_yaml(config: RunConfig) -> str:
    """The configuration as YAML text that `load_config` reads back to an equal object."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False)


def config_hash(config: RunConfig) -> str:
    """sha256 over every key except where the run lives and whether it resumes."""
    tree = config_to_dict(config)
    for key in ("run_dir", "resume", "load", "do_training"):
        tree.pop(key)
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()


def valid_keys() -> list[str]:
    """Every dotted key of `RunConfig`, in order."""
    return [key for key, _ in leaf_types(RunConfig)]


def dotted_values(config: RunConfig) -> dict[str, Any]:
    """Every value by its dotted key."""
    return {key: functools.reduce(getattr, key.split("."), config) for key in valid_keys()}


def packaged_configs() -> list[str]:
    """Names that `load_config` finds inside the package."""
    return sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))


def parse_override(text: str) -> tuple[str, Any]:
    """Split `key=value` (or `++key=value`); the value is read as YAML.

    Raises:
        ConfigError: no `=`, an empty key, or a value that is not YAML.
    """
    key, equals, value = text.lstrip("+").partition("=")
    if not equals or not key.strip():
        raise ConfigError(f'override "{text}"', "it is not of the form key=value", "Write e.g. train.lr=1e-3")
    return key.strip(), _parse_value(value, f'override "{text}"')


def _parse_value(text: str, asked: str) -> Any:
    try:
        return yaml.safe_load(text) if text.strip() else ""
    except yaml.YAMLError as error:
        if not any(mark in text for mark in "\n{}"):
            return text  # x[000..099], *.csv and the like are plain strings here
        raise ConfigError(asked, f"the value is not YAML ({error})", "Quote it") from error


def _find(source: str | Path) -> Path:
    path = Path(source)
    packaged = CONFIG_DIR / f"{source}.yaml"
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return path
    if path.name == str(source) and packaged.is_file():
        return packaged
    raise ConfigError(
        f'config "{source}"',
        "it is neither a YAML file nor a packaged name",
        f"Give a path ending in .yaml, or one of: {', '.join(packaged_configs())}",
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        raise ConfigError(
            f"config {path}", f"it cannot be read ({' '.join(str(error).split())})", "Mend the file"
        ) from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"config {path}", f"it holds a {type(tree).__name__}", "Write a mapping of keys to values")
    return tree


def _apply_override(tree: dict[str, Any], text: str) -> None:
    """Set one dotted key; text for a text key is taken as it stands (`run_dir=007`), other values are YAML."""
    key, value = parse_override(text)
    key = key.removeprefix("model.") if key.startswith("model.data.") else key
    types = dict(leaf_types(RunConfig))
    inside = [leaf for leaf in types if leaf.startswith(f"{key}.")]
    if inside:
        do = f"Set one of them, e.g. {inside[0]}=..."
        raise ConfigError(f'override "{text}"', f"{key} is a group of keys", do)
    if types.get(key) is str:
        value = text.partition("=")[2].strip()
    _set_dotted(tree, key, value)


def _set_dotted(tree: dict[str, Any], key: str, value: Any) -> None:
    *parents, leaf = key.split(".")
    for name in parents:
        child = tree.setdefault(name, {})
        if not isinstance(child, dict):
            raise ConfigError(f'override "{key}"', f'"{name}" is a value, not a group of keys', _nearest(key))
        tree = child
    tree[leaf] = value


def _expand_aliases(tree: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`model.data.*` is BioNeMo's place for `data.*`; a key in both places with two values is refused."""
    tree = {key: dict(value) if isinstance(value, Mapping) else value for key, value in tree.items()}
    model = tree.get("model")
    if isinstance(model, dict) and "data" in model:
        alias = model.pop("data")
        data = tree.get("data") or {}
        if not isinstance(alias, Mapping) or not isinstance(data, Mapping):
            raise ConfigError(where, "data or model.data is not a group of keys", "Write data: {dataset_path: ...}")
        tree["data"] = _merge(data, alias, where)
    return tree


def _merge(base: Mapping[str, Any], alias: Mapping[str, Any], where: str) -> dict[str, Any]:
    merged = dict(base)
    for key, value in alias.items():
        old = merged.get(key, value)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merge(old, value, where)
        elif old != value:
            raise ConfigError(where, f"data.{key} is {old!r} and model.data.{key} is {value!r}", "Keep one of them")
        merged[key] = value
    return merged


def _validate(config: RunConfig, where: str) -> None:
    """Relations between keys that a single key's bounds cannot express."""
    train, data = config.train, config.data
    if not config.run_dir.strip():
        raise ConfigError(where, "run_dir is empty", "Give a folder for the run, e.g. runs/mine")
    if train.early_stopping_patience and not train.eval_interval:
        found = f"train.early_stopping_patience={train.early_stopping_patience} with train.eval_interval=0"
        raise ConfigError(where, f"{found} would never be looked at", "Give eval_interval, e.g. 100")
    if data.task != "aug" and data.mask_scheme == "span" and not data.span_lambda:
        raise ConfigError(
            where, "data.span_lambda=0 would draw empty spans for ever", "Give a mean length above 0, e.g. 3"
        )
    if train.min_lr > train.lr:
        raise ConfigError(where, f"train.min_lr={train.min_lr} exceeds train.lr={train.lr}", "Give min_lr <= lr")
    if train.global_batch_size % train.micro_batch_size:
        raise ConfigError(
            where,
            f"train.micro_batch_size={train.micro_batch_size} does not divide "
            f"train.global_batch_size={train.global_batch_size}",
            f"Valid micro batches: {', '.join(map(str, list_divisors(train.global_batch_size)))}",
        )
    if 0 < data.max_tokens < data.max_length:
        raise ConfigError(
            where,
            f"data.max_tokens={config.data.max_tokens} is less than data.max_length={config.data.max_length}",
            "A batch must hold the longest molecule: raise max_tokens or lower max_length",
        )


def _nearest(key: str) -> str:
    return nearest_key(key, valid_keys(), OTHER_NAMES)
