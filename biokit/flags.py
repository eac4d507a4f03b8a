"""Command-line flags as users of the source systems write them, read as `key=value` overrides.

`--some-name V`, `--some_name V` and `--some-name=V` set the key whose last part is `some_name`; a switch may stand
alone (`--checkpoint-activations`). ALIASES are the names of other systems that mean the same; nothing else is guessed.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from biokit.config import RunConfig
from biokit.errors import ConfigError
from biokit.schema import leaf_types

TENSOR, PIPELINE = "parallel.tensor_model_parallel_size", "parallel.pipeline_model_parallel_size"
ALIASES: dict[str, str] = {
    "mp_size": TENSOR,
    "model_parallel_size": TENSOR,
    "tensor_parallel_size": TENSOR,
    "tp_size": TENSOR,
    "pp_size": PIPELINE,
    "pipe_parallel_size": PIPELINE,
    "pipeline_parallel_size": PIPELINE,
    "save": "run_dir",
    "save_dir": "run_dir",
    "ifresume": "resume",
    "data_path": "data.dataset_path",
    "seq_length": "data.max_length",
    "max_seq_length": "data.max_length",
    "batch_size": "train.micro_batch_size",
    "train_batch_size": "train.global_batch_size",
    "total_num_steps": "train.train_iters",
    "max_lr": "train.lr",
    "lr_decay_style": "train.lr_schedule",
    "warmup": "train.lr_warmup_fraction",
    "deepspeed_config_path": "parallel.deepspeed_config",
}
SWITCHES: dict[str, str] = {"fp16": "train.precision=fp16", "bf16": "train.precision=bf16", "cpu": "train.device=cpu"}
IGNORED: dict[str, str] = {
    "use_env": "every process reads its rank from the environment anyway",
    "local_rank": "every process reads LOCAL_RANK from the environment",
}
REFUSED: dict[str, str] = {
    "gas": "Set train.global_batch_size = micro batch x accumulation x data-parallel size",
    "gradient_accumulation_steps": "Set train.global_batch_size = micro batch x accumulation x data-parallel size",
    "deepspeed": "The strategy names the engine: set --strategy Zero1, Zero2, Zero3, Pipeline or ThreeD",
    "zero_stage": "Set --strategy Zero1, Zero2 or Zero3",
    "zero_offload": "Set --strategy ZeroInf and --offload-device cpu",
    "lr_decay_iters": "The schedule ends with train.train_iters",
    "lr_warmup_iters": "Set train.lr_warmup_fraction, a part of train.train_iters",
    "hidden_dropout": "Set --dropout: it is one for the whole model",
    "attention_dropout": "Set --dropout: it is one for the whole model",
}
WORDS = {"true", "false", "yes", "no", "on", "off"}  # YAML's booleans


def read_flags(words: Sequence[str], own: Sequence[str] = ()) -> tuple[list[str], list[str], list[str]]:
    """Sort the words behind a command into what the command line and the configuration understand.

    Args:
        words: a configuration's name, flags and `key=value`, in any order.
        own: flags of the command itself, without a value (`--dry-run`).

    Returns:
        (the command's own flags, the configuration's name followed by `key=value` overrides in their order, a line
        about each flag that is ignored)

    Raises:
        ConfigError: an unknown or ambiguous flag (names the candidates), one without its value, or one key set by two
            names to two values.
    """
    types = dict(leaf_types(RunConfig))
    flags, plain, notes, spelled = [], [], [], dict[str, tuple[str, str]]()
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word in own:
            flags.append(word)
            continue
        if not word.startswith("--"):
            plain.append(word)
            continue
        flag, equals, value = word.partition("=")
        name = flag[2:].replace("-", "_")
        if name in IGNORED:
            if name == "local_rank" and not equals:
                _take_value(flag, rest)
            notes.append(f"{flag} is ignored: {IGNORED[name]}.")
            continue
        if name in SWITCHES and not equals:
            override = SWITCHES[name]
        else:
            key = find_key(flag, list(types))
            if not equals:
                stands_alone = types[key] is bool and (not rest or rest[0].lower() not in WORDS)
                value = "True" if stands_alone else _take_value(flag, rest)
            override = f"{key}={value}"
        _check_repeated(override, flag, spelled)
        plain.append(override)
    first = next((word for word in plain if "=" not in word), None)
    if first is not None:
        plain.remove(first)
        plain.insert(0, first)
    return flags, plain, notes


def find_key(flag: str, keys: Sequence[str]) -> str:
    """The dotted key, of all `keys`, that `--some-name` sets.

    Raises:
        ConfigError: no key, or more than one, has that name.
    """
    name = flag.removeprefix("--").replace("-", "_")
    if name in REFUSED:
        raise ConfigError(f"flag {flag}", "no key means that alone", REFUSED[name])
    names: dict[str, list[str]] = {alias: [key] for alias, key in ALIASES.items()}
    for key in keys:
        for own in {key, key.rsplit(".", 1)[-1]}:
            names.setdefault(own, []).append(key)
    found = names.get(name, [])
    if len(found) > 1:
        raise ConfigError(f"flag {flag}", f"{len(found)} keys have that name", f"Write one of: {', '.join(found)}")
    if not found:
        close = difflib.get_close_matches(name, [*names, *SWITCHES], n=3, cutoff=0.5)
        candidates = ", ".join(f"--{other.replace('_', '-')}" for other in close)
        do = f"Did you mean {candidates}?" if close else "See biokit train --help, or write key=value"
        raise ConfigError(f"flag {flag}", "no key has that name", do)
    return found[0]


def _take_value(flag: str, rest: list[str]) -> str:
    if not rest or rest[0].startswith("--"):
        raise ConfigError(f"flag {flag}", "it has no value", f"Write {flag} VALUE")
    return rest.pop(0)


def _check_repeated(override: str, flag: str, spelled: dict[str, tuple[str, str]]) -> None:
    """A later flag of the same name wins, as in shell scripts that append "$@"; two names for one key do not agree."""
    key, _, value = override.partition("=")
    before, other = spelled.get(key, (value, flag))
    if value != before and flag != other:
        raise ConfigError(f"flag {flag} {value}", f"{other} has set {key} to {before}", "Give one of the two")
    spelled[key] = (value, flag)


def describe_flags() -> str:
    """The help text about flags."""
    names = [f"  --{name.replace('_', '-')}: {target}" for name, target in (ALIASES | SWITCHES).items()]
    return "\n".join([
        "flags, instead of key=value: --some-name V, --some_name V or --some-name=V sets the key that ends in",
        "some_name (--num-layers 4 is model.num_layers=4); a switch may stand alone (--checkpoint-activations).",
        "Names that other systems use:", *names,
        f"Accepted and ignored: {', '.join('--' + name for name in IGNORED)}.",
    ])  # fmt: skip
