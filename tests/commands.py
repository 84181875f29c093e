"""The command lines that a reader is given: found in documents, presets and help texts, as they stand there."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from jmlr_jax import cli, config_io

ROOT = Path(__file__).resolve().parent.parent
COMMAND = re.compile(r"(?:jmlr|bash tpu_scripts/\w+\.sh)(?=\s|$)")
FENCE = re.compile(r"^[ \t]*```[^\n]*\n(.*?)^[ \t]*```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:jmlr|bash)\s[^`]+)`")
HEADER = re.compile(r"^# Command: +(.*(?:\n# {10,}.*)*)", re.MULTILINE)


@dataclass(frozen=True)
class Command:
    """A command: where it stands, how (``block``, ``inline``, ``header`` or ``help``), and its text in one line."""

    where: str
    kind: str
    text: str

    @property
    def jmlr(self) -> list[str] | None:
        """Arguments that `jmlr` gets of it; None where it is not a call of `jmlr`. Marks of a synopsis are left out."""
        text = re.sub(r"(?<=\s)(?:\.\.\.|&)(?=\s|$)|\[-[^\]]*\]", "", self.text)
        program, *words = shlex.split(text, comments=True)
        if program == "jmlr":
            return words
        script, *words = words
        if script == "tpu_scripts/run.sh":
            return ["run", *words] if not words or words[0][0] == "-" or "=" in words[0] else words
        if script == "tpu_scripts/launch.sh":
            named = [i for i, word in enumerate(words) if word in cli.COMMANDS]
            return words[named[0] :] if named else None
        return None


def collect() -> list[Command]:
    """All of them, in the order in which they stand; those of one place follow one another."""
    found: list[Command] = []
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))):
        found += _of_page(str(page.relative_to(ROOT)), page.read_text())
    for name, file in sorted(config_io.presets().items()):
        for text in HEADER.findall(file.read_text()):
            found.append(Command(f"configs/{name}.yaml", "header", " ".join(text.replace("\n#", " ").split())))
    for line in cli.EXAMPLES.splitlines():
        if COMMAND.match(line.strip()):
            found.append(Command("jmlr --help", "help", re.split(r"\s{2,}", line.strip())[0]))
    return found + [Command("jmlr COMMAND --help", "help", command.example) for command in cli.COMMANDS.values()]


def _of_page(where: str, text: str) -> list[Command]:
    placed: list[tuple[int, Command]] = []
    for block in FENCE.finditer(text):
        for line in block[1].replace("\\\n", " ").splitlines():
            if COMMAND.match(line.strip()):
                placed.append((block.start(), Command(where, "block", line.strip())))
    outside = FENCE.sub(lambda block: " " * len(block[0]), text)  # places stay what they are
    for found in INLINE.finditer(outside):
        if COMMAND.match(found[1]):
            placed.append((found.start(), Command(where, "inline", " ".join(found[1].split()))))
    return [command for _, command in sorted(placed, key=lambda pair: pair[0])]
