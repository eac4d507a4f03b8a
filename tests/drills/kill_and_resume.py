"""Drill: SIGKILL a training at any moment, start it again, and compare with the run that nobody disturbed.

Every second trial aims inside a save. A trial passes when the loss curve and the last weights are bitwise those of the
undisturbed run and no completed checkpoint was lost or altered on the way.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from biokit.checkpoint import PARTIAL, load_checkpoint
from biokit.config import RunConfig, config_from_dict
from biokit.errors import BiokitError
from biokit.runs import RunFolder
from tests.drills.outcome import Outcome

CONTEXT = multiprocessing.get_context("forkserver")
ITERATIONS, SAVE_INTERVAL, KILLS_PER_TRIAL = 24, 3, 2


@dataclass
class Trial:
    """What happened in one trial."""

    kills: int = 0
    kills_in_save: int = 0
    faults: list[str] = field(default_factory=list)


def make_config(run_dir: Path, dataset_path: str) -> RunConfig:
    """A training of seconds that uses everything that carries state: dropout, random SMILES, masks, a schedule."""
    return config_from_dict(
        {
            "run_dir": str(run_dir),
            "data": {"dataset_path": dataset_path, "limit_rows": 300, "task": "mask_aug", "max_length": 100},
            "model": {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "dropout": 0.1},
            "train": {
                "train_iters": ITERATIONS,
                "micro_batch_size": 8,
                "global_batch_size": 16,
                "save_interval": SAVE_INTERVAL,
                "eval_interval": 6,
                "eval_iters": 1,
                "early_stopping_patience": 3,
                "num_threads": 1,
                "progress": False,
                "tensorboard": False,
            },
        }
    )


def run_training(config: RunConfig) -> None:
    """Body of the child process."""
    from biokit.train import train

    train(config)


def start(config: RunConfig) -> multiprocessing.process.BaseProcess:
    process = CONTEXT.Process(target=run_training, args=(config,))
    process.start()
    return process


def whole_run(config: RunConfig) -> None:
    """Train to the end; a failing child ends the drill."""
    process = start(config)
    process.join()
    if process.exitcode:
        raise SystemExit(f"a training that nobody disturbed ended with exit code {process.exitcode}")


def kill_at(process: multiprocessing.process.BaseProcess, folder: RunFolder, delay_s: float, in_save: bool) -> bool:
    """SIGKILL after `delay_s`, or (`in_save`) that long after the next save began; True when a save was cut."""
    before = partials(folder)  # of an earlier life: its successor removes them
    deadline = time.monotonic() + 120
    while in_save and process.is_alive() and time.monotonic() < deadline:
        if partials(folder) - before:
            break
    until = time.monotonic() + delay_s
    while process.is_alive() and time.monotonic() < until:
        time.sleep(min(0.0005, max(0.0, until - time.monotonic())))
    if process.is_alive():
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return bool(partials(folder) - before)


def partials(folder: RunFolder) -> set[str]:
    """Names of the unfinished checkpoints; they hold the writer's process id."""
    return {path.name for path in folder.checkpoints.glob(f"{PARTIAL}*")}


def checkpoint_digests(folder: RunFolder) -> dict[int, str]:
    """Step -> manifest text of every completed checkpoint, each one fully verified."""
    digests = {}
    for step in folder.checkpoint_steps():
        load_checkpoint(folder.checkpoint_dir(step))
        digests[step] = (folder.checkpoint_dir(step) / "manifest.json").read_text()
    return digests


def losses(folder: RunFolder) -> list[tuple[int, float, float | None]]:
    return [(line["step"], line["loss"], line.get("val_loss")) for line in folder.read_metrics()]


def run_trial(number: int, root: Path, reference: RunFolder, seconds: float, rng: random.Random) -> Trial:
    """One training, killed a few times, then left to end."""
    trial = Trial()
    config = make_config(root / f"trial_{number:03d}", str(reference.path / "data"))
    folder = RunFolder(config.run_dir)
    known: dict[int, str] = {}
    for _ in range(KILLS_PER_TRIAL):
        in_save = number % 2 == 1
        process = start(config)
        cut = kill_at(process, folder, rng.uniform(0, 0.008) if in_save else rng.uniform(0, seconds), in_save)
        process.join()
        trial.kills += process.exitcode == -signal.SIGKILL
        trial.kills_in_save += cut
        try:
            found = checkpoint_digests(folder)
        except BiokitError as error:
            trial.faults.append(f"a completed checkpoint is broken: {error}")
            return trial
        trial.faults += [f"checkpoint {step} was lost or altered" for step in known if found.get(step) != known[step]]
        known = found
    process = start(config)
    process.join()
    if process.exitcode:
        trial.faults.append(f"the resumed run ended with exit code {process.exitcode}")
    elif losses(folder) != losses(reference):
        trial.faults.append("the loss curve differs from the undisturbed one")
    elif last_weights(folder) != last_weights(reference):
        trial.faults.append("the last weights differ from the undisturbed ones")
    return trial


def last_weights(folder: RunFolder) -> bytes:
    return (folder.checkpoint_dir(ITERATIONS) / "model.safetensors").read_bytes()


def undisturbed_run(root: Path) -> tuple[RunFolder, float]:
    """The run to compare with, and how long a run takes from a ready store."""
    CONTEXT.set_forkserver_preload(["biokit.train", "biokit.chem.molecules", "biokit.kernels.smiles_scanner"])
    config = make_config(root / "reference", "wehi_mols")
    whole_run(config)
    reference = RunFolder(config.run_dir)
    again = make_config(root / "timed", str(reference.path / "data"))
    begun = time.monotonic()
    whole_run(again)
    return reference, time.monotonic() - begun


def run_drill(trials: int, seed: int) -> Outcome:
    """Trials on one process."""
    rng, started = random.Random(seed), time.monotonic()
    failed = kills = kills_in_save = 0
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        reference, seconds = undisturbed_run(root)
        for number in range(trials):
            trial = run_trial(number, root, reference, seconds, rng)
            failed += bool(trial.faults)
            kills += trial.kills
            kills_in_save += trial.kills_in_save
            aim = "in a save" if number % 2 else "at random"
            print(f"Single {number + 1}/{trials} ({aim}): {'; '.join(trial.faults) or 'bitwise equal'}", flush=True)
    noted = f"{kills} kills, {kills_in_save} of them inside a save"
    return Outcome("one process killed, Single", trials, failed, noted, time.monotonic() - started)
