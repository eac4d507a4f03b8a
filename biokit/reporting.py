"""What a training shows while it runs: a progress bar and TensorBoard event files."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from biokit.config import RunConfig
from biokit.runs import RunFolder


class ProgressBar:
    """A tqdm bar over the steps; silent where tqdm is missing or `train.progress=false`."""

    def __init__(self, total: int, initial: int, shown: bool) -> None:
        self._bar: Any = None
        if shown:
            try:
                from tqdm.auto import tqdm
            except ImportError:
                return
            self._bar = tqdm(total=total, initial=initial, unit="step", desc="training", mininterval=1.0)

    def update(self, **figures: float | None) -> None:
        """One step more; figures that are None keep what was shown."""
        if self._bar is not None:
            shown = {name: f"{value:.4g}" for name, value in figures.items() if value is not None}
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def progress_bar(config: RunConfig, initial: int) -> Iterator[ProgressBar]:
    """A bar that starts at step `initial` and is closed in any case."""
    bar = ProgressBar(config.train.train_iters, initial, config.train.progress)
    try:
        yield bar
    finally:
        bar.close()


def open_tensorboard(config: RunConfig, folder: RunFolder, resume_step: int) -> Any | None:
    """A TensorBoard writer, or None where it is switched off or not installed (said on stderr)."""
    if not config.train.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("no TensorBoard files: the package tensorboard is not installed", file=sys.stderr)
        return None
    return SummaryWriter(str(folder.tensorboard), purge_step=resume_step + 1)


def write_tensorboard(board: Any | None, line: Mapping[str, Any]) -> None:
    """The numbers of a metrics line as scalars of its step."""
    if board is not None:
        for name, value in line.items():
            if name != "step" and value is not None:
                board.add_scalar(name, value, line["step"])
