"""What an operator may set: environment variables ``DIGITS_*``, read once at start."""

from ipaddress import ip_address
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, FilePath, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from digits.errors import DigitsError


class BadSettings(DigitsError):
    """A ``DIGITS_*`` variable holds something that cannot be used."""

    code = "bad_settings"


def _address(value: str) -> str:
    """A target that ``grpc_client.Channel`` takes."""
    split_target(value)
    return value


def check_rate(value: str) -> str:
    """A rate such as ``100/second``, or several with ``;`` between; empty for none.

    Raises:
        ValueError: It is none.
    """
    if value:
        from limits import parse_many  # where a rate is set: 0.1 s of start otherwise

        try:
            parse_many(value)
        except ValueError as err:
            raise ValueError(f"expected a rate such as 100/second or 100/second;2000/minute, came {value!r}") from err
    return value


Port = Annotated[int, Field(ge=0, le=65535)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Settings(BaseSettings):
    """The gateway's settings. Times are in seconds, sizes in bytes. Port 0 takes any free port."""

    model_config = SettingsConfigDict(env_prefix="DIGITS_", extra="ignore", frozen=True, use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Address that REST and gRPC listen on; ``0.0.0.0`` for all interfaces."""

    rest_port: Port = 8080
    """Port of REST, the drawing page and ``/metrics``."""

    grpc_port: Port = 50051
    """Port of gRPC."""

    workers: Annotated[int, Field(ge=1, le=64)] = 1
    """Processes that answer, on the same two ports. With two or more, SIGHUP replaces them one by one and no request is
    lost. A rate limit, a queue's limit and a limit of connections each count in one process."""

    upstream: Annotated[str, AfterValidator(_address)] = "127.0.0.1:8500"
    """The model server's gRPC address: ``host:port``, ``dns:///name:port`` (which means the same) or ``unix:path``.
    Calls take turns over all addresses of a name."""

    upstream_wait_s: Positive | None = None
    """How long to wait at the start until something listens at that address, before the gateway's own ports open; then
    it ends with an error. Unset: it starts at once, and ``/readyz`` says what is missing until there is one."""

    model_label: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,64}$")] = ""
    """Label of the model version that answers requests which name none, such as ``stable``; empty for the newest
    version. While the model server does not know the label, the newest answers."""

    timeout_s: Positive = 5.0
    """How long a REST request, or a gRPC call that brings no deadline, may wait for the model."""

    max_batch_images: Annotated[int, Field(ge=1, le=65536)] = 128
    """Most images that go upstream in one call. A single request with more goes alone."""

    max_upstream_calls: Annotated[int, Field(ge=1, le=64)] = 3
    """Most calls under way upstream at once. What arrives meanwhile waits and goes together."""

    busy_wait_ms: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """For so long after a call upstream has left or come back the gateway looks for more instead of sleeping: shorter
    waiting, above all on virtual machines, for up to a whole processor a worker. 0: it sleeps. 2 is enough."""

    max_queue_images: Annotated[int, Field(ge=1)] = 1024
    """Most images that may wait for their turn. Beyond that requests are refused: 429, RESOURCE_EXHAUSTED."""

    max_wait_s: Positive = 0.25
    """Longest wait for its turn that a request is let in for, as the calls of late let expect it; a request with less
    time than that until its deadline is refused sooner."""

    max_burst_s: Positive = 0.1
    """How long more than a batch may wait before it counts as overload, in which queue and batches are kept short."""

    max_request_images: Annotated[int, Field(ge=1, le=65536)] = 4096
    """Most images in one request of TensorFlow Serving's or the open inference protocol."""

    max_passed_calls: Annotated[int, Field(ge=1)] = 32
    """Most gRPC calls of TensorFlow Serving's API passed on at once; more are refused: RESOURCE_EXHAUSTED."""

    max_body_bytes: Annotated[int, Field(ge=1024)] = 10 * 1024 * 1024
    """Largest request body or gRPC message."""

    header_timeout_s: Positive = 10.0
    """How long a connection may take over its request's headers, from its first byte or from connecting."""

    body_timeout_s: Positive = 20.0
    """How long a request may take over its body."""

    keep_alive_s: Positive = 75.0
    """How long an idle REST connection is kept open."""

    decode_threads: Annotated[int, Field(ge=1, le=64)] = 1
    """Threads that decode large pictures. Small ones are decoded at once."""

    max_waiting_decodes: Annotated[int, Field(ge=1)] = 64
    """Most large pictures decoded or waiting for a thread. Beyond that they are refused as overload."""

    unsure_below: Annotated[float, Field(ge=0, le=1)] | None = None
    """An answer of less certainty than this is marked and counted as unsure. None: than the model's own threshold."""

    status_poll_s: Positive = 0.5
    """How often the model server is asked whether it has a version to serve. ``/readyz`` follows the answer."""

    drain_delay_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.2
    """After SIGTERM, how long requests are still accepted while readiness is already off, so that balancers notice."""

    drain_timeout_s: Positive = 20.0
    """After SIGTERM, how long requests under way may take before they are cut off."""

    max_connections: Annotated[int, Field(ge=1)] = 8192
    """Most connections at once to either port; further ones are closed at once."""

    api_keys_file: FilePath | None = None
    """File of API keys, one ``name:sha256`` a line, or ``name:sha256:rate``; ``python -m serving.gateway make-key
    NAME`` makes one. With it, all that reaches the model needs a key: ``Authorization: Bearer KEY`` or
    ``x-api-key: KEY``, over gRPC as metadata. Health, metrics, documents and the drawing page stay open."""

    require_keys: bool = False
    """Do not start without at least one API key."""

    rate_limit: Annotated[str, AfterValidator(check_rate)] = ""
    """Most requests of each API key, or of each client address where no key is needed: ``100/second``, or several with
    ``;`` between. Beyond it: 429, RESOURCE_EXHAUSTED."""

    tls_cert_file: FilePath | None = None
    """Certificate chain, PEM, for both ports. Without it they speak plain HTTP and gRPC."""

    tls_key_file: FilePath | None = None
    """The certificate's private key, PEM."""

    tls_client_ca_file: FilePath | None = None
    """Authorities, PEM, one of which must have signed each client's certificate (mutual TLS), on both ports."""

    upstream_tls: bool = False
    """Speak TLS to the model server; the system's authorities are trusted unless ``DIGITS_UPSTREAM_CA_FILE`` is set."""

    upstream_ca_file: FilePath | None = None
    """Authorities, PEM, one of which must have signed the model server's certificate."""

    upstream_cert_file: FilePath | None = None
    """Certificate chain, PEM, that the model server is shown (mutual TLS)."""

    upstream_key_file: FilePath | None = None
    """Its private key, PEM."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level that is logged. Requests are logged as info, those that end in a 5xx as warning."""

    log_format: Literal["auto", "json", "text"] = "auto"
    """``auto`` writes text to a terminal and JSON, one object a line, to anything else."""

    @model_validator(mode="after")
    def _files_belong_together(self) -> Self:
        for one, other in (("tls_cert_file", "tls_key_file"), ("upstream_cert_file", "upstream_key_file")):
            if (getattr(self, one) is None) != (getattr(self, other) is None):
                raise ValueError(f"DIGITS_{one.upper()} and DIGITS_{other.upper()} go together: set both or none")
        if self.tls_client_ca_file and not self.tls_cert_file:
            raise ValueError("DIGITS_TLS_CLIENT_CA_FILE needs DIGITS_TLS_CERT_FILE and DIGITS_TLS_KEY_FILE")
        if (self.upstream_ca_file or self.upstream_cert_file) and not self.upstream_tls:
            raise ValueError("DIGITS_UPSTREAM_CA_FILE and DIGITS_UPSTREAM_CERT_FILE need DIGITS_UPSTREAM_TLS=true")
        return self

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the ports."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def is_open_to_all(self) -> bool:
        """Whether other machines can reach the ports and nobody is asked who they are."""
        return not (self.is_local or self.api_keys_file or self.tls_client_ca_file)

    @property
    def hostport_rest(self) -> str:
        """``host:port`` of REST, with brackets around an IPv6 address."""
        return join_host_port(self.host, self.rest_port)

    @property
    def hostport_grpc(self) -> str:
        """``host:port`` of gRPC, with brackets around an IPv6 address."""
        return join_host_port(self.host, self.grpc_port)


def join_host_port(host: str, port: int) -> str:
    """``127.0.0.1:8080``, ``[::1]:8080``."""
    try:
        return f"[{host}]:{port}" if ip_address(host).version == 6 else f"{host}:{port}"
    except ValueError:
        return f"{host}:{port}"


def split_target(target: str) -> tuple[str, int, str]:
    """A target's host, port and socket path: ``("models", 8500, "")`` or ``("localhost", 0, "/run/models.sock")``.

    Raises:
        ValueError: It is none.
    """
    if target.startswith("unix:"):
        path = target.removeprefix("unix:")
        return "localhost", 0, path.removeprefix("//") if path.startswith("///") else path
    place = target.removeprefix("dns:///") if target.startswith("dns:///") else target.removeprefix("dns:")
    host, colon, port = place.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    try:
        host.encode("idna")  # what a look-up of the name begins with
    except UnicodeError:
        host = ""
    if not (host and colon and port.isdecimal() and 1 <= int(port) <= 65535 and "/" not in place):
        raise ValueError("expected host:port, dns:///name:port or unix:path")
    return host, int(port), ""


def read_settings() -> Settings:
    """Read the environment.

    Raises:
        BadSettings: One line that names each bad variable, what it holds and what is expected.
    """
    try:
        return Settings()
    except ValidationError as err:
        raise BadSettings("; ".join(_one(error) for error in err.errors())) from err


def _one(error: object) -> str:
    assert isinstance(error, dict)
    if not error["loc"]:
        return str(error["msg"]).removeprefix("Value error, ")
    name = "DIGITS_" + "_".join(str(part) for part in error["loc"]).upper()
    return f"{name}={error['input']!r}: {error['msg']}"
