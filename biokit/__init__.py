"""biokit: train and use molecular language models at any scale, from a notebook. Importing it costs no torch."""

import importlib

__version__ = "0.1.0"


def load_ipython_extension(shell: object) -> None:
    """`%load_ext biokit`: the magics."""
    # by name: every module that asks this one for the version would else stand above the magics
    importlib.import_module("biokit.launch.magics.extension").load_magics(shell)
