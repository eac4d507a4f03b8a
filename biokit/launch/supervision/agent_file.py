"""How the processes of a node ended, as a file of a life."""

from __future__ import annotations

import json
import time
from typing import Any

from biokit.runs import LifeFolder, write_atomically

PARENT = "BIOKIT_PARENT_PID"  # variable: who started this process; it may be gone before the process can ask


def note_end(life: LifeFolder, node: int, code: int, ranks: dict[str, dict[str, Any]]) -> None:
    """Leave how a node's processes ended.

    Args:
        code: the agent's exit code; negative: the signal that ended it.
        ranks: `exit_code, time, pid` of each rank that did not end well, by rank.
    """
    write_atomically(life.agent_file(node), json.dumps({"code": code, "ranks": ranks, "time": time.time()}) + "\n")
