"""Every command that a document shows is run by a test, or the document says why not."""

import re

import pytest

from tests.conftest import ROOT
from tests.docs.commands import NOT_RUN, PROGRAMS, Command, Mark, commands, commands_in, mark_of, marks

COMMANDS, MARKS = commands(), marks()
NAMED = [mark for mark in MARKS if not mark.how.startswith(NOT_RUN)]


def words_of(beginning: str) -> list[str]:
    """What a test that runs it must hold too: subcommands, names of options and settings; not the program."""
    words = [re.sub(r"(?<=\w)=.*", "", word).strip("-'\"") for word in beginning.split()]
    return [word for word in words if re.fullmatch(r"\w[\w.-]*", word) and word not in {*PROGRAMS, "m"}]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.file}: {command.text.splitlines()[0]}")
def test_a_command_names_its_test_or_says_why_it_is_not_run(command: Command) -> None:
    """So that what a reader pastes is what was tried."""
    mark = mark_of(command, MARKS)
    assert mark, f"{command.file}: {command.text!r} needs a line in a comment of commands: see tests/docs/commands.py"
    assert mark.how.startswith("tests/") or len(mark.how) > len(NOT_RUN) + 10, f"{mark}: no reason"


@pytest.mark.parametrize("mark", NAMED, ids=lambda mark: mark.beginning)
def test_the_test_that_is_named_is_there_and_knows_the_command(mark: Mark) -> None:
    """It is defined in its file, which holds the command's own words or takes the command from the document."""
    file, _, name = mark.how.partition("::")
    source = (ROOT / file).read_text()
    assert re.search(rf"^(?:async )?def {name}\(", source, re.MULTILINE), f"{mark.how} is not there"
    if "documented(" not in source and "x-codeSamples" not in source:
        assert words_of(mark.beginning), f"{mark}: too short to say anything"
        for word in words_of(mark.beginning):
            assert word in source, f"{file} does not hold {word!r} of {mark.beginning!r}"


def test_no_mark_is_left_of_a_command_that_is_gone() -> None:
    """Each decides for some command, and no beginning is marked twice."""
    assert {mark_of(command, MARKS) for command in COMMANDS} >= set(MARKS)
    assert len({mark.beginning for mark in MARKS}) == len(MARKS)


def test_commands_are_found_wherever_a_document_shows_them() -> None:
    """Lines of an indented block without their remarks, fenced blocks whole, words between backquotes."""
    text = (
        "Run `make x` or `x.y`, `git a; git b`.\n\n    dvc push    # to it\n    # alone\n    A=1 make y\n\n"
        "```sh\ncurl a |\n  cat\n```\n\n```text\nnothing\n```\n\n| a |\n| --- |\n| `docker ps` |\n"
    )
    found = [command.text for command in commands_in(text)]
    assert found == ["make x", "git a", "git b", "dvc push", "A=1 make y", "curl a |\n  cat", "docker ps"]


def test_the_longest_mark_decides_and_none_is_no_mark() -> None:
    """`make` vouches for `make a`, not for `makefile a`; `make b c` for what begins so."""
    known = [Mark("", "make", "one"), Mark("", "make b c", "two")]
    assert [mark.how if mark else None for text in ("make a", "make b c d", "makefile a") if True
            for mark in [mark_of(Command("", text), known)]] == ["one", "two", None]  # fmt: skip
