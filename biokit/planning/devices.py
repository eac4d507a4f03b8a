"""Devices and links that a run is planned for: published figures, and the shares of them that a run is taken to reach.

Sources: NVIDIA's data sheets of V100 (SXM2), A100 80GB (SXM4), H100 (SXM5), H200 (SXM): dense rates without sparsity,
fp32 without TF32 (torch's default), memory bandwidth, NVLink a direction. Links between nodes are those of NVIDIA's
own systems of that generation, one adapter a GPU: EDR shared by two (V100), HDR (A100), NDR (H100, H200).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from biokit.errors import ConfigError

MATMUL_SHARE = 0.5  # of the published rate that matrix products reach, in a model of this kind
MEMORY_SHARE = 0.8  # of the memory bandwidth that other operations reach
LINK_SHARE = 0.8  # of a link's rate that a message reaches
LAUNCH_S = 4e-6  # host time of an operation: a step that is made of small ones cannot be faster
HOP_S = {True: 5e-6, False: 12e-6}  # latency of a hop inside a node, and between nodes


@dataclass(frozen=True)
class Device:
    """One device and its links.

    Attributes:
        tflops: dense matrix products, 1e12 operations a second, by precision.
        memory_gb_s: bandwidth of its memory, 1e9 bytes a second.
        memory_gib: size of its memory.
        link_gb_s: to devices of the same node, each direction, 1e9 bytes a second.
        node_link_gb_s: to other nodes, each direction, a device.
        host_gb_s: to the host's memory, each direction.
        kind: torch's name of such devices.
    """

    name: str
    tflops: Mapping[str, float]
    memory_gb_s: float
    memory_gib: float
    link_gb_s: float
    node_link_gb_s: float
    host_gb_s: float
    kind: str = "cuda"

    def describe(self, precision: str) -> str:
        """Its figures in one line."""
        return (
            f"{self.name}: {self.tflops[precision]:g} TFLOP/s in {precision}, memory {self.memory_gb_s:,.0f} GB/s, "
            f"links {self.link_gb_s:g} GB/s in a node and {self.node_link_gb_s:g} GB/s between nodes"
        )


def _rates(fp32: float, low: float, bf16: float = 0.0) -> dict[str, float]:
    return {"fp32": fp32, "fp16": low, "bf16": bf16 or low}


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        Device("v100", _rates(15.7, 125.0, bf16=15.7), 900, 32, 150, 6.25, 16),  # bf16 is computed as fp32
        Device("a100", _rates(19.5, 312.0), 2039, 80, 300, 25, 32),
        Device("h100", _rates(66.9, 989.4), 3350, 80, 450, 50, 64),
        Device("h200", _rates(66.9, 989.4), 4800, 141, 450, 50, 64),
        # no data sheet: of the size that two cores of a laptop or of a virtual machine have
        Device("cpu", _rates(0.1, 0.1), 20, 16, 2, 1, 20, kind="cpu"),
    )
}


def find_device(name: str) -> Device:
    """The device of that name.

    Raises:
        ConfigError: there is none; names those there are.
    """
    if name.lower() not in DEVICES:
        do = f"Valid: {', '.join(DEVICES)}; for another one give its figures, e.g. --device h100 --tflops 400"
        raise ConfigError(f"device {name}", "there is no such device in the table", do)
    return DEVICES[name.lower()]


def adjust_device(device: Device, **figures: float) -> Device:
    """The device with a user's own figures; one that is 0 stays as it is. `tflops` holds for every precision."""
    for name, value in figures.items():
        if not 0 <= value < math.inf:
            raise ConfigError(f"figure {name}={value:g} of a device", "it is no size", "Give a positive number")
    given = {name: value for name, value in figures.items() if value}
    if "tflops" in given:
        given["tflops"] = dict.fromkeys(device.tflops, given["tflops"])  # type: ignore[assignment]
    return replace(device, **given) if given else device  # type: ignore[arg-type]
