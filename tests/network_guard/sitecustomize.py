"""Let no Python code in this process or its children reach beyond this machine.

Python imports a module of this name at start when its folder is on PYTHONPATH, so that kernels and command-line
runs are guarded too. An audit hook sees every connection and look-up made through Python's socket module, and
cannot be taken out again. Compiled code with sockets of its own (llama.cpp, Chroma's Rust core) is not seen:
tests/test_offline.py runs in a network namespace for that.

A library may swallow the error, as telemetry does, so each attempt is also written to $LLMOPS_REF_NETWORK_LOG.
"""

import ipaddress
import os
import socket
import sys

_EVENTS = {
    "socket.connect": 1,
    "socket.sendto": 1,
    "socket.sendmsg": 1,
    "socket.getaddrinfo": 0,
    "socket.gethostbyname": 0,
    "socket.gethostbyaddr": 0,
}


class NetworkBlockedError(ConnectionError):
    "Code under test tried to reach another machine."


def is_local(host: object) -> bool:
    "Tell whether a host, as given to the socket module, is this machine."
    if isinstance(host, (bytes, bytearray)):
        host = host.decode("ascii", "replace")
    if not host or host in ("localhost", "0.0.0.0", "::", socket.gethostname()):
        return True
    try:
        return ipaddress.ip_address(str(host).partition("%")[0]).is_loopback
    except ValueError:
        return False


def _watch(event: str, arguments: tuple) -> None:
    position = _EVENTS.get(event)
    if position is None:
        return
    host = arguments[position]
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
        if not isinstance(host, tuple):
            return  # a Unix socket's path, or the address of an earlier connect
        host = host[0]
    if is_local(host):
        return
    log = os.environ.get("LLMOPS_REF_NETWORK_LOG")
    if log:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{event} {host}\n")
    raise NetworkBlockedError(f"The tests run offline, and {event} asked for {host!r}.")


if not getattr(sys, "_llmops_ref_network_guard", False):
    sys._llmops_ref_network_guard = True
    sys.addaudithook(_watch)
