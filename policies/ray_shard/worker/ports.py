"""Addresses and ports of this machine at which ranks meet."""
from __future__ import annotations

import os
import socket

import psutil


def open_port(host: str = "127.0.0.1") -> int:
    """A port that is free now, for rank 0 to bind. Somebody else may be quicker: then `Group` raises, and another will do."""
    with socket.create_server((host, 0), family=_family(host)) as server:
        return int(server.getsockname()[1])


def listen(host: str, port: int) -> int | None:
    """A socket that listens on this address alone; torch's own store would listen on all. None leaves it to torch."""
    return None if os.name == "nt" else socket.create_server((host, port), family=_family(host)).detach()


def interface_of(address: str) -> str:
    """What the system calls the interface with this address; "" if there is none."""
    return next((name for name, found in psutil.net_if_addrs().items() if address in [one.address for one in found]), "")


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
