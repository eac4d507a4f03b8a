"""biokit: train and use molecular language models at any scale, from a notebook. Importing it costs no torch."""

__version__ = "0.1.0"


def load_ipython_extension(shell: object) -> None:
    """`%load_ext biokit`: the magics."""
    from biokit.launch.extension import load_magics

    load_magics(shell)
