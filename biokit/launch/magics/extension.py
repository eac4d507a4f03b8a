"""What `%load_ext biokit` gives a notebook."""

from __future__ import annotations

from typing import Any


def load_magics(shell: Any) -> None:
    """Register the magics and the completion of their flags; costs no torch."""
    from biokit.launch.magics.slurm_magics import SubmitMagics
    from biokit.launch.magics.torchrun_magics import TorchrunMagics, complete_flags
    from biokit.launch.magics.warm_magics import WarmMagics
    from biokit.launch.notebooks import end_with_runner

    end_with_runner()
    for magics in (TorchrunMagics, WarmMagics, SubmitMagics):
        shell.register_magics(magics)
    if complete_flags not in shell.Completer.custom_matchers:
        shell.Completer.custom_matchers.append(complete_flags)
