"""Runs a notebook by papermill, judges it by its run's manifest, and trusts the copy that it wrote itself."""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from biokit.errors import DataError, EngineError, RunError
from biokit.launch.notebook_files import literal_path, masked_output
from biokit.launch.tree import end_with
from biokit.runs import RunFolder
from biokit.secrets import mask, secret_values

RUNNER = "BIOKIT_NOTEBOOK_RUNNER"  # variable: process id of who executes the notebook
DONE = ("finished", "stopped", "preprocessed")


@dataclass(frozen=True)
class ExecutedNotebook:
    """Where an executed notebook and the run that it made stand."""

    path: Path
    folder: RunFolder
    seconds: float

    def __str__(self) -> str:
        files = sorted(p for p in self.folder.path.rglob("*") if p.is_file() and not _is_internal(p, self.folder.path))
        lines = [f"{self.path.name} ran in {self.seconds:.0f} s; it and what it made:"]
        return "\n".join(lines + [f"  {path}" for path in files])


def run_notebook(
    notebook: Path, out: Path, parameters: Mapping[str, Any] | None = None, cwd: Path | None = None
) -> ExecutedNotebook:
    """Execute a notebook with its `run_dir` parameter set to `out`; the executed copy is left there too.

    Its kernel ends with this process. Parameters whose names look secret reach the kernel, but no file.

    Args:
        parameters: further values for its `parameters` cell.
        cwd: where its kernel runs (default: beside the notebook).

    Raises:
        EngineError: papermill is not installed.
        DataError: no such notebook, or a parameter that its `parameters` cell does not have.
        RunError: a cell failed (named, with its error), or the run's manifest does not say it is done.
    """
    try:
        import papermill
        from jupyter_client.kernelspec import NoSuchKernel
        from nbclient.exceptions import DeadKernelError
        from papermill.exceptions import PapermillExecutionError
    except ImportError as error:
        raise EngineError(
            f"run {notebook}",
            "papermill is not installed",
            'Install it: pip install -c constraints.txt -e ".[notebooks]"',
        ) from error
    values = {**(parameters or {}), "run_dir": str(out.resolve())}
    check_parameters(notebook, values)
    out.mkdir(parents=True, exist_ok=True)
    executed = out / notebook.name
    folder = RunFolder(out)
    before = folder.manifest_file.stat().st_mtime_ns if folder.manifest_file.exists() else 0
    started = time.monotonic()
    try:
        with masked_output(executed, values) as output, _announced(), _without_noise():
            papermill.execute_notebook(
                literal_path(notebook),
                output,
                values,
                kernel_name="python3",
                cwd=str(cwd or notebook.parent),
                log_output=False,
                extra_arguments=["--IPKernelApp.log_level=40"],  # it warns of what is always so: it listens on TCP
            )
    except (DeadKernelError, NoSuchKernel) as error:
        found = f"its kernel is not there any more or never was ({error})"
        raise RunError(f"notebook {notebook.name}", found, "Install ipykernel; look for a lack of memory") from error
    except PapermillExecutionError as error:
        raise RunError(
            f"notebook {notebook.name}",
            mask(f"its cell [{error.exec_count}] failed ({error.ename}: {error.evalue})", secret_values(values)),
            f"Open {executed}: the cell is marked",
        ) from None  # the error itself would tell the secrets
    finally:
        if executed.exists():
            trust_notebook(executed)
    if not folder.manifest_file.exists() or folder.manifest_file.stat().st_mtime_ns == before:
        do = "Give its run the folder `run_dir`, or let a cell update that folder's manifest"
        raise RunError(f"notebook {notebook.name}", "it ran to its end and wrote no manifest", do)
    if (status := folder.read_manifest().get("status")) not in DONE:
        raise RunError(f"notebook {notebook.name}", f"its run is {status!r}", f"See {out}/logs")
    return ExecutedNotebook(executed, folder, time.monotonic() - started)


def end_with_runner() -> None:
    """Called in a kernel: make it end when `run_notebook`, which started it, is gone, and its runs with it."""
    if os.environ.get(RUNNER) == str(os.getppid()):
        end_with(os.getppid())


@contextlib.contextmanager
def _announced() -> Iterator[None]:
    """Tell the kernels that this process starts who they belong to."""
    before = os.environ.get(RUNNER)
    os.environ[RUNNER] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(RUNNER)
        if before is not None:
            os.environ[RUNNER] = before


@contextlib.contextmanager
def _without_noise() -> Iterator[None]:
    """Without the warning that a notebook's cells have no ids, which nbformat gives them as it reads them."""
    from nbformat.warnings import MissingIDFieldWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MissingIDFieldWarning)
        yield


def trust_notebook(path: Path) -> None:
    """Sign a notebook for this user, so that it opens with its pictures and widgets (as `jupyter trust` does)."""
    import nbformat
    from nbformat.sign import NotebookNotary

    notary = NotebookNotary()
    with contextlib.closing(notary.store):
        notary.sign(nbformat.read(path, as_version=4))


def check_parameters(notebook: Path, values: Mapping[str, Any]) -> None:
    """Nothing, where a notebook's `parameters` cell knows all these names.

    Raises:
        DataError: no such notebook, or a parameter that it does not have.
    """
    import papermill

    if not notebook.is_file():
        raise DataError(f"notebook {notebook}", "there is no such file", "Give the path of a .ipynb file")
    try:
        with _without_noise():
            known = papermill.inspect_notebook(str(notebook))
    except ValueError as error:
        do = "Save it once from JupyterLab, which notes its kernel" if "kernel" in str(error) else "Give a .ipynb file"
        raise DataError(f"notebook {notebook}", f"it cannot be read ({error})", do) from error
    except Exception as error:  # nbformat, papermill and json each have their own
        raise DataError(f"notebook {notebook}", f"it cannot be read ({error})", "Give a .ipynb file") from error
    unknown = [name for name in values if name not in known]
    if unknown:
        own = f"It has: {', '.join(known)}" if known else "Tag the cell that sets them as `parameters`"
        raise DataError(f"notebook {notebook.name}", f"it has no parameter {', '.join(unknown)}", own)


def _is_internal(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    folders = {"data", "checkpoints", "tensorboard", "logs"}
    return any(part.startswith(".") or part in folders for part in parts)
