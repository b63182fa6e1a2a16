"""`make audit` against a package index that publishes vulnerabilities: it asks that alone, and fails when it must."""

import datetime
import json
import os
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from packaging.requirements import Requirement

from tests.conftest import HANG_S, ROOT

FLAW = {
    "id": "PYSEC-2026-1",
    "aliases": ["CVE-2026-0001"],
    "details": "reads past the end",
    "fixed_in": ["99.0"],
    "link": "",
    "published": "2026-01-01T00:00:00Z",
    "withdrawn": None,
}


class Index(socketserver.ThreadingTCPServer):
    """A package index behind a proxy, so that whatever host is asked for is this one. Knows every package but some."""

    allow_reuse_address = daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.folder = folder
        self.flaws: dict[str, list[dict[str, object]]] = {}
        self.unknown: set[str] = set()
        self.asked: set[str] = set()
        self._key = ec.generate_private_key(ec.SECP256R1())
        (folder / "ca.pem").write_bytes(self._certificate("authority").public_bytes(serialization.Encoding.PEM))

    def context(self, host: str) -> ssl.SSLContext:
        """TLS as that host."""
        path = self.folder / f"{host}.pem"
        private = serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        path.write_bytes(
            self._key.private_bytes(serialization.Encoding.PEM, *private)
            + self._certificate(host).public_bytes(serialization.Encoding.PEM)
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path)
        return context

    def _certificate(self, name: str) -> x509.Certificate:
        authority = name == "authority"
        now = datetime.datetime.now(datetime.UTC)
        named = [x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one)]) for one in (name, "authority")]
        builder = (
            x509.CertificateBuilder(named[1], named[0], self._key.public_key(), x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        )
        return builder.sign(self._key, hashes.SHA256())

    def answer(self, path: str) -> tuple[int, bytes]:
        """The status and the body for /…/PACKAGE/VERSION/json."""
        name = path.split("/")[-3]
        self.asked.add(name)
        if name in self.unknown:
            return 404, b"{}"
        return 200, json.dumps({"info": {}, "vulnerabilities": self.flaws.get(name, [])}).encode()


class _Connection(socketserver.StreamRequestHandler):
    server: Index

    def handle(self) -> None:
        host = self._head().split()[1].rpartition(":")[0]
        self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        with self.server.context(host).wrap_socket(self.request, server_side=True) as secure:
            self.rfile = secure.makefile("rb")
            while head := self._head():
                status, body = self.server.answer(head.split()[1])
                secure.sendall(b"HTTP/1.1 %d -\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body))

    def _head(self) -> str:
        lines = list(iter(self.rfile.readline, b"\r\n")) if (first := self.rfile.readline()) else []
        return (first + b"".join(lines)).decode()


@pytest.fixture
def index(tmp_path: Path) -> Iterator[Index]:
    with Index(tmp_path) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def audit(index: Index, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """`make audit` of the gateway's packages, the tools as they are."""
    if not (ROOT / ".tools" / "bin" / "pip-audit").exists():
        pytest.skip("needs the tools' own environment: `make tools` (make test builds it)")
    environment = {
        **os.environ,
        "HTTPS_PROXY": f"http://127.0.0.1:{index.server_address[1]}",
        "https_proxy": "",
        "NO_PROXY": "",
        "no_proxy": "",
        "REQUESTS_CA_BUNDLE": str(tmp_path / "ca.pem"),
        "HOME": str(tmp_path),  # and no cache of an earlier answer
        "XDG_CACHE_HOME": str(tmp_path),
        "PIP_CACHE_DIR": str(tmp_path),
    }
    del environment["https_proxy"], environment["no_proxy"]
    return subprocess.run(
        ["make", "--old-file=tools", "audit", "IMAGES=gateway"],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG_S, check=False,
    )  # fmt: skip


def test_without_a_known_flaw_it_passes_having_asked_for_every_package(index: Index, tmp_path: Path) -> None:
    done = audit(index, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "No known vulnerabilities found" in done.stderr
    lines = (ROOT / "requirements" / "gateway.txt").read_text().splitlines()
    locked = [Requirement(line.rstrip("\\ ")) for line in lines if line[:1].isalnum()]
    assert index.asked == {one.name for one in locked if one.marker is None or one.marker.evaluate()}


def test_a_known_flaw_fails_it_with_what_to_do(index: Index, tmp_path: Path) -> None:
    index.flaws["pillow"] = [FLAW]
    done = audit(index, tmp_path)
    assert done.returncode != 0
    (row,) = [line for line in done.stdout.splitlines() if line.startswith("pillow ")]
    assert row.split()[2:] == ["PYSEC-2026-1", "99.0"]


def test_a_package_the_index_says_nothing_of_fails_it(index: Index, tmp_path: Path) -> None:
    index.unknown.add("orjson")
    done = audit(index, tmp_path)
    assert done.returncode != 0
    assert "orjson" in done.stderr
