"""Drills: a rank of a training under a supervisor is killed or stopped, or the supervisor is asked to end.

A trial passes when the run went on by itself to its end with the losses and the last weights of the run that nobody
disturbed, or ended with its checkpoint in time; and when no process of it is left.
"""

from __future__ import annotations

import json
import os
import random
import signal
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from biokit.config import RunConfig, config_from_dict, config_to_dict, config_to_yaml
from biokit.launch.orders import Order
from biokit.launch.supervision.supervisor import Limits
from biokit.runs import RunFolder
from tests.drills.kill_a_rank import LIFE_S, last_step
from tests.drills.kill_and_resume import ITERATIONS, SAVE_INTERVAL, last_weights, losses, make_config
from tests.drills.outcome import Outcome
from tests.supervised import Supervised

LAYOUTS = {2: {}, 4: {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}}
STRATEGIES = {2: "DDP", 4: "ThreeD"}
NAMES = {signal.SIGKILL: "killed", signal.SIGSTOP: "stopped"}
SAVED_WITHIN_S = 30.0


@dataclass(frozen=True)
class Trial:
    """What one trial found: what is wrong, and the seconds that the run took."""

    faults: list[str]
    seconds: float


def configure(run_dir: Path, dataset_path: str, num_ranks: int, **train: object) -> RunConfig:
    """A training of seconds on so many ranks."""
    tree = config_to_dict(make_config(run_dir, dataset_path))
    tree |= {"strategy": STRATEGIES[num_ranks], "parallel": {**tree["parallel"], **LAYOUTS[num_ranks], "timeout_s": 60}}
    tree["train"] |= train
    return config_from_dict(tree)


def start(config: RunConfig, num_ranks: int, limits: Limits) -> Supervised:
    """Give a training to a supervisor."""
    folder = RunFolder(config.run_dir)
    folder.create()
    asked = folder.logs / "config_asked.yaml"
    asked.write_text(config_to_yaml(config), encoding="utf-8")
    torchrun = ("--nproc-per-node", str(num_ranks))
    order = Order("train", ("-m", "biokit", "train", str(asked)), torchrun, max_lives=3, backoff_s=0.1)
    return Supervised(folder.path, order, limits)


def count_orphans(run: Supervised) -> list[str]:
    """What is wrong where processes of a run are left."""
    left = run.left()
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return [f"{len(left)} processes are left"] if left else []


def strike(run: Supervised, number: int, rng: random.Random, num_ranks: int) -> list[str]:
    """Send one rank a signal at some step of the first life."""
    victim, aim = rng.randrange(num_ranks), rng.randrange(1, ITERATIONS - 2)
    run.wait_until(lambda: last_step(run.folder) >= aim, LIFE_S)
    time.sleep(rng.uniform(0.0, 0.02))
    who = json.loads(run.folder.life(1).rank_file(victim).read_text())
    if "ended" in who:
        return ["the rank had ended before it was struck"]
    os.kill(who["pid"], number)
    return []


def run_trial(
    config: RunConfig, reference: RunFolder, rng: random.Random, number: int, num_ranks: int, limits: Limits
) -> Trial:
    """One training that loses a rank and goes on by itself."""
    begun, folder = time.monotonic(), RunFolder(config.run_dir)
    run = start(config, num_ranks, limits)
    faults = strike(run, number, rng, num_ranks)
    reached = last_step(folder)
    code = run.wait(LIFE_S)
    if code or run.state.outcome != "finished":
        return Trial([*faults, f"the run {run.state.outcome}:\n{run.log}", *count_orphans(run)], 0.0)
    seconds = time.monotonic() - begun
    if folder.last_life() != 2:
        faults.append(f"it had {folder.last_life()} lives")
    if reached - folder.read_manifest()["resumed_from"] > SAVE_INTERVAL + 1:  # one more may be done by now
        faults.append("more steps were done again than lie between two checkpoints")
    if losses(folder) != losses(reference):
        faults.append("the loss curve differs from the undisturbed one")
    if last_weights(folder) != last_weights(reference):
        faults.append("the last weights differ from the undisturbed ones")
    return Trial(faults + count_orphans(run), seconds)


def lose_a_rank(trials: int, seed: int, number: int, num_ranks: int, limits: Limits | None = None) -> Outcome:
    """Trials in which one of `num_ranks` ranks gets a signal."""
    rng, started, failed, seconds = random.Random(seed), time.monotonic(), 0, []
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        config = configure(root / "reference", "wehi_mols", num_ranks)
        undisturbed = start(config, num_ranks, Limits())
        if undisturbed.wait(LIFE_S):
            raise SystemExit(f"a training that nobody disturbed failed:\n{undisturbed.log}")
        reference = RunFolder(config.run_dir)
        for trial in range(trials):
            again = configure(root / f"trial_{trial:03d}", str(reference.path / "data"), num_ranks)
            found = run_trial(again, reference, rng, number, num_ranks, limits or Limits())
            failed += bool(found.faults)
            seconds.append(found.seconds)
            what = f"{num_ranks} ranks, one {NAMES[signal.Signals(number)]} {trial + 1}/{trials}"
            print(f"{what}: {'; '.join(found.faults) or 'bitwise equal'} ({found.seconds:.1f} s)", flush=True)
    name = f"one of {num_ranks} ranks {NAMES[signal.Signals(number)]}, supervised, {STRATEGIES[num_ranks]}"
    noted = f"resumed by itself, {sum(seconds) / len(seconds):.0f} s a run; 0 orphans"
    return Outcome(name, trials, failed, noted, time.monotonic() - started)


def terminate_once(config: RunConfig, rng: random.Random, num_ranks: int) -> Trial:
    """SIGTERM to the supervisor at any moment of a training."""
    run = start(config, num_ranks, Limits())
    aim = rng.randrange(1, ITERATIONS)
    run.wait_until(lambda: last_step(run.folder) >= aim, LIFE_S)
    time.sleep(rng.uniform(0.0, 0.1))
    begun = time.monotonic()
    run.process.terminate()
    code = run.wait(LIFE_S)
    seconds = time.monotonic() - begun
    manifest = run.folder.read_manifest()
    faults = [] if code == 0 else [f"exit code {code}:\n{run.log}"]
    if manifest["status"] != "stopped" or run.folder.checkpoint_steps()[-1:] != [manifest["step"]]:
        faults.append(f"{manifest['status']} at step {manifest['step']}, saved {run.folder.checkpoint_steps()}")
    if manifest["step"] != last_step(run.folder):
        faults.append(f"step {last_step(run.folder)} is lost")
    if seconds > SAVED_WITHIN_S:
        faults.append(f"it took {seconds:.0f} s")
    return Trial(faults + count_orphans(run), seconds)


def terminate(trials: int, seed: int, num_ranks: int = 2) -> Outcome:
    """Trials in which the supervisor gets SIGTERM, as a scheduler sends it before the time limit."""
    rng, started, failed, slowest = random.Random(seed), time.monotonic(), 0, 0.0
    with tempfile.TemporaryDirectory() as scratch:
        data = "wehi_mols"
        for trial in range(trials):
            run_dir = Path(scratch) / f"trial_{trial:03d}"
            long = {"train_iters": 100_000, "eval_interval": 0, "early_stopping_patience": 0, "save_interval": 0}
            found = terminate_once(configure(run_dir, data, num_ranks, **long), rng, num_ranks)
            data = str(Path(scratch) / "trial_000" / "data")
            failed, slowest = failed + bool(found.faults), max(slowest, found.seconds)
            print(
                f"SIGTERM {trial + 1}/{trials}: {'; '.join(found.faults) or 'saved'} ({found.seconds:.1f} s)",
                flush=True,
            )
    noted = f"saved and exit 0, at most {slowest:.1f} s after the signal; 0 orphans"
    return Outcome(f"SIGTERM, supervised, {num_ranks} ranks", trials, failed, noted, time.monotonic() - started)
