"""Requests to a reward worker: patient while it is away, short with one that says no."""

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from soar_mega.rewards.judging import WorkerError
from soar_mega.rewards.tokens import VARIABLE, read_token
from soar_mega.rewards.url_file import read_url_file

log = logging.getLogger(__name__)
LARGEST_ANSWER = 16 * 2**20
PIECE = 2**16
SHOWN = 200  # characters of what a worker said
TRIES = 3  # of a request that fails within the worker
FAILED, COME_BACK = 500, (429, 502, 503, 504)
UNKNOWN_PAGE = (404, 405, 501)


@dataclass(frozen=True, kw_only=True)
class Patience:
    """In seconds.

    Attributes:
        connect: until there is a connection.
        request: for a whole request.
        in_all: while a worker is away or late.
        pause: until it is asked again, doubled each time up to longest_pause.
    """

    connect: float = 10
    request: float = 300
    in_all: float = 600
    pause: float = 1
    longest_pause: float = 30


class Peer:
    """A worker, by its URL up to /score or /compute, or by file:PATH (`soar_mega.rewards.url_file`).

    The file is read again for every request: a worker that was started again may be on another machine.
    """

    def __init__(self, place: str, patience: Patience) -> None:
        """ValueError where the place is no URL, or the token is unusable."""
        self.place = place
        self._patience = patience
        self._closed = threading.Event()
        self._connection: HTTPConnection | None = None  # while a request is under way
        self._token = read_token(os.environ[VARIABLE]) if VARIABLE in os.environ else ""
        if not place.startswith("file:"):
            check_url(place)

    def get(self, path: str) -> bytes:
        """The body of a page, b"" where the worker is there but has no such page. WorkerError as `post`."""
        return self._request("GET", path, None)

    def post(self, path: str, content: dict[str, Any]) -> bytes:
        """The body of an answer.

        Raises:
            WorkerError: the worker was away or late for too long, refuses, or answers without end.
        """
        return self._request("POST", path, json.dumps(content).encode())

    def close(self) -> None:
        """Ends what another thread is asking, which raises WorkerError there."""
        self._closed.set()
        connection = self._connection
        if connection is not None and connection.sock is not None:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    def error(self, words: str, said: Any) -> WorkerError:
        """What is wrong with what the worker said."""
        return WorkerError(f"reward worker {self.place}: {words}: {repr(said)[:SHOWN]}")

    def _request(self, method: str, path: str, body: bytes | None) -> bytes:
        until = time.monotonic() + self._patience.in_all
        for tries, pause in enumerate(self._pauses(), start=1):
            if self._closed.is_set():
                raise WorkerError(f"reward worker {self.place} is not asked any more")
            try:
                status, answer = self._once(method, path, body)
            except WorkerError:
                raise
            except TimeoutError:
                why = f"it did not answer within {self._patience.request:g} seconds"
            except (OSError, HTTPException) as error:
                why = f"it is not there ({str(error) or type(error).__name__})"
            else:
                if status == 200:
                    return answer
                if method == "GET" and status in UNKNOWN_PAGE:
                    return b""
                why = f"it answered {status}: {_words(answer)}"
                if status in (401, 403):
                    why += f" ({VARIABLE} names the file that holds it)"
                if status not in COME_BACK and (status != FAILED or tries == TRIES):
                    raise WorkerError(f"reward worker {self.place}: {why}")
            if self._closed.is_set() or time.monotonic() + pause > until:
                raise WorkerError(f"reward worker {self.place}: {why}; it was asked {tries} times")
            log.warning("reward worker %s: %s; it is asked again in %g seconds", self.place, why, pause)
            self._closed.wait(pause)
        raise AssertionError("pauses never end")

    def _pauses(self) -> Iterator[float]:
        pause = self._patience.pause
        while True:
            yield pause
            pause = min(2 * pause, self._patience.longest_pause)

    def _once(self, method: str, path: str, body: bytes | None) -> tuple[int, bytes]:
        place, token = self._address()
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {token}"} if token else {}
        )
        url = urlsplit(place)
        kind = HTTPSConnection if url.scheme == "https" else HTTPConnection
        until = time.monotonic() + self._patience.request
        connection = kind(str(url.hostname), url.port, timeout=self._patience.connect)
        self._connection = connection
        try:
            self._connect(connection)
            connection.request(method, url.path.rstrip("/") + path, body, headers)
            response = connection.getresponse()
            answer = bytearray()
            while piece := response.read1(PIECE):
                answer += piece
                if len(answer) > LARGEST_ANSWER:
                    raise self.error(
                        f"its answer is longer than {LARGEST_ANSWER} bytes", bytes(answer[:SHOWN])
                    )
                if time.monotonic() > until:
                    raise TimeoutError
            if response.length:  # of what it said would come
                raise ConnectionError(f"its answer broke off {response.length} bytes before the end")
            return response.status, bytes(answer)
        finally:
            self._connection = None
            connection.close()

    def _connect(self, connection: HTTPConnection) -> None:
        try:
            connection.connect()
        except TimeoutError as error:
            raise ConnectionError(f"no connection within {self._patience.connect:g} seconds") from error
        if self._closed.is_set():
            raise ConnectionError("closed")
        connection.sock.settimeout(self._patience.request)

    def _address(self) -> tuple[str, str]:
        """Its URL and its token. WorkerError where its file says that it does not come back."""
        if not self.place.startswith("file:"):
            return self.place, self._token
        said = read_url_file(Path(self.place.removeprefix("file:")))
        if said.gone:
            raise WorkerError(f"reward worker {self.place}: {said.gone}")
        check_url(said.url)
        return said.url, read_token(said.token_file) if said.token_file else self._token


def check_url(url: str) -> None:
    """ValueError where it is no URL of a worker, or one that holds a secret."""
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port)
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        raise ValueError(f"{url!r} is no address of a reward worker, as in http://host:8000/score#NAME")
    if parts.username or parts.password:
        raise ValueError(f"{url}: a token has no place in a recipe: name its file in {VARIABLE}")


def _words(answer: bytes) -> str:
    try:
        content = json.loads(answer)
        return str(content.get("error") or content.get("detail") or content)[:SHOWN]
    except (ValueError, RecursionError, AttributeError):
        return repr(answer)[:SHOWN]
