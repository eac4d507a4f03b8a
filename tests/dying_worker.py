"""A worker for tests of `biokit.data.guarded`: it doubles numbers, and dies, hangs or prints where asked."""

import os
import signal
from typing import Any

from biokit.data.guarded import limit_cpu_time, serve


def prepare(setup: dict[str, Any]) -> Any:
    if setup.get("refuse"):
        raise RuntimeError("no such engine")

    def run(rows: list[Any]) -> tuple[list[Any], bytes]:
        results = []
        for row in rows:
            limit_cpu_time(0.3)
            if row == "die":
                os.kill(os.getpid(), signal.SIGSEGV)
            while row == "hang":
                pass
            if row == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)
            if row == "print":
                os.write(1, b"noise" * 100)
            results.append([row * 2])
        limit_cpu_time(0)
        return results, b"x" * len(rows)

    return run


if __name__ == "__main__":
    serve(prepare)
