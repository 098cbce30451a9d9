"""The network guard itself: it must stop what it is there to stop, or every offline test is worth nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading

import pytest


@pytest.mark.tries_network
@pytest.mark.parametrize(
    "attempt",
    [
        lambda: socket.create_connection(("192.0.2.1", 80), timeout=1),
        lambda: socket.getaddrinfo("example.org", 443),
        lambda: socket.gethostbyname("example.org"),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("192.0.2.1", 9)),
        lambda: socket.socket(socket.AF_INET6).connect(("2001:db8::1", 80)),
    ],
    ids=["connect", "getaddrinfo", "gethostbyname", "sendto", "ipv6"],
)
def test_leaving_the_machine_is_refused(attempt) -> None:
    with pytest.raises(ConnectionError, match="tests run offline"):
        attempt()


@pytest.mark.tries_network
def test_a_child_process_inherits_the_guard() -> None:
    code = "import socket; socket.create_connection(('192.0.2.1', 80), timeout=1)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "NetworkBlockedError" in done.stderr


@pytest.mark.tries_network
def test_a_swallowed_attempt_is_still_written_down() -> None:
    code = "import socket\ntry:\n    socket.create_connection(('192.0.2.77', 80))\nexcept OSError:\n    pass"
    subprocess.run([sys.executable, "-c", code], check=True)
    with open(os.environ["LLMOPS_REF_NETWORK_LOG"], encoding="utf-8") as log:
        assert "192.0.2.77" in log.read()


def test_loopback_is_allowed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=lambda: server.accept()[0].sendall(b"here"))
        thread.start()
        with socket.create_connection(server.getsockname()[:2], timeout=5) as client:
            assert client.recv(4) == b"here"
        thread.join()
    assert socket.getaddrinfo("localhost", 80)
