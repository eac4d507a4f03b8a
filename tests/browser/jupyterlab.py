"""JupyterLab on the loopback and a headless Chromium that looks at it.

Needs node, chromium and the npm package playwright-core (in the folder that BIOKIT_NODE_MODULES names).
BIOKIT_SCREENSHOTS names the folder for the screenshots and for what the browser saw.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
from nbformat.sign import NotebookNotary
from PIL import Image

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
MIN_COLOURS = 500  # of a lit molecule; an empty 3D stage has one and its frame
START_TIMEOUT_S = 120.0
BROWSER_TIMEOUT_S = 400.0
SETTINGS = {  # every cell is in the page, wherever it is scrolled to; and no question about news in the picture
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


def list_missing() -> str:
    """What this machine lacks for a browser test; empty where nothing."""
    playwright = Path(os.environ.get("BIOKIT_NODE_MODULES", HERE / "node_modules")) / "playwright-core"
    needs = {
        "node": shutil.which("node"),
        "chromium": shutil.which("chromium"),
        "playwright-core (BIOKIT_NODE_MODULES)": playwright.is_dir(),
    }
    return ", ".join(name for name, found in needs.items() if not found)


def look(script: str, notebook: str, root: Path, **parameters: object) -> dict[str, Any]:
    """Open a copy of a notebook, with these parameters and without outputs, and do what a browser script does.

    Returns:
        What the script saw. It stands beside its screenshots, which bear the script's name.
    """
    path = REPOSITORY / "notebooks" / f"{notebook}.ipynb"
    prepared = papermill.execute_notebook(path, None, parameters, prepare_only=True, progress_bar=False)
    for cell in (cell for cell in prepared.cells if cell.cell_type == "code"):
        cell.outputs, cell.execution_count = [], None
    prepared.metadata.pop("widgets", None)
    nbformat.write(prepared, root / "live.ipynb")
    return look_at(script, "live.ipynb", root)


def look_at(script: str, notebook: str, root: Path) -> dict[str, Any]:
    """Open a notebook that stands in `root`, as it is, and do what a browser script does; returns as `look`."""
    stem = Path(script).stem
    pictures = Path(os.environ.get("BIOKIT_SCREENSHOTS", root))
    pictures.mkdir(parents=True, exist_ok=True)
    for old in pictures.glob(f"{stem}_*.png"):
        old.unlink()
    with _jupyterlab(root) as address:
        command = ["node", str(HERE / script), f"{address}/lab/tree/{notebook}?reset", str(pictures / stem)]
        command += [str(shutil.which("chromium")), str(root / "profile")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=BROWSER_TIMEOUT_S)
        (pictures / f"{stem}.json").write_text(done.stdout)
        seen = json.loads(done.stdout or "{}")
        assert done.returncode == 0, f"{seen}\n{done.stderr[-2000:]}"
    assert seen["failed"] == [] and seen["foreign"] == []
    return {**seen, "pictures": sorted(pictures.glob(f"{stem}_*.png"))}


def sign(path: Path, root: Path) -> None:
    """Trust a notebook, as `jupyter trust` does, in the JupyterLab that will have its folders in `root`."""
    (root / ".data").mkdir(exist_ok=True)
    notary = NotebookNotary(data_dir=str(root / ".data"))
    with contextlib.closing(notary.store):
        notary.sign(nbformat.read(path, as_version=4))


def count_colours(path: Path) -> int:
    """The different colours in a picture."""
    with Image.open(path) as picture:
        return len(picture.convert("RGB").getcolors(maxcolors=1 << 24) or [])


@contextlib.contextmanager
def _jupyterlab(root: Path) -> Iterator[str]:
    """JupyterLab on a free loopback port with folders of its own; its address. The whole session ends with it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folders = {f"JUPYTER_{name}_DIR": str(root / f".{name.lower()}") for name in ("CONFIG", "DATA", "RUNTIME")}
    for name, values in SETTINGS.items():
        file = root / ".lab" / f"{name}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(values))
    command = [sys.executable, "-m", "jupyter", "lab", "--no-browser", "--ip=127.0.0.1", f"--port={port}"]
    command += ["--IdentityProvider.token=", f"--ServerApp.root_dir={root}", "--allow-root"]
    command += ["--LabApp.news_url=", "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate"]
    folders["JUPYTERLAB_SETTINGS_DIR"] = str(root / ".lab")
    environment = {**os.environ, **folders, "PYTHONPATH": str(REPOSITORY)}
    with (root / "jupyter.log").open("wb") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, cwd=root, start_new_session=True
        )
    try:
        _wait_for(f"http://127.0.0.1:{port}/api/status", server, root / "jupyter.log")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.send_signal(signal.SIGTERM)  # it shuts its kernels down, whose trainings end with them
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()


def _wait_for(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            with urllib.request.urlopen(address, timeout=5):
                return
        except OSError:
            assert server.poll() is None and time.monotonic() < end, log.read_text()[-3000:]
            time.sleep(0.5)
