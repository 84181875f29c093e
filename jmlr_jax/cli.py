"""The command line: ``jmlr COMMAND [--config FILE] [--run-dir DIR] [key=value ...]``.

Nothing heavy is imported until a command runs, so that ``--help`` and ``print-config`` answer at once.
"""

from __future__ import annotations

import argparse
import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn, get_args

from jmlr_jax import chatter, cli_answering, cli_evaluation, config_io
from jmlr_jax.config import ArmName, Config
from jmlr_jax.config_models import DType
from jmlr_jax.errors import JmlrError
from jmlr_jax.files import disk_trouble, expanded
from jmlr_jax.parallel.libtpu import set_flags

ARMS = get_args(ArmName)
STARTS = ("prepare", "run")  # commands that write the configuration of a run directory
DESCRIPTION = "Joint training of a late-interaction retriever and a language model on multiple-choice questions."
EXAMPLES = """\
examples:
  jmlr run                                        the whole experiment on the embedded closed world
  jmlr run --config smoke --run-dir runs/smoke    the same path in miniature, to see that it works
  jmlr prepare --config smoke --run-dir runs/a train.steps=20
  jmlr train --run-dir runs/a                     a run brings what it was prepared with
  jmlr eval --run-dir runs/a --arm jmlr
  jmlr print-config --fields                      every key, its default and its meaning

A value is the last of: the default, the preset (--config), key=value. `jmlr COMMAND --help` tells more.
"""


class _Command(NamedTuple):
    """One subcommand: its help line, what it does, and an example."""

    act: Callable[[Config, argparse.Namespace], None]
    help: str
    example: str
    places: tuple[str, ...] = ()  # directories named without an option
    configured: bool = True  # whether it takes --config, --run-dir and key=value
    together: bool = False  # whether several processes can run it as one


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: arguments without the program's name; None takes ``sys.argv``.

    Returns:
        Exit status: 0 done, 2 something for the user to mend (one line per problem on stderr), 130 interrupted.

    Raises:
        SystemExit: from ``--help`` (0) and from arguments that do not parse (2).
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # as standard error does, for what the terminal cannot show
    parser = _parser()
    # Overrides are what argparse does not know, so that they may stand before, between and after the options.
    args, rest = parser.parse_known_args(argv)
    for word in rest:
        if word.startswith("-"):
            parser.error(f"unknown option {word} for `jmlr {args.command}` (see jmlr {args.command} --help)")
    command = COMMANDS[args.command]
    if rest and not command.configured:
        parser.error(f"unexpected argument {rest[0]} for `jmlr {args.command}` (see jmlr {args.command} --help)")
    set_flags()
    chatter.hush()
    if getattr(args, "distributed", None) is not None:
        return _as_one_of_several(args.distributed, lambda: _act(command, args, rest))
    return _act(command, args, rest)


def _as_one_of_several(where: str, act: Callable[[], int]) -> int:
    """Runs a command as one process of a job; the exit status, 1 where another process seems to be lost."""
    from jmlr_jax.parallel import distributed

    try:
        distributed.start(where)
    except JmlrError as error:
        print(f"jmlr: {error}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # a request for a trace, where nothing is trained
    try:
        status = act()
    except Exception:  # an error of ours is told by `act`; another process that is lost shows as any other
        traceback.print_exc()
        print(distributed.lost(), file=sys.stderr)
        distributed.abandon(1)
    if status == 130:
        distributed.abandon(status)
    distributed.finish()
    return status


def _act(command: _Command, args: argparse.Namespace, rest: list[str]) -> int:
    try:
        command.act(_configuration(args, rest) if command.configured else Config(), args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has left: jmlr print-config | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("jmlr: interrupted; the same command continues from the last checkpoint", file=sys.stderr)
        return 130
    except Exception as error:
        said = str(error) if isinstance(error, JmlrError) else disk_trouble(error)
        if said is None and not isinstance(error, OSError):
            raise  # a fault of ours
        if args.debug:
            traceback.print_exc()
        for line in (said or str(error)).splitlines() or [type(error).__name__]:
            print(f"jmlr: {line}", file=sys.stderr)
        return 2
    return 0


def _configuration(args: argparse.Namespace, overrides: list[str]) -> Config:
    """The configuration asked for: that of ``--config``, else the one saved in ``--run-dir``, else the defaults."""
    source: str | None = args.config
    if getattr(args, "ann_recall", None) is not None:
        overrides = [*overrides, f"index.ann_recall={args.ann_recall}"]
    if args.run_dir is not None:
        overrides = [*overrides, f"run_dir={args.run_dir}"]
        saved = os.path.join(expanded(args.run_dir), config_io.RESOLVED_NAME)
        if source is None and os.path.exists(saved):
            source = saved
            print(f"jmlr: configuration of {saved}", file=sys.stderr)
        elif source is None and args.command not in STARTS and os.path.isdir(f"{expanded(args.run_dir)}/data"):
            raise config_io.ConfigError(f"{saved}: is gone; bring it back from a copy, or give --config")
    return config_io.load(source, overrides)


# Commands. What a command imports, it imports when it runs.


def _prepare(config: Config, args: argparse.Namespace) -> None:
    from jmlr_jax.commands import pipeline

    pipeline.prepare_data(config)


def _index(config: Config, args: argparse.Namespace) -> None:
    from jmlr_jax.commands import pipeline
    from jmlr_jax.run.open import Run

    pipeline.index(Run.open(config))


def _search(config: Config, args: argparse.Namespace) -> None:
    from jmlr_jax.commands import search

    search.run_search(
        config, args.query, name=args.arm, k=args.k, sources=args.source, hybrid=args.hybrid, trec=args.trec
    )


def _train(config: Config, args: argparse.Namespace) -> None:
    from jmlr_jax.commands import pipeline
    from jmlr_jax.run.open import Run

    run = Run.open(config)
    for arm in config.eval.arms if args.arm == "all" else (args.arm,):
        pipeline.train(run, arm)


def _report(config: Config, args: argparse.Namespace) -> None:
    from jmlr_jax.commands import pipeline

    pipeline.write_report(config, args.out)


def _run(config: Config, args: argparse.Namespace) -> None:
    from jmlr_jax.commands import pipeline

    pipeline.run_all(config, args.seeds)
    print(config.run_dir)


def _compare(config: Config, args: argparse.Namespace) -> None:
    from jmlr_jax.commands import compare

    compare.run(args.run_dir, args.other, args.split, args.json)


def _import(config: Config, args: argparse.Namespace) -> None:
    from jmlr_jax.hf.convert import import_checkpoint

    import_checkpoint(
        args.src,
        args.dst,
        dtype=args.dtype,
        vocab_multiple=args.vocab_multiple,
        add_tokens=args.add_token,
        layers=args.layers,
    )
    print(args.dst)


def _export(config: Config, args: argparse.Namespace) -> None:
    from jmlr_jax.commands.export import export_run

    export_run(config, args.dst, arm=args.arm, with_index=args.with_index)
    print(args.dst)


def _plan(config: Config, args: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_platforms", "cpu")  # what is asked is the compiler; a TPU that is there is left alone
    from jmlr_jax.planning import report as plan_report
    from jmlr_jax.planning.search import Look

    look = Look(args.search, args.budget, args.tried)
    plan_report.run(config, args.topology, args.json, args.lengths, look)


def _print_config(config: Config, args: argparse.Namespace) -> None:
    if not args.fields:
        print(config_io.to_yaml(config), end="")
        return
    for row in config_io.field_rows():
        print(f"{row.key} = {row.default}" + (f"\n    {row.description}" if row.description else ""))


COMMANDS = {
    "prepare": _Command(
        _prepare,
        "read questions and passages, split, filter leakage, tokenise",
        "jmlr prepare --config own_small --run-dir runs/a data.train_path=train.jsonl data.test_path=test.jsonl "
        "data.corpus_path=corpus.jsonl",
        together=True,
    ),
    "index": _Command(_index, "encode the passages and build the index", "jmlr index --run-dir runs/a", together=True),
    "train": _Command(_train, "train one arm, or continue it", "jmlr train --run-dir runs/a --arm bm25", together=True),
    "eval": _Command(
        cli_evaluation.evaluate,
        "evaluate trained arms, on questions of the run or on a published set",
        "jmlr eval --run-dir runs/a --arm bm25",
        together=True,
    ),
    "report": _Command(_report, "write tables and figures of a run", "jmlr report --run-dir runs/a", together=True),
    "run": _Command(
        _run, "all of the above, for one seed or several", "jmlr run --seeds 3 --run-dir runs/b", together=True
    ),
    "compare": _Command(
        _compare,
        "paired differences between two runs on the questions they have in common",
        "jmlr compare runs/a runs/b --split dev",
        places=("RUN", "OTHER"),
        configured=False,
    ),
    "search": _Command(
        _search,
        "ask the index of a run; @FILE with lines `id<TAB>question` for a TREC run file",
        'jmlr search "What helps against gout?" --run-dir runs/a --hybrid',
        places=("QUERY",),
        together=True,
    ),
    "ask": _Command(
        cli_answering.ask,
        "answer a question beside the passages that made the answer; without one, one after the other",
        'jmlr ask "What helps against gout?" --run-dir runs/a --option insulin --option colchicine',
    ),
    "serve": _Command(
        cli_answering.serve,
        "a web page and a JSON API that answer so (needs the extra `serve`)",
        "jmlr serve --run-dir runs/a --port 8000",
    ),
    "import": _Command(
        _import,
        "check a published checkpoint, a directory or a GGUF file, and write it for training",
        "jmlr import downloads/colbertv2.0 models/colbertv2.0",
        places=("SRC", "DST"),
        configured=False,
    ),
    "export": _Command(
        _export,
        "write a trained pair for other tools, with a model card",
        "jmlr export runs/a exported/a --arm bm25",
        places=("RUN", "DST"),
    ),
    "plan": _Command(
        _plan,
        "compile for a TPU slice without one: does it fit, how fast, at what cost (needs the extra `plan`)",
        "jmlr plan --config paper_7b_v5e16 --topology v5e:8x8 train.batch_size=64",
    ),
    "print-config": _Command(
        _print_config, "show the configuration that a command would use", "jmlr print-config --config smoke"
    ),
}


class _Parser(argparse.ArgumentParser):
    """Errors in the same form as all others: one line, exit status 2."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"jmlr: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="jmlr",
        usage="jmlr COMMAND [--config FILE] [--run-dir DIR] [key=value ...]",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=_formatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=_Parser)
    for name, command in COMMANDS.items():
        sub = commands.add_parser(
            name,
            usage=" ".join(["jmlr", name, *command.places, "[options]", *["[key=value ...]"] * command.configured]),
            help=command.help,
            description=f"{command.help[0].upper()}{command.help[1:]}.",
            epilog=f"example: {command.example}",
            formatter_class=_formatter,
            allow_abbrev=False,
        )
        shipped = ", ".join(config_io.presets()) or "none found"
        if command.configured:
            sub.add_argument("--config", metavar="FILE", help=f"YAML file, or the name of a preset ({shipped})")
        for place in command.places:
            sub.add_argument("run_dir" if place == "RUN" else place.lower(), metavar=place)
        if command.configured and "RUN" not in command.places:
            sub.add_argument("--run-dir", metavar="DIR", help="where the run lives; short for run_dir=DIR")
        if command.together:
            sub.add_argument(
                "--distributed",
                metavar="WHERE",
                help="run as one of several processes, all started with the same command: auto (TPU slices), or "
                "HOST:PORT,ID,COUNT",
            )
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name == "train":
            sub.add_argument("--arm", choices=(*ARMS, "all"), default="jmlr", help="default: jmlr; all: eval.arms")
        elif name == "eval":
            cli_evaluation.add_arguments(sub, ARMS)
        elif name == "index":
            tuned = "to tune to; short for index.ann_recall=FRACTION"
            sub.add_argument("--ann-recall", "--recall", type=float, metavar="FRACTION", help=tuned)
        elif name == "search":
            sub.add_argument(
                "--arm", default="initial", metavar="NAME", help="whose retriever: a trained phase; default: initial"
            )
            sub.add_argument("--k", type=_positive, default=5, help="passages; default: 5")
            sub.add_argument(
                "--source", action="append", default=[], metavar="NAME", help="only from there; may be given repeatedly"
            )
            sub.add_argument("--hybrid", action="store_true", help="fuse with BM25 by reciprocal rank")
            sub.add_argument("--trec", metavar="FILE", help="write a TREC run file")
        elif name == "report":
            sub.add_argument("--out", metavar="DIR", help="where to write it; default: the run directory")
        elif name in ("ask", "serve"):
            cli_answering.add_arguments(sub, name)
        elif name == "run":
            sub.add_argument("--seeds", type=_positive, default=1, metavar="N", help="runs seeds 0 to N-1; default: 1")
        elif name == "export":
            sub.add_argument("--arm", choices=ARMS, default="jmlr", help="whose weights; default: jmlr")
            sub.add_argument("--with-index", action="store_true", help="add what `jmlr ask` and `jmlr serve` need")
        elif name == "compare":
            sub.add_argument("--split", choices=("dev", "test"), default="test", help="default: test")
            sub.add_argument("--json", metavar="FILE", help="write the differences")
        elif name == "import":
            sub.add_argument(
                "--dtype", choices=get_args(DType), help="of the written weights; default: the checkpoint's"
            )
            sub.add_argument("--layers", type=_positive, metavar="N", help="keep the first N layers alone")
            sub.add_argument("--vocab-multiple", type=_positive, default=1, metavar="N", help="pad the vocabulary")
            sub.add_argument("--add-token", action="append", default=[], metavar="TOKEN", help="may be repeated")
        elif name == "plan":
            sub.add_argument("--topology", metavar="SLICE", help="e.g. v5e:4x4; default: mesh.topology")
            sub.add_argument("--lengths", metavar="DATA", help="price it at real lengths too: medqa, or those of a run")
            what = "find the fastest that fits over mesh, batch, accumulate, remat, memory, or all of them"
            sub.add_argument("--search", metavar="AXES", help=what)
            sub.add_argument("--budget", type=_positive, metavar="MINUTES", help="try nothing new after so long")
            sub.add_argument("--tried", metavar="FILE", help="keep what --search tried, and go on from it")
            sub.add_argument("--json", metavar="FILE", help="write the plan (with --search the fastest that fits)")
        elif name == "print-config":
            sub.add_argument("--fields", action="store_true", help="every key with its default and description")
    return parser


def _formatter(prog: str) -> argparse.HelpFormatter:
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=18)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {number}")
    return number
