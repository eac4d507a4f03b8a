"""What a run was started from, and what it is now: the facts of its card."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import os
import platform
import shlex
import socket
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from biokit.errors import BiokitError, RunError
from biokit.launch.orders import Order, read_order
from biokit.launch.slurm.job_status import find_job
from biokit.launch.states import SupervisorState, read_state
from biokit.launch.status import read_status
from biokit.runs import RunFolder
from biokit.safe_files import to_float, to_number, to_whole
from biokit.secrets import mask_words

PACKAGES = ("biokit", "torch", "numpy", "deepspeed", "megatron-core", "rdkit")
GIT_TIMEOUT_S = 10.0
HASH_DIGITS = 12  # enough to tell two of them apart


def collect_facts(order: Order, where: Path | None = None) -> dict[str, Any]:
    """The state of the code, the machine and the installation now; what the order knows itself comes first.

    Args:
        where: the folder that the programs start in (default: this process's).
    """
    folder = where or Path.cwd()
    return {
        "time": round(time.time(), 3),
        "host": socket.gethostname(),
        "cwd": str(folder),
        "line": shlex.join(mask_words(shlex.split(order.line()))),
        "git": read_git(folder),
        "python": platform.python_version(),
        "versions": read_versions(),
        **order.facts,
    }


def read_versions() -> dict[str, str]:
    """Versions of the packages that decide what a run does, of those installed; nothing is imported."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def read_git(where: Path) -> dict[str, Any]:
    """The state of the repository around a folder, else of that around biokit itself.

    Returns:
        `commit`, `dirty`, and where it is dirty `changes`, the first digits of sha256 over what tracked files differ
        in. Empty where there is no repository, or no git.
    """
    for folder in (where, Path(__file__).parent):
        commit = _git(folder, "rev-parse", "HEAD")
        if not commit:
            continue
        changes = _git(folder, "diff", "HEAD", "--no-ext-diff", "--no-textconv")
        state: dict[str, Any] = {"commit": commit.decode().strip(), "dirty": bool(changes)}
        return state | ({"changes": hashlib.sha256(changes).hexdigest()[:HASH_DIGITS]} if changes else {})
    return {}


def describe_run(folder: RunFolder, status: str = "", with_settings: bool = False) -> dict[str, Any]:
    """The facts of a run's card: what was asked, from which state of what, and where it stands.

    Entries that are not known are left out: `run, status, kind, life, last_life, step, num_steps, loss, started, ended,
    host, slurm_job, layout, num_parameters, config_hash, settings, data_hash, git, python, versions, line`; `settings`
    are those keys of the configuration that differ from the defaults.
    """
    order, said = _order_of(folder), read_state(folder) or SupervisorState(max_lives=0)
    manifest = read_manifest(folder)
    facts = dict(order.facts) if order else {}
    lines = folder.read_metrics()
    known = {
        "run": str(folder.path),
        "status": status or read_status(folder),
        "kind": order.kind if order else "train" if manifest else None,
        "life": said.life,
        "last_life": said.first_life + said.max_lives - 1 if said.max_lives > 1 else None,
        "step": lines[-1]["step"] if lines else manifest.get("step"),
        "num_steps": to_whole(manifest.get("train_iters")),
        "loss": lines[-1].get("loss") if lines else None,
        "started": said.started or to_number(facts.get("time")),
        "ended": said.ended,
        "host": said.host or facts.get("host"),
        "slurm_job": job.job_id if (job := find_job(folder)) else None,
        "layout": manifest.get("layout") or facts.get("layout"),
        "num_parameters": manifest.get("num_parameters"),
        "config_hash": manifest.get("config_hash") or facts.get("config_hash"),
        "settings": _changed_settings(folder) if with_settings else {},
        "data_hash": manifest.get("data_hash"),
        "git": facts.get("git"),
        "python": facts.get("python"),
        "versions": {**_mapping(manifest.get("versions")), **_mapping(facts.get("versions"))},
        "line": facts.get("line"),
    }
    return {name: value for name, value in known.items() if value not in (None, "", {}, 0.0)}


def compare_runs(first: RunFolder, second: RunFolder) -> list[tuple[str, str, str]]:
    """What differs between two runs: (what, in the first, in the second); `-` where one does not say.

    Raises:
        RunError: a folder that holds no run.
    """
    both = [_comparable(folder) for folder in (first, second)]
    names = dict.fromkeys(name for facts in both for name in facts)
    rows = [(name, *(facts.get(name, "-") for facts in both)) for name in names]
    return [(name, a, b) for name, a, b in rows if a != b]


def read_manifest(folder: RunFolder) -> dict[str, Any]:
    """The manifest of a training; empty where the run has none (yet)."""
    try:
        return folder.read_manifest()
    except RunError:
        return {}


def read_settings(folder: RunFolder) -> dict[str, Any]:
    """A training's configuration as dotted keys, in effect or else as asked; empty where the run has none."""
    from biokit.config import dotted_values, load_config

    for file in (folder.config_file, asked_file(folder)):
        if file.is_file():
            return dotted_values(load_config(file))
    return {}


def _changed_settings(folder: RunFolder) -> dict[str, Any]:
    """A training's configuration where it is not the default; empty where the run has none that can be read."""
    from biokit.config import RunConfig, dotted_values

    try:
        settings, defaults = read_settings(folder), dotted_values(RunConfig())
    except BiokitError:
        return {}
    return {key: value for key, value in settings.items() if key != "run_dir" and value != defaults[key]}


def asked_file(folder: RunFolder) -> Path:
    """The configuration that a training's ranks are given."""
    return folder.logs / "config_asked.yaml"


def _comparable(folder: RunFolder) -> dict[str, str]:
    """A run as named texts: configuration keys, then what it was made from, then how far it came."""
    facts, settings = describe_run(folder), read_settings(folder)
    if not settings and "line" not in facts:
        raise RunError(f"run {folder.path}", "it has no configuration and no order", "Give the folder of a run")
    texts = {key: str(value) for key, value in settings.items() if key != "run_dir"}
    if not settings:
        texts["line"] = facts["line"]
    for name in ("config_hash", "data_hash", "num_parameters", "python", "status", "step"):
        texts |= {name.replace("_", " "): str(facts[name])[:HASH_DIGITS]} if name in facts else {}
    for group in ("layout", "git", "versions"):
        texts |= {f"{group} {name}": str(value) for name, value in _mapping(facts.get(group)).items()}
    texts |= _final_losses(folder)
    return texts


def _final_losses(folder: RunFolder) -> dict[str, str]:
    lines = folder.read_metrics()
    texts = {}
    for key, name in (("loss", "final loss"), ("val_loss", "final validation loss")):
        values = [to_float(line[key]) for line in lines if isinstance(line.get(key), (int, float))]
        if values:
            texts[name] = f"{values[-1]:.6g}" if math.isfinite(values[-1]) else str(values[-1])
    return texts


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _order_of(folder: RunFolder) -> Order | None:
    try:
        return read_order(folder)
    except RunError:
        return None


def _git(folder: Path, *words: str) -> bytes:
    """What git says in a folder; empty where it fails. It asks nobody, and runs nothing that the repository names."""
    command = ["git", "-C", str(folder), "-c", "core.fsmonitor=false", "--no-optional-locks", "--no-pager", *words]
    environment = {**os.environ, "GIT_TERMINAL_PROMPT": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, timeout=GIT_TIMEOUT_S, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return b""
    return done.stdout if done.returncode == 0 else b""
