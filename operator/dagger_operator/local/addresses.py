"""A loopback address for each pod, so that every pod can listen on the same port."""

import hashlib
import socket


def pod_address(scope: str, pod: str) -> str:
    """Return an address in 127.64.0.0/10, always the same for the same pod of the same run."""
    a, b, c = hashlib.blake2b(f"{scope}/{pod}".encode(), digest_size=3).digest()
    return f"127.{64 + a % 128}.{b}.{1 + c % 254}"


def listens(address: str, port: int, timeout: float = 0.2) -> bool:
    """Whether something already accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(timeout)
        return probe.connect_ex((address, port)) == 0
