"""The ways to install agree with one another, and the tree is what the design says."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = dict(
    line.lower().split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")
)


def direct_dependencies():
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    return {re.split(r"[<>=!~ ]", requirement)[0].lower(): requirement for group in groups for requirement in group}


def test_every_direct_dependency_has_a_pin_and_no_other():
    assert set(direct_dependencies()) == set(PINS)


def test_pins_satisfy_the_ranges():
    for name, requirement in direct_dependencies().items():
        floor = requirement.split(">=")[1]
        assert [int(part) for part in PINS[name].split(".")[:2]] >= [int(part) for part in floor.split(".")[:2]], name


def test_environment_yml_equals_pyproject():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    python, pip, nested = environment["dependencies"]
    assert python == f"python{PROJECT['requires-python']}"
    assert pip == "pip"
    extras = ",".join(PROJECT["optional-dependencies"])
    assert nested == {"pip": ["-c constraints.txt", f"-e .[{extras}]"]}


def test_apex_is_never_listed():
    assert "apex" not in direct_dependencies()


def test_links_are_there():
    assert (ROOT / "biokit" / "kernels").is_symlink()
    assert (ROOT / "biokit" / "kernels" / "attention.py").samefile(ROOT / "kernels" / "attention.py")
    assert (ROOT / "biokit" / "assets").is_symlink()


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("biokit", ("torch", "numpy", "rdkit")),
        ("biokit.train", ("rdkit", "numba", "pyarrow", "matplotlib", "tensorboard", "deepspeed", "megatron")),
    ],
)
def test_imports_cost_no_more_than_they_say(module, forbidden):
    code = f"import sys, {module}; print(*(m for m in {forbidden!r} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
