"""The worker's side of several processes: words with the supervisor over a socket, a JSON object a line."""

import asyncio
import socket
from collections.abc import Callable
from typing import Any, Final, Self

import orjson

from serving.gateway.totals import Family

LINE_LIMIT: Final = 64 * 1024 * 1024
ANSWER_S: Final = 3.0
"""A supervisor that takes longer to add up metrics is not waited for."""


class Control:
    """A worker's line to its supervisor.

    Args:
        reader: What the supervisor says.
        writer: What it is told.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.retire = asyncio.Event()
        """Set when another worker has taken over."""
        self.orphaned = asyncio.Event()
        """Set when the supervisor is gone."""
        self._reader = reader
        self._writer = writer
        self._snapshot: Callable[[], list[Family]] = list
        self._scrapes: list[asyncio.Future[list[Family]]] = []
        self._listening = asyncio.create_task(self._listen(), name="supervisor")

    @classmethod
    async def open(cls, descriptor: int) -> Self:
        """Take up the inherited socket."""
        line = socket.socket(fileno=descriptor)
        reader, writer = await asyncio.open_unix_connection(sock=line, limit=LINE_LIMIT)
        return cls(reader, writer)

    def tells(self, snapshot: Callable[[], list[Family]]) -> None:
        """Have the supervisor told these metrics when it asks."""
        self._snapshot = snapshot

    def ready(self) -> None:
        """Say that requests are answered."""
        self._say({"ready": True})

    async def all_metrics(self) -> list[Family]:
        """Metrics of all workers, those that have ended included; this worker's own if the supervisor is silent."""
        scrape: asyncio.Future[list[Family]] = asyncio.get_running_loop().create_future()
        self._scrapes.append(scrape)
        self._say({"scrape": True})
        try:
            return await asyncio.wait_for(scrape, ANSWER_S)
        except TimeoutError:
            return self._snapshot()

    async def close(self) -> None:
        """Leave the last counts behind and hang up."""
        self._say({"snapshot": self._snapshot()})
        self._listening.cancel()
        self._writer.close()
        await asyncio.gather(self._listening, self._writer.wait_closed(), return_exceptions=True)

    def _say(self, words: dict[str, Any]) -> None:
        if not self._writer.is_closing():
            self._writer.write(orjson.dumps(words) + b"\n")

    async def _listen(self) -> None:
        try:
            while line := await self._reader.readline():
                self._heard(orjson.loads(line))
        except ConnectionError:
            pass
        finally:
            self.orphaned.set()

    def _heard(self, words: dict[str, Any]) -> None:
        if "retire" in words:
            self.retire.set()
        elif "snapshot" in words:
            self._say({"snapshot": self._snapshot()})
        else:
            scrapes, self._scrapes = self._scrapes, []
            for scrape in scrapes:
                if not scrape.done():
                    scrape.set_result(words["totals"])
