"""soar-mega serve-reward"""

import argparse

from soar_mega.cli.numbers import check_at_least_one

HELP = """\
Judge images for other processes: a reward worker that speaks JSON over HTTP.

  soar-mega serve-reward digits --port 8000
  soar-mega serve-reward digits my_rewards:sharpness --port 8000
  soar-mega serve-reward pick_score_rl clip_score --weights models/scorers
  soar-mega serve-reward digits --host 0.0.0.0 --port 0 --token-file ~/.reward_token --url-file /shared/reward.url

It answers POST /score as UniRL's reward service does, and POST /compute (or /NAME/compute, where several rewards are
served) as Flow-Factory's server does, so their trainers can ask it too. GET /health says what is served. A recipe asks
it as stage.rewards={"http://HOST:PORT/score#NAME": 1.0}, or as "file:PATH#NAME" with the --url-file.

Without a token it listens on this machine alone. It ends on SIGTERM, when what it has begun is answered.
"""


def add_parser(verbs: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = verbs.add_parser(
        "serve-reward",
        help="judge images for other processes",
        description=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names", nargs="+", metavar="NAME", help="what stage.rewards may name (docs/rewards.md)"
    )
    parser.add_argument("--weights", default="", metavar="DIR", help="where published scorers find theirs")
    parser.add_argument("--device", help="of published scorers (default: cuda where there is a GPU)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on, of IPv4 or IPv6 (default: %(default)s)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0: a free one (default: %(default)s)")
    parser.add_argument("--token-file", default="", metavar="PATH", help="a secret that clients must show")
    parser.add_argument("--url-file", default="", metavar="PATH", help="write the address here while serving")
    parser.add_argument("--max-images", type=int, default=64, help="of a request (default: %(default)s)")
    parser.add_argument(
        "--max-megapixels", type=int, default=64, help="of all its images (default: %(default)s)"
    )
    parser.add_argument("--max-mebibytes", type=int, default=256, help="of its body (default: %(default)s)")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    check_at_least_one(arguments, "max_images", "max_megapixels", "max_mebibytes")
    if not 0 <= arguments.port <= 65535:
        raise ValueError(f"--port must be from 0 to 65535, not {arguments.port}")

    from soar_mega.cli.process import start_logging

    start_logging()

    import torch

    from soar_mega.outputs import check_file
    from soar_mega.rewards.registry import make_scorers
    from soar_mega.rewards.server import RewardServer, serve
    from soar_mega.rewards.tokens import read_token
    from soar_mega.rewards.url_file import MARK
    from soar_mega.rewards.worker import Limits, Worker

    if arguments.url_file:
        check_file(arguments.url_file, MARK)  # before models are read
    token = read_token(arguments.token_file) if arguments.token_file else ""
    limits = Limits(
        body=arguments.max_mebibytes * 2**20,
        images=arguments.max_images,
        pixels=arguments.max_megapixels * 10**6,
    )
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    worker = Worker(make_scorers(arguments.names, arguments.weights, device), limits, arguments.names)
    server = RewardServer(worker, arguments.host, arguments.port, token)
    served = ", ".join(worker.scorers)

    def tell() -> None:
        print(f"ready: {served} at {server.url}", flush=True)

    serve(server, arguments.url_file, arguments.token_file, tell)
    return 0
