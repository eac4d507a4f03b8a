"""The text of a job, and site files: what a user writes arrives as it is, and never becomes shell."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from biokit.errors import ConfigError
from biokit.launch.slurm.sbatch import JobRequest, parse_time, write_script
from biokit.launch.slurm.sites import Site, find_site_file, load_site, site_from_dict

ODD = 'it\'s "x"; touch PWNED $(touch PWNED) `touch PWNED` & | > PWNED #'
SITE = """\
sbatch:
  account: 007
  --partition: gpu
  time: 1:30:00
  exclusive: true
  requeue: false
gpu_request: gres=gpu:a100:{gpus}
setup: |
  module load cuda
  export READ_BY_SETUP="$NOT_SET_ANYWHERE yes"
python: python3
container: apptainer exec --nv '/images/my image.sif'
srun:
  mpi: none
"""


def request_in(folder: Path, **values: object) -> JobRequest:
    """A job of two nodes."""
    base = JobRequest("small", "Trains small.", folder / "run", folder, num_nodes=2, gpus_per_node=8, num_processes=8)
    return replace(base, **values)


def options_of(script: str) -> dict[str, str]:
    """The `#SBATCH` lines, quotes taken off as sbatch does."""
    lines = [line for line in script.splitlines() if line.startswith("#SBATCH ")]
    words = [shlex.split(line, comments=False)[1] for line in lines]
    return {word.partition("=")[0].removeprefix("--"): word.partition("=")[2] for word in words}


def test_a_script_tells_all(tmp_path: Path) -> None:
    script = write_script(request_in(tmp_path, time="12:00:00"), Site(python="/opt/python"))
    assert options_of(script) == {
        "job-name": "small",
        "nodes": "2",
        "ntasks-per-node": "1",
        "gpus-per-node": "8",
        "time": "12:00:00",
        "signal": "B:USR2@120",
        "requeue": "",
        "output": str(tmp_path / "run" / "logs" / "slurm-%j.out"),
        "open-mode": "append",
    }
    assert script.startswith("#!/bin/bash\n# Trains small.\n") and "set -eu" in script
    assert script.endswith(f"exec /opt/python -m biokit.launch.slurm.job {tmp_path / 'run'}\n")
    assert "120 s before the time limit" in script


def test_a_site_adds_its_ways(tmp_path: Path) -> None:
    file = tmp_path / "site.yaml"
    file.write_text(SITE)
    script = write_script(request_in(tmp_path), load_site(file))
    options = options_of(script)
    assert options["account"] == "007" and options["time"] == "1:30:00"  # as written, no number
    assert (options["exclusive"], options["gres"]) == ("", "gpu:a100:8") and "gpus-per-node" not in options
    assert f"# From the site file {file}:" in script
    order = [script.index(part) for part in ("set -eu", "set +u", "module load cuda", "set -u\n", "exec ")]
    assert order == sorted(order)
    assert "exec apptainer exec --nv '/images/my image.sif' python3 -m biokit.launch.slurm.job" in script
    assert "export BIOKIT_SRUN=--mpi=none" in script
    (container,) = [line for line in script.splitlines() if line.startswith("export BIOKIT_CONTAINER=")]
    (value,) = shlex.split(container.partition("=")[2])
    assert shlex.split(value) == ["apptainer", "exec", "--nv", "/images/my image.sif"]


def test_without_gpus(tmp_path: Path) -> None:
    cpus = options_of(write_script(request_in(tmp_path, gpus_per_node=0, num_processes=4), Site()))
    assert cpus["cpus-per-task"] == "4" and not {"gres", "gpus-per-node"} & set(cpus)
    own = site_from_dict({"sbatch": {"cpus-per-task": "32"}})
    assert write_script(request_in(tmp_path, gpus_per_node=0), own).count("cpus-per-task") == 1
    silent = write_script(request_in(tmp_path), site_from_dict({"gpu_request": ""}))
    assert "8 GPUs a node are not asked for: the site file's gpu_request is empty" in silent


def test_an_array(tmp_path: Path) -> None:
    script = write_script(request_in(tmp_path, num_tasks=4), Site())
    assert options_of(script)["array"] == "0-3" and options_of(script)["output"].endswith("/logs/slurm-%A_%a.out")
    assert script.rstrip().endswith("--array")


def test_odd_values_run_nothing(tmp_path: Path) -> None:
    """The script is run by a real shell; what stands for Python writes down the words that it was given."""
    folder = tmp_path / ODD.replace("/", "")
    (folder / "run").mkdir(parents=True)
    python = folder / "python"
    code = "import json, os, sys\njson.dump([os.getcwd(), *sys.argv], open('given', 'w'))\n"
    python.write_text(f"#!{sys.executable}\n{code}")
    python.chmod(0o755)
    site = Site(python=str(python), setup="echo in the set-up: $NOT_SET_ANYWHERE")
    script = write_script(request_in(folder, name=ODD), site)
    assert options_of(script)["job-name"] == ODD and options_of(script)["output"].startswith(str(folder))
    done = subprocess.run(["bash"], input=script, text=True, capture_output=True, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "in the set-up:\n"), done.stderr
    given = json.loads((folder / "given").read_text())
    assert given == [str(folder), str(python), "-m", "biokit.launch.slurm.job", str(folder / "run")]
    assert list(tmp_path.rglob("PWNED")) == []


@pytest.mark.parametrize(
    ("change", "site", "message"),
    [
        ({"name": "a\n#SBATCH --nodes=9"}, {}, "line break"),
        ({"title": "a\ntouch PWNED"}, {}, "line break"),
        ({"name": "a\x1b[2J"}, {}, "control character"),
        ({"time": "1\ntouch PWNED"}, {}, "not a time limit"),
        ({"time": "2:00", "signal_before_s": 120}, {}, "Give more time"),
        ({"run_dir": Path("/runs/100%j")}, {}, "Give a --run-dir without them"),
        ({"run_dir": Path("/runs/a\nb")}, {}, "line break"),
        ({}, {"sbatch": {"account": "a\ntouch PWNED"}}, "account.*line break"),
        ({}, {"python": "python\ntouch PWNED"}, "python holds a line break"),
        ({}, {"container": "a 'b"}, "Close its quotes"),
        ({}, {"gpu_request": "gres=gpu:8"}, "where the number goes"),
        ({}, {"gpu_request": "gres=gpu:{x}"}, "where the number goes"),
        ({}, {"gpu_request": "gres=gpu:{gpus}:{x}"}, "where the number goes"),
        ({}, {"gpu_request": "two words={gpus}"}, "an option of sbatch"),
        ({}, {"sbatch": {"array": "0-3"}}, "array is decided by each submission. Use a list of values"),
        ({}, {"sbatch": {"p; touch PWNED": "x"}}, "not the long name of an option"),
        ({}, {"sbatch": {"account": ["a"]}}, "Give text, a number, or true"),
        ({}, {"sbatch": "gpu"}, "Write a mapping"),
        ({}, {"setpu": "x"}, 'unknown key "setpu". Did you mean "setup"'),
        ({}, {"partition": "gpu"}, 'unknown key "partition". Did you mean "sbatch"'),
    ],
)  # fmt: skip
def test_what_cannot_be_is_said(
    tmp_path: Path, change: dict[str, object], site: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        write_script(request_in(tmp_path, **change), site_from_dict(site))


BOMB = "\n".join(
    ["sbatch:", "  a0: &a0 [x]"] + [f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
)


@pytest.mark.parametrize("text", ["a: [", "- a\n", "\udcff", "a: " + "[" * 100_000, BOMB])
def test_a_site_file_that_is_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "site.yaml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match=f"site file {file}") as caught:
        load_site(file)
    assert len(str(caught.value)) < 1000
    with pytest.raises(ConfigError, match="cannot be read"):
        load_site(tmp_path / "missing.yaml")


def test_where_the_site_file_is_found(tmp_path: Path) -> None:
    own, named = tmp_path / ".config" / "biokit" / "site.yaml", tmp_path / "named.yaml"
    assert find_site_file({"HOME": str(tmp_path)}) is None and load_site(None) == Site()
    own.parent.mkdir(parents=True)
    own.touch()
    named.touch()
    assert find_site_file({"HOME": str(tmp_path)}) == own and load_site(own).sbatch == {}
    assert find_site_file({"HOME": str(tmp_path), "BIOKIT_SITE": str(named)}) == named
    with pytest.raises(ConfigError, match="BIOKIT_SITE"):
        find_site_file({"BIOKIT_SITE": str(tmp_path / "missing.yaml")})


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 5400), ("5:30", 330), ("12:00:00", 43200), ("2-0", 172800), ("1-2:30", 95400), ("1-02:03:04", 93784)],
)
def test_time_limits(text: str, seconds: int) -> None:
    assert parse_time(text) == seconds and parse_time("UNLIMITED") is None
