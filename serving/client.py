"""Client of the gateway, for Python and the command line: ``python -m serving.client classify seven.png [--grpc]``."""

import os
import ssl
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Final, NamedTuple, Self

import grpc
import httpx
import orjson
import stamina
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from digits import errors
from digits.errors import DigitsError, ModelUnavailable, Overloaded, UpstreamTimeout
from serving.protos import digits_pb2 as pb
from serving.protos import digits_pb2_grpc

DEFAULT_URL: Final = "http://127.0.0.1:8080"
DEFAULT_ADDRESS: Final = "127.0.0.1:50051"
PARALLEL: Final = 8
"""Files that the command line sends at once."""

LONGEST_PAUSE_S: Final = 30.0
"""A gateway that wants to be left alone for longer is not waited for."""


class Reading(NamedTuple):
    """One digit that was read; ``probabilities`` are ten, for the digits 0 to 9.

    For a model of other classes ``digit`` is the number of one, and ``label`` what it is called. ``unsure`` says that
    the answer had better not be used: the model is less certain of it than its threshold.
    """

    digit: int
    confidence: float
    probabilities: tuple[float, ...]
    model_version: str
    request_id: str
    label: str = ""
    unsure: bool = False


_OPTIONAL: Final = ("label", "unsure")
"""Not in a gateway's JSON when there is nothing to say."""


class GatewayError(DigitsError):
    """The gateway answered an error that this client has no class for, or something that is no answer of a gateway."""


class GatewayUnreachable(ModelUnavailable):
    """No connection to the gateway."""


class _Client:
    """What both transports share: retries of what may pass, and closing."""

    def __init__(self, timeout_s: float, attempts: int) -> None:
        self._timeout_s = timeout_s
        self._retry = stamina.RetryingCaller(
            attempts=attempts, timeout=2 * timeout_s * attempts, wait_initial=0.1, wait_max=2.0, wait_jitter=0.2
        ).on(_worth_another_try)

    def classify(self, picture: bytes) -> Reading:
        """Read the digit in a picture.

        Args:
            picture: A PNG, JPEG, … file's bytes, or the 784 bytes of a canonical image (ink 255 on paper 0).

        Raises:
            DigitsError: BadImage, TooLarge, Overloaded, ModelUnavailable, UpstreamTimeout, … as the gateway said. The
                last three only after several attempts.
        """
        return self._retry(self._classify_once, picture)

    def close(self) -> None:
        """Close connections."""
        raise NotImplementedError

    def _classify_once(self, picture: bytes) -> Reading:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RestClient(_Client):
    """Speaks REST. May be used from several threads.

    Args:
        url: Address of the gateway, such as ``http://localhost:8080`` or ``https://digits.example``.
        timeout_s: Longest wait for one answer.
        attempts: Tries in all.
        api_key: Sent with each request, where the gateway asks for one.
        ca: File of authorities, PEM, that may have signed the gateway's certificate; the system's if None.
        cert: Certificate chain, PEM, to show the gateway (mutual TLS).
        key: Its private key, PEM.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        timeout_s: float = 10.0,
        attempts: int = 5,
        api_key: str = "",
        ca: Path | None = None,
        cert: Path | None = None,
        key: Path | None = None,
    ) -> None:
        super().__init__(timeout_s, attempts)
        context = ssl.create_default_context(cafile=ca)
        if cert is not None:
            context.load_cert_chain(cert, key)
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.Client(base_url=url, timeout=timeout_s, headers=headers, verify=context)

    def close(self) -> None:
        """Close connections."""
        self._http.close()

    def _classify_once(self, picture: bytes) -> Reading:
        url = self._http.base_url
        try:
            answer = self._http.post("/classify", content=picture, headers={"content-type": "application/octet-stream"})
        except httpx.TimeoutException as err:
            raise UpstreamTimeout(f"the gateway at {url} did not answer within {self._timeout_s:g} s") from err
        except httpx.TransportError as err:
            raise GatewayUnreachable(f"the gateway at {url} cannot be reached: {err}") from err
        try:
            found = orjson.loads(answer.content)
            if answer.status_code == 200:
                return Reading(
                    digit=found["digit"],
                    confidence=found["confidence"],
                    probabilities=tuple(found["probabilities"]),
                    model_version=found["model_version"],
                    request_id=found["request_id"],
                    label=found.get("label", ""),
                    unsure=found.get("unsure", False),
                )
            code, message = found["error"]["code"], found["error"]["message"]
        except (orjson.JSONDecodeError, KeyError, TypeError) as err:
            raise GatewayError(f"{url} answered {answer.status_code}, and not as a gateway does: is it one?") from err
        raise _error(code, message, float(answer.headers.get("retry-after", 0)))


class GrpcClient(_Client):
    """Speaks gRPC. May be used from several threads.

    Args:
        address: ``host:port`` of the gateway's gRPC port.
        timeout_s: Deadline of one call.
        attempts: Tries in all.
        api_key: Sent with each call, where the gateway asks for one.
        tls: Speak TLS; so it does too where ``ca`` or ``cert`` is given.
        ca: File of authorities, PEM, that may have signed the gateway's certificate; the system's if None.
        cert: Certificate chain, PEM, to show the gateway (mutual TLS).
        key: Its private key, PEM.
    """

    def __init__(
        self,
        address: str = DEFAULT_ADDRESS,
        *,
        timeout_s: float = 10.0,
        attempts: int = 5,
        api_key: str = "",
        tls: bool = False,
        ca: Path | None = None,
        cert: Path | None = None,
        key: Path | None = None,
    ) -> None:
        super().__init__(timeout_s, attempts)
        self._address = address
        self._metadata = (("authorization", f"Bearer {api_key}"),) if api_key else ()
        if tls or ca is not None or cert is not None:
            files = [file.read_bytes() if file else None for file in (ca, key, cert)]
            self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(*files))
        else:
            self._channel = grpc.insecure_channel(address)
        self._stub = digits_pb2_grpc.DigitsStub(self._channel)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def _classify_once(self, picture: bytes) -> Reading:
        try:
            request = pb.ClassifyRequest(image=picture)
            found = self._stub.Classify(request, timeout=self._timeout_s, metadata=self._metadata)
        except grpc.RpcError as err:
            raise _rpc_error(err, self._address) from err
        return Reading(
            found.digit,
            found.confidence,
            tuple(found.probabilities),
            found.model_version,
            found.request_id,
            found.label,
            found.unsure,
        )


_BY_CODE: Final[dict[str, type[DigitsError]]] = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, DigitsError) and kind is not DigitsError
}

_BY_STATUS: Final[dict[grpc.StatusCode, type[DigitsError]]] = {
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.TooLarge,  # a message over the server's limit
    grpc.StatusCode.UNIMPLEMENTED: errors.Unimplemented,
    grpc.StatusCode.DEADLINE_EXCEEDED: UpstreamTimeout,
}


def _error(code: str, message: str, retry_after_s: float) -> DigitsError:
    kind = _BY_CODE.get(code, GatewayError)
    if issubclass(kind, Overloaded | ModelUnavailable):
        return kind(message, retry_after_s)
    return kind(message)


def _rpc_error(err: grpc.RpcError, address: str) -> DigitsError:
    details = err.details() or err.code().name
    trailers = dict(err.trailing_metadata() or ())
    if "x-error-code" in trailers:
        retry_after_s = float(trailers.get("grpc-retry-pushback-ms", 0)) / 1000
        return _error(trailers["x-error-code"], details, retry_after_s)
    # Not the gateway's own word but its gRPC library's, or this side's.
    if err.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):  # the latter from one that is stopping
        return GatewayUnreachable(f"the gateway at {address} cannot be reached: {details}")
    return _BY_STATUS.get(err.code(), GatewayError)(details)


def _worth_another_try(err: Exception) -> bool | float:
    if isinstance(err, Overloaded | ModelUnavailable) and err.retry_after_s:
        return err.retry_after_s if err.retry_after_s <= LONGEST_PAUSE_S else False
    return isinstance(err, Overloaded | ModelUnavailable | UpstreamTimeout)


# --- the command line ---

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _root() -> None:
    """Client of the digits gateway."""


@app.command()
def classify(
    files: Annotated[
        list[Path], typer.Argument(help="Pictures of one digit each, raw files of 784 bytes, or folders of such files.")
    ],
    use_grpc: Annotated[bool, typer.Option("--grpc", help="Speak gRPC instead of REST.")] = False,
    url: Annotated[str, typer.Option(envvar="DIGITS_URL", help="Address of REST.")] = DEFAULT_URL,
    address: Annotated[str, typer.Option(envvar="DIGITS_ADDRESS", help="host:port of gRPC.")] = DEFAULT_ADDRESS,
    timeout_s: Annotated[float, typer.Option("--timeout", min=0.001, help="Seconds for one answer.")] = 10.0,
    attempts: Annotated[int, typer.Option(min=1, help="Tries for each file when the service is busy or away.")] = 5,
    parallel: Annotated[int, typer.Option(min=1, max=256, help="Files sent at once.")] = PARALLEL,
    api_key: Annotated[
        str, typer.Option(envvar="DIGITS_API_KEY", help="Better set as a variable: others see a command line.")
    ] = "",
    tls: Annotated[bool, typer.Option("--tls", help="gRPC over TLS; for REST the address says https.")] = False,
    ca: Annotated[Path | None, typer.Option(exists=True, help="Authorities to trust, PEM; else the system's.")] = None,
    cert: Annotated[Path | None, typer.Option(exists=True, help="Certificate to show, PEM (mutual TLS).")] = None,
    key: Annotated[Path | None, typer.Option(exists=True, help="The certificate's private key, PEM.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False,
) -> None:
    """Read the digit in each picture. Exits with 1 if any could not be read."""
    files = [file for name in files for file in _files_in(name)]
    failed = 0
    stamina.instrumentation.set_on_retry_hooks([])  # they log to standard output, where the answers go
    with ExitStack() as stack:
        client: _Client = stack.enter_context(
            GrpcClient(
                address, timeout_s=timeout_s, attempts=attempts, api_key=api_key, tls=tls, ca=ca, cert=cert, key=key
            )
            if use_grpc
            else RestClient(url, timeout_s=timeout_s, attempts=attempts, api_key=api_key, ca=ca, cert=cert, key=key)
        )
        for file, found in _with_progress(_read_all(client, files, parallel), len(files)):
            failed += isinstance(found, DigitsError)
            _show(file, found, as_json=as_json)
    if failed:
        raise typer.Exit(1)


def _files_in(path: Path) -> list[Path]:
    """The file itself, or the files right in a folder by their names; hidden ones are left out."""
    if not path.is_dir():
        return [path]
    return sorted(file for file in path.iterdir() if file.is_file() and not file.name.startswith("."))


def _read_all(client: _Client, files: list[Path], parallel: int) -> Iterator[tuple[Path, Reading | DigitsError]]:
    """Answers in the order of the files, several of them under way at once."""

    def read(file: Path) -> Reading | DigitsError:
        try:
            return client.classify(file.read_bytes())
        except OSError as err:
            return errors.BadImage(f"cannot read the file: {err.strerror}")
        except DigitsError as err:
            return err

    with ThreadPoolExecutor(parallel) as pool:
        yield from zip(files, pool.map(read, files), strict=True)


def _with_progress(found: Iterator[Any], total: int) -> Iterator[Any]:
    """A bar on a terminal's standard error, if there is something to wait for."""
    columns = (TextColumn("reading"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=total < 2 or not console.is_terminal) as progress:
        task = progress.add_task("reading", total=total)
        for one in found:
            progress.advance(task)
            yield one


def _show(file: Path, found: Reading | DigitsError, *, as_json: bool) -> None:
    if as_json:
        facts: dict[str, object] = {"file": os.fspath(file)}
        if isinstance(found, DigitsError):
            facts["error"] = {"code": found.code, "message": str(found)}
        else:
            facts |= {name: value for name, value in found._asdict().items() if name not in _OPTIONAL or value}
        print(orjson.dumps(facts).decode())  # noqa: T201 - a command line prints
    elif isinstance(found, DigitsError):
        print(f"{file}: {found}", file=sys.stderr)  # noqa: T201
    else:
        doubt = "\tunsure" if found.unsure else ""
        print(f"{file}\t{found.label or found.digit}\t{found.confidence:.2%}\tmodel {found.model_version}{doubt}")  # noqa: T201


if __name__ == "__main__":
    app()
