"""Links between the documents lead somewhere."""

import re
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from tests.conftest import ROOT
from tests.docs.commands import markdown_files


def anchors(markdown: str) -> set[str]:
    """What a heading can be linked by, as GitHub makes it of the heading's text."""
    tokens = MarkdownIt("commonmark").parse(markdown)
    headings = [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(markdown: str) -> set[str]:
    """Addresses of links and pictures to files of the repository."""
    inline = [token for token in MarkdownIt("commonmark").enable("table").parse(markdown) if token.type == "inline"]
    children = [child for token in inline for child in token.children or ()]
    found = {str(child.attrs[name]) for child in children for name in ("href", "src") if name in child.attrs}
    return {address for address in found if not re.match(r"[a-z]+:", address)}


@pytest.mark.parametrize("path", markdown_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_to_a_heading_in_it(path: Path) -> None:
    """A page that was moved, or a heading that was reworded, is found before a reader finds it."""
    for address in links(path.read_text()):
        name, _, anchor = address.partition("#")
        target = path.parent / name if name else path
        assert target.exists(), f"{address}: no such file"
        assert not anchor or anchor in anchors(target.read_text()), f"{address}: no such heading"


def test_each_page_is_named_in_the_readme() -> None:
    """A newcomer finds all of docs/ from the first page."""
    linked = links((ROOT / "README.md").read_text())
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in linked


def test_a_link_that_leads_nowhere_is_found() -> None:
    """To a file and to a heading; what leads out of the repository is left alone."""
    assert links("[a](b.md#c) ![d](e.png)\n\n| [f](#g) |\n| --- |\n| [h](https://i) |") == {"b.md#c", "e.png", "#g"}
    assert anchors("# A `b`: c/d, e\n") == {"a-b-cd-e"}
