"""Finds a rank's place on its network: the interface with its node's address, and a free port."""

from __future__ import annotations

import socket

import psutil


def interface_of(address: str) -> str | None:
    """Return the name of the network interface that has an address; None where none has it."""
    for name, addresses in psutil.net_if_addrs().items():
        # An IPv6 address may end in its scope, as in fe80::1%eth0.
        if any(item.address.partition("%")[0] == address for item in addresses):
            return name
    return None


def socket_interfaces(address: str) -> dict[str, str]:
    """Return the environment with which Gloo and NCCL talk over the interface that has `address`.

    By themselves Gloo takes what the machine's name resolves to, which is 127.0.1.1 on a Debian,
    and NCCL the first interface that is up, which may be a container bridge: other nodes reach
    neither. Empty where no interface has the address.
    """
    name = interface_of(address)
    # The equals sign has NCCL match the whole name, where it would take "eth1" for "eth10" also.
    return {} if name is None else {"GLOO_SOCKET_IFNAME": name, "NCCL_SOCKET_IFNAME": f"={name}"}


def reserve_port() -> socket.socket:
    """Return a socket bound to a port of all addresses, which nobody is given while it is open.

    It does not listen: so one who sets SO_REUSEADDR, as `torch.distributed` does in this process or
    in another, can listen at that very port, while the system gives it to nobody who asks for any.
    On all addresses, since torch listens on all, and who has the port of one is in its way.
    """
    dual = socket.has_dualstack_ipv6()
    reserved = socket.socket(socket.AF_INET6 if dual else socket.AF_INET)
    try:
        reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if dual:
            reserved.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        reserved.bind(("", 0))
    except OSError:
        reserved.close()
        raise
    return reserved
