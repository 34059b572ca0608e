"""Requests damaged at random: a worker says what is wrong with an error of ours, and goes on."""

import json
import random
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from soar_mega.rewards.asking import Patience
from soar_mega.rewards.client import WorkerScorer
from soar_mega.rewards.picture_files import to_base64
from soar_mega.rewards.server import RewardServer
from soar_mega.rewards.worker import BadRequest, Limits, Worker

pytestmark = pytest.mark.slow

TOKENS = (
    *'[]{},:"\\/+=-\n\0',
    "null",
    "true",
    "-3",
    "1e999",
    "NaN",
    '"\\ud800"',
    "9" * 400,
    "[" * 3000,
    "\xff",
)
VALUES: tuple[Any, ...] = (None, True, -3, 1e30, 10**30, "", "\0", "a" * 300, [], [None], {}, {"a": []})


class MeanRed:
    name, version, weights_hash = "mean_red", "1", ""

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> dict[str, Tensor]:
        return {self.name: images[:, 0].mean(dim=(1, 2)) + 0 * len(prompts[0])}


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker([MeanRed()], Limits(body=2**20, images=8, pixels=10_000))


def bodies(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Requests of both forms, of which one value, a few characters, or the end is wrong."""
    picture = to_base64(torch.rand(3, 6, 5, generator=torch.Generator().manual_seed(0)))
    turn = {"text": "a 3", "image_b64": picture}
    score = {"requests": [{"history": [turn], "required_rewards": ["mean_red"], "metadata": {"a": 1}}] * 2}
    compute = {"prompt": ["a", "b"], "image": [picture] * 2, "metadata": None}
    while True:
        path, content = rng.choice([("/score", score), ("/compute", compute)])
        text = json.dumps(content)
        kind = rng.randrange(4)
        if kind == 0:
            copy = json.loads(text)
            place: Any = copy
            while isinstance(place, dict | list) and place:
                key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
                if rng.random() < 0.4 or not isinstance(place[key], dict | list):
                    place[key] = rng.choice(VALUES)
                    break
                place = place[key]
            text = json.dumps(copy)
        elif kind == 1:
            where = rng.randrange(len(text))
            text = text[:where] + rng.choice(TOKENS) + text[where + rng.randrange(4) :]
        elif kind == 2:
            text = text[: rng.randrange(len(text))]
        else:  # within a picture
            where = text.index(picture) + rng.randrange(len(picture))
            text = text[:where] + rng.choice("ABCxyz019+/") + text[where + 1 :]
        yield path, text.encode("latin-1", "replace")


def test_whatever_the_body_only_our_error_comes_out(worker: Worker) -> None:
    answered = refused = 0
    for _, (path, body) in zip(range(6000), bodies(random.Random(0))):
        try:
            answer = worker.score(body) if path == "/score" else worker.compute(body, "mean_red")
            json.dumps(answer, allow_nan=False)
            answered += 1
        except BadRequest:
            refused += 1
    assert answered > 1000 and refused > 1000


def test_whatever_is_sent_the_server_stays_up(worker: Worker) -> None:
    rng = random.Random(1)
    server = RewardServer(worker)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    for _, (path, body) in zip(range(600), bodies(rng)):
        length = rng.choice([len(body), len(body), 0, 3, len(body) - 1])
        sent = f"POST {path} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode() + body
        if rng.random() < 0.3:
            where = rng.randrange(60)
            sent = sent[:where] + rng.randbytes(rng.randrange(1, 9)) + sent[where + 4 :]
        with socket.create_connection(server.server_address[:2], timeout=10) as peer:
            try:
                peer.sendall(sent)
                peer.shutdown(socket.SHUT_WR)
                while peer.recv(4096):
                    pass
            except (BrokenPipeError, ConnectionResetError):
                pass  # it was refused before all was sent
    image = torch.full((1, 3, 6, 5), 0.2)
    scorer = WorkerScorer(f"{server.url}/compute", Patience(in_all=5))
    assert scorer.score(image, ["a"], [{}])["compute"][0] == pytest.approx(0.2, abs=1e-6)
    server.shutdown()
    thread.join()
    server.server_close()
