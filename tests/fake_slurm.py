"""Slurm's commands as stand-ins that note the words they are given and answer as they are told."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

INSIDE = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_PER_TASK": "6"}
STAND_IN = """\
#!{python}
import json, os, sys
with open({log!r}, "a") as log:
    inside = os.environ.get("SLURM_JOB_ID", "")
    log.write(json.dumps([inside, os.path.basename(sys.argv[0]), *sys.argv[1:]]) + "\\n")
known = json.load(open({answers!r}))
code, said, error = known.get(os.path.basename(sys.argv[0]), [0, "", ""])
sys.stdout.write(said)
sys.stderr.write(error)
sys.exit(code)
"""


class FakeSlurm:
    """Commands that note their words and answer as told: `answers["squeue"] = (code, output, error)`."""

    def __init__(self, folder: Path) -> None:
        self.log, self._answers = folder / "said.jsonl", folder / "answers.json"
        self.answer()
        (folder / "bin").mkdir()
        text = STAND_IN.format(python=sys.executable, log=str(self.log), answers=str(self._answers))
        for name in ("sbatch", "squeue", "scancel", "scontrol", "srun"):
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        self.path = f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}"

    @classmethod
    def install(cls, folder: Path, monkeypatch: pytest.MonkeyPatch) -> FakeSlurm:
        """Put it in Slurm's place for a test; what this process knows of an allocation is forgotten."""
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            monkeypatch.delenv(name)
        made = cls(folder)
        monkeypatch.setenv("PATH", made.path)
        return made

    def answer(self, **answers: tuple[int, str, str]) -> None:
        """What the commands say from now on."""
        self._answers.write_text(json.dumps(answers))

    @property
    def said(self) -> list[list[str]]:
        """The words of all calls so far."""
        return [words for _, *words in self._read()]

    @property
    def allocations(self) -> list[str]:
        """The job that each call took itself to be in."""
        return [inside for inside, *_ in self._read()]

    def _read(self) -> list[list[str]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []
