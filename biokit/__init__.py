"""biokit: train and use molecular language models at any scale, from a notebook. Importing it costs no torch."""

__version__ = "0.1.0"
