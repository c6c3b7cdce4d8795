"""Ranks meet over real networks: two network namespaces that a veth pair joins.

The machine's name resolves to 127.0.1.1 in both, as on Debian and in pods on the host's network:
what a rank says of itself by that name leads the other nowhere.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch.distributed import TCPStore

from cluster.addresses import interface_of, reserve_port, socket_interfaces
from tests.waiting import free_ports
from trainers.rendezvous import RendezvousError, meet
from trainers.template import RANK_ADDRESSES

ADDRESSES = ("10.213.77.1", "10.213.77.2")
PATIENT_SECONDS = 120
"""For processes to start on a loaded machine."""

MEETS = """
import json, os, sys, time
import psutil, torch
import torch.distributed as dist
import trainers.rendezvous
from cluster.addresses import socket_interfaces
from trainers.ranks import joined

trainers.rendezvous.RENDEZVOUS_SECONDS = float(sys.argv[2])
for name, value in socket_interfaces(sys.argv[1]).items():
    os.environ.setdefault(name, value)
began = time.monotonic()
try:
    with joined(torch.device("cpu")) as ranks:
        seconds = time.monotonic() - began
        total = ranks.sum_(torch.tensor([ranks.rank + 1.0])).item()
        state = ranks.from_first({"of": ranks.rank, "text": "é" * 70, "none": None})
        own = psutil.Process().net_connections("inet")
        listening = sorted({c.laddr.ip for c in own if c.status == psutil.CONN_LISTEN})
        ranks.sum_(torch.ones(()))  # both have looked
    print(json.dumps({"seconds": seconds, "total": total, "state": state, "at": listening}))
except trainers.rendezvous.RendezvousError as error:
    print(json.dumps({"seconds": time.monotonic() - began, "error": str(error)}))
    sys.stdout.flush()
    os._exit(0)
"""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass
class Network:
    """Two namespaces, each with one end of a cable, on which the nodes' addresses are."""

    names: tuple[str, str]
    hosts: Path

    def cut(self) -> None:
        """Unplug the second one."""
        _ip("-n", self.names[1], "link", "set", "cable", "down")

    def start(self, rank: int, *, limit: float, **more: str) -> subprocess.Popen[str]:
        """Start a rank that meets the other, for at most `limit` seconds."""
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": ADDRESSES[0],
            "MASTER_PORT": "29511",
            RANK_ADDRESSES: " ".join(ADDRESSES),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            **more,
        }
        mounted = f'mount --bind "{self.hosts}" /etc/hosts && exec "$@"'
        command = ["ip", "netns", "exec", self.names[rank], "sh", "-c", mounted, "sh"]
        command += [sys.executable, "-P", "-c", MEETS, ADDRESSES[rank], str(limit)]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *, limit: float, **more: str) -> list[dict]:
        """What both ranks say; `more` is of their environment."""
        ranks = [self.start(rank, limit=limit, **more) for rank in (0, 1)]
        try:
            said = [rank.communicate(timeout=PATIENT_SECONDS) for rank in ranks]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        assert [rank.returncode for rank in ranks] == [0, 0], said
        return [json.loads(out.splitlines()[-1]) for out, _ in said]


@pytest.fixture
def network(tmp_path: Path) -> Iterator[Network]:
    names = f"isoflop-a-{os.getpid()}", f"isoflop-b-{os.getpid()}"
    if shutil.which("ip") is None or os.getuid() != 0:
        pytest.skip("network namespaces need iproute2 and root")
    hosts = tmp_path / "hosts"
    hosts.write_text(f"127.0.0.1 localhost\n127.0.1.1 {os.uname().nodename}\n")
    made: list[str] = []
    try:
        for name in names:
            try:
                _ip("netns", "add", name)
            except subprocess.CalledProcessError as error:
                pytest.skip(f"network namespaces are not permitted here: {error.stderr.decode()}")
            made.append(name)
        end = f"vi{os.getpid()}"
        _ip(
            "link",
            "add",
            end,
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "cable",
            "netns",
            names[1],
        )
        _ip("-n", names[0], "link", "set", end, "name", "cable")
        for name, address in zip(names, ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "cable")
            _ip("-n", name, "link", "set", "cable", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield Network(names, hosts)
    finally:
        for name in made:
            with suppress(subprocess.CalledProcessError):
                _ip("netns", "delete", name)


@pytest.mark.slow
def test_ranks_on_two_nodes_meet_and_listen_at_the_nodes_addresses_alone(network: Network) -> None:
    first, second = network.run(limit=60.0)
    assert (first["total"], second["total"]) == (3.0, 3.0)
    assert first["state"] == second["state"] == {"of": 0, "text": "é" * 70, "none": None}
    assert (first["at"], second["at"]) == ([ADDRESSES[0]], [ADDRESSES[1]])


@pytest.mark.slow
def test_ranks_that_do_not_reach_each_other_fail_and_name_both_addresses(network: Network) -> None:
    network.cut()
    for found in network.run(limit=6.0):
        assert f"rank 0 at {ADDRESSES[0]}:29511" in found["error"]
        assert f"rank 1 at {ADDRESSES[1]}" in found["error"]
        assert "which may take 6 s" in found["error"]


@pytest.mark.slow
def test_ranks_whose_data_takes_the_wrong_interface_fail_and_name_both(network: Network) -> None:
    """They meet at the first one's port, but offer each other their loopbacks."""
    for found in network.run(limit=6.0, GLOO_SOCKET_IFNAME="lo"):
        assert f"rank 0 at {ADDRESSES[0]}:29511" in found["error"]
        assert f"rank 1 at {ADDRESSES[1]}" in found["error"]
        assert "GLOO_SOCKET_IFNAME, where it is set, must name" in found["error"]


def test_the_interface_of_an_address_is_known_by_name() -> None:
    name = interface_of("127.0.0.1")
    assert name is not None
    assert socket_interfaces("127.0.0.1") == {
        "GLOO_SOCKET_IFNAME": name,
        "NCCL_SOCKET_IFNAME": f"={name}",
    }
    assert socket_interfaces("203.0.113.7") == {}  # of documentation, RFC 5737: nobody's


def test_nobody_takes_the_port_that_the_first_rank_was_promised(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with reserve_port() as reserved:
        address = "127.0.0.1", reserved.getsockname()[1]
        with socket.socket() as thief, pytest.raises(OSError, match="in use"):
            thief.bind(address)
        # As torch in a program listens by itself: on all addresses.
        all_addresses = TCPStore("127.0.0.1", address[1], 1, is_master=True)
        assert all_addresses.port == address[1]
        del all_addresses
        values = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": address[0]}
        for name, value in (values | {"MASTER_PORT": str(address[1])}).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv(
            "GLOO_SOCKET_IFNAME", socket_interfaces(address[0])["GLOO_SOCKET_IFNAME"]
        )
        store = meet()
        with socket.create_connection(address):
            assert store.check(["here/0"])


TAKES_ALL_PORTS = """
import socket
from contextlib import suppress
from pathlib import Path
from cluster.addresses import reserve_port

Path("/proc/sys/net/ipv4/ip_local_port_range").write_text("40000 40019")
reserved = reserve_port()
taken = []
with suppress(OSError):
    while True:
        other = socket.socket()
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken.append(other)
ports = sorted(other.getsockname()[1] for other in taken)
print(ports == sorted(set(range(40000, 40020)) - {reserved.getsockname()[1]}))
"""


@pytest.mark.slow
def test_who_asks_for_any_port_is_given_every_one_but_that(network: Network) -> None:
    """In a network of twenty ports."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = ["ip", "netns", "exec", network.names[0], sys.executable, "-P", "-c", TAKES_ALL_PORTS]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout == "True\n", done.stderr


def test_a_port_that_is_taken_all_the_same_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        (port,) = free_ports(1)
        other.bind(("127.0.0.1", port))
        other.listen()
        values = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for name, value in (values | {"MASTER_PORT": str(port)}).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(RendezvousError, match=f"cannot listen at 127.0.0.1:{port} .*in use"):
            meet()
