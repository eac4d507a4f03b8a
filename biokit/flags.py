"""Command-line flags as users of the source systems write them, read as `key=value` overrides.

`--some-name V`, `--some_name V` and `--some-name=V` set the key whose last part is `some_name`; a switch may stand
alone (`--checkpoint-activations`) or take True or False. ALIASES are the names of other systems that mean the same;
nothing else is guessed.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from biokit.config import RunConfig, parse_override
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
WITHOUT: dict[str, str] = {"fp16": "train.precision=fp32", "bf16": "train.precision=fp32", "cpu": "train.device=auto"}
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
BOOLEANS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def read_flags(
    words: Sequence[str], own: Sequence[str] = (), own_with_value: Sequence[str] = ()
) -> tuple[list[str], list[str], list[str]]:
    """Sort the words behind a command into what the command line and the configuration understand.

    Args:
        words: a configuration's name, flags and `key=value`, in any order.
        own: flags of the command itself, without a value (`--dry-run`); `own_with_value`: with one (`--lives 3`).

    Returns:
        (the command's own flags, the configuration's name followed by `key=value` overrides in their order, a line
        about each flag that is ignored)

    Raises:
        ConfigError: an unknown or ambiguous flag (names the candidates), one without its value, a switch with another
            word than True or False, or one key set by two names to two values.
    """
    types = dict(leaf_types(RunConfig))
    flags, overrides, notes, spelled = [], [], [], dict[str, tuple[str, str]]()
    names: list[tuple[str, str]] = []  # words that may be the configuration's name, and a lone switch before each
    rest, switch = list(words), ""
    while rest:
        word, before, switch = rest.pop(0), switch, ""
        if word in own:
            flags.append(word)
        elif (flag := word.partition("=")[0].replace("_", "-")) in own_with_value:
            flags += [flag, word.partition("=")[2] if "=" in word else _take_value(flag, rest)]
        elif not word.startswith("--") and "=" not in word:
            names.append((word, before))
        elif not word.startswith("--"):
            _check_repeated(word, "", spelled)
            overrides.append(word)
        else:
            flag = word.partition("=")[0]
            name = _plain_name(flag)
            if name in IGNORED:
                if name == "local_rank" and flag == word:
                    _take_value(flag, rest)
                notes.append(f"{flag} is ignored: {IGNORED[name]}.")
                continue
            num_behind = len(rest)
            override = _read_flag(word, rest, types)
            switch = flag if flag == word and len(rest) == num_behind else ""
            _check_repeated(override, flag, spelled)
            overrides.append(override)
    for word, before in [*names[1:], *names[:1]] if len(names) > 1 else ():  # only one is the configuration's
        if before:
            _read_boolean(before, word)
    return flags, [word for word, _ in names] + overrides, notes


def _plain_name(flag: str) -> str:
    return flag.removeprefix("--").replace("-", "_")


def _is_switch(flag: str, types: Mapping[str, type]) -> bool:
    return _plain_name(flag) in SWITCHES or types[find_key(flag, list(types))] is bool


def _read_flag(word: str, rest: list[str], types: Mapping[str, type]) -> str:
    """The override that a flag means; takes its value from the words behind it where it has one there."""
    flag, equals, value = word.partition("=")
    if not _is_switch(flag, types):
        return f"{find_key(flag, list(types))}={value if equals else _take_value(flag, rest)}"
    if not equals:
        value = rest.pop(0) if rest and rest[0].lower() in BOOLEANS else "True"
    wanted, name = _read_boolean(flag, value), _plain_name(flag)
    if name not in SWITCHES:
        return f"{find_key(flag, list(types))}={wanted}"
    if not wanted:
        do = f"Leave {flag} out, or set {WITHOUT[name]}"
        raise ConfigError(f"flag {flag} {value}", "it does not say what to take instead", do)
    return SWITCHES[name]


def find_key(flag: str, keys: Sequence[str]) -> str:
    """The dotted key, of all `keys`, that `--some-name` sets.

    Raises:
        ConfigError: no key, or more than one, has that name.
    """
    name = _plain_name(flag)
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
        known = [other for other in (*names, *SWITCHES) if "." in name or "." not in other]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        candidates = ", ".join(f"--{other.replace('_', '-')}" for other in close)
        do = f"Did you mean {candidates}?" if close else "See biokit train --help, or write key=value"
        raise ConfigError(f"flag {flag}", "no key has that name", do)
    return found[0]


def _take_value(flag: str, rest: list[str]) -> str:
    if not rest or rest[0].startswith("--"):
        raise ConfigError(f"flag {flag}", "it has no value", f"Write {flag} VALUE")
    return rest.pop(0)


def _read_boolean(flag: str, word: str) -> bool:
    if word.lower() not in BOOLEANS:
        raise ConfigError(f"flag {flag} {word}", "it takes True or False", f"Write {flag} alone, or with one of them")
    return BOOLEANS[word.lower()]


def _check_repeated(override: str, flag: str, spelled: dict[str, tuple[str, str]]) -> None:
    """A later word of the same name wins, as in shell scripts that append "$@"; two names for one key must agree."""
    key, value = parse_override(override)[0], override.partition("=")[2]
    name = flag or key
    key = key.removeprefix("model.") if key.startswith("model.data.") else key
    before, other = spelled.get(key, (value, name))
    if name != other and value != before and _parsed(key, value) != _parsed(key, before):
        asked = f"flag {flag} {value}" if flag else override
        raise ConfigError(asked, f"{other} has set {key} to {before}", "Give one of the two")
    spelled[key] = (value, name)


def _parsed(key: str, value: str) -> Any:
    is_text = dict(leaf_types(RunConfig)).get(key) is str
    return value.strip() if is_text else parse_override(f"{key}={value}")[1]


def describe_flags() -> str:
    """The help text about flags."""
    names = [f"  --{name.replace('_', '-')}: {target}" for name, target in (ALIASES | SWITCHES).items()]
    return "\n".join([
        "flags, instead of key=value: --some-name V, --some_name V or --some-name=V sets the key that ends in",
        "some_name (--num-layers 4 is model.num_layers=4); a switch may stand alone (--checkpoint-activations) or take",
        "True or False (also 1 or 0, yes or no, on or off).",
        "Names that other systems use:", *names,
        f"Accepted and ignored: {', '.join('--' + name for name in IGNORED)}.",
    ])  # fmt: skip
