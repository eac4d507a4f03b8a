"""A real kernel for tests: cells in, outputs out; and small notebooks."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
import psutil
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel
from jupyter_core.utils import ensure_event_loop

REPOSITORY = Path(__file__).parents[1]
CELL_S = 90.0


@dataclass
class CellOutput:
    """What a cell gave.

    Attributes:
        times: when each piece of the text came, unix seconds.
        data: of each display and result, by MIME type.
    """

    status: str = ""
    text: str = ""
    times: list[float] = field(default_factory=list)
    data: list[dict[str, Any]] = field(default_factory=list)
    error: dict[str, Any] = field(default_factory=dict)


@dataclass
class Kernel:
    """A kernel that has loaded biokit's magics, in a folder of its own."""

    manager: KernelManager
    client: BlockingKernelClient

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self.manager.provisioner.pid)

    def run(self, code: str, seen: Callable[[CellOutput], object] = lambda output: None) -> CellOutput:
        """Run a cell; `seen` is called after each output."""
        output = CellOutput()

        def take(message: dict[str, Any]) -> None:
            content = message["content"]
            if message["msg_type"] == "stream":
                output.text += content["text"]
                output.times.append(time.time())
            elif message["msg_type"] in ("display_data", "execute_result"):
                output.data.append(content["data"])
            elif message["msg_type"] == "error":
                output.error = content
            seen(output)

        # stop_on_error: else a kernel drops, for some milliseconds after a cell that failed, whatever it is asked
        reply = self.client.execute_interactive(
            code, timeout=CELL_S, output_hook=take, store_history=False, stop_on_error=False
        )
        output.status = reply["content"]["status"]
        return output

    def value(self, expression: str) -> str:
        """The repr of an expression in the kernel."""
        return self.run(f"print(repr(({expression})))").text.rstrip("\n")


@contextmanager
def open_kernel(folder: Path, **variables: str) -> Iterator[Kernel]:
    """A kernel that runs in a folder; what it started is looked for by the test, and it is killed at the end."""
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    manager, client = _start_kernel(str(folder), environment)
    try:
        kernel = Kernel(manager, client)
        assert kernel.run("%load_ext biokit").status == "ok"
        yield kernel
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
        manager.cleanup_resources()


def _start_kernel(folder: str, environment: dict[str, str]) -> tuple[KernelManager, BlockingKernelClient]:
    """A kernel that answers: its ports are chosen before it binds them, and another process may take one meanwhile."""
    for _ in range(2):
        with contextlib.suppress(RuntimeError):
            return start_new_kernel(kernel_name="python3", cwd=folder, env=environment)
    return start_new_kernel(kernel_name="python3", cwd=folder, env=environment)


@contextmanager
def thread_of_kernels() -> Iterator[None]:
    """For a thread that starts or interrupts kernels: jupyter_client gives it an event loop, and leaves that open."""
    try:
        yield
    finally:
        ensure_event_loop().close()


def list_processes(folder: Path) -> list[psutil.Process]:
    """Living processes of runs in a folder: their command lines name it."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(folder) in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return [process for process in found if process.pid != os.getpid()]


def wait_until(condition: Callable[[], object], timeout_s: float = 30.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "the awaited state did not come"
        time.sleep(0.05)


def write_notebook(path: Path, *sources: str) -> Path:
    """A notebook of code cells, the first of which holds its parameters; nbval takes its cells for executed."""
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    notebook.cells = [nbformat.v4.new_code_cell(source, execution_count=i) for i, source in enumerate(sources, 1)]
    notebook.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(notebook, path)
    return path


def count_copies(folder: Path, *secrets: str) -> dict[str, int]:
    """Files below a folder that hold a secret, in any of the spellings that JSON and Python have for it."""
    found = {}
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            spellings = {s for secret in secrets for s in (secret, json.dumps(secret)[1:-1], repr(secret)[1:-1])}
            if count := sum(content.count(spelling.encode()) for spelling in spellings):
                found[str(path.relative_to(folder))] = count
    return found
