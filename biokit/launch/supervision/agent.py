"""torchrun's agent of one node, in this process.

`python -m biokit.launch.supervision.agent LIFE_DIR NODE torchrun's words...`.

Its own words go to standard output and error as always. How it ended, and with which exit codes its ranks, is left in
the life's agent file.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from biokit.launch.rendezvous import elastic_variables
from biokit.launch.supervision.agent_file import PARENT, note_end
from biokit.launch.tree import become_subreaper, end_with
from biokit.runs import LifeFolder


def main(words: list[str]) -> int:
    """Run the agent to its end; returns its exit code."""
    life, node = LifeFolder(Path(words[0])), int(words[1])
    end_with(int(os.environ.get(PARENT, os.getppid())))
    become_subreaper()  # where the supervisor is killed, what the ranks left is found from here
    os.environ |= {PARENT: str(os.getpid()), **elastic_variables(words[2:])}
    code, ranks = _run_torchrun(words[2:])
    note_end(life, node, code, ranks)
    return code


def _run_torchrun(words: list[str]) -> tuple[int, dict[str, dict[str, Any]]]:
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import main as torchrun

    try:
        torchrun(words)
    except ChildFailedError as error:
        print(error, file=sys.stderr)
        return 1, {
            str(rank): {"exit_code": failure.exitcode, "time": failure.timestamp, "pid": failure.pid}
            for rank, failure in error.failures.items()
        }
    except SignalException as error:
        print(f"torchrun's agent was ended by {error.sigval.name}", file=sys.stderr)
        return 128 + error.sigval, {}
    return 0, {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
