"""Drills on checkpoints alone: a save that is killed, a disk that is full, a bit that flips."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import tempfile
import time
from pathlib import Path

import torch

from biokit.checkpoint import (
    PARTIAL,
    CheckpointWriter,
    load_checkpoint,
    newest_checkpoint,
    remove_partial,
    save_checkpoint,
)
from biokit.errors import BiokitError
from biokit.runs import RunFolder
from tests.distributed import CONTEXT
from tests.drills.outcome import Outcome

NUM_TENSORS, SIZE = 24, 20_000  # 1.9 MB of weights, twice that of moments: a save of some 20 ms


def tensors(step: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights and moments that tell the step they belong to."""
    model = {f"layer.{i}.weight": torch.full((SIZE,), float(step)) for i in range(NUM_TENSORS)}
    return model, {f"{moment}.{name}": t.clone() for name, t in model.items() for moment in ("exp_avg", "exp_avg_sq")}


def save_for_ever(run_dir: str, beside: bool) -> None:
    """Body of the saver: one checkpoint after another, each step noted once it is whole."""
    torch.set_num_threads(1)
    folder = RunFolder(run_dir)
    writer = CheckpointWriter(folder, beside, keep_last=2, keep_best=0, best_metric="val_loss")
    for step in range(1, 100_000):
        writer.write(step, *tensors(step), {"step": step}, {"config": {}}, "<PAD>\n")
        writer.wait()
        (folder.path / "done").write_text(str(step))


def kill_a_save(root: Path, number: int, rng: random.Random) -> tuple[str, bool]:
    """(what is wrong, whether a save was cut)."""
    folder = RunFolder(root / f"saves_{number:03d}")
    folder.create()
    saver = CONTEXT.Process(target=save_for_ever, args=(str(folder.path), number % 2 == 1))
    saver.start()
    done, deadline = folder.path / "done", time.monotonic() + 60
    while not done.exists() and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(rng.uniform(0.0, 0.12))
    saver.kill()
    saver.join()
    if saver.exitcode != -signal.SIGKILL:
        return f"the saver had ended with {saver.exitcode}", False
    cut = any(folder.checkpoints.glob(f"{PARTIAL}*"))
    completed = int(done.read_text() or 0)
    remove_partial(folder)
    newest = newest_checkpoint(folder)
    if newest is None:
        return "no checkpoint is left", cut
    try:
        found = load_checkpoint(newest)
    except BiokitError as error:
        return f"the newest checkpoint is broken: {error}", cut
    wrong = [name for name in found.model if not torch.equal(found.model[name], tensors(found.state["step"])[0][name])]
    behind = found.state["step"] < completed
    shutil.rmtree(folder.path)
    return f"{', '.join(wrong)} are of another step" if wrong else "a completed one is lost" if behind else "", cut


def cut_saves(trials: int, seed: int) -> Outcome:
    """SIGKILL inside a save; every second saver writes in a thread beside."""
    CONTEXT.set_forkserver_preload(["tests.preload", "biokit.train", "biokit.chem.molecules"])
    rng, started, failed, cuts = random.Random(seed), time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(trials):
            fault, cut = kill_a_save(Path(scratch), number, rng)
            failed, cuts = failed + bool(fault), cuts + cut
            if fault:
                print(f"save {number + 1}/{trials}: {fault}", flush=True)
    noted = f"{cuts} killed inside a save, half of them written beside"
    if not cuts:
        failed, noted = trials, "no save was cut: nothing is shown"
    return Outcome("saver killed", trials, failed, noted, time.monotonic() - started)


def save_on_a_full_disk(run_dir: str, limit: int) -> None:
    """Body of a saver whose files may not grow beyond `limit` bytes; exits with 3 where the error is ours."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        save_checkpoint(RunFolder(run_dir), 2, *tensors(2), {"step": 2}, {"config": {}}, "<PAD>\n")
    except BiokitError:
        os._exit(3)


def fill_the_disk(trials: int, seed: int) -> Outcome:
    """A write that fails anywhere in the second save: one clear error, and the first checkpoint is as it was."""
    CONTEXT.set_forkserver_preload(["tests.preload", "biokit.train", "biokit.chem.molecules"])
    rng, started, failed = random.Random(seed), time.monotonic(), 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch) / "run")
        folder.create()
        first = save_checkpoint(folder, 1, *tensors(1), {"step": 1}, {"config": {}}, "<PAD>\n")
        largest = max(path.stat().st_size for path in first.iterdir())
        for number in range(trials):
            limit = rng.choice([0, 1, 5, rng.randrange(largest), rng.randrange(largest)])
            saver = CONTEXT.Process(target=save_on_a_full_disk, args=(str(folder.path), limit))
            saver.start()
            saver.join()
            left = sorted(path.name for path in folder.checkpoints.iterdir())
            faults = [] if saver.exitcode == 3 else [f"the saver ended with {saver.exitcode}"]
            faults += [] if left == [first.name] else [f"left behind: {left}"]
            load_checkpoint(first)
            failed += bool(faults)
            if faults:
                print(f"full disk {number + 1}/{trials} ({limit} bytes): {'; '.join(faults)}", flush=True)
    return Outcome("disk full in a save", trials, failed, "the checkpoint before it loads", time.monotonic() - started)


def flip_bits(trials: int, seed: int) -> Outcome:
    """One bit of one file of a checkpoint: found before a tensor is used."""
    rng, started, silent, where = random.Random(seed), time.monotonic(), 0, dict[str, int]()
    with tempfile.TemporaryDirectory() as scratch:
        folder = RunFolder(Path(scratch) / "run")
        folder.create()
        path = save_checkpoint(folder, 1, *tensors(1), {"step": 1, "note": "x" * 50}, {"config": {}}, "<PAD>\n?\n")
        files = sorted(path.iterdir())
        for number in range(trials):
            file = files[number % len(files)]
            whole = file.read_bytes()
            place, bit = rng.randrange(len(whole)), 1 << rng.randrange(8)
            file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            try:
                load_checkpoint(path)
                silent += 1
                print(f"bit {number + 1}/{trials}: {file.name} byte {place} ^ {bit} went unnoticed", flush=True)
            except BiokitError:
                where[file.name] = where.get(file.name, 0) + 1
            file.write_bytes(whole)
        load_checkpoint(path)
    noted = ", ".join(f"{name} {count}" for name, count in sorted(where.items()))
    return Outcome("one bit flipped", trials, silent, f"found in {noted}", time.monotonic() - started)
