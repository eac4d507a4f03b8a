"""The profile table names what ran, largest first, and keeps the profiler's own messages away."""

import re

import torch

from biokit.view.profile import profile_operations


def test_the_largest_operation_comes_first(capfd):
    square = torch.randn(300, 300)
    table = profile_operations(lambda: [square @ square for _ in range(5)] + [torch.ones(3)], num_rows=3)
    lines = table.splitlines()
    assert re.match(r"aten::mm\s+[\d.]+\s+[\d.]+%\s+5$", lines[1])
    assert len(lines) == 4
    assert capfd.readouterr().err == ""
