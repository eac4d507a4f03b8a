"""`python -m biokit.launch.rank COMMAND ...`: one rank of a run, `biokit COMMAND ...` that ends with its torchrun.

torchrun starts each rank in a session of its own; were torchrun killed, its ranks would wait for one another, and hold
the devices, until a group times out.
"""

from __future__ import annotations

import os
import runpy
import sys

from biokit.launch.background import end_with

if __name__ == "__main__":
    end_with(os.getppid())
    sys.argv[0] = "biokit"
    runpy.run_module("biokit", run_name="__main__", alter_sys=True)
