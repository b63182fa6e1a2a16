"""The commands in the Markdown files, and what each file says of how they are tested.

A command is a line of an indented block, a whole block fenced as `sh` or `python`, or words between backquotes that
begin with a program. What vouches for it is said in a comment above a block that shows it, once for all files:

    <!-- commands
    dvc repro => tests/training/test_path.py::test_name
    kubectl => not run: needs a cluster
    -->

The longest beginning that fits a command decides. The test named either has the same command in its own words, or takes
it from here (`documented`) and runs it as it stands.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token

from tests.conftest import ROOT

PROGRAMS = {"curl", "docker", "dvc", "git", "helm", "kill", "kind", "kubectl", "make", "prefect", "python"}
SHELL, PYTHON = "sh", "python"
NOT_RUN = "not run: "


@dataclass(frozen=True)
class Command:
    """One command as the reader sees it."""

    file: str
    text: str
    language: str = SHELL


@dataclass(frozen=True)
class Mark:
    """How the commands that begin so are tested."""

    file: str
    beginning: str
    how: str

    def fits(self, command: str) -> bool:
        return f"{' '.join(command.split())} ".startswith(f"{self.beginning} ")


def markdown_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=ROOT, check=True, capture_output=True, text=True,
    )  # fmt: skip
    return sorted(ROOT / name for name in listed.stdout.splitlines())


def commands() -> list[Command]:
    return [command for path in markdown_files() for command in commands_in(path.read_text(), _name(path))]


def marks() -> list[Mark]:
    return [mark for path in markdown_files() for mark in _marks_in(path.read_text(), _name(path))]


def mark_of(command: Command, among: list[Mark]) -> Mark | None:
    """The mark with the longest beginning that fits."""
    return max((mark for mark in among if mark.fits(command.text)), key=lambda mark: len(mark.beginning), default=None)


def commands_in(markdown: str, file: str = "") -> Iterator[Command]:
    for token in MarkdownIt("commonmark").enable("table").parse(markdown):
        if token.type == "code_block":
            yield from (Command(file, text) for line in token.content.splitlines() if (text := _bare(line)))
        elif token.type == "fence" and token.info in (SHELL, PYTHON):
            yield Command(file, token.content.strip(), token.info)
        elif token.type == "inline":
            yield from (Command(file, text) for text in _spans(token))


def _bare(line: str) -> str:
    """Without the remark at its end."""
    return re.sub(r"(^|\s+)#\s.*", "", line).strip()


def _spans(inline: Token) -> Iterator[str]:
    """What stands between backquotes and begins with a program and another word, settings before it left aside."""
    for token in inline.children or ():
        if token.type == "code_inline":
            words = re.sub(r"^([A-Z_]+=\S+ )+", "", token.content).split()
            if len(words) > 1 and words[0] in PROGRAMS:
                yield from (part.strip() for part in token.content.split("; "))


def _marks_in(markdown: str, file: str) -> Iterator[Mark]:
    for comment in re.findall(r"^<!-- commands\n(.*?)^-->$", markdown, re.MULTILINE | re.DOTALL):
        for line in comment.splitlines():
            beginning, arrow, how = line.partition(" => ")
            if not arrow:
                raise ValueError(f"{file}: expected `COMMAND => HOW` in a comment of commands, came {line!r}")
            yield Mark(file, beginning.strip(), how.strip())


def documented(test: str) -> list[Command]:
    """The commands that name this test, in the order of the files and of their lines."""
    known = marks()
    return [command for command in commands() if (mark := mark_of(command, known)) and mark.how == test]


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))
