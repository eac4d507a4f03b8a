"""Epilog of a node: ends what a job left behind, known by the job's id in the environment it was started with.

A recipe for sites whose ProctrackType is linuxproc, where a daemonised process outlives its job; with cgroups Slurm
does the same by itself. In slurm.conf: `Epilog=<a script that runs this>`.
"""

import contextlib
import os
import signal
import time
from pathlib import Path


def find_leftovers(job_id: str, node: str) -> list[int]:
    """Ids of the processes of a job on a node, without this one."""
    wanted, found = {f"SLURM_JOB_ID={job_id}".encode(), f"SLURMD_NODENAME={node}".encode()}, []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                if wanted <= set((entry / "environ").read_bytes().split(b"\0")):
                    found.append(int(entry.name))
    return found


def main() -> None:
    job_id, node = os.environ["SLURM_JOB_ID"], os.environ["SLURMD_NODENAME"]
    ancestors = {os.getppid()}  # the shell that runs the epilog has the job's id too
    for number, wait_s in ((signal.SIGTERM, 1.0), (signal.SIGKILL, 0.0)):
        left = [pid for pid in find_leftovers(job_id, node) if pid not in ancestors]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        time.sleep(wait_s if left else 0.0)


if __name__ == "__main__":
    main()
