"""Saving and loading a training's state against `torch.save` and torch's distributed checkpoint (DCP): wall seconds.

The same weights and AdamW moments, from and into the same live model; files lie in the page cache when they are read.
What each does beyond writing bytes:

    ours                 gathers a copy, safetensors, sha256 of every file, fsync of files and folders
    torch.save           CRC-32 (its archive's own); no fsync. Also shown followed by fsync
    DCP                  fsync; no checksum. One process, which writes one file
    ours, beside         (`train.async_save`) what the training waits for: the gathering of the copy

Loading with the check reads every file twice: sha256 against the manifest, in parallel over the files, then tensors.
`torch.load` is called with `weights_only`.
"""

from __future__ import annotations

import functools
import gc
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from biokit.checkpoint import CheckpointWriter, load_checkpoint, save_checkpoint
from biokit.config import ModelConfig
from biokit.parallel.grid import Layout
from biokit.parallel.single import Single
from biokit.runs import RunFolder, flush_to_disk
from tests.bench.rigs import Rig, read_batches, share, start
from tests.bench.timing import Row, compare_times
from tests.distributed import Ranks

MODEL = ModelConfig(preset="small", dropout=0.1)  # 44.7 million parameters: 536 MB with moments
GATHERED = (
    Layout("Zero1", data=2),
    Layout("Zero3", data=2),
    Layout("Pipeline", pipeline=2),
    Layout("ThreeD", tensor=2),
)
STEP = 1
SAVE, BESIDE = "save, ours (sha256, fsync)", "save beside the training, ours: what it waits for"
LOAD, UNCHECKED = "load, ours (sha256 checked)", "load, ours, unchecked"
SYNCED, PLAIN, DCP = "`torch.save`, then fsync", "`torch.save`", "DCP"

Work = Callable[[], object]


class Contenders:
    """Ways to save and load the state of one training, each in a folder of its own."""

    def __init__(self, strategy: Single, folder: Path) -> None:
        self.strategy, self.folder = strategy, folder
        self.model, self.optimizer = strategy.model, strategy.optimizer
        self.ours, self.beside = RunFolder(folder / "ours"), RunFolder(folder / "beside")
        self.writer = CheckpointWriter(self.beside, True, 0, 0, "loss")

    def saves(self) -> dict[str, Work]:
        """By what is said of them."""
        return {
            SAVE: lambda: save_checkpoint(self.ours, *self._state()),
            SYNCED: lambda: self._torch_save(self.folder / "synced.pt", flush=True),
            PLAIN: lambda: self._torch_save(self.folder / "plain.pt", flush=False),
            DCP: lambda: dcp.save(self._nested(), checkpoint_id=self.folder / "dcp"),
            BESIDE: lambda: self.writer.write(*self._state()),
        }

    def loads(self) -> dict[str, Work]:
        """By what is said of them; each reads what its save wrote."""
        return {
            LOAD: lambda: self._load(check=True),
            UNCHECKED: lambda: self._load(check=False),
            "`torch.load`": self._torch_load,
            DCP: self._dcp_load,
        }

    def settle(self) -> None:
        """Have the disk hold everything, so that no save waits for the bytes of the one before it."""
        self.writer.wait()
        for path in self.folder.rglob("*"):
            flush_to_disk(path)

    def clear(self) -> None:
        """Remove what was saved."""
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _state(self) -> tuple[Any, ...]:
        return STEP, self.strategy.model_state(), self.strategy.optimizer_state(), {}, {}, ""

    def _load(self, check: bool) -> None:
        saved = load_checkpoint(self.ours.checkpoint_dir(STEP), check)
        self.strategy.load(saved.model, saved.optimizer, {})

    def _torch_save(self, path: Path, flush: bool) -> None:
        torch.save({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, path)
        if flush:
            flush_to_disk(path)

    def _torch_load(self) -> None:
        state = torch.load(self.folder / "plain.pt", weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])

    def _nested(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def _dcp_load(self) -> None:
        state = self._nested()
        dcp.load(state, checkpoint_id=self.folder / "dcp")
        set_state_dict(self.model, self.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def measure(model: ModelConfig = MODEL, rounds: int = 5) -> list[Row]:
    """Rows of saving, of loading, of the check; then what gathering takes on two ranks."""
    rig = Rig(Layout(), model, 4, 4)
    with start(rig) as strategy, tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")  # DCP, of being alone
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
        assert isinstance(strategy, Single)
        batch = share(read_batches(4, 1)[0], rig, strategy)
        strategy.train_batch(batch.micros, batch.num_valid, batch.seeds, 1e-4)
        contenders = Contenders(strategy, Path(name))
        saves, loads = _time_rounds(contenders, rounds)
        contenders.writer.close()
        num_bytes = 12 * sum(parameter.numel() for parameter in strategy.model.parameters())
    size = f"{num_bytes / 1e6:,.0f} MB"
    rows = [compare_times(f"{SAVE}, {size}", peer, saves[SAVE], saves[peer]) for peer in (SYNCED, PLAIN, DCP)]
    rows.append(compare_times(f"{BESIDE}, {size}", "the whole save", saves[BESIDE], saves[SAVE]))
    rows += [compare_times(f"{LOAD}, {size}", peer, loads[LOAD], loads[peer]) for peer in ("`torch.load`", DCP)]
    rows.append(compare_times(f"{LOAD}, {size}", "the same, unchecked", loads[LOAD], loads[UNCHECKED]))
    return rows


def measure_gathering(layout: Layout, model: ModelConfig = MODEL, rounds: int = 3) -> list[Row]:
    """What a save adds under a strategy of several ranks: gathering the whole state on one, against copying it."""
    alone = _time_gathering(Rig(Layout(), model, 4, 8), rounds)
    with Ranks(layout.world_size, timeout_s=300.0) as ranks:
        gathered = ranks.run(_time_gathering, Rig(layout, model, 4, 8), rounds)[0]
    return [compare_times(f"gather the state for a save, {layout}", "a copy under Single", gathered, alone)]


def measure_all() -> list[Row]:
    return measure() + [row for layout in GATHERED for row in measure_gathering(layout)]


def _time_rounds(contenders: Contenders, rounds: int) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Seconds of each way to save and to load; a warm-up round goes before."""
    saves: dict[str, list[float]] = {}
    loads: dict[str, list[float]] = {}
    for _ in range(rounds + 1):
        contenders.clear()
        for works, found in ((contenders.saves(), saves), (contenders.loads(), loads)):
            for name, work in works.items():
                found.setdefault(name, []).append(_time(work))
                contenders.settle()
    return _without_first(saves), _without_first(loads)


def _without_first(found: Mapping[str, list[float]]) -> dict[str, list[float]]:
    return {name: seconds[1:] for name, seconds in found.items()}


def _time_gathering(rig: Rig, rounds: int) -> list[float]:
    """On every rank: seconds from a common start until the main process has everything."""
    with start(rig) as strategy:
        seconds = []
        for _ in range(rounds + 1):
            strategy.processes.barrier()
            seconds.append(_time(functools.partial(_gather, strategy)))
        return seconds[1:]


def _gather(strategy: Any) -> None:
    strategy.model_state()
    strategy.optimizer_state()


def _time(work: Work) -> float:
    gc.collect()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
