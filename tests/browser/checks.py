"""What holds of the answers of a view, wherever it stands."""

from __future__ import annotations

from typing import Any


def check_grid(seen: dict[str, Any]) -> list[str]:
    """A grid sorts both ways, and copies what was selected; its tiles' legends, from low to high."""
    low, high = ([text.removeprefix("✓").split() for text in seen[order]] for order in ("ascending", "descending"))
    assert len(low) == len(high) > 1
    values = [float(words[-1]) for words in low]
    assert values == sorted(values) and values[0] < values[-1]
    assert [float(words[-1]) for words in high] == values[::-1]
    assert seen["copied"] == seen["titles"] and seen["titles"][1] in seen["detail"]
    assert seen["count"] == f"2 of {len(low)} selected"
    return [words[-1] for words in low]
