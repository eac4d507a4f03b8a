"""The run folder: the one place where a training, a notebook, a dashboard and a job meet.

Layout (only this module knows it):
    config.yaml  ds_config.json  manifest.json  metrics/rank_NNNNN.jsonl  logs/  checkpoints/step_NNNNNNNN/
    tensorboard/  STOP
    launch.json  supervisors/node_NNNN.json  nodes/node_NNNN.json  lives/NNNN/{ranks,errors,stacks,output,agents}/
    failure.json  hang.json  cell.py  given.safetensors  result.safetensors
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from biokit.errors import RunError
from biokit.safe_files import load_object, read_object, read_part, to_number, to_whole

STEP_DIGITS = 8
LIFE_DIGITS = NODE_DIGITS = 4
RANK_DIGITS = 5
LEFTOVER = ".partial"
OWN_PARTS = ("checkpoints", "lives", "logs", "metrics", "nodes", "supervisors", "tensorboard")
MAX_METRICS_BYTES = 1 << 30
MAX_STEP = 1 << 63
MAX_SHOWN = 200  # characters of a path that is refused


@dataclass(frozen=True)
class LifeFolder:
    """What one launch of a run's processes leaves: a run that is started again after a fault has several lives."""

    path: Path

    def create(self) -> None:
        """Make its parts."""
        for part in ("ranks", "errors", "stacks", "output", "agents"):
            (self.path / part).mkdir(parents=True, exist_ok=True)

    def rank_file(self, rank: int) -> Path:
        """Who a rank is: `rank, local_rank, node, host, pid, pid_started, time`; it writes this JSON when it starts."""
        return self.path / "ranks" / f"rank_{rank:0{RANK_DIGITS}d}.json"

    def error_file(self, rank: int) -> Path:
        """The exception that ended a rank, as JSON."""
        return self.path / "errors" / f"rank_{rank:0{RANK_DIGITS}d}.json"

    def stack_file(self, rank: int) -> Path:
        """Python stacks of a rank, appended at each request and at a fatal signal."""
        return self.path / "stacks" / f"rank_{rank:0{RANK_DIGITS}d}.txt"

    def output_file(self, rank: int) -> Path:
        """What a rank printed: standard output and error together, in order."""
        return self.path / "output" / f"rank_{rank:0{RANK_DIGITS}d}.log"

    def agent_file(self, node: int) -> Path:
        """How torchrun's agent on a node ended: `code` and the exit codes of its ranks, as JSON."""
        return self.path / "agents" / f"node_{node:0{NODE_DIGITS}d}.json"

    def log_of_agent_of(self, rank: int) -> Path:
        """What torchrun's agent of a rank's node printed."""
        return self.agent_log(to_whole(read_object(self.rank_file(rank)).get("node")))

    def agent_log(self, node: int) -> Path:
        """What torchrun's agent on a node said itself."""
        return self.path / "agents" / f"node_{node:0{NODE_DIGITS}d}.log"


class RunFolder:
    """Reads and writes the parts of one run folder; any process may open any run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    @property
    def config_file(self) -> Path:
        """The configuration, as YAML that `load_config` reads."""
        return self.path / "config.yaml"

    @property
    def manifest_file(self) -> Path:
        """What the run is and where it stands, as JSON."""
        return self.path / "manifest.json"

    @property
    def deepspeed_file(self) -> Path:
        """The DeepSpeed configuration that is in effect, where DeepSpeed runs."""
        return self.path / "ds_config.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of all checkpoints."""
        return self.path / "checkpoints"

    @property
    def logs(self) -> Path:
        """What the supervisor said, and what was asked of it."""
        return self.path / "logs"

    @property
    def tensorboard(self) -> Path:
        """Event files."""
        return self.path / "tensorboard"

    @property
    def stop_file(self) -> Path:
        """Its presence asks the run to stop."""
        return self.path / "STOP"

    @property
    def launch_file(self) -> Path:
        """What was asked to be started, and from which state of the code, as JSON."""
        return self.path / "launch.json"

    @property
    def failure_file(self) -> Path:
        """Why the last life failed, as JSON."""
        return self.path / "failure.json"

    @property
    def hang_file(self) -> Path:
        """Where each rank stood when the time was up, as JSON."""
        return self.path / "hang.json"

    @property
    def result_file(self) -> Path:
        """Values that rank 0 gave back."""
        return self.path / "result.safetensors"

    def supervisor_file(self, node: int = 0) -> Path:
        """Where the supervisor of a node stands, as JSON."""
        return self.path / "supervisors" / f"node_{node:0{NODE_DIGITS}d}.json"

    def node_file(self, node: int) -> Path:
        """What the supervisor of a node says to those of the other nodes, as JSON."""
        return self.path / "nodes" / f"node_{node:0{NODE_DIGITS}d}.json"

    def life(self, number: int) -> LifeFolder:
        """A launch of the processes, counted from 1."""
        return LifeFolder(self.path / "lives" / f"{number:0{LIFE_DIGITS}d}")

    def last_life(self) -> int:
        """Number of the newest launch; 0: none yet."""
        found = (p.name for p in (self.path / "lives").glob("*") if p.is_dir())
        return max((int(name) for name in found if name.isascii() and name.isdecimal()), default=0)

    def metrics_file(self, rank: int = 0) -> Path:
        """One JSON object a line: `step, loss, lr, tokens_per_s, samples_per_s, time` and more."""
        return self.path / "metrics" / f"rank_{rank:0{RANK_DIGITS}d}.jsonl"

    def checkpoint_dir(self, step: int) -> Path:
        """The folder of the checkpoint of a step, whether there is one or not."""
        return self.checkpoints / f"step_{step:0{STEP_DIGITS}d}"

    def create(self) -> None:
        """Make the folder and its fixed parts; an existing run is left as it is.

        Raises:
            RunError: the path is a file, or cannot be written.
        """
        try:
            for part in (self.path, self.checkpoints, self.logs, self.path / "metrics"):
                part.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RunError(f"run folder {self.path}", f"it cannot be made ({error})", "Give another run_dir") from error

    def check_path(self) -> None:
        """Nothing, where there is such a folder or one could be made.

        Raises:
            RunError: the path is a file, or one that no folder can have.
        """
        try:
            is_folder = stat.S_ISDIR(self.path.stat().st_mode)
        except FileNotFoundError:
            return
        except (OSError, ValueError) as error:  # ValueError: a null byte
            found = f"there can be none ({getattr(error, 'strerror', '') or error})"
            raise RunError(f"run folder {str(self.path)[:MAX_SHOWN]}", found, "Give another path") from error
        if not is_folder:
            raise RunError(f"run folder {self.path}", "it is a file", "Give another path")

    def checkpoint_steps(self) -> list[int]:
        """Steps of the finished checkpoints, ascending. Unfinished ones bear another name and do not count."""
        found = (p.name.removeprefix("step_") for p in self.checkpoints.glob("step_*") if p.is_dir())
        steps = sorted(int(name) for name in found if name.isascii() and name.isdecimal())
        return [step for step in steps if self.checkpoint_dir(step).is_dir()]  # other spellings are not ours

    def request_stop(self) -> None:
        """Ask the run to save a checkpoint at the next step boundary and end."""
        if not self.path.is_dir():
            raise RunError(f"stop {self.path}", "there is no such run folder", "Check the path")
        self.stop_file.touch()

    def stop_requested(self) -> bool:
        """True while the STOP file is there."""
        return self.stop_file.exists()

    def clear_stop(self) -> None:
        """Take the request back."""
        self.stop_file.unlink(missing_ok=True)

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the run for one trainer; the lock ends with the process, however it ends.

        Raises:
            RunError: another process holds it.
        """
        asked = f"run {self.path}"
        try:
            lock = take_lock(self.path / ".lock")
        except BlockingIOError as error:
            found = "another process is training in it"
            raise RunError(asked, found, "Wait, stop it, or give another run_dir") from error
        except OSError as error:
            do = "Give a run_dir that can be written, or on another disk"
            raise RunError(asked, f"it cannot be locked ({error})", do) from error
        with lock:
            self._remove_leftovers()
            yield

    def _remove_leftovers(self) -> None:
        """Small files that a killed process was writing."""
        for folder in (self.path, self.metrics_file().parent):
            for path in folder.glob(f".*{LEFTOVER}"):
                if path.is_file():  # a folder is a data set half made: who makes it anew removes it
                    path.unlink(missing_ok=True)

    def write_config(self, text: str) -> None:
        """Replace `config.yaml`."""
        write_atomically(self.config_file, text)

    def write_manifest(self, manifest: dict[str, Any]) -> None:
        """Replace `manifest.json`."""
        write_atomically(self.manifest_file, json.dumps(manifest, indent=1, sort_keys=True) + "\n")

    def write_deepspeed_config(self, config: Mapping[str, Any]) -> None:
        """Replace `ds_config.json`."""
        write_atomically(self.deepspeed_file, json.dumps(dict(config), indent=1) + "\n")

    def read_manifest(self) -> dict[str, Any]:
        """The manifest: status (`running`, `finished`, `stopped`, `failed`), step, versions, hashes.

        Raises:
            RunError: there is none, or it is not JSON.
        """
        try:
            return load_object(self.manifest_file)
        except (OSError, ValueError) as error:
            raise RunError(f"run {self.path}", f"its manifest cannot be read ({error})", "Check the path") from error

    def update_manifest(self, **values: Any) -> dict[str, Any]:
        """Add or replace entries of the manifest; returns the whole."""
        manifest = self.read_manifest() if self.manifest_file.exists() else {}
        manifest.update(values)
        self.write_manifest(manifest)
        return manifest

    def read_metrics(self, rank: int = 0) -> list[dict[str, Any]]:
        """All whole metrics lines of a rank, oldest first.

        A torn last line (killed writer) is left out, and so are lines that a crash of the machine has made unreadable.
        """
        try:
            raw = read_part(self.metrics_file(rank), MAX_METRICS_BYTES)
        except OSError:
            return []
        whole = raw[: raw.rfind(b"\n") + 1]
        lines = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError, RecursionError):
                lines.append(json.loads(line))
        return [line for line in lines if _is_metrics(line)]


def _is_metrics(line: Any) -> bool:
    """Whether a line says of which step it is, and when it was written, if it says it, by a number."""
    if not isinstance(line, dict) or type(line.get("step")) is not int or not 0 <= line["step"] < MAX_STEP:
        return False
    return "time" not in line or to_number(line["time"], -1.0) >= 0


class MetricsWriter:
    """Appends one JSON object a line to a rank's metrics file. A resumed run first drops the lines it will redo."""

    def __init__(self, folder: RunFolder, rank: int = 0, resume_step: int = 0) -> None:
        kept = [line for line in folder.read_metrics(rank) if line["step"] <= resume_step] if resume_step else []
        path = folder.metrics_file(rank)
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file: IO[str] = path.open("a")

    def write(self, line: dict[str, Any]) -> None:
        """Write one line with the wall-clock `time` (unix seconds) added; it reaches the operating system at once.

        Raises:
            RunError: the disk is full, or the file cannot be written.
        """
        try:
            self._file.write(json.dumps({**line, "time": round(time.time(), 3)}, allow_nan=False) + "\n")
            self._file.flush()
        except OSError as error:
            found = f"it cannot be written ({error})"
            raise RunError(
                f"metrics {self._file.name}", found, "Free disk space and start again: the run resumes"
            ) from error

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what a full disk did not take was said by `write`
            self._file.close()


def take_lock(path: Path) -> IO[str]:
    """Open a file and lock it for one process; closing it, or the end of the process, gives the lock back.

    Raises:
        BlockingIOError: another process has it. OSError: the file cannot be written, or its disk knows no locks.
    """
    file = path.open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def flush_to_disk(path: Path) -> None:
    """Have the disk hold what was written to a file or folder before going on."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def describe_file(path: Path) -> dict[str, Any]:
    """Size and sha256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_atomically(path: Path, text: str) -> None:
    """Replace a small text file in one step: readers see the old or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=LEFTOVER)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
