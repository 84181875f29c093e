"""`jmlr ask` and `jmlr serve` on the command line: their arguments, and what they do. Nothing heavy is imported."""

from __future__ import annotations

import argparse

from jmlr_jax.config import Config


def add_arguments(command: argparse.ArgumentParser, name: str) -> None:
    """Arguments of ``ask`` or ``serve``."""
    if name == "ask":
        command.add_argument("question", nargs="?", metavar="QUESTION", help="left out: asks for one after the other")
        command.add_argument("--arm", metavar="NAME", help="who answers; default: jmlr, or the first there is")
        command.add_argument(
            "--option", action="append", default=[], metavar="TEXT", help="to choose among; given for each option"
        )
        command.add_argument(
            "--source", action="append", default=[], metavar="NAME", help="passages only from there; may be repeated"
        )
        command.add_argument("--k", type=int, metavar="N", help="passages read; default: as many as in training")
        command.add_argument("--answer-anyway", action="store_true", help="also where the answer is not sure enough")
        command.add_argument("--json", action="store_true", help="a line of JSON for each question")
        return
    command.add_argument(
        "--arm", action="append", metavar="NAME", help="arms to offer; may be repeated; default: all that are trained"
    )
    command.add_argument("--host", default="127.0.0.1", help="address to listen on; any but this one needs a token")
    command.add_argument("--port", type=int, default=8000, help="0 takes a free one; default: 8000")
    command.add_argument(
        "--token-file", metavar="FILE", help="file with the token that clients must give (16 characters or more)"
    )
    command.add_argument(
        "--allow-host", action="append", default=[], metavar="NAME", help="further name that clients may call it by"
    )
    command.add_argument("--queue", type=int, default=32, metavar="N", help="requests that wait, at most; default: 32")
    command.add_argument(
        "--timeout", type=float, default=60.0, metavar="S", help="seconds until a request is given up; default: 60"
    )
    command.add_argument("--log-questions", action="store_true", help="write questions to the log; default: never")


def ask(config: Config, args: argparse.Namespace) -> None:
    """`jmlr ask`."""
    from jmlr_jax.commands.ask import run_ask

    run_ask(
        config,
        args.question,
        arm=args.arm,
        options=args.option,
        sources=args.source,
        k=args.k,
        anyway=args.answer_anyway,
        as_json=args.json,
    )


def serve(config: Config, args: argparse.Namespace) -> None:
    """`jmlr serve`."""
    from jmlr_jax.serving.server import Settings, run_server

    run_server(
        config,
        Settings(
            host=args.host,
            port=args.port,
            arms=None if args.arm is None else tuple(args.arm),
            token_file=args.token_file,
            allowed_hosts=tuple(args.allow_host),
            queue=args.queue,
            timeout=args.timeout,
            log_questions=args.log_questions,
        ),
    )
