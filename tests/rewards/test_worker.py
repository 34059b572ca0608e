"""A real reward worker and its clients: values, refusals, damage. One process serves the tests of this file."""

import base64
import contextlib
import http.client
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from soar_mega.cli import main
from soar_mega.examples.digits.benchmark import benchmark_prompts, real_canvases
from soar_mega.rewards import make_rewards
from soar_mega.rewards.asking import Patience
from soar_mega.rewards.client import WorkerScorer
from soar_mega.rewards.jpeg import JpegIncompressibility
from soar_mega.rewards.picture_files import from_base64, to_base64
from soar_mega.rewards.server import RewardServer
from soar_mega.rewards.tokens import VARIABLE, read_token
from soar_mega.rewards.worker import Limits, Worker

TOKEN = "0123456789abcdef-of-the-tests"
BRIEF = Patience(request=5, in_all=0.2, pause=0.01)
OWN = """
import time

def mean_red(images, prompts, metadata):
    for prompt in prompts:
        if prompt == "bad":
            raise RuntimeError("out of paint")
    return [float("nan") if p == "nan" else float(i[0].mean()) for i, p in zip(images, prompts)]

def metadata_value(images, prompts, metadata):
    return [m["value"] for m in metadata]

def slow(images, prompts, metadata):
    time.sleep(0.5)
    return [1.0] * len(images)
"""


class Served:
    """The process, and the files that its clients need."""

    def __init__(self, folder: Path) -> None:
        self.url_file, self.token_file = folder / "url", folder / "token"
        self.token_file.write_text(f"{TOKEN}\n")
        self.token_file.chmod(0o600)
        (folder / "own_rewards.py").write_text(OWN)
        names = [
            "digits",
            "jpeg_incompressibility",
            *(f"own_rewards:{n}" for n in ("mean_red", "metadata_value", "slow")),
        ]
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "soar_mega", "serve-reward", *names, "--port", "0"),
                *("--url-file", str(self.url_file), "--token-file", str(self.token_file)),
                *("--max-images", "24", "--max-megapixels", "1", "--max-mebibytes", "2"),
            ],
            env=os.environ | {"PYTHONPATH": f"{folder}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        assert first.startswith("ready: digits, jpeg_incompressibility, mean_red"), first
        self.url = self.url_file.read_text().splitlines()[0]
        self.port = int(self.url.rpartition(":")[2])

    def ask(
        self, path: str, content: Any = None, token: str | None = f"Bearer {TOKEN}"
    ) -> tuple[int, dict[str, Any]]:
        """The status and the answer to a POST of JSON, or to a GET where there is no content."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {"Authorization": token} if token else {}
        body = content if isinstance(content, bytes) or content is None else json.dumps(content).encode()
        try:
            connection.request("GET" if content is None else "POST", path, body, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    served = Served(tmp_path_factory.mktemp("worker"))
    yield served
    if served.process.poll() is None:
        served.process.kill()
    served.process.wait(timeout=30)


@pytest.fixture
def token(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, str(served.token_file))


def pictures(count: int, height: int = 16, width: int = 16) -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).random((count, 3, height, width), dtype=np.float32))


def question(pictures: list[Any], *, name: str = "mean_red", prompt: str = "a 3") -> dict[str, Any]:
    turns = [[{"text": prompt, "image_b64": picture}] for picture in pictures]
    return {"requests": [{"history": turn, "required_rewards": [name], "metadata": None} for turn in turns]}


# -- values


def test_png_moves_no_value_by_more_than_half_a_step() -> None:
    image = pictures(1, 20, 30)[0]
    back = from_base64(to_base64(image), 600) / 255
    assert back.shape == image.shape and (back - image).abs().max() <= 1 / 510 + 1e-7


def test_a_worker_gives_what_the_same_scorers_give_here(served: Served, token: None) -> None:
    captions = benchmark_prompts(3)[:20]  # more than one request takes
    images, prompts = torch.from_numpy(real_canvases(captions)), [caption.text for caption in captions]
    metadata: list[dict[str, Any]] = [{"value": i} for i in range(20)]
    metadata[0] |= {"tag": "counting", "include": [{"class": "3", "count": 4}]}
    here = make_rewards({"digits": 1.0, "jpeg_incompressibility": 1.0}).score(images, prompts, metadata)
    there = make_rewards(
        {
            f"{served.url}/score#digits": 1.0,
            f"{served.url}/jpeg_incompressibility/compute#jpeg": 1.0,
            f"file:{served.url_file}#mean_red": 1.0,
            f"{served.url}/metadata_value/compute": 1.0,
        }
    ).score(images, prompts, metadata)
    assert torch.equal(there["digits"], here["digits"]) and 0 < here["digits"].mean() < 1
    assert torch.equal(there["jpeg"], here["jpeg_incompressibility"])
    assert (there["mean_red"] - images[:, 0].double().mean(dim=(1, 2))).abs().max() <= 1 / 510 + 1e-7
    assert there["compute"].tolist() == list(range(20))


def test_the_version_of_a_scorer_comes_with_it(served: Served, token: None) -> None:
    assert WorkerScorer(f"{served.url}/score#jpeg_incompressibility").version.startswith("quality 95")


def test_a_reward_may_be_asked_for_by_what_a_recipe_calls_it(served: Served, token: None) -> None:
    scorer = WorkerScorer(f"{served.url}/score#own_rewards:mean_red")
    assert scorer.name == "mean_red" and list(scorer.score(pictures(1), ["a"], [{}])) == ["mean_red"]


def test_questions_of_unirl_and_flow_factory_are_understood(served: Served) -> None:
    """As their clients put them: JPEG unless told otherwise, two turns for editing, a password in the URL."""
    image = Image.fromarray(np.full((16, 16, 3), (200, 10, 10), dtype=np.uint8))
    file = BytesIO()
    image.save(file, format="JPEG", quality=95)
    jpeg = base64.b64encode(file.getvalue()).decode()
    black = to_base64(torch.zeros(3, 16, 16))
    basic = "Basic " + base64.b64encode(f"any:{TOKEN}".encode()).decode()
    turns = [{"text": "red", "image_b64": black}, {"text": "red", "image_b64": jpeg}]
    names = ["jpeg_incompressibility", "mean_red"]
    status, answer = served.ask(
        "/score", {"requests": [{"history": turns, "required_rewards": names}]}, basic
    )
    assert status == 200 and answer["errors"] == [{}]
    assert answer["results"][0]["mean_red"]["mean_red"] == pytest.approx(200 / 255, abs=0.01)
    assert list(answer["results"][0]) == names
    empty = {"video": None, "condition_images": None, "condition_videos": None}
    status, answer = served.ask("/mean_red/compute", {"prompt": ["red"], "image": [jpeg], **empty}, basic)
    assert status == 200 and list(answer) == ["rewards"]
    assert answer["rewards"][0] == pytest.approx(200 / 255, abs=0.01)
    status, health = served.ask("/health", token=basic)
    assert status == 200 and health["status"] == "ok" and "mean_red" in health["rewards"]
    assert served.ask("/mean_red/health", token=basic) == (200, health)
    assert served.ask("/rewards")[1]["rewards"] == list(health["rewards"])


# -- samples that cannot be judged


def bomb(width: int, height: int) -> str:
    """A PNG of a few hundred bytes that says that it is large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return base64.b64encode(body).decode()


def gif() -> str:
    file = BytesIO()
    Image.new("RGB", (16, 16)).save(file, format="GIF")
    return base64.b64encode(file.getvalue()).decode()


def test_each_sample_has_a_score_or_a_reason(served: Served) -> None:
    good = to_base64(torch.full((3, 16, 16), 0.4))
    other = to_base64(torch.full((3, 8, 24), 0.8))  # another size
    damage = {
        "no base64 @": "damaged",
        good[: len(good) // 2]: "damaged",
        gif(): "no PNG or JPEG",
        bomb(60_000, 60_000): "pixels",
        bomb(2_000, 600): "2000 x 600 pixels, at most",
        bomb(30, 30): "damaged",
        None: "there is no image",
    }
    status, answer = served.ask("/score", question([good, *damage, other]))
    assert status == 200
    values = [result.get("mean_red", {}).get("mean_red") for result in answer["results"]]
    assert values[0] == pytest.approx(0.4, abs=1e-6) and values[-1] == pytest.approx(0.8, abs=1e-6)
    assert values[1:-1] == [None] * len(damage)
    for words, error in zip(damage.values(), answer["errors"][1:-1]):
        assert words in error["mean_red"]
    assert answer["errors"][0] == answer["errors"][-1] == {}


def test_the_images_of_a_request_share_its_pixels() -> None:
    worker = Worker([JpegIncompressibility()], Limits(pixels=2 * 16 * 16))
    pictures, name = [to_base64(torch.zeros(3, 16, 16))] * 3, JpegIncompressibility.name
    errors = worker.score(json.dumps(question(pictures, name=name)).encode())["errors"]
    assert errors[:2] == [{}, {}] and "at most 0 are left in this request" in errors[2][name]
    answer = worker.compute(json.dumps({"prompt": ["a"] * 3, "image": pictures}).encode(), name)
    assert None not in answer["rewards"][:2] and answer["rewards"][2] is None
    assert answer["errors"] == [None, None, errors[2][name]]


def test_what_a_scorer_cannot_judge_is_left_out(
    served: Served, token: None, caplog: pytest.LogCaptureFixture
) -> None:
    images = torch.stack([torch.full((3, 16, 16), i / 255) for i in range(4)])
    for key in (f"{served.url}/score#mean_red", f"{served.url}/mean_red/compute#mean_red"):
        caplog.clear()
        values = make_rewards({key: 1.0}).score(images, ["a", "bad", "nan", "b"], [{}] * 4)["total"]
        assert values.isnan().tolist() == [False, True, True, False]
        assert values[3] == pytest.approx(3 / 255, abs=1e-6)
        assert "RuntimeError: out of paint" in caplog.text and "2 of 4 samples" in caplog.text


# -- refusals


@pytest.mark.parametrize(
    "shown", [None, "Bearer", "Bearer wrong", f"Basic {TOKEN}", f"Digest {TOKEN}", "Bearer \xe9"]
)
def test_without_the_token_nothing_is_answered(served: Served, shown: str | None) -> None:
    for path, content in (("/score", question([])), ("/mean_red/compute", b"{"), ("/health", None)):
        status, answer = served.ask(path, content, shown)
        assert status == 401 and "token" in answer["error"]


def test_a_client_with_a_wrong_token_ends_at_once(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").write_text("another-token-of-24-letters")
    (tmp_path / "other").chmod(0o600)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "other"))
    with pytest.raises(OSError, match=f"reward worker {served.url}: it answered 401.*{VARIABLE}"):
        make_rewards({f"{served.url}/score#digits": 1.0})


@pytest.mark.parametrize(
    ("path", "content", "status", "why"),
    [
        ("/score", b"{", 400, "not valid JSON"),
        ("/score", b"[" * 100_000, 400, "not valid JSON"),
        ("/score", b'{"requests": ' + b"9" * 10_000 + b"}", 400, "not valid JSON"),
        ("/score", b"\xff\xfe\xff", 400, "not valid JSON"),
        ("/score", [], 400, "must be a JSON object"),
        ("/score", {"requests": 1}, 400, "requests must be a list"),
        ("/score", {"requests": [1]}, 400, "each of requests must be an object"),
        ("/score", {"requests": [{"required_rewards": []}]}, 400, "history must be a list"),
        ("/score", {"requests": [{"required_rewards": [], "history": []}]}, 400, "at least one turn"),
        ("/score", question([""], name="beauty"), 400, "unknown reward 'beauty', served are ['digits'"),
        ("/score", question([""], prompt="\ud800"), 400, "a prompt must be text"),
        ("/score", question([""] * 25), 413, "25 images in a request, at most 24"),
        ("/score", b" " * (2 * 2**20 + 1), 413, "at most 2097152 are taken"),
        ("/score", b" " * (40 * 2**20), 413, "at most 2097152 are taken"),
        ("/compute", {}, 404, "several rewards are served: POST /NAME/compute"),
        ("/beauty/compute", {}, 404, "there is no /beauty/compute"),
        ("/mean_red/score", {}, 404, "there is no /mean_red/score"),
        ("/mean_red/compute", {"image": [""], "prompt": []}, 400, "1 images, 0 prompts and 1 of metadata"),
        ("/mean_red/compute", {"image": [], "prompt": [], "video": [[""]]}, 400, "videos are not judged"),
        (
            "/mean_red/compute",
            {"image": [""], "prompt": ["a"], "metadata": [1]},
            400,
            "the metadata of a prompt",
        ),
        ("/", None, 404, "GET /health or /rewards"),
    ],
)
def test_requests_that_cannot_be_answered_are_told_why(
    served: Served, path: str, content: Any, status: int, why: str
) -> None:
    answered, answer = served.ask(path, content)
    assert answered == status and why in answer["error"]


@pytest.mark.parametrize(
    "length", ["", "Content-Length: -1\r\n", "Content-Length: x\r\n", f"Content-Length: {10**30}\r\n"]
)
def test_a_body_without_a_usable_length_is_not_read(served: Served, length: str) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as peer:
        peer.sendall(f"POST /score HTTP/1.1\r\nAuthorization: Bearer {TOKEN}\r\n{length}\r\n".encode())
        assert peer.recv(100).split()[1] in (b"411", b"413")


def test_a_peer_that_leaves_costs_nothing(served: Served) -> None:
    for sent in (b"", b"\0\xff\r\n\r\n", b"POST /score HTTP/1.1\r\nContent-Length: 100\r\n\r\n{"):
        with socket.create_connection(("127.0.0.1", served.port), timeout=10) as peer:
            peer.sendall(sent.replace(b"HTTP/1.1", f"HTTP/1.1\r\nAuthorization: Bearer {TOKEN}".encode()))
    assert served.ask("/health")[0] == 200


def test_a_worker_is_open_to_the_network_only_with_a_token() -> None:
    for host in ("0.0.0.0", "10.0.0.1", "::", "example.org"):
        with pytest.raises(ValueError, match="give --token-file, or --host 127.0.0.1"):
            RewardServer(Worker([], Limits()), host)


@pytest.mark.parametrize(
    ("content", "mode", "why"),
    [
        ("a" * 32, 0o604, "can be read by others: chmod o-rwx"),
        ("short", 0o600, "16 characters or more"),
        ("two words of some length", 0o600, "one word"),
        ("caf\xe9" * 10, 0o600, "plain ASCII"),
    ],
)
def test_tokens_that_are_no_secret_are_refused(content: str, mode: int, why: str, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(content)
    (tmp_path / "token").chmod(mode)
    with pytest.raises(ValueError, match=why):
        read_token(tmp_path / "token")


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["beauty"], "there is no reward 'beauty'"),
        (["digits", "--max-images", "0"], "--max-images must be at least 1"),
        (["digits", "--port", "70000"], "--port must be from 0 to 65535"),
        (["digits", "--url-file", "/"], "is a folder"),
        (["digits", "--token-file", "nowhere"], "nowhere"),
        (["jpeg_compressibility", "--port", "0", "--url-file", __file__], "was not written by this program"),
        (["jpeg_compressibility", "--host", "0.0.0.0"], "open to the whole network"),
    ],
)
def test_a_worker_that_cannot_be_started_says_why(
    arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve-reward", *arguments]) == 1
    assert why in capsys.readouterr().err


# -- workers that are away, late, or lie


class Script:
    """A server in a thread that gives one answer after another, the last one for ever.

    An answer is a status with what to send, the bytes themselves, or the seconds until it hangs up without a word.
    """

    def __init__(self, *answers: tuple[int, Any] | bytes | float) -> None:
        self.answers = list(answers)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            try:
                peer, _ = self.socket.accept()
            except OSError:
                return
            with peer, peer.makefile("rb") as request:
                request.readline()
                length = http.client.parse_headers(request).get("Content-Length", "0")
                request.read(int(length))
                self._answer(peer)

    def _answer(self, peer: socket.socket) -> None:
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, float):
            time.sleep(answer)
            return
        if isinstance(answer, bytes):
            peer.sendall(answer)
            return
        status, content = answer
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        try:
            peer.sendall(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        except OSError:
            return

    def close(self) -> None:
        self.socket.shutdown(socket.SHUT_RDWR)  # or the thread would go on listening
        self.socket.close()


UP = (200, {"status": "ok"})


def given(answer: tuple[int, Any] | float, form: str = "score#x", patience: Patience = BRIEF) -> list[float]:
    """What a client makes of an answer to one image."""
    script = Script(UP, answer)
    try:
        scorer = WorkerScorer(f"{script.url}/{form}", patience)
        return scorer.score(pictures(1), ["a"], [{}])[scorer.name].tolist()
    finally:
        script.close()


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((200, b"<html>"), "not valid JSON: b'<html>'"),
        ((200, b"["), "not valid JSON"),
        ((200, []), "no JSON object"),
        ((200, {}), "results has no list where 1 are expected"),
        ((200, {"results": []}), "results has 0 entries where 1 are expected"),
        ((200, {"results": [{"x": {"x": 1}}] * 2}), "results has 2 entries where 1 are expected"),
        ((200, {"results": [{"x": {"x": 1}}], "errors": [{}] * 3}), "errors has 3 entries"),
        ((200, {"results": [{"y": {"y": 1}}]}), "neither a value nor an error for x"),
        ((200, {"results": [{"x": 1.0}]}), "neither a value nor an error for x"),
        ((200, {"results": [None], "errors": [None]}), "neither a value nor an error for x"),
        ((200, {"results": [{"x": {"x": "1.0"}}]}), "something else than a number: '1.0'"),
        ((200, {"results": [{"x": {"x": True}}]}), "something else than a number: True"),
        ((200, b" " * (16 * 2**20 + 1)), "longer than 16777216 bytes"),
        ((302, b""), "it answered 302"),
        ((422, {"detail": "unknown reward"}), "it answered 422: unknown reward"),
        ((500, {"error": "no memory"}), "it answered 500: no memory"),
        ((503, b""), "it answered 503"),
        (0.0, "it is not there"),
    ],
)
def test_a_worker_that_lies_ends_the_run_by_its_name(answer: tuple[int, Any] | float, why: str) -> None:
    with pytest.raises(OSError, match=r"^reward worker http://127.0.0.1:\d+: ") as error:
        given(answer)
    assert why in str(error.value)


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        ((200, {"error": "no model"}), "it failed: 'no model'"),
        ((200, {"rewards": [1.0, 2.0]}), "rewards has 2 entries where 1 are expected"),
        ((200, {"rewards": 1.0}), "rewards has no list"),
        ((200, {"rewards": [[1.0]]}), "something else than a number: [1.0]"),
    ],
)
def test_a_worker_of_the_other_form_cannot_lie_either(answer: tuple[int, Any], why: str) -> None:
    with pytest.raises(OSError) as error:
        given(answer, "compute")
    assert why in str(error.value)


def test_values_that_are_none_are_left_out() -> None:
    for value in (b"NaN", b"Infinity", b"null", b"9" * 400, b"1e999"):
        (made,) = given((200, b'{"rewards": [%s]}' % value), "compute")
        assert not np.isfinite(made)
    assert np.isnan(given((200, {"results": [{}], "errors": [{"x": "no face"}]}))).all()
    assert given((200, {"results": [{"x": {"a": 1, "b": 2}}]})) == [1.0]
    assert given((200, {"results": [{"x": {"a": 1, "b": 2}}]}), "score#x/b") == [2.0]


def test_a_request_holds_no_more_pixels_than_a_worker_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("soar_mega.rewards.client.PIXELS", 2 * 256 + 1)
    script = Script(UP, *((200, {"rewards": rewards}) for rewards in ([1.0, 2.0], [3.0, 4.0], [5.0])))
    scorer = WorkerScorer(f"{script.url}/compute", BRIEF)
    assert scorer.score(pictures(5), ["a"] * 5, [{}] * 5)["compute"].tolist() == [1, 2, 3, 4, 5]
    script.close()


class Gate:
    """A scorer that waits to be let through, and counts."""

    name, version, weights_hash = "gate", "1", ""

    def __init__(self) -> None:
        self.open, self.calls = threading.Event(), 0

    def score(self, images: Tensor, prompts: Any, metadata: Any) -> dict[str, Tensor]:
        self.calls += 1
        assert self.open.wait(30)
        return {"gate": torch.ones(len(images))}


def test_whoever_left_is_not_answered() -> None:
    """A worker that answers them too makes those wait who are still there, until they leave as well."""
    gate = Gate()
    server = RewardServer(Worker([gate], Limits()))
    threading.Thread(target=server.serve_forever, args=(0.05,)).start()
    port = server.server_address[1]
    body = json.dumps({"prompt": ["a"], "image": [to_base64(pictures(1)[0])]}).encode()
    sent = f"POST /compute HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body
    with socket.create_connection(("127.0.0.1", port), timeout=30) as patient:
        patient.sendall(sent)
        for _ in range(6):
            with socket.create_connection(("127.0.0.1", port), timeout=30) as impatient:
                impatient.sendall(sent)
        with socket.create_connection(
            ("127.0.0.1", port), timeout=30
        ) as last:  # all before it have been taken
            last.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            assert b"200" in last.recv(100)
        gate.open.set()
        assert b'{"rewards": [1.0]}' in b"".join(iter(lambda: patient.recv(4096), b""))
    server.shutdown()
    server.server_close()
    assert gate.calls <= 2  # one may have had its place already


def test_a_late_worker_ends_the_run() -> None:
    with pytest.raises(OSError, match="it did not answer within 0.2 seconds; it was asked 1 times"):
        given(1.0, patience=Patience(request=0.2, in_all=0.1, pause=0.01))


@pytest.mark.parametrize("answer", [30.0, (503, b"")])
def test_a_worker_that_is_waited_for_keeps_no_process(answer: tuple[int, Any] | float) -> None:
    script = Script(UP, answer)
    rewards = make_rewards({f"{script.url}/compute": 1.0})  # patient for minutes
    found: list[BaseException] = []

    def ask() -> None:
        try:
            rewards.score(pictures(1), ["a"], [{}])
        except OSError as error:
            found.append(error)

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    time.sleep(0.1)
    rewards.close()
    asking.join(timeout=20)
    assert not asking.is_alive() and "reward worker http://127.0.0.1" in str(found[0])
    script.close()


def test_a_worker_that_comes_back_is_used(caplog: pytest.LogCaptureFixture) -> None:
    killed_amid_its_answer = b'HTTP/1.1 200 OK\r\nContent-Length: 18\r\n\r\n{"rewards":'
    away = [(503, b""), (500, b""), 0.0, killed_amid_its_answer]
    script = Script((503, b""), UP, *away, (200, {"rewards": [2.0]}))
    scorer = WorkerScorer(f"{script.url}/compute", Patience(request=5, in_all=5, pause=0.01))
    assert scorer.score(pictures(1), ["a"], [{}])["compute"].tolist() == [2.0]
    script.close()
    assert caplog.text.count("it is asked again in") == 5


def test_a_worker_is_found_where_its_file_says(tmp_path: Path) -> None:
    first, second = (
        Script(UP, (200, {"results": [{"x": {"x": 1}}]})),
        Script((200, {"results": [{"x": {"x": 2}}]})),
    )
    place = tmp_path / "url"
    place.write_text(f"{first.url}\n")
    scorer = WorkerScorer(f"file:{place}#x", Patience(request=5, in_all=5, pause=0.01))
    assert scorer.score(pictures(1), ["a"], [{}])["x"].tolist() == [1.0]
    first.close()
    place.unlink()  # it has ended, and starts again elsewhere
    threading.Timer(0.1, place.write_text, [second.url]).start()
    assert scorer.score(pictures(1), ["a"], [{}])["x"].tolist() == [2.0]
    second.close()


def has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.create_server(("::1", 0), family=socket.AF_INET6):
        return True
    return False


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
def test_a_worker_may_be_on_ipv6() -> None:
    server = RewardServer(Worker([JpegIncompressibility()], Limits()), "::1")
    threading.Thread(target=server.serve_forever, args=(0.05,)).start()
    try:
        assert server.url == f"http://[::1]:{server.server_address[1]}"
        asked = pictures(2), ["a", "b"], [{}] * 2
        there = make_rewards({f"{server.url}/score#jpeg_incompressibility": 1.0}).score(*asked)["total"]
        assert torch.equal(there, make_rewards({"jpeg_incompressibility": 1.0}).score(*asked)["total"])
    finally:
        server.shutdown()
        server.server_close()
    everywhere = RewardServer(Worker([], Limits()), "::", token=TOKEN)
    everywhere.server_close()
    assert everywhere.url == f"http://{socket.gethostname()}:{everywhere.server_address[1]}"


def test_a_worker_that_is_not_there_is_waited_for_and_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(
        OSError, match=f"reward worker http://127.0.0.1:{port}: it is not there .*refused.* asked [3-9]"
    ):
        WorkerScorer(f"http://127.0.0.1:{port}/score#x", BRIEF)


@pytest.mark.parametrize(
    ("key", "why"),
    [
        ("http://host:8000#x", "ends in /score#NAME or /compute"),
        ("http://host:8000/score", "put #NAME after it"),
        ("http://host:port/score#x", "is no address of a reward worker"),
        ("http:///score#x", "is no address of a reward worker"),
        ("http://user:secret@host/score#x", "a token has no place in a recipe"),
    ],
)
def test_addresses_that_are_none_are_named(key: str, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        make_rewards({key: 1.0})


def test_a_reward_that_the_worker_has_not_is_named_at_the_start(served: Served, token: None) -> None:
    with pytest.raises(ValueError, match=r"has no reward beauty, it has \['digits', 'jpeg"):
        make_rewards({f"{served.url}/score#beauty": 1.0})


# -- the last test: it ends the process


def test_a_signal_lets_it_finish_what_it_has_begun(served: Served) -> None:
    """The one by which a job's time limit is told, again and again, as well as SIGTERM."""
    answers: list[tuple[int, dict[str, Any]]] = []
    asked = question([to_base64(pictures(1)[0])], name="slow")
    asking = threading.Thread(target=lambda: answers.append(served.ask("/score", asked)))
    asking.start()
    time.sleep(0.2)
    served.process.send_signal(signal.SIGUSR1)
    served.process.send_signal(signal.SIGTERM)
    asking.join(timeout=30)
    assert answers[0][0] == 200 and answers[0][1]["results"] == [{"slow": {"slow": 1.0}}]
    assert served.process.wait(timeout=30) == 0
    assert not served.url_file.exists()
