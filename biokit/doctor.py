"""What this machine and this installation can do: `biokit doctor`. Reads metadata and files; loads no heavy library.

Every probe is guarded: a broken library or a missing tool becomes a line of the report, never an exception.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

REQUIRED = ("torch", "numpy", "safetensors", "pyyaml", "tqdm", "rdkit", "numba", "pyarrow", "matplotlib", "tensorboard")
EXTRAS = {
    "notebooks": ("jupyterlab", "ipykernel", "ipywidgets", "papermill", "nbformat", "py3Dmol"),
    "analysis": ("cma", "scikit-learn"),
}
COMMAND_TIMEOUT_S = 1.5
MIN_FREE_GB = 5.0
MISSING = "missing"
T = TypeVar("T")


@dataclass(frozen=True)
class Finding:
    """One line: what, what was found, and what to do for more (or nothing)."""

    name: str
    found: str
    do: str = ""


@dataclass(frozen=True)
class DoctorReport:
    """Findings by section, and warnings; printing it gives the report."""

    sections: dict[str, tuple[Finding, ...]]
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON: section -> name -> {found, do}, and `warnings`."""
        tree: dict[str, object] = {
            section: {finding.name: {k: v for k, v in asdict(finding).items() if k != "name"} for finding in findings}
            for section, findings in self.sections.items()
        }
        return {**tree, "warnings": list(self.warnings)}

    def __str__(self) -> str:
        lines: list[str] = []
        for section, findings in self.sections.items():
            lines += ["", section] if lines else [section]
            width = max((len(finding.name) for finding in findings), default=0)
            for finding in findings:
                lines.append(f"  {finding.name:<{width}}  {finding.found}" + (f". {finding.do}" if finding.do else ""))
        lines += ["", *(f"WARNING: {warning}" for warning in self.warnings)] if self.warnings else ["", "no warnings"]
        return "\n".join(lines)


@dataclass(frozen=True)
class Gpu:
    """One CUDA device as the driver names it; compute capability (0, 0) where the driver's tool did not say."""

    name: str
    memory: str = ""
    capability: tuple[int, int] = (0, 0)


def report() -> DoctorReport:
    """Examine versions, engines, kernels, devices and folders; a few seconds at most."""
    no_gpus: list[Gpu] = []
    gpus = _or_else(list_gpus, no_gpus)
    sections = {
        "versions": _section(probe_versions),
        "engines": _section(probe_engines),
        "kernels": _section(probe_kernels),
        "devices": _section(lambda: probe_devices(gpus)),
        "more": _section(lambda: probe_extras(gpus)),
        "folders": _section(probe_folders),
    }
    return DoctorReport(sections, tuple(_or_else(lambda: list(find_warnings(gpus)), ["some checks could not be made"])))


def version_of(package: str) -> str:
    """The installed version from its metadata; `missing` where it is not installed."""
    try:
        return importlib.metadata.version(package) or "unknown"
    except importlib.metadata.PackageNotFoundError:
        return MISSING


def has_module(name: str) -> bool:
    """True where `package.module` can be found; unlike `find_spec`, without importing the package."""
    parent, _, child = name.partition(".")
    spec = importlib.util.find_spec(parent)
    if spec is None or not child:
        return spec is not None
    places = spec.submodule_search_locations
    return places is not None and importlib.machinery.PathFinder.find_spec(name, list(places)) is not None


def has_wrong_apex() -> bool:
    """True where `apex` is installed and is not NVIDIA's (the package index has another package of that name)."""
    return has_module("apex") and not has_module("apex.optimizers")


def torch_build() -> str:
    """`CPU`, `CUDA 12.8` or `ROCm 6.4`, read from torch's version file; `missing`, or `unknown`."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return MISSING
    text = (Path(next(iter(spec.submodule_search_locations))) / "version.py").read_text(encoding="utf-8")
    for key, name in (("cuda", "CUDA"), ("hip", "ROCm")):
        match = re.search(rf"^{key}\b[^=\n]*=\s*['\"]([\d.]+)", text, flags=re.MULTILINE)
        if match:
            return f"{name} {match.group(1)}"
    return "CPU" if "cuda" in text else "unknown"


def list_gpus() -> list[Gpu]:
    """NVIDIA GPUs by the driver's tool, else by their device files; empty where there is none."""
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader"]
    gpus = []
    for line in _run(query).splitlines():
        name, memory, capability = (part.strip() for part in line.split(","))
        major, _, minor = capability.partition(".")
        gpus.append(Gpu(name, memory, (int(major), int(minor or 0))))
    return gpus or [Gpu(path.name) for path in sorted(Path("/dev").glob("nvidia[0-9]*"))]


def probe_versions() -> Iterator[Finding]:
    yield Finding("python", f"{platform.python_version()} on {platform.platform(terse=True)}")
    yield Finding("biokit", version_of("biokit"))
    for package in REQUIRED:
        version = version_of(package)
        build = f" ({_or_else(torch_build, 'unknown')} build)" if package == "torch" and version != MISSING else ""
        yield Finding(package, version + build, _install(package) if version == MISSING else "")
    for extra, packages in EXTRAS.items():
        absent = [package for package in packages if version_of(package) == MISSING]
        found = ", ".join(f"{package} {version_of(package)}" for package in packages if package not in absent)
        yield Finding(extra, found or MISSING, _install_extra(extra) if absent else "")


def probe_engines() -> Iterator[Finding]:
    """Which strategies can run, by the engines they need."""
    torch, deepspeed, megatron = map(version_of, ("torch", "deepspeed", "megatron-core"))
    alone = f"usable (torch {torch})" if torch != MISSING else "torch is missing"
    yield Finding("Single, DDP", alone)
    staged = "Zero1, Zero2, Zero3, ZeroInf, Pipeline"
    for name, missing in ((staged, deepspeed == MISSING), ("ThreeD", MISSING in (deepspeed, megatron))):
        engines = {"DeepSpeed": deepspeed} | ({"Megatron-core": megatron} if name == "ThreeD" else {})
        found = ", ".join(
            f"{engine} {'not installed' if version == MISSING else version}" for engine, version in engines.items()
        )
        yield Finding(name, found if missing else f"usable ({found})", _install_extra("distributed") if missing else "")


def probe_kernels() -> Iterator[Finding]:
    """Which implementation of each fused operation runs; the kernels' own `implementation` functions decide."""
    from biokit.kernels.dispatch import reference_forced

    if reference_forced():
        for name in ("SMILES scanner", "attention", "cross entropy", "dropout", "layer norm"):
            yield Finding(name, "reference: BIOKIT_KERNELS=reference is set", "Unset it for speed")
        return
    if has_module("numba"):
        yield Finding("SMILES scanner", "numba (small batches, until it is loaded: re)")
    else:
        yield Finding("SMILES scanner", "reference: numba is not installed", _install("numba"))
    yield Finding("attention", "sdpa; on the CPU in bf16 or with dropout reference, which is faster there")
    yield Finding("cross entropy", "torch")
    yield Finding("dropout", "lanes (16 random bits an element) on the CPU, else torch")
    norm = "apex on CUDA, else torch" if has_module("apex.normalization") else "torch: NVIDIA apex is not installed"
    yield Finding("layer norm", norm)


def probe_devices(gpus: list[Gpu]) -> Iterator[Finding]:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    quota = _or_else(_cpu_quota, "")
    yield Finding("CPU", f"{os.cpu_count()} cores, {usable} usable by this process{quota}, {_or_else(_cpu_bf16, '')}")
    yield Finding("memory", _or_else(_memory, "unknown"))
    if not gpus:
        yield Finding("CUDA", "no device")
    for index, gpu in enumerate(gpus):
        bf16 = (
            "bf16" if gpu.capability >= (8, 0) else "no bf16: use fp16" if gpu.capability > (0, 0) else "bf16 unknown"
        )
        capability = "compute {}.{}".format(*gpu.capability) if gpu.capability > (0, 0) else ""
        yield Finding(f"CUDA {index}", ", ".join(part for part in (gpu.name, gpu.memory, capability, bf16) if part))


def probe_extras(gpus: list[Gpu]) -> Iterator[Finding]:
    use = "With a GPU: build it from NVIDIA's source, or take conda-forge's nvidia-apex; never the package index's apex"
    if has_module("apex.optimizers"):
        yield Finding("NVIDIA apex", "found")
    else:
        found = "another package named apex is installed" if has_wrong_apex() else "not installed"
        yield Finding("NVIDIA apex", f"{found}; torch's fused AdamW and layer norm are used", use)
    engine = version_of("transformer-engine")
    do = "With a GPU: pip install --no-build-isolation 'transformer-engine[pytorch]'" if engine == MISSING else ""
    yield Finding("TransformerEngine", "not installed" if engine == MISSING else f"found {engine}", do)
    if shutil.which("sbatch"):
        yield Finding("Slurm client", _run(["sbatch", "--version"]).strip() or "found, but it does not answer")
    else:
        yield Finding("Slurm client", "not installed", "On a cluster: run on a login node, or load its Slurm module")


def probe_folders() -> Iterator[Finding]:
    here = Path.cwd()
    free = shutil.disk_usage(here).free / 1e9
    writable = "writable" if os.access(here, os.W_OK) else "not writable"
    yield Finding("working folder", f"{writable}, {free:.0f} GB free")
    cache = _cache_folder()
    if os.access(cache, os.W_OK):
        yield Finding("compiled kernels", f"kept in {cache}")
    else:
        do = "Set NUMBA_CACHE_DIR to a folder that can be written"
        yield Finding("compiled kernels", f"{cache} cannot be written: numba compiles anew in each process", do)


def find_warnings(gpus: list[Gpu]) -> Iterator[str]:
    build = _or_else(torch_build, "unknown")
    if build.startswith("CUDA") and not gpus:
        yield (
            f"torch is the {build} build and this machine has no GPU. It works, but takes gigabytes for nothing. "
            "Remove torch, then `pip install -c constraints.txt torch` from an index that offers a CPU build."
        )
    if build == "CPU" and gpus:
        yield (
            f"torch is the CPU build and this machine has {len(gpus)} GPU(s), which it cannot use. "
            "Install the CUDA build of the version in constraints.txt."
        )
    if has_wrong_apex():
        yield (
            "the installed package `apex` is not NVIDIA's but another of that name (a web toolkit), and is not used. "
            "Run `pip uninstall apex`."
        )
    for package in REQUIRED:
        if version_of(package) == MISSING:
            yield f"{package} is missing. {_install(package)}."
    free = shutil.disk_usage(Path.cwd()).free / 1e9
    if free < MIN_FREE_GB:
        yield f"only {free:.1f} GB are free in {Path.cwd()}. Checkpoints and token stores need more: make room."
    if not os.access(Path.cwd(), os.W_OK):
        yield f"{Path.cwd()} cannot be written, and runs go to ./runs by default. Give another run_dir."


def _section(probe: Callable[[], Iterator[Finding]]) -> tuple[Finding, ...]:
    """All findings of a probe; where it breaks off, the reason is the last."""
    findings: list[Finding] = []
    try:
        findings.extend(probe())
    except Exception as error:  # whatever is broken here must not hide the rest
        findings.append(Finding("(broken off)", f"{type(error).__name__}: {error}"))
    return tuple(findings)


def _or_else(probe: Callable[[], T], otherwise: T) -> T:
    try:
        return probe()
    except Exception:  # a probe must not end the report
        return otherwise


def _run(command: list[str]) -> str:
    """Standard output of a command; empty where it is missing, fails or takes too long."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _install_extra(extra: str) -> str:
    return f'Install it, in biokit\'s folder: pip install -c constraints.txt -e ".[{extra}]"'


def _install(what: str) -> str:
    return f'Install it: pip install -c constraints.txt "{what}"'


def _cpu_quota() -> str:
    """The container's limit in cores (cgroup v2), where it has one."""
    quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    return "" if quota == "max" else f", limited to {int(quota) / int(period):g} cores of time"


def _cpu_bf16() -> str:
    flags = Path("/proc/cpuinfo").read_text()
    native = "amx_bf16" in flags or "avx512_bf16" in flags or "bf16" in re.findall(r"^Features.*", flags, re.MULTILINE)
    return "bf16 in hardware" if native else "bf16 emulated"


def _memory() -> str:
    values = dict(re.findall(r"^(\w+):\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE))
    total, available = int(values["MemTotal"]) * 1024, int(values["MemAvailable"]) * 1024
    limit = _or_else(lambda: Path("/sys/fs/cgroup/memory.max").read_text().strip(), "max")
    limited = f", limited to {int(limit) / 1e9:.0f} GB" if limit.isdigit() and int(limit) < total else ""
    return f"{total / 1e9:.0f} GB, {available / 1e9:.0f} GB available{limited}"


def _cache_folder() -> Path:
    """Where numba keeps compiled code: its variable, else beside the kernels."""
    asked = os.environ.get("NUMBA_CACHE_DIR")
    return Path(asked) if asked else Path(__file__).parent / "kernels"
