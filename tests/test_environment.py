"""The ways to install agree with one another, and the tree is what the design says."""

import hashlib
import importlib
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


def test_readme_names_every_module():
    text = (ROOT / "README.md").read_text()
    modules = [*(ROOT / "biokit").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    missing = [path.name for path in modules if path.name != "__init__.py" and path.name not in text]
    assert missing == []


def test_readme_names_every_notebook_and_target():
    text = (ROOT / "README.md").read_text()
    assert all(f"notebooks/{path.name}" in text for path in (ROOT / "notebooks").glob("*.ipynb"))
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make (\w+)", text):
        assert f"\n{target}:" in makefile, target


def test_back_ticked_names_exist():
    """A docstring or document that names `biokit.x.y` names something that is there."""
    texts = [*(ROOT / "biokit").rglob("*.py"), *(ROOT / "kernels").glob("*.py"), ROOT / "README.md", ROOT / "LOG.md"]
    for path in texts:
        for name in re.findall(r"`(biokit(?:\.\w+)+)`", path.read_text()):
            assert resolves(name), f"{path.name}: {name}"


def resolves(name):
    parts = name.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ImportError:
            continue
        return all((found := getattr(found, part, None)) is not None for part in parts[cut:])
    return False


def test_models_know_no_process_group():
    for path in (ROOT / "biokit" / "models").glob("*.py"):
        assert "torch.distributed" not in path.read_text()


def test_data_readme_has_the_hash_of_every_file():
    table = re.findall(
        r"^\| (\S+/\S+) \|.*\| ([0-9a-f]{64}) \|$", (ROOT / "data" / "README.md").read_text(), re.MULTILINE
    )
    files = [path for path in (ROOT / "data").rglob("*") if path.is_file() and path.parent != ROOT / "data"]
    files = [path for path in files if path.name != "README.md"]  # a model's card
    assert {ROOT / "data" / name for name, _ in table} == set(files)
    for name, expected in table:
        assert hashlib.sha256((ROOT / "data" / name).read_bytes()).hexdigest() == expected, name
