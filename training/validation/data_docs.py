"""Great Expectations' pages made self-contained, with an index of all findings before them."""

import re
from html import escape
from pathlib import Path

from training.validation.expectations import Finding, Results
from training.workspace import whole_file

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem;color:#222}
table{border-collapse:collapse;width:100%;margin:.6rem 0 1.4rem}td,th{border:1px solid #ddd;padding:.3rem .5rem;
text-align:left;vertical-align:top}th{background:#f4f4f4}.ok{color:#17692c}.bad,.text-danger{color:#b3261e;font-weight:600}
.warn,.text-warning{color:#8a5a00;font-weight:600}code{background:#f4f4f4;padding:0 .2rem}
.alert{background:#f4f4f4;padding:.6rem .8rem;margin-top:1.4rem}h5,h6{font-size:1rem;margin:.2rem 0}
.fa-check-circle::before{content:"\\2713"}.fa-times::before,.fa-exclamation-triangle::before{content:"\\2717"}
.badge{background:#eee;padding:0 .3rem;border-radius:.2rem}.col-lg-2,nav,footer{display:none}
"""
_HEADS = ("", "about", "requirement", "column", "expected", "came", "rows", "for example, rows")


def write_data_docs(folder: Path, results: Results) -> None:
    """The page of each suite and an index; they load nothing from anywhere."""
    _write_page(folder / "index.html", "Raw data", _index(results))
    for name, html in results.pages.items():
        back = '<p><a href="index.html">all findings</a></p>'
        _write_page(folder / f"{name}.html", name, back + _make_self_contained(html))


def _index(results: Results) -> str:
    failed = len(results.failed)
    count = len(results.findings)
    verdict = f"{failed} of {count} expectations failed" if failed else f"all {count} expectations hold"
    links = " · ".join(f'<a href="{name}.html">{name}</a>' for name in results.pages)
    heads = "".join(f"<th>{head}</th>" for head in _HEADS)
    rows = "".join(_row(f) for f in [*results.failed, *(f for f in results.findings if f.passed)])
    return (
        f"<h1>Raw data: {verdict}</h1><p>Page of each suite: {links}</p>"
        "<p>The rows to look at are listed in <code>quarantine.csv</code> and drawn on <code>contact_sheet.png</code>, "
        f"in the folder above this one.</p><table><tr>{heads}</tr>{rows}</table>"
    )


def _row(f: Finding) -> str:
    if f.passed:
        verdict = '<td class="ok">holds</td>'
    elif f.severity == "stop":
        verdict = '<td class="bad">failed: stop</td>'
    else:
        verdict = '<td class="warn">failed: warn</td>'
    examples = ", ".join(map(str, f.examples))
    offending = f"{f.offending:,}" if f.offending else ""
    cells = (f.about, f.requirement, f.column, f.expected, f.came, offending, examples)
    return f"<tr>{verdict}{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _make_self_contained(html: str) -> str:
    """A page's body without scripts, outside styles, images and links: it loads nothing and tells nobody.

    Random names of foldable parts go as well, so that the same findings are the same page.
    """
    body = html[html.index("<body") :]
    body = body[body.index(">") + 1 :].rsplit("</body>", 1)[0]
    body = re.sub(r"<(script|style|iframe|footer|nav)\b.*?</\1>", "", body, flags=re.DOTALL | re.IGNORECASE)
    body = re.sub(r"<(link|img|iframe)\b[^>]*>", "", body, flags=re.IGNORECASE)
    body = re.sub(r"<a\b[^>]*>(.*?)</a>", r"\1", body, flags=re.DOTALL | re.IGNORECASE)
    body = re.sub(r"-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}", "", body)
    return re.sub(r"\son\w+=\"[^\"]*\"", "", body)


def _write_page(path: Path, title: str, body: str) -> None:
    head = f'<meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
    with whole_file(path) as part:
        part.write_text(
            f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>\n', encoding="utf-8"
        )
