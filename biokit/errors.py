"""What a user may get wrong, in one message grammar: *what was asked - what was found - what to do*.

>>> str(DataError("molecules.csv row 17", 'SMILES "C1CC(" cannot be parsed', 'Fix the row, or pass on_bad="drop"'))
'molecules.csv row 17: SMILES "C1CC(" cannot be parsed. Fix the row, or pass on_bad="drop".'
"""

from __future__ import annotations

from collections.abc import Sequence


class BiokitError(Exception):
    """An error that a user can mend. `asked` names the request, `found` the obstacle, `do` the way out."""

    def __init__(self, asked: str, found: str, do: str) -> None:
        self.asked, self.found, self.do = _without_stop(asked), found.rstrip("."), do.rstrip(".")
        super().__init__(f"{self.asked}: {self.found}. {self.do}{'' if self.do.endswith('?') else '.'}")

    def __reduce__(self) -> tuple[type, tuple[str, str, str]]:
        return type(self), (self.asked, self.found, self.do)


def _without_stop(asked: str) -> str:
    """Without the full stop at its end; a last word that is only stops is a path."""
    return asked if not asked.split(" ")[-1].strip(".") else asked.rstrip(".")


class ConfigError(BiokitError):
    """A configuration key, type or value that cannot work."""


class DataError(BiokitError):
    """A file, row, column or molecule that cannot be read as asked."""


class StoreError(BiokitError):
    """A token store that is missing, torn or not what its checksums say."""


class CheckpointError(BiokitError):
    """A checkpoint that is missing, torn, or does not fit the model."""


class EngineError(BiokitError):
    """Something that this machine or this installation does not have."""


class RunError(BiokitError):
    """A run folder that cannot be used as asked."""


def list_faults(faults: Sequence[str], most: int = 5) -> str:
    """The first few of them, and how many more there are."""
    return "; ".join(faults[:most]) + (f" and {len(faults) - most} more" if len(faults) > most else "")
