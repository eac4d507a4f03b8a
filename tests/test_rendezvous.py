"""Where agents meet: flags, addresses, ports."""

import socket
from types import SimpleNamespace

import psutil
import pytest

from biokit.errors import ConfigError
from biokit.launch.rendezvous import (
    elastic_variables,
    find_local_address,
    first_free_port,
    join_endpoint,
    network_variables,
    rendezvous_flags,
    split_endpoint,
)
from tests.distributed import free_port


def test_node_0_hosts_and_says_so() -> None:
    flags = [rendezvous_flags(2, node, "node0:1234", "run-1", address) for node, address in ((0, ""), (1, "10.0.0.2"))]
    assert flags[0] == [
        "--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", "node0:1234", "--rdzv-id", "biokit-run-1",
        "--rdzv-conf", "is_host=1",
    ]  # fmt: skip
    assert flags[1] == [*flags[0][:-1], "is_host=0", "--local-addr", "10.0.0.2"]


def test_the_address_towards_a_host() -> None:
    assert find_local_address("127.0.0.1:80") == "127.0.0.1"
    assert find_local_address("no such host:80") == ""


def test_gloo_is_told_the_network_of_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"lo": [SimpleNamespace(address="127.0.0.1")], "ib0": [SimpleNamespace(address="fe80::1%ib0")]}
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: own)
    assert network_variables("127.0.0.1", {}) == {"GLOO_SOCKET_IFNAME": "lo"}
    assert network_variables("fe80::1", {}) == {"GLOO_SOCKET_IFNAME": "ib0"}
    for address, environment in (("10.9.9.9", {}), ("", {}), ("127.0.0.1", {"GLOO_SOCKET_IFNAME": "eth7"})):
        assert network_variables(address, environment) == {}


@pytest.mark.parametrize("endpoint", ["node0", "node0:", ":1", "node0:0", "node0:65536", "node0:x", "node0:-1", ""])
def test_an_endpoint_that_is_none(endpoint: str) -> None:
    with pytest.raises(ConfigError, match=r"it is not HOST:PORT\. Give e.g. node0:29500"):
        split_endpoint(endpoint)


def test_endpoints_with_addresses_of_two_kinds() -> None:
    for endpoint, parts in (("node0:1", ("node0", 1)), ("[::1]:29500", ("::1", 29500))):
        assert split_endpoint(endpoint) == parts
        assert join_endpoint(*parts) == endpoint


def test_a_port_in_use_is_passed_over() -> None:
    with socket.create_server(("", free_port())) as server:
        taken = server.getsockname()[1]
        assert taken < first_free_port(taken) <= taken + 49
        with pytest.raises(ConfigError, match=f"MASTER_PORT={taken}: it is in use: so are the 0 above it"):
            first_free_port(taken, 1)


@pytest.mark.parametrize(
    ("flags", "is_range"),
    [
        (["--nnodes", "1:2"], True),
        (["--nproc_per_node", "2", "--nnodes=1:4"], True),
        (["--nnodes", "2", "x.py", "a:b"], False),
        (["--nnodes=2"], False),
        ([], False),
    ],
)
def test_a_range_of_nodes_needs_a_store_of_its_own(flags: list[str], is_range: bool) -> None:
    assert bool(elastic_variables(flags)) is is_range
