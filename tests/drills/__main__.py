"""All fault drills, and their table: `python -m tests.drills [--trials N] [--only WORD]`; `make drills TRIALS=N`."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Callable
from functools import partial

from tests.drills import cut_checkpoints, dying, kill_a_rank, kill_and_resume, link_cut, slurm_node_lost, supervised
from tests.drills.outcome import HEADER, Outcome
from tests.ways_to_die import WAYS

FULL: dict[str, tuple[int, Callable[[int, int], Outcome]]] = {
    "Single": (50, kill_and_resume.run_drill),
    **{name: (20, partial(kill_a_rank.run_drill, strategy=name)) for name in kill_a_rank.LAYOUTS},
    **{
        f"{name}{ranks}": (20, partial(supervised.lose_a_rank, number=number, num_ranks=ranks))
        for name, number in (("killed", signal.SIGKILL), ("stopped", signal.SIGSTOP))
        for ranks in (2, 4)
    },
    "SIGTERM": (20, supervised.terminate),
    **{way: (10, partial(dying.run_drill, way=way)) for way in WAYS},
    "node": (5, slurm_node_lost.run_drill),
    "link": (6, link_cut.run_drill),
    "saves": (200, cut_checkpoints.cut_saves),
    "disk": (40, cut_checkpoints.fill_the_disk),
    "bits": (100, cut_checkpoints.flip_bits),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.drills", description=__doc__)
    parser.add_argument("--trials", type=int, default=0, help="at most so many of each drill; 0: the full count")
    parser.add_argument("--only", default="", help=f"one of {', '.join(FULL)}")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.only and options.only not in FULL:
        parser.error(f"--only {options.only}: there is no such drill. Valid: {', '.join(FULL)}")
    outcomes = []
    for name, (full, drill) in FULL.items():
        if options.only in ("", name):
            outcomes.append(drill(min(full, options.trials or full), options.seed))
    print(HEADER, *(outcome.row for outcome in outcomes), sep="\n")
    return int(any(outcome.failed for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
