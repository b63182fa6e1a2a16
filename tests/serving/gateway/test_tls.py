"""TLS and mutual TLS on both ports and towards the model server, with certificates made for the test."""

import datetime
import ipaddress
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import grpc
import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from serving.client import GatewayUnreachable, GrpcClient, RestClient
from serving.gateway.settings import Settings
from tests.conftest import ROOT
from tests.serving.gateway.conftest import Here, LoopThread, eventually
from tests.serving.gateway.test_process import run
from tests.serving.gateway.upstream_server import TestUpstream


class Pair(NamedTuple):
    cert: Path
    key: Path


class Authority:
    """Signs certificates for 127.0.0.1 and localhost."""

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.file = self._write(f"{name}.pem", self._sign(self._subject, self._key, authority=True))

    def pair(self, name: str) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        cert = self._write(f"{self._name}-{name}.pem", self._sign(subject, key, authority=False))
        private = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return Pair(cert, self._write(f"{self._name}-{name}.key", private))

    def _sign(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *, authority: bool) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
        certificate = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)

    def _write(self, name: str, data: bytes) -> Path:
        path = self._folder / name
        path.write_bytes(data)
        return path


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ours"), "ours")


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("theirs"), "theirs")


def read_both(here: Here, **tls: Path) -> list[int]:
    with RestClient(here.url.replace("http://", "https://"), attempts=1, **tls) as rest:
        digits = [rest.classify(bytes(784)).digit]
    with GrpcClient(here.grpc_address, attempts=1, **tls) as rpc:
        return [*digits, rpc.classify(bytes(784)).digit]


def check_shut_out(here: Here, **tls: Path) -> None:
    url = here.url.replace("http://", "https://")
    with RestClient(url, attempts=1, **tls) as rest, pytest.raises(GatewayUnreachable):
        rest.classify(bytes(784))
    with GrpcClient(here.grpc_address, attempts=1, timeout_s=5, **tls) as rpc, pytest.raises(GatewayUnreachable):
        rpc.classify(bytes(784))


def start_tls(start: Callable[..., Here], pair: Pair, **settings: object) -> Here:
    here = start(ready=False, tls_cert_file=pair.cert, tls_key_file=pair.key, **settings)
    eventually(lambda: here.gateway.upstream.availability.ready)
    return here


def test_both_ports_speak_tls_and_nothing_else(start: Callable[..., Here], authority: Authority) -> None:
    """Clients that trust the authority are answered; plain ones are not, nor is anything older than TLS 1.2."""
    here = start_tls(start, authority.pair("gateway"))
    assert here.log_lines("listening")[0]["rest"].startswith("https://")
    assert read_both(here, ca=authority.file) == [0, 0]
    with pytest.raises(httpx.TransportError):
        here.http.get("/healthz")
    with pytest.raises(grpc.RpcError):
        here.channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=2)
    old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    old.load_verify_locations(authority.file)
    old.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises((httpx.ConnectError, ssl.SSLError)):
        httpx.get(here.url.replace("http://", "https://") + "/healthz", verify=old)


@pytest.mark.parametrize("clients", ["", "ours", "stranger"])
def test_the_images_health_check_speaks_tls_where_the_gateway_does(
    start: Callable[..., Here], authority: Authority, stranger: Authority, clients: str
) -> None:
    """It goes by the gateway's settings. With mutual TLS it shows the gateway's certificate; a refusal is an answer."""
    pair = authority.pair("gateway")
    files = {"tls_cert_file": pair.cert, "tls_key_file": pair.key}
    if clients:
        files["tls_client_ca_file"] = (authority if clients == "ours" else stranger).file
    here = start_tls(start, pair, **{name: file for name, file in files.items() if "client" in name})
    url = here.url.replace("https://", "http://") + "/readyz"
    environment = {f"DIGITS_{name.upper()}": str(file) for name, file in files.items()}
    assert check_health(url, **environment) == (0, "")
    assert check_health(url)[0] == 1
    code, words = check_health("http://127.0.0.1:9/readyz", **environment)
    assert (code, words.splitlines()) == (1, ["https://127.0.0.1:9/readyz: [Errno 111] Connection refused"])
    if clients != "stranger":
        here.gateway.draining = True
        assert check_health(url, **environment)[0] == 1


def check_health(url: str, **environment: str) -> tuple[int, str]:
    command = [sys.executable, ROOT / "docker" / "health.py", url]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)
    return done.returncode, done.stderr


def test_a_handshake_that_takes_too_long_is_cut_off(start: Callable[..., Here], authority: Authority) -> None:
    """A connection that says nothing holds no place for longer than one that is slow with its headers."""
    here = start_tls(start, authority.pair("gateway"), header_timeout_s=0.5)
    for address in (here.url.removeprefix("http://"), here.grpc_address):
        host, port = address.rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=20) as raw:
            assert raw.recv(100) == b""


def test_a_client_that_does_not_know_the_authority_leaves(
    start: Callable[..., Here], authority: Authority, stranger: Authority
) -> None:
    """It is the client's to check."""
    here = start_tls(start, authority.pair("gateway"))
    check_shut_out(here, ca=stranger.file)


def test_mutual_tls_lets_in_whom_the_authority_signed(
    start: Callable[..., Here], authority: Authority, stranger: Authority
) -> None:
    """No certificate, or one that another authority signed, is no way in, on either port."""
    here = start_tls(start, authority.pair("gateway"), tls_client_ca_file=authority.file)
    mine, theirs = authority.pair("client"), stranger.pair("client")
    assert read_both(here, ca=authority.file, cert=mine.cert, key=mine.key) == [0, 0]
    for pair in ({}, {"cert": theirs.cert, "key": theirs.key}):
        check_shut_out(here, ca=authority.file, **pair)


def test_the_way_to_the_model_server_can_be_mutual_tls(
    start: Callable[..., Here], thread: LoopThread, authority: Authority, stranger: Authority
) -> None:
    """The gateway shows its certificate and checks the server's; it is not ready before one that is not signed so."""
    server, client, unknown = authority.pair("server"), authority.pair("gateway"), stranger.pair("gateway")
    upstream = TestUpstream()
    upstream.credentials = grpc.ssl_server_credentials(
        [(server.key.read_bytes(), server.cert.read_bytes())], authority.file.read_bytes(), require_client_auth=True
    )
    thread.run(upstream.start())
    try:
        tls = {"upstream": upstream.target, "upstream_tls": True, "upstream_ca_file": authority.file}
        here = start(**tls, upstream_cert_file=client.cert, upstream_key_file=client.key)
        assert here.classify(bytes(784)).json()["model_version"] == "3"
        for wrong in (
            {"upstream_cert_file": unknown.cert, "upstream_key_file": unknown.key},
            {"upstream_ca_file": stranger.file, "upstream_cert_file": client.cert, "upstream_key_file": client.key},
        ):
            here = start(ready=False, **{**tls, **wrong})
            eventually(lambda here=here: "cannot be reached" in here.http.get("/readyz").json()["reason"])
            assert here.classify(bytes(784)).status_code == 503
    finally:
        thread.run(upstream.stop())


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        ({"tls_cert_file": "cert"}, "DIGITS_TLS_KEY_FILE"),
        ({"tls_client_ca_file": "cert"}, "needs DIGITS_TLS_CERT_FILE"),
        ({"upstream_ca_file": "cert"}, "DIGITS_UPSTREAM_TLS"),
        ({"tls_cert_file": "missing", "tls_key_file": "missing"}, "file"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(
    authority: Authority, settings: dict[str, str], part: str
) -> None:
    """With the ones that are missing."""
    files = {name: authority.file if value == "cert" else Path("/nowhere") for name, value in settings.items()}
    with pytest.raises(ValueError, match=part):
        Settings(**files)


def test_a_file_that_is_no_certificate_is_one_line_and_status_2(tmp_path: Path, authority: Authority) -> None:
    """It names the setting and the file, not what is in it."""
    bad = tmp_path / "bad.pem"
    bad.write_text("secret")
    pair = authority.pair("gateway")
    ports = {"DIGITS_REST_PORT": "0", "DIGITS_GRPC_PORT": "0"}
    good = {"DIGITS_TLS_CERT_FILE": str(pair.cert), "DIGITS_TLS_KEY_FILE": str(pair.key)}
    for settings in (
        {"DIGITS_TLS_CERT_FILE": str(bad), "DIGITS_TLS_KEY_FILE": str(bad)},
        {**good, "DIGITS_TLS_CLIENT_CA_FILE": str(bad)},
        {"DIGITS_UPSTREAM_TLS": "true", "DIGITS_UPSTREAM_CA_FILE": str(bad)},
    ):
        ended = run(**ports, **settings)
        assert ended.returncode == 2
        [line] = ended.stderr.splitlines()
        assert str(bad) in line
        assert "secret" not in line
