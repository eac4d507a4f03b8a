"""The text of a job: a batch script that a person can read, change and submit by hand.

Nothing of a user's ever becomes shell: paths are quoted words, option values are refused where they hold a line break,
and parameters travel in a file of the run folder. Only a site's set-up text is shell, and stands as its users wrote it.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from biokit.errors import ConfigError
from biokit.launch.slurm.sites import GPUS_PLACE, Site, check_value

SRUN_VARIABLE = "BIOKIT_SRUN"  # further options of srun, as shell words
CONTAINER_VARIABLE = "BIOKIT_CONTAINER"  # words before the interpreter, as shell words
SIGNAL_BEFORE_S = 120
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True)
class JobRequest:
    """What a job is to run, and with what.

    Attributes:
        title: what it runs, in a few words, for the script's first comment.
        run_dir: absolute; of an array: the folder of all its run folders.
        work_dir: where the job runs: relative paths of the configuration or notebook start there.
        num_processes: ranks a node.
        time: as sbatch takes it; empty: the partition's.
        signal_before_s: how long before the time limit the job is told, to save and to requeue itself.
        num_tasks: of the array; 0: no array.
    """

    name: str
    title: str
    run_dir: Path
    work_dir: Path
    num_nodes: int = 1
    gpus_per_node: int = 0
    num_processes: int = 1
    time: str = ""
    signal_before_s: int = SIGNAL_BEFORE_S
    num_tasks: int = 0


def write_script(request: JobRequest, site: Site) -> str:
    """The batch script of a job.

    Raises:
        ConfigError: a value that cannot stand in a `#SBATCH` line, or a time limit that leaves no time.
    """
    _check_time(request)
    parts = [_header(request), _placing(request, site), _ending(request, site), _output(request), _from_site(site)]
    lines = ["#!/bin/bash", *(line for part in parts for line in part), ""]
    lines += ["set -eu", ""]
    if site.setup.strip():
        lines += [
            "# The site's set-up, as it stands in the site file; such texts often read variables that are not set."
        ]
        lines += ["set +u", site.setup.strip("\n"), "set -u", ""]
    lines += _settings(site)
    words = [*site.container, site.python, "-m", "biokit.launch.slurm.job", str(request.run_dir)]
    words += ["--array"] if request.num_tasks else []
    lines += [f"cd {shlex.quote(str(request.work_dir))}", ""]
    lines += [
        "# exec: the signals that Slurm sends to the batch script are then the launcher's own.",
        f"exec {_join(words)}",
    ]
    return "\n".join(lines) + "\n"


def parse_time(text: str) -> int | None:
    """Seconds of a time limit as sbatch writes it: minutes, MM:SS, HH:MM:SS, D-HH, D-HH:MM, D-HH:MM:SS.

    Returns:
        None for `UNLIMITED`.

    Raises:
        ConfigError: it is none of them.
    """
    if text.upper() in ("UNLIMITED", "INFINITE"):
        return None
    found = _TIME.fullmatch(text)
    if not found:
        raise ConfigError(f"--time {text}", "it is not a time limit", "Give HH:MM:SS, D-HH:MM:SS, or minutes")
    days, *parts = (int(part) if part else None for part in found.groups())
    given = [part for part in parts if part is not None]
    if days is None:
        given = {1: [0, *given, 0], 2: [0, *given]}.get(len(given), given)
    hours, minutes, seconds = [*given, 0, 0][:3]
    return (((days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds


def _header(request: JobRequest) -> list[str]:
    return [
        f"# {check_value(request.title, 'what the job runs')}",
        "# Written by `biokit submit`; by hand: sbatch job.sbatch",
        _option("job-name", request.name),
    ]


def _placing(request: JobRequest, site: Site) -> list[str]:
    """Nodes, tasks and devices."""
    ranks = "1 rank" if request.num_processes == 1 else f"{request.num_processes} ranks"
    lines = ["#", f"# One task a node: it starts the node's {ranks}."]
    lines += [_option("nodes", str(request.num_nodes)), _option("ntasks-per-node", "1")]
    if request.gpus_per_node and site.gpu_request:
        name, _, value = site.gpu_request.removeprefix("--").partition("=")
        lines.append(_option(name, value.replace(GPUS_PLACE, str(request.gpus_per_node))))
        if not {"cpus-per-task", "cpus-per-gpu", "exclusive"} & set(site.sbatch):
            lines.append("# CPUs: as many a GPU as the partition gives; else write cpus-per-gpu into the site file.")
    elif request.gpus_per_node:
        lines.append(f"# {request.gpus_per_node} GPUs a node are not asked for: the site file's gpu_request is empty.")
    elif not {"cpus-per-task", "exclusive"} & set(site.sbatch):
        lines.append(_option("cpus-per-task", str(request.num_processes)))
    if request.num_tasks:
        lines += ["# Each task of the array has a run folder of its own: 000, 001, ..."]
        lines += [_option("array", f"0-{request.num_tasks - 1}")]
    return lines


def _ending(request: JobRequest, site: Site) -> list[str]:
    lines = [
        "#",
        f"# {request.signal_before_s} s before the time limit the job is told: it saves a checkpoint at the next step",
        "# boundary and puts itself back into the queue; so it does where Slurm preempts it, and after a lost node.",
    ]
    if request.time:
        lines.append(_option("time", request.time))
    return [*lines, _option("signal", f"B:USR2@{request.signal_before_s}"), _option("requeue", True)]


def _output(request: JobRequest) -> list[str]:
    path = str(request.run_dir / "logs" / ("slurm-%A_%a.out" if request.num_tasks else "slurm-%j.out"))
    if "\\" in path or "%" in str(request.run_dir):
        found = "Slurm reads % and \\ in the path of a job's output in its own way"
        raise ConfigError(f"run folder {request.run_dir}", found, "Give a --run-dir without them")
    lines = ["#", "# What the job says; when it is put back into the queue, the same file goes on."]
    return [*lines, _option("output", path), _option("open-mode", "append")]


def _from_site(site: Site) -> list[str]:
    """Lines for the site's own options, as they stand in its file."""
    if not site.sbatch:
        return []
    source = check_value(site.source, "the site file's path")
    return ["#", f"# From the site file {source}:", *(_option(*pair) for pair in site.sbatch.items())]


def _settings(site: Site) -> list[str]:
    """What the launcher needs to know of the site when it starts srun."""
    srun = [f"--{name}" if value is True else f"--{name}={value}" for name, value in site.srun.items()]
    values = {SRUN_VARIABLE: _join(srun), CONTAINER_VARIABLE: _join(site.container)}
    lines = [f"export {name}={shlex.quote(value)}" for name, value in values.items() if value]
    return ["# How the launcher reaches the other nodes.", *lines, ""] if lines else []


def _option(name: str, value: str | bool) -> str:
    if value is True:
        return f"#SBATCH --{name}"
    return f"#SBATCH --{name}={shlex.quote(check_value(str(value), f'--{name}'))}"


def _check_time(request: JobRequest) -> None:
    limit_s = parse_time(request.time) if request.time else None
    if limit_s is not None and limit_s <= request.signal_before_s:
        found = f"the job would be told {request.signal_before_s} s before its end, when it begins"
        raise ConfigError(f"--time {request.time}", found, "Give more time, or a smaller --signal-before")


def _join(words: list[str] | tuple[str, ...]) -> str:
    return shlex.join(words)
