"""The life of model versions: found, loaded, warmed, served, drained, unloaded. Knows nothing of TensorFlow or gRPC.

One thread makes every transition. Requests take a version with ``acquire`` and give it back; a version that is to go
takes no new requests and is closed when its last one has ended. What differs from TensorFlow Serving, on purpose:

- a version that fails to load is passed over in favour of the next lower one, also right after a start;
- a base path that is empty, missing or unreadable never unloads anything;
- a failed version is tried again as soon as its files change, besides the configured retries;
- a label that moves to a version that is not loaded yet names the one before until it is.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from types import TracebackType
from typing import Generic, Protocol, Self, TypeVar

import structlog

from serving.model_server import storage
from serving.model_server.config import All, Latest, ModelConfig
from serving.model_server.errors import Code, ServingError

log = structlog.get_logger()

KEPT_ENDED_VERSIONS = 100
"""Ended versions that a model's status still tells of."""


class State(IntEnum):
    """As ``ModelVersionStatus.State``."""

    START = 10
    LOADING = 20
    AVAILABLE = 30
    UNLOADING = 40
    END = 50


class Servable(Protocol):
    """What a loader returns."""

    def close(self) -> None:
        """Free it; nobody uses it any more."""


S = TypeVar("S", bound=Servable)


@dataclass(slots=True)
class Version(Generic[S]):
    """One version of one model, and where it is in its life. ``status`` and ``message`` say why a load failed."""

    number: int
    path: Path
    state: State = State.START
    status: Code = Code.OK
    message: str = ""
    servable: S | None = None
    users: int = 0
    failures: int = 0
    retry_at_s: float = 0.0
    failed_files: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class VersionStatus:
    """A snapshot for ``GetModelStatus``."""

    number: int
    state: State
    status: Code
    message: str


@dataclass(slots=True)
class _Model(Generic[S]):
    config: ModelConfig
    versions: dict[int, Version[S]] = field(default_factory=dict)
    moved_labels: dict[str, int] = field(default_factory=dict)  # what a label named before it moved
    removed: bool = False
    complaint: str = ""

    def available(self) -> list[int]:
        return [number for number, version in self.versions.items() if version.state is State.AVAILABLE]

    def labelled(self, label: str) -> int:
        """The version that a configured label names now."""
        number, before = self.config.labels[label], self.moved_labels.get(label)
        available = self.available()
        return before if before in available and number not in available else number

    def configure(self, config: ModelConfig) -> None:
        self.moved_labels = {label: self.labelled(label) for label in self.config.labels if label in config.labels}
        self.config = config

    def held_by_labels(self) -> set[int]:
        """Versions that stay, wanted or not, because the one that is to take a label over is not there yet."""
        return {self.labelled(label) for label, number in self.config.labels.items() if self.labelled(label) != number}


class Lease(Generic[S]):
    """A version in use: ``with manager.acquire(…) as lease: lease.servable``. It stays loaded that long."""

    __slots__ = ("_manager", "_version", "number", "servable")

    def __init__(self, manager: "Manager[S]", version: Version[S], servable: S) -> None:
        self._manager = manager
        self._version = version
        self.servable = servable
        self.number = version.number

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._manager._release(self._version)  # noqa: SLF001 - the two halves of one reference count


class Manager(Generic[S]):
    """Follows the base paths of the configured models.

    Args:
        load: loads and warms one version, given model name, version number and folder; a ``ServingError`` or any other
            exception from it is the reason that the version's status shows.
        poll_s: seconds between looks at the base paths; 0 looks once.
        max_retries: further tries of a version that failed to load.
        retry_s: seconds between them.
        on_change: called after versions came or went, with model name to has-a-version; never twice at a time.
        labels_may_dangle: a label may name a version that is not loaded.
    """

    def __init__(
        self,
        load: Callable[[str, int, Path], S],
        *,
        poll_s: float = 1.0,
        max_retries: int = 5,
        retry_s: float = 60.0,
        on_change: Callable[[Mapping[str, bool]], None] = lambda _: None,
        labels_may_dangle: bool = False,
    ) -> None:
        self._load = load
        self._poll_s = poll_s
        self._max_retries = max_retries
        self._retry_s = retry_s
        self._on_change = on_change
        self._labels_may_dangle = labels_may_dangle
        self._models: dict[str, _Model[S]] = {}
        self._retired: list[_Model[S]] = []
        self._lock = threading.Lock()
        self._announcing = threading.Lock()
        self._wake = threading.Event()
        self._stopping = False
        self._passes = 0
        self._pass_ended = threading.Condition(self._lock)
        self._thread = threading.Thread(target=self._run, name="version-manager", daemon=True)

    def start(self, models: Iterable[ModelConfig]) -> None:
        """Begin to follow ``models``."""
        self._configure(models)
        self._thread.start()

    def stop(self) -> None:
        """Stop following; versions stay as they are. A load under way is not waited for."""
        self._stopping = True
        self._wake.set()

    def reconfigure(self, models: Iterable[ModelConfig], timeout_s: float | None = None) -> None:
        """Replace the whole configuration and wait until its versions are loaded.

        Raises:
            ServingError: a model ended without any version, or a label names a version that is not loaded.
        """
        models = list(models)
        with self._lock:
            self._check_labels(models)
        self._configure(models)
        with self._pass_ended:
            target = self._passes + 2  # the pass under way may have begun before the change
            self._wake.set()
            while self._passes < target and not self._stopping:
                self._wake.set()
                if not self._pass_ended.wait(timeout_s or 0.1) and timeout_s:
                    raise ServingError(Code.DEADLINE_EXCEEDED, "the new configuration is not loaded yet")
            for config in models:
                model = self._models.get(config.name)
                if model and not model.available():
                    reasons = [f"{v.number}: {v.message}" for v in model.versions.values() if v.message]
                    raise ServingError(
                        Code.UNKNOWN,
                        f"model {config.name} has no loaded version ({'; '.join(reasons) or 'none found'})",
                    )

    def acquire(self, name: str, number: int | None = None, label: str | None = None) -> Lease[S]:
        """Take a version for one request: ``number``, or what ``label`` names, or the highest available.

        Raises:
            ServingError: NOT_FOUND for a model or version that is not available, INVALID_ARGUMENT for an unknown label.
        """
        with self._lock:
            model = self._models.get(name)
            if label is not None:
                number = self._labelled(model, label)
            version: Version[S] | None = None
            if model is not None:
                version = model.versions.get(max(model.available(), default=-1) if number is None else number)
            if version is None or version.state is not State.AVAILABLE or version.servable is None:
                wanted = f"Latest({name})" if number is None else f"Specific({name}, {number})"
                raise ServingError(Code.NOT_FOUND, f"Servable not found for request: {wanted}")
            version.users += 1
            return Lease(self, version, version.servable)

    def status(self, name: str, number: int | None = None, label: str | None = None) -> list[VersionStatus]:
        """The states of a model's versions, highest first, or of one of them.

        Raises:
            ServingError: NOT_FOUND, with TensorFlow Serving's wording.
        """
        with self._lock:
            model = self._models.get(name)
            if label is not None:
                number = self._labelled(model, label)
            versions = [] if model is None else sorted(model.versions.values(), key=lambda v: -v.number)
            if number is not None:
                versions = [version for version in versions if version.number == number]
            if not versions:
                missing = "any versions" if number is None else f"version {number}"
                raise ServingError(Code.NOT_FOUND, f"Could not find {missing} of model {name}")
            return [VersionStatus(v.number, v.state, v.status, v.message) for v in versions]

    def knows(self, name: str) -> bool:
        """Whether a model of that name is configured."""
        return name in self._models

    def states(self) -> dict[str, dict[int, str]]:
        """Model name → version → name of its state."""
        with self._lock:
            return {name: {n: v.state.name for n, v in model.versions.items()} for name, model in self._models.items()}

    def serving(self) -> dict[str, bool]:
        """Model name to whether it has an available version."""
        with self._lock:
            return {name: bool(model.available()) for name, model in self._models.items()}

    def _labelled(self, model: _Model[S] | None, label: str) -> int:
        if model is None or label not in model.config.labels:
            raise ServingError(Code.INVALID_ARGUMENT, f"Unrecognized servable version label: {label}")
        return model.labelled(label)

    def _check_labels(self, models: Iterable[ModelConfig]) -> None:
        """A label may be moved to a loaded version only, so that no client that uses it loses its model."""
        if self._labels_may_dangle:
            return
        for config in models:
            model = self._models.get(config.name)
            for label, number in config.labels.items():
                moved = model is not None and model.config.labels.get(label) != number
                if moved and model is not None and number not in model.available():
                    raise ServingError(
                        Code.FAILED_PRECONDITION,
                        f"Request to assign label {label} to version {number} of model {config.name}, "
                        "which is not currently available for inference",
                    )

    def _release(self, version: Version[S]) -> None:
        with self._lock:
            version.users -= 1
            last = version.users == 0 and version.state is State.UNLOADING
        if last:
            self._wake.set()

    def _configure(self, models: Iterable[ModelConfig]) -> None:
        with self._lock:
            wanted = {config.name: config for config in models}
            for name in set(self._models) - set(wanted):
                model = self._models.pop(name)
                model.removed = True
                self._retired.append(model)
            for name, config in wanted.items():
                if name in self._models:
                    self._models[name].configure(config)
                else:
                    self._models[name] = _Model(config)
        self._announce()

    def _run(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                self._pass()
            except Exception:
                log.exception("version_manager_failed")
            with self._pass_ended:
                self._passes += 1
                self._pass_ended.notify_all()
            self._wake.wait(self._poll_s or None)

    def _pass(self) -> None:
        """One look at everything: load what is wanted, retire what is not, close what has drained."""
        with self._lock:
            models = list(self._models.values())
        for model in models:
            self._follow(model)
        with self._lock:
            retired = list(self._retired)
        for model in retired:
            self._retire(model, keep=set())
            self._close_drained(model)
            if not any(version.servable for version in model.versions.values()):
                self._retired.remove(model)

    def _follow(self, model: _Model[S]) -> None:
        found = self._look(model)
        if found:
            self._retire(model, keep=self._ensure_wanted(model, found))
        self._close_drained(model)

    def _look(self, model: _Model[S]) -> dict[int, Path]:
        """Versions on disk; a complaint about them is logged when it changes, not at each look."""
        base_path = model.config.base_path
        try:
            found = storage.versions(base_path)
            complaint = "" if found else "no complete version"
        except OSError as err:
            found, complaint = {}, f"{type(err).__name__}: {err.strerror}"
        if complaint != model.complaint:
            model.complaint = complaint
            if complaint:
                log.warning(
                    "no_versions_found",
                    model=model.config.name,
                    base_path=str(base_path),
                    reason=complaint,
                    kept=sorted(model.available()),
                )
        return found

    def _ensure_wanted(self, model: _Model[S], found: dict[int, Path]) -> set[int]:
        """Load what the policy wants and can have; the versions that are to stay."""
        policy = model.config.policy
        if isinstance(policy, Latest):
            kept: set[int] = set()
            for number in sorted(found, reverse=True):
                if len(kept) == policy.count:
                    break
                if self._ensure(model, number, found[number]):
                    kept.add(number)
            return kept
        wanted = set(found) if isinstance(policy, All) else set(policy.numbers)
        loaded = set(model.available()) & wanted
        return loaded | {n for n in sorted(wanted & set(found), reverse=True) if self._ensure(model, n, found[n])}

    def _ensure(self, model: _Model[S], number: int, path: Path) -> bool:
        """Whether the version is available, after loading it where that is due."""
        version = model.versions.get(number)
        if version is not None and version.state is State.AVAILABLE:
            return True
        if version is not None and version.state is State.UNLOADING:
            return False  # wanted again while it drains: the next look loads it afresh
        if version is not None and version.status is not Code.OK and not self._due(version):
            return False
        if version is None or version.state is State.END:
            previous = version
            version = Version(number, path, failures=previous.failures if previous else 0)
            if previous and previous.failed_files != storage.fingerprint(path):
                version.failures = 0
        return self._attempt(model, version)

    def _due(self, version: Version[S]) -> bool:
        if version.failed_files != storage.fingerprint(version.path):
            return True
        return version.failures <= self._max_retries and time.monotonic() >= version.retry_at_s

    def _attempt(self, model: _Model[S], version: Version[S]) -> bool:
        name = model.config.name
        version.state = State.LOADING
        with self._lock:
            model.versions[version.number] = version
        log.info("version_loading", model=name, version=version.number, path=str(version.path))
        files = storage.fingerprint(version.path)
        started = time.monotonic()
        try:
            servable = self._load(name, version.number, version.path)
        except Exception as err:  # noqa: BLE001 - whatever a model's files do, the other versions go on being served
            code = err.status if isinstance(err, ServingError) else Code.INTERNAL
            message = str(err) or type(err).__name__
            with self._lock:
                version.failures += 1
                version.retry_at_s = time.monotonic() + self._retry_s
                version.failed_files = files
                version.state, version.status, version.message = State.END, code, message
            # A traceback through TensorFlow tells nothing that the reason does not.
            log.error(  # noqa: TRY400
                "version_failed", model=name, version=version.number, status=code.name, reason=message
            )
            return False
        with self._lock:
            version.servable = servable
            version.state, version.status, version.message = State.AVAILABLE, Code.OK, ""
        log.info("version_available", model=name, version=version.number, seconds=round(time.monotonic() - started, 3))
        self._announce()
        return True

    def _retire(self, model: _Model[S], keep: set[int]) -> None:
        """Let versions go that are not to stay; the last available one goes only with its model."""
        with self._lock:
            staying = keep if model.removed else keep | model.held_by_labels()
            going = [v for v in model.versions.values() if v.state is State.AVAILABLE and v.number not in staying]
            if not keep and not model.removed:
                going = []
            for version in going:
                version.state = State.UNLOADING
        for version in going:
            log.info("version_unloading", model=model.config.name, version=version.number, in_flight=version.users)
        if going:
            self._announce()

    def _close_drained(self, model: _Model[S]) -> None:
        with self._lock:
            drained = [v for v in model.versions.values() if v.state is State.UNLOADING and v.users == 0]
        for version in drained:
            servable, version.servable = version.servable, None
            if servable is not None:
                servable.close()
            with self._lock:
                version.state = State.END
            log.info("version_unloaded", model=model.config.name, version=version.number)
        with self._lock:
            ended = sorted(n for n, v in model.versions.items() if v.state is State.END)
            for number in ended[:-KEPT_ENDED_VERSIONS]:
                del model.versions[number]

    def _announce(self) -> None:
        # One at a time, so that what is heard last is what is true.
        with self._announcing:
            self._on_change(self.serving())
