"""The doctor's report in faked environments: it names what is wrong, and never fails."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from biokit import doctor
from biokit.doctor import DoctorReport, Finding, Gpu, find_warnings, has_module, list_gpus, report, torch_build
from biokit.kernels import attention, cross_entropy, layer_norm

H200 = Gpu("NVIDIA H200", "143771 MiB", (9, 0))


def _fake_package(folder: Path, name: str, *modules: str) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text("raise RuntimeError('the doctor must not import this')\n")
    for module in modules:
        (folder / name / f"{module}.py").write_text("")


def _found(section: Iterator[Finding]) -> dict[str, str]:
    return {finding.name: finding.found for finding in section}


def test_the_report_of_this_machine() -> None:
    text = str(report())
    for word in ("python", "torch", "rdkit", "Single", "attention", "CPU", "Slurm client", "working folder"):
        assert word in text
    assert "broken off" not in text


def test_it_can_be_written_as_json() -> None:
    tree = json.loads(json.dumps(report().as_dict()))
    assert tree["versions"]["torch"]["found"].startswith(torch.__version__.split("+")[0])
    assert isinstance(tree["warnings"], list)


def test_no_heavy_library_is_loaded() -> None:
    code = (
        "import sys; from biokit.doctor import report; str(report()); "
        "print(sorted({'torch', 'numpy', 'rdkit', 'numba', 'deepspeed', 'megatron', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("build, gpus, expected", [
    ("CUDA 12.8", [], "this machine has no GPU"),
    ("CPU", [H200], "has 1 GPU(s), which it cannot use"),
    ("CPU", [], ""),
    ("CUDA 12.8", [H200], ""),
    ("missing", [], ""),
])  # fmt: skip
def test_torch_and_gpu_must_match(monkeypatch: pytest.MonkeyPatch, build: str, gpus: list[Gpu], expected: str) -> None:
    monkeypatch.setattr(doctor, "torch_build", lambda: build)
    warnings = [text for text in find_warnings(gpus) if text.startswith("torch is the")]
    assert len(warnings) == bool(expected)
    assert all(expected in text and "constraints.txt" in text for text in warnings)


@pytest.mark.parametrize("line, build", [
    ("cuda: Optional[str] = '12.8'", "CUDA 12.8"),
    ("cuda: Optional[str] = None\nhip: Optional[str] = '6.4.2'", "ROCm 6.4.2"),
    ("cuda: Optional[str] = None\nhip: Optional[str] = None", "CPU"),
    ("nothing to see", "unknown"),
])  # fmt: skip
def test_the_build_of_torch_is_read_from_its_version_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, build: str
) -> None:
    (tmp_path / "version.py").write_text(f"__version__ = '2.13.0'\n{line}\n")
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    assert torch_build() == build


def test_the_installed_torch_is_read_right() -> None:
    assert torch_build() == (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU")


def test_the_wrong_apex_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _fake_package(tmp_path, "apex", "views")
    monkeypatch.syspath_prepend(tmp_path)
    assert any("not NVIDIA's" in text and "pip uninstall apex" in text for text in find_warnings([]))
    assert "another package" in _found(doctor.probe_extras([]))["NVIDIA apex"]


def test_the_right_apex_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    _fake_package(tmp_path, "apex", "optimizers", "normalization")
    monkeypatch.syspath_prepend(tmp_path)
    assert not any("apex" in text for text in find_warnings([]))
    assert _found(doctor.probe_extras([]))["NVIDIA apex"] == "found"
    assert "apex on CUDA" in _found(doctor.probe_kernels())["layer norm"]
    assert has_module("apex") and "apex" not in sys.modules


def test_what_is_missing_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    gone = {"rdkit", "deepspeed", "papermill"}
    real = doctor.version_of
    monkeypatch.setattr(doctor, "version_of", lambda name: doctor.MISSING if name in gone else real(name))
    text = str(report())
    assert 'WARNING: rdkit is missing. Install it: pip install -c constraints.txt "rdkit".' in text
    assert "DeepSpeed" in text and 'pip install -c constraints.txt -e ".[distributed]"' in text
    assert '-e ".[notebooks]"' in text


def test_gpus_come_from_the_driver_else_from_the_device_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_run", lambda command: "NVIDIA H200, 143771 MiB, 9.0\nTesla V100, 16160 MiB, 7.0\n")
    gpus = list_gpus()
    assert gpus == [H200, Gpu("Tesla V100", "16160 MiB", (7, 0))]
    lines = _found(doctor.probe_devices(gpus))
    assert lines["CUDA 0"].endswith("compute 9.0, bf16") and lines["CUDA 1"].endswith("no bf16: use fp16")
    monkeypatch.setattr(doctor, "_run", lambda command: "")
    monkeypatch.setattr(doctor.Path, "glob", lambda self, pattern: [Path("/dev/nvidia0")])
    assert list_gpus() == [Gpu("nvidia0")]


@pytest.mark.parametrize("name", ["version_of", "has_module", "torch_build", "list_gpus", "_run", "_cache_folder"])
def test_no_broken_probe_ends_the_report(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def broken(*_: object) -> None:
        raise OSError("broken on purpose")

    monkeypatch.setattr(doctor, name, broken)
    text = str(report())
    assert "versions" in text and "folders" in text


def test_a_probe_that_breaks_off_says_so() -> None:
    def probe() -> Iterator[Finding]:
        yield Finding("first", "fine")
        raise ValueError("no more")

    assert doctor._section(probe) == (Finding("first", "fine"), Finding("(broken off)", "ValueError: no more"))


def test_a_full_or_locked_folder_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: SimpleNamespace(free=1.2e9))
    monkeypatch.setattr(doctor.os, "access", lambda path, mode: False)
    text = " ".join(find_warnings([]))
    assert "only 1.2 GB are free" in text and "cannot be written" in text
    assert "NUMBA_CACHE_DIR" in str(doctor._section(doctor.probe_folders))


@pytest.mark.parametrize("forced", [False, True])
def test_the_kernels_section_says_what_the_kernels_do(monkeypatch: pytest.MonkeyPatch, forced: bool) -> None:
    """The report is written without loading torch, so that its words are compared with the dispatch here."""
    monkeypatch.setenv("BIOKIT_KERNELS", "reference" if forced else "")
    lines = _found(doctor.probe_kernels())
    fp32, bf16 = (attention.implementation("cpu", dtype) for dtype in (torch.float32, torch.bfloat16))
    assert lines["attention"].startswith(fp32) and bf16 in lines["attention"]
    assert attention.implementation("cuda", torch.bfloat16) == fp32
    assert lines["cross entropy"].startswith(cross_entropy.implementation())
    assert lines["layer norm"].startswith(layer_norm.implementation("cuda"))


def test_commands_that_hang_or_fail_count_as_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "COMMAND_TIMEOUT_S", 0.2)
    assert doctor._run([sys.executable, "-c", "import time; print('x', flush=True); time.sleep(60)"]) == ""
    assert doctor._run([sys.executable, "-c", "print('x'); raise SystemExit(1)"]) == ""
    assert doctor._run(["/no/such/command"]) == ""


def test_an_empty_report_prints() -> None:
    assert str(DoctorReport({}, ())).strip() == "no warnings"
