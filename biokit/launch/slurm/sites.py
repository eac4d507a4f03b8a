"""What a cluster wants of every job: a YAML file that its users write once.

# ~/.config/biokit/site.yaml
sbatch:                       # options of sbatch by their long names; `true`: an option without a value
  account: chem01
  partition: gpu
gpu_request: gres=gpu:a100:{gpus}    # where --gpus-per-node is not known; empty: ask for none
setup: |                      # shell text at the top of the job, as it stands
  module load python/3.12 cuda/12.4
  source ~/biokit/.venv/bin/activate
python: python                # the interpreter, after the set-up
container: apptainer exec --nv /images/biokit.sif    # words before the interpreter, on every node; the job's launcher
                              # runs in it too: to go back into the queue, and for several nodes, it needs Slurm's
                              # commands there (squeue, scontrol, srun, scancel)
srun:                         # options of srun, which starts torchrun on each node
  mpi: none
"""

from __future__ import annotations

import os
import re
import reprlib
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from biokit.errors import ConfigError
from biokit.schema import nearest_key

SITE_VARIABLE = "BIOKIT_SITE"
GPUS_PLACE = "{gpus}"
KEYS = ("sbatch", "srun", "setup", "python", "container", "gpu_request")
OTHER_NAMES = {"options": "sbatch", "modules": "setup", "account": "sbatch", "partition": "sbatch", "gres": "sbatch"}
OWN_OPTIONS = {  # options that the submission itself decides, and how
    "nodes": "--nodes",
    "ntasks": "--nodes",
    "ntasks-per-node": "--nodes",
    "gpus-per-node": "--gpus-per-node",
    "array": "a list of values, e.g. -p lr 1e-4,3e-4",
    "signal": "--signal-before",
    "open-mode": "nothing: it is always `append`",
    "output": "nothing: output goes to the run folder's logs",
    "error": "nothing: output goes to the run folder's logs",
    "chdir": "nothing: the job runs where it was submitted",
    "export": "the set-up text",
    "wrap": "nothing: the job is a notebook or a training",
}
OPTION_NAME = r"[a-z][a-z0-9-]+"
Options = dict[str, str | bool]


@dataclass(frozen=True)
class Site:
    """One cluster's ways.

    Attributes:
        sbatch: options of sbatch by their long names; True: an option without a value.
        srun: the same of srun.
        setup: shell text, run before anything else.
        python: the interpreter that jobs use.
        container: words before the interpreter.
        gpu_request: the option that asks for a node's GPUs; `{gpus}` stands for their number; empty: none is asked for.
        source: where this was read, for the job's comments; empty: nothing was.
    """

    sbatch: Options = field(default_factory=dict)
    srun: Options = field(default_factory=dict)
    setup: str = ""
    python: str = sys.executable
    container: tuple[str, ...] = ()
    gpu_request: str = f"gpus-per-node={GPUS_PLACE}"
    source: str = ""


def find_site_file(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The file that BIOKIT_SITE names, else the user's own where there is one.

    Raises:
        ConfigError: BIOKIT_SITE names a file that is not there.
    """
    named = environment.get(SITE_VARIABLE, "")
    if named:
        if not Path(named).is_file():
            raise ConfigError(f"{SITE_VARIABLE}={named}", "there is no such file", "Mend or unset the variable")
        return Path(named)
    folder = environment.get("XDG_CONFIG_HOME") or Path(environment.get("HOME", "~")).expanduser() / ".config"
    own = Path(folder) / "biokit" / "site.yaml"
    return own if own.is_file() else None


def load_site(path: Path | None) -> Site:
    """Read a site file; without one, a site that asks for nothing special.

    Raises:
        ConfigError: it cannot be read, an unknown key (the nearest is named), or a value that cannot stand in a job.
    """
    if path is None:
        return Site()
    asked = f"site file {path}"
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # all text: 1:30:00 is no number
    except RecursionError as error:
        raise ConfigError(asked, "it is nested too deeply", "Mend the file") from error
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(asked, f"it cannot be read ({' '.join(str(error).split())})", "Mend the file") from error
    tree = tree or {}
    if not isinstance(tree, dict):
        raise ConfigError(asked, f"it holds a {type(tree).__name__}", f"Write a mapping of {', '.join(KEYS)}")
    return site_from_dict(tree, asked)


def site_from_dict(tree: Mapping[str, Any], asked: str = "site") -> Site:
    """A site from a mapping of text, as YAML gives it where nothing is read as a number; raises as `load_site`."""
    for key in tree:
        if key not in KEYS:
            raise ConfigError(asked, f'unknown key "{key}"', nearest_key(str(key), list(KEYS), OTHER_NAMES))
    values: dict[str, Any] = {name: tree[name] for name in KEYS if name in tree}
    for name in ("sbatch", "srun"):
        values[name] = _read_options(values.get(name) or {}, f"{asked}: {name}")
    for name in ("setup", "python", "container", "gpu_request"):
        if not isinstance(values.get(name, ""), str):
            raise ConfigError(asked, f"{name} is {reprlib.repr(values[name])}", "Give text")
        if name != "setup" and _has_control(values.get(name, "")):
            raise ConfigError(asked, f"{name} holds a line break or a control character", "Write it on one line")
    values["container"] = _split_words(values.get("container", ""), asked)
    _check_gpu_request(values.get("gpu_request", ""), asked)
    if not values.get("python", "python").strip():
        raise ConfigError(asked, "python is empty", "Leave it out, or name an interpreter")
    return Site(**values, source=asked.removeprefix("site file "))


def check_value(text: str, asked: str) -> str:
    """A value that may stand in a `#SBATCH` line.

    Raises:
        ConfigError: it holds a line break or another control character: what follows would be a line of its own.
    """
    if _has_control(text):
        raise ConfigError(asked, f"{text!r} holds a line break or a control character", "Write it on one line")
    return text


def _has_control(text: str) -> bool:
    return any(not sign.isprintable() for sign in text)


def _read_options(tree: Any, asked: str) -> Options:
    if not isinstance(tree, Mapping):
        raise ConfigError(asked, f"it is {reprlib.repr(tree)}", "Write a mapping, e.g. {partition: gpu}")
    options: Options = {}
    for key, value in tree.items():
        name = str(key).removeprefix("--").replace("_", "-")
        if not re.fullmatch(OPTION_NAME, name):
            raise ConfigError(asked, f"{key!r} is not the long name of an option", "Write e.g. partition: gpu")
        if asked.endswith("sbatch") and name in OWN_OPTIONS:
            raise ConfigError(asked, f"{name} is decided by each submission", f"Use {OWN_OPTIONS[name]}")
        if not isinstance(value, str):
            raise ConfigError(asked, f"{name} is {reprlib.repr(value)}", "Give text, a number, or true")
        if value != "false":
            options[name] = True if value == "true" else check_value(value, f"{asked}: {name}")
    return options


def _split_words(text: str, asked: str) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(text))
    except ValueError as error:
        raise ConfigError(asked, f"container cannot be split into words ({error})", "Close its quotes") from error


def _check_gpu_request(text: str, asked: str) -> None:
    places = re.findall(r"\{[^{}]*\}|[{}]", text)
    if text and (not places or set(places) != {GPUS_PLACE}):
        do = f"Write where the number goes, e.g. gres=gpu:{GPUS_PLACE}; or leave it empty"
        raise ConfigError(asked, f"gpu_request is {text!r}", do)
    name = text.removeprefix("--").partition("=")[0]
    if text and not re.fullmatch(OPTION_NAME, name):
        raise ConfigError(asked, f"gpu_request is {text!r}", f"Write an option of sbatch, e.g. gres=gpu:{GPUS_PLACE}")
