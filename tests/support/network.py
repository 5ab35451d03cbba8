"""Ports, servers, certificates and file descriptors of the test process."""

from __future__ import annotations

import datetime as dt
import ipaddress
import os
import resource
import socket
import ssl
from collections import deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from service.http_protocol import App, BuildRefusal, Limits, build_text_refusal
from service.server import HttpServer, base_url, listen

_DAY = dt.timedelta(days=1)
_RESERVATIONS: deque[int] = deque()
"""Descriptors of the sockets that reserve ports."""
_MAX_RESERVATIONS = 200


def reserve_port() -> int:
    """Reserve a TCP port of 127.0.0.1 for this process: nothing listens there until it starts a server.

    The kernel gives a port to no other process while a socket is bound to it. A server may bind it too, any number of
    times, if both have SO_REUSEADDR and this one does not listen.
    """
    reserving = socket.socket()
    reserving.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserving.bind(("127.0.0.1", 0))
    port = int(reserving.getsockname()[1])
    _RESERVATIONS.append(reserving.detach())
    if len(_RESERVATIONS) > _MAX_RESERVATIONS:
        os.close(_RESERVATIONS.popleft())
    return port


@asynccontextmanager
async def serve_app(
    app: App, *, limits: Limits = Limits(), refuse: BuildRefusal = build_text_refusal
) -> AsyncIterator[str]:
    """Serve an application on a free port of 127.0.0.1, in the event loop of the test; yield its base URL."""
    server = HttpServer(app, limits=limits, build_refusal=refuse)
    listening = listen("127.0.0.1", 0)
    server.start(listening)
    try:
        yield base_url(listening)
    finally:
        await server.stop()


def create_certificate(folder: Path, subject: str = "127.0.0.1") -> tuple[Path, ssl.SSLContext]:
    """Create a certificate for an IPv4 address or a name; returns the file to trust and the server's context."""
    is_address = subject[0].isdigit()
    name = x509.IPAddress(ipaddress.ip_address(subject)) if is_address else x509.DNSName(subject)
    key, now = ec.generate_private_key(ec.SECP256R1()), dt.datetime.now(dt.UTC)
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    certificate = (
        x509.CertificateBuilder(issuer, issuer, key.public_key(), x509.random_serial_number(), now - _DAY, now + _DAY)
        .add_extension(x509.SubjectAlternativeName([name]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path = folder / "certificate.pem"
    path.write_bytes(certificate.public_bytes(Encoding.PEM) + private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return path, context


@contextmanager
def exhaust_descriptors(pid: int = 0) -> Iterator[None]:
    """Let a process, by default this one, run out of file descriptors within the block."""
    soft, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    # 0 to 2 are always open. With less, `poll` of a thread that runs beside the test would fail.
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (3, hard))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (soft, hard))
