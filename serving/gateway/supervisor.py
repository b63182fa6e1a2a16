"""Several worker processes on the same two ports: started, watched, replaced one by one, stopped together.

The supervisor answers no request. It holds the listening sockets, one of each port for each worker (SO_REUSEPORT: the
kernel spreads connections), and what waits in one is not lost when its worker is replaced: the next worker accepts
from the same socket. It imports neither gRPC nor numpy, and adds up the workers' metrics.
"""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from typing import Any, Final

import orjson

from digits.errors import DigitsError
from serving.gateway.listening import listen, require_free
from serving.gateway.logs import Logs
from serving.gateway.settings import Settings, join_host_port
from serving.gateway.totals import Family, add_up, that_stay
from serving.gateway.worker import LINE_LIMIT

START_S: Final = 60.0
"""A worker that is not ready after this time has failed."""

GRACE_S: Final = 5.0
"""What a worker may take beyond its own drain time before it is killed."""

SNAPSHOT_S: Final = 1.0
"""Longest wait for a worker's metrics; those it told last stand in."""

KEEP_S: Final = 5.0
"""How often metrics are taken for the case that a worker is killed."""

PAUSES_S: Final = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Before a worker that has fallen over is started again, by how often it did so in a row."""

STEADY_S: Final = 30.0
"""One that has lived so long starts at the first pause again."""


class _Failed(DigitsError):
    """A worker did not start. It has said why; ``status`` is what it ended with."""

    code = "worker_failed"

    def __init__(self, status: int) -> None:
        super().__init__(f"a worker process could not be started: it ended with status {status}")
        self.status = status


class _Worker:
    """One process and the line to it."""

    def __init__(self, process: asyncio.subprocess.Process, line: socket.socket) -> None:
        self.process = process
        self.started = time.monotonic()
        self.ready = asyncio.Event()
        self.snapshot: list[Family] = []
        self._line = line
        self._snapshots: list[asyncio.Future[None]] = []
        self._writer: asyncio.StreamWriter | None = None

    async def listen(self, scrape: Any) -> None:
        """Hear what it says until it hangs up."""
        reader, self._writer = await asyncio.open_unix_connection(sock=self._line, limit=LINE_LIMIT)
        with contextlib.suppress(ConnectionError):
            while line := await reader.readline():
                words = orjson.loads(line)
                if "ready" in words:
                    self.ready.set()
                elif "scrape" in words:
                    scrape(self)
                else:
                    self.snapshot = words["snapshot"]
                    self._told()
        self._writer.close()
        self._told()

    def say(self, **words: object) -> None:
        """One line to the worker; nothing if it has gone."""
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(orjson.dumps(words) + b"\n")

    async def refresh(self) -> None:
        """Have ``snapshot`` renewed, if the worker answers in time."""
        if self._writer is None or self._writer.is_closing():
            return
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._snapshots.append(told)
        self.say(snapshot=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(told, SNAPSHOT_S)

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(number)

    def _told(self) -> None:
        waiting, self._snapshots = self._snapshots, []
        for one in waiting:
            if not one.done():
                one.set_result(None)


class Supervisor:
    """Keeps ``settings.workers`` workers running. Create it inside a running event loop; then ``run``.

    Args:
        settings: What the operator set.
        logs: Where lines go.
    """

    def __init__(self, settings: Settings, logs: Logs) -> None:
        self._settings = settings
        self._log = logs.log
        self._slots: list[_Worker | None] = [None] * settings.workers
        self._listeners: list[tuple[socket.socket, socket.socket] | None] = [None] * settings.workers
        self._changing = [asyncio.Lock() for _ in self._slots]
        self._all: set[_Worker] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._stop = asyncio.Event()
        self._reload = asyncio.Event()
        self._past: list[Family] = []
        self._crashes = 0

    async def run(self) -> int:
        """Serve until SIGTERM or SIGINT. SIGHUP replaces the workers one by one. Returns the exit status.

        Raises:
            CannotListen: A port is taken, or the address is not one of this machine's.
        """
        settings = self._settings
        self._rest_port = require_free(settings.host, settings.rest_port, "DIGITS_REST_PORT")
        self._grpc_port = require_free(settings.host, settings.grpc_port, "DIGITS_GRPC_PORT")
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        loop.add_signal_handler(signal.SIGHUP, self._reload.set)
        try:
            await self._start_all()
            self._say_listening()
            await self._until_told()
        except _Failed as err:
            return err.status if err.status > 0 else 1
        finally:
            await self._end_all()
        self._log.info("stopped")
        return 0

    async def _start_all(self) -> None:
        """The first alone: what is wrong with the settings is said once."""
        self._slots[0] = await self._start(0)
        others = range(1, len(self._slots))
        for slot, worker in zip(others, await asyncio.gather(*map(self._start, others)), strict=True):
            self._slots[slot] = worker

    def _say_listening(self) -> None:
        settings = self._settings
        scheme = "https" if settings.tls_cert_file else "http"
        self._log.info(
            "listening",
            rest=f"{scheme}://{join_host_port(settings.host, self._rest_port)}",
            grpc=join_host_port(settings.host, self._grpc_port),
            upstream=settings.upstream,
            pid=os.getpid(),
            workers=[worker.process.pid for worker in self._slots if worker],
        )
        if settings.is_open_to_all:
            self._log.warning("open_to_all", host=settings.host, hint="DIGITS_API_KEYS_FILE")

    async def _until_told(self) -> None:
        keeping = asyncio.create_task(self._keep_metrics())
        for slot in range(len(self._slots)):
            self._spawn(self._keep_running(slot))
        try:
            while not self._stop.is_set():
                self._reload.clear()
                told = [asyncio.create_task(event.wait()) for event in (self._stop, self._reload)]
                await asyncio.wait(told, return_when=asyncio.FIRST_COMPLETED)
                for task in told:
                    task.cancel()
                if not self._stop.is_set():
                    await self._replace_all()
        finally:
            keeping.cancel()

    # --- one worker ---

    async def _start(self, slot: int) -> _Worker:
        """A worker that is ready.

        Raises:
            _Failed: It ended, or was not ready in time.
        """
        listeners = self._listeners[slot] = self._listeners[slot] or self._listen()
        ours, theirs = socket.socketpair()
        with theirs:
            handed_down = [one.fileno() for one in (theirs, *listeners)]
            command = [sys.executable, "-m", "serving.gateway", "--worker", *map(str, handed_down)]
            process = await asyncio.create_subprocess_exec(*command, pass_fds=handed_down)
        worker = _Worker(process, ours)
        self._all.add(worker)
        self._spawn(self._attend(worker))
        waits = [asyncio.create_task(one) for one in (worker.ready.wait(), process.wait())]
        await asyncio.wait(waits, timeout=START_S, return_when=asyncio.FIRST_COMPLETED)
        for task in waits:
            task.cancel()
        if not worker.ready.is_set():
            worker.signal(signal.SIGKILL)
            raise _Failed(await process.wait())
        return worker

    def _listen(self) -> tuple[socket.socket, socket.socket]:
        """Sockets of their own for a worker, on the ports that all share."""
        host = self._settings.host
        return (
            listen(host, self._rest_port, "DIGITS_REST_PORT", shared=True),
            listen(host, self._grpc_port, "DIGITS_GRPC_PORT", shared=True),
        )

    async def _attend(self, worker: _Worker) -> None:
        """Hear a worker out, and keep its counts when it has ended."""
        await worker.listen(lambda asker: self._spawn(self._answer(asker)))
        await worker.process.wait()
        self._all.discard(worker)
        self._past = add_up((self._past, that_stay(worker.snapshot)))

    async def _keep_running(self, slot: int) -> None:
        """Start a worker again that has fallen over; sooner the first time than the fifth."""
        failures = 0
        while True:
            worker = self._slots[slot]
            status = await worker.process.wait() if worker is not None else None
            async with self._changing[slot]:
                if self._stop.is_set():
                    return
                if worker is not self._slots[slot]:
                    continue  # replaced meanwhile
                if worker is not None:
                    self._slots[slot] = None
                    self._crashes += 1
                    failures = 0 if time.monotonic() - worker.started > STEADY_S else failures
                    self._log.error("worker_ended", pid=worker.process.pid, status=status, slot=slot)
                pause_s = PAUSES_S[min(failures, len(PAUSES_S) - 1)]
                failures += 1
                if pause_s:
                    self._refuse(slot)
                    await asyncio.sleep(pause_s)
                try:
                    self._slots[slot] = await self._start(slot)
                except DigitsError as err:
                    self._log.error("worker_not_started", slot=slot, reason=str(err))

    def _refuse(self, slot: int) -> None:
        """Nobody will accept from these sockets soon: new connections are to go to other workers."""
        listeners, self._listeners[slot] = self._listeners[slot], None
        for listener in listeners or ():
            listener.close()

    async def _end(self, worker: _Worker, *, retire: bool) -> None:
        """Have a worker finish its work and go; it is killed if it does not."""
        if retire:
            worker.say(retire=True)
        else:
            worker.signal(signal.SIGTERM)
        limit_s = self._settings.drain_delay_s + self._settings.drain_timeout_s + GRACE_S
        try:
            await asyncio.wait_for(worker.process.wait(), limit_s)
        except TimeoutError:
            self._log.warning("worker_killed", pid=worker.process.pid, after_s=limit_s)
            worker.signal(signal.SIGKILL)
            await worker.process.wait()

    # --- all of them ---

    async def _replace_all(self) -> None:
        """One by one: the new one answers before the old one leaves. If one does not start, the old ones stay."""
        self._log.info("replacing", workers=len(self._slots))
        for slot in range(len(self._slots)):
            async with self._changing[slot]:
                old = self._slots[slot]
                try:
                    new = await self._start(slot)
                except DigitsError as err:
                    self._log.error("replacing_failed", slot=slot, reason=f"{err}; the workers that run stay")
                    return
                self._slots[slot] = new
            if self._stop.is_set():
                return
            if old is not None:
                await self._end(old, retire=True)
        self._log.info("replaced", workers=[worker.process.pid for worker in self._slots if worker])

    async def _end_all(self) -> None:
        self._stop.set()
        for slot in range(len(self._slots)):
            self._refuse(slot)  # each worker's are open until it has drained what waits in them
        await asyncio.gather(*(self._end(worker, retire=False) for worker in tuple(self._all)))
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- metrics ---

    async def _keep_metrics(self) -> None:
        while True:
            await asyncio.sleep(KEEP_S)
            await asyncio.gather(*(worker.refresh() for worker in tuple(self._all)))

    async def _answer(self, asker: _Worker) -> None:
        await asyncio.gather(*(worker.refresh() for worker in tuple(self._all)))
        own: list[Family] = [
            ["digits_workers", "Worker processes that run.", "gauge", [["digits_workers", {}, float(len(self._all))]]],
            [
                "digits_worker_crashes", "Worker processes that ended without being told to.", "counter",
                [["digits_worker_crashes_total", {}, float(self._crashes)]],
            ],
        ]  # fmt: skip
        # What one that is starting says of the model server is not known to be so.
        live = (one.snapshot if one.ready.is_set() else that_stay(one.snapshot) for one in self._all)
        asker.say(totals=add_up((self._past, *live, own)))

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
