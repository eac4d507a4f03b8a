"""Small jobs for the tests and the drill of Slurm: what they run, how they are submitted and awaited."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import nbformat

from biokit.config import RunConfig, config_from_dict, config_to_dict, config_to_yaml
from biokit.launch.commands.parameters import join_parameters
from biokit.launch.commands.submit import add_arguments, prepare
from biokit.launch.slurm.jobs import Job, read_job
from biokit.runs import RunFolder
from tests.slurm.cluster import Cluster, wait_until
from tests.small_run import small_config

JOB_S = 90.0  # a job of these tests takes some 10 s on an idle machine
STEPS = 100
NOTEBOOK = """\
from biokit.config import load_config
from biokit.train import train
manifest = train(load_config(config, [f"run_dir={run_dir}", f"train.lr={lr}"]))
print(f"lr {lr!r}, note {note!r}, {manifest['status']} at step {manifest['step']}")
"""


def write_config(folder: Path, **train: Any) -> Path:
    """A training of a few seconds, as a YAML file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "small.yaml"
    path.write_text(config_to_yaml(long_config(folder, **train)))
    return path


def long_config(folder: Path, **train: Any) -> RunConfig:
    """Long enough for something to happen in the middle, on one process or two."""
    config = small_config(folder, **{"train_iters": STEPS, "save_interval": 10, "micro_batch_size": 2, **train})
    return config_from_dict({**config_to_dict(config), "parallel": {"timeout_s": 60}})


def write_notebook(folder: Path, config: Path, code: str = NOTEBOOK) -> Path:
    """A notebook that trains."""
    parameters = nbformat.v4.new_code_cell(f'run_dir = ""\nconfig = {str(config)!r}\nlr = 1e-3\nnote = ""')
    parameters.metadata["tags"] = ["parameters"]
    path = folder / "train.ipynb"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    cells = [parameters, nbformat.v4.new_code_cell(code)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel}), path)
    return path


def submit(*words: str | Path) -> RunFolder:
    """Submit what the words of `biokit submit` stand for; returns the run folder, of an array: that of all its runs."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    submission = prepare(parser.parse_args(join_parameters(list(map(str, words)))))
    submission.write()
    submission.send()
    return submission.root


def job_of(folder: RunFolder) -> Job:
    """The job of a run folder, which there is."""
    job = read_job(folder)
    assert job is not None
    return job


def wait_for_outcome(cluster: Cluster, folder: RunFolder, *outcomes: str, timeout_s: float = JOB_S) -> Job:
    """Return when a job has said that it ended in one of these ways."""
    wait_until(lambda: job_of(folder).outcome in outcomes, timeout_s, lambda: explain(cluster, folder))
    return job_of(folder)


def wait_for_step(cluster: Cluster, folder: RunFolder, step: int, timeout_s: float = JOB_S) -> None:
    """Return when a training has done a step."""
    wait_until(lambda: last_step(folder) >= step, timeout_s, lambda: explain(cluster, folder))


def wait_for_state(cluster: Cluster, folder: RunFolder, *states: str, timeout_s: float = JOB_S) -> None:
    """Return when Slurm says one of these of a job."""

    def state() -> str:
        return cluster.ask("squeue", "-h", "-t", "all", "-j", job_of(folder).job_id, "-o", "%T", check=False)

    wait_until(lambda: state() in states, timeout_s, lambda: f"{state()}\n{explain(cluster, folder)}")


def last_step(folder: RunFolder) -> int:
    """The newest step in the metrics; 0: none."""
    lines = folder.read_metrics()
    return lines[-1]["step"] if lines else 0


def losses(folder: RunFolder) -> list[tuple[int, float, float | None]]:
    """The curve of a run."""
    return [(line["step"], line["loss"], line.get("val_loss")) for line in folder.read_metrics()]


def explain(cluster: Cluster, folder: RunFolder) -> str:
    """What the job, its supervisor and Slurm said, for a test that fails."""
    files = sorted([*folder.path.rglob("slurm-*.out"), *folder.path.rglob("supervisor.log")])
    files += sorted(folder.path.glob("lives/*/agents/*.log")) + sorted(folder.path.glob("lives/*/output/*.log"))
    parts = [f"--- {path}\n{path.read_text(errors='replace')[-2000:]}" for path in files]
    queue = cluster.ask("squeue", "-t", "all", check=False)
    return "\n".join([f"job {job_of(folder)}", queue, *parts, cluster.read_logs()])
