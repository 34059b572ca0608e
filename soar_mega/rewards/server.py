"""A reward worker as an HTTP server: JSON and pictures in base64 alone, never pickle."""

import contextlib
import json
import logging
import select
import signal
import socket
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any

from soar_mega.outputs import write_file
from soar_mega.rewards.tokens import matches
from soar_mega.rewards.url_file import MARK, url_file_content
from soar_mega.rewards.worker import BadRequest, Worker

log = logging.getLogger(__name__)
AT_ONCE = 2  # requests in memory: one is judged, the next one arrives
SILENCE, ARRIVAL = 30, 120  # seconds: of a peer that sends nothing, and for a whole body
PIECE = 2**16


class RewardServer(ThreadingHTTPServer):
    """Serves a worker until `shutdown`, and answers what it has begun."""

    daemon_threads = False
    request_queue_size = 128

    def __init__(self, worker: Worker, host: str = "127.0.0.1", port: int = 0, token: str = "") -> None:
        """
        Args:
            port: 0 takes a free one.
            token: what clients must show; "" asks for none and listens on the loopback address alone.

        Raises:
            ValueError: without a token, for any other address.
            OSError: the address is taken, or is not of this machine.
        """
        if not token and not _is_loopback(host):
            raise ValueError(
                f"a reward worker on {host} is open to the whole network: give --token-file, or --host 127.0.0.1"
            )
        self.worker, self.token = worker, token
        self.places = threading.BoundedSemaphore(AT_ONCE)
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, port), _Handler)

    @property
    def url(self) -> str:
        host, port = str(self.server_address[0]), self.server_address[1]
        if host in ("0.0.0.0", "::"):
            host = socket.gethostname()
        return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.warning("a connection from %s broke", client_address, exc_info=True)


def serve(
    server: RewardServer,
    url_file: str | Path = "",
    token_file: str = "",
    ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM, SIGINT, or SIGUSR1, by which a job's time limit is told.

    Args:
        url_file: where clients look for the server (`file:PATH#NAME`): it is there while the server is.
        token_file: where they find the token that it asks of them.
        ready: called when the server answers.

    Raises:
        ValueError: there is a file that this program did not write in the place of `url_file`.
    """

    def end(number: int, frame: FrameType | None) -> None:
        threading.Thread(target=server.shutdown).start()  # it waits for the loop that this has interrupted

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, end)
    announced = url_file_content(server.url, token_file)
    try:
        if url_file:
            write_file(url_file, announced, MARK)
        ready()
        server.serve_forever(poll_interval=0.1)
    finally:
        server.server_close()
        if url_file and Path(url_file).is_file() and Path(url_file).read_bytes() == announced:
            Path(url_file).unlink()


class _Handler(BaseHTTPRequestHandler):
    server: RewardServer
    timeout = SILENCE

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        self._answer(self._post)

    def _get(self) -> dict[str, Any]:
        health = self.server.worker.health()
        _, path = self._split_path()
        if path == "/health":
            return health
        if path == "/rewards":
            return {"rewards": list(health["rewards"])}
        raise BadRequest(f"there is no {self.path}: GET /health or /rewards", 404)

    def _post(self) -> dict[str, Any]:
        worker, (name, path) = self.server.worker, self._split_path()
        if path == "/score" and not name:
            answer = worker.score
        elif path == "/compute":
            if not name and len(worker.scorers) > 1:
                raise BadRequest(
                    f"several rewards are served: POST /NAME/compute, of {list(worker.scorers)}", 404
                )
            chosen = name or next(iter(worker.scorers))

            def answer(body: bytes) -> dict[str, Any]:
                return worker.compute(body, chosen)
        else:
            raise BadRequest(f"there is no {self.path}: POST /score or /compute", 404)
        length = self._length()
        with self.server.places:
            body = self._read(length)
            # whoever had no patience asks again: to answer twice would make all others wait
            if self._is_left():
                raise ConnectionError("the peer went away")
            return answer(body)

    def _split_path(self) -> tuple[str, str]:
        """/NAME/compute is ("NAME", "/compute"): to Flow-Factory's client http://host:port/NAME is a server."""
        first, slash, rest = self.path.lstrip("/").partition("/")
        return (first, f"/{rest}") if slash and first in self.server.worker.scorers else ("", self.path)

    def _length(self) -> int:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            raise BadRequest("a request needs its Content-Length", 411)
        if len(length) > 18 or int(length) > self.server.worker.limits.body:
            raise BadRequest(f"{length} bytes, at most {self.server.worker.limits.body} are taken", 413)
        return int(length)

    def _read(self, length: int) -> bytes:
        body, until = bytearray(), time.monotonic() + ARRIVAL
        while len(body) < length:
            piece = self.rfile.read1(min(PIECE, length - len(body)))  # type: ignore[attr-defined]
            if not piece:
                raise ConnectionError("the peer went away")
            if time.monotonic() > until:
                raise BadRequest(f"the body did not arrive within {ARRIVAL} seconds", 408)
            body += piece
        return bytes(body)

    def _is_left(self) -> bool:
        readable, _, _ = select.select([self.connection], [], [], 0)
        return bool(readable) and not self.connection.recv(1, socket.MSG_PEEK)

    def _answer(self, make: Callable[[], dict[str, Any]]) -> None:
        try:
            if self.server.token and not matches(self.server.token, self.headers.get("Authorization")):
                raise BadRequest("the token is missing or wrong: send Authorization: Bearer TOKEN", 401)
            status, content = 200, make()
        except BadRequest as error:
            status, content = error.status, {"error": str(error)}
        except (ConnectionError, TimeoutError) as error:
            log.info("%s went away: %s", self.client_address[0], error)
            self.close_connection = True
            return
        except Exception:  # a defect must not end the service: it is told of where it is seen
            log.exception("%s failed", self.path)
            status, content = 500, {"error": "the worker failed: see its log"}
        self._send(status, content)

    def _send(self, status: int, content: dict[str, Any]) -> None:
        body = json.dumps(content, allow_nan=False).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            if status == 401:
                self.send_header("WWW-Authenticate", "Bearer")
            self.end_headers()
            self.wfile.write(body)
        except OSError as error:
            log.info("%s did not wait for its answer: %s", self.client_address[0], error)
        if status != 200:
            with contextlib.suppress(OSError):
                self._hear_out()

    def _hear_out(self) -> None:
        """Lets a peer finish that still sends what was refused: it would see a broken connection, not the answer."""
        self.connection.shutdown(socket.SHUT_WR)
        self.connection.settimeout(1)
        until = time.monotonic() + 2
        while time.monotonic() < until and self.connection.recv(PIECE):
            pass

    def log_message(self, format: str, *args: Any) -> None:
        # a request may hold anything, and a log is read on a terminal
        log.info("%s %s", self.client_address[0], (format % args).encode("unicode_escape").decode())


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False
