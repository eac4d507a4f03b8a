"""Where torchrun's agents of one run meet: flags, addresses and ports."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Mapping, Sequence

import psutil

from biokit.errors import ConfigError
from biokit.launch.orders import flag_pairs
from biokit.parallel.peers import find_own_address

GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"


def rendezvous_flags(num_nodes: int, node_rank: int, endpoint: str, run_id: str, local_addr: str = "") -> list[str]:
    """torchrun's flags for an agent that meets the others at node 0.

    Which node hosts is said outright: torchrun would guess it from names, and two nodes that both take themselves
    for the host wait for ever. The ranks' order follows from who comes first, not from the nodes' numbers.

    Args:
        endpoint: `host:port` of node 0.
        run_id: the same on all nodes, and of no other run there.
        local_addr: under which the others reach this node; empty: its full host name.
    """
    where = ["--nnodes", str(num_nodes), "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
    where += ["--rdzv-id", f"biokit-{run_id}", "--rdzv-conf", f"is_host={int(node_rank == 0)}"]
    return [*where, "--local-addr", local_addr] if local_addr else where


def elastic_variables(torchrun: Sequence[str]) -> dict[str, str]:
    """What torchrun needs in its environment where the number of nodes is a range, `--nnodes 1:2`; else nothing.

    Args:
        torchrun: its flags.
    """
    ranges = any(name == "--nnodes" and ":" in value for name, value in flag_pairs(torchrun))
    # torch 2.13: with the agents' store a node that comes later waits for ever
    return {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"} if ranges else {}


def find_local_address(endpoint: str) -> str:
    """The address of this node on the network that leads to `host:port`; empty where nothing leads there."""
    return find_own_address(*split_endpoint(endpoint))


def network_variables(local_addr: str, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """What tells gloo the network that an address is of; empty where that is said already, or not known.

    Left alone, gloo takes the one that the host's name leads to: on many systems that is the loopback device.
    """
    if environment.get(GLOO_INTERFACE) or not local_addr:
        return {}
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address.partition("%")[0] == local_addr for address in addresses):
            return {GLOO_INTERFACE: name}
    return {}


def split_endpoint(endpoint: str) -> tuple[str, int]:
    """(host, port).

    Raises:
        ConfigError: it is not `host:port`.
    """
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(f"endpoint {endpoint!r}", "it is not HOST:PORT", "Give e.g. node0:29500")
    return host.strip("[]"), int(port)


def join_endpoint(host: str, port: int) -> str:
    """`host:port`; an address of IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_port(port: int) -> None:
    """Open a port and give it back.

    Raises:
        ConfigError: another process has it, or this one may not open it.
    """
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.socket(family) as probe:
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)  # as torch does: in use for either is in use
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a run that has just ended does not count
        try:
            probe.bind(("", port))  # and not listen: ranks of other nodes may be trying to connect
        except OSError as error:
            reason = "in use" if error.errno == errno.EADDRINUSE else f"not to be had ({error.strerror})"
            found = f"port {port} is {reason} on this machine"
            raise ConfigError(
                f"MASTER_PORT={port}", found, "Give another MASTER_PORT, the same on every node"
            ) from error


def first_free_port(port: int, num_tried: int = 50) -> int:
    """This port, or the next one above it that nobody listens on.

    Raises:
        ConfigError: so many of them are in use.
    """
    for candidate in range(port, min(port + num_tried, 65536)):
        with contextlib.suppress(ConfigError):
            check_port(candidate)
            return candidate
    found = f"so are the {num_tried - 1} above it, on this machine"
    raise ConfigError(f"MASTER_PORT={port}: it is in use", found, "Give another MASTER_PORT, the same on every node")
