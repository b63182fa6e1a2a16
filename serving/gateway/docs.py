"""``/docs``: the OpenAPI document as one page for people. Made here, so it needs no script and no outside resource."""

import re
from html import escape
from typing import Any, Final

CSS: Final = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin: 2.5rem 0 .5rem; border-top: 1px solid var(--line); padding-top: 1.5rem; font-size: 1.15rem; }
h2 b { display: inline-block; min-width: 4rem; }
code, pre { font: .9em/1.45 ui-monospace, monospace; }
:is(h2, p) > code { overflow-wrap: anywhere; }
pre { background: var(--soft); padding: .75rem 1rem; overflow-x: auto; border-radius: .4rem; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--line); }
"""


def render_docs(document: dict[str, Any]) -> str:
    """The page's HTML.

    Args:
        document: An OpenAPI document.
    """
    info = document["info"]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>",
        '<meta name=viewport content="width=device-width, initial-scale=1">',
        f"<title>{escape(info['title'])} API</title><link rel=stylesheet href=/docs.css>",
        f"<h1>{escape(info['title'])} API <small>{escape(info['version'])}</small></h1>",
        f"<p>{escape(info['summary'])} {_text(info['description'])} The same as a machine reads it: ",
        '<a href="/openapi.json">openapi.json</a>. gRPC: <code>digits.v1.Digits</code> and ',
        "<code>inference.GRPCInferenceService</code>, by reflection; ",
        "<code>tensorflow.serving.PredictionService</code> as TensorFlow Serving has it.</p>",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(_operation(path, method, operation))
    parts.append("<h2>Answers</h2>")
    parts += [_model(name, schema) for name, schema in document["components"]["schemas"].items()]
    return "".join(parts) + "</html>"


def _operation(path: str, method: str, operation: dict[str, Any]) -> str:
    parts = [f"<h2><b>{method.upper()}</b> <code>{escape(path)}</code></h2><p>{_text(operation['summary'])}</p>"]
    if body := operation.get("requestBody"):
        kinds = ", ".join(f"<code>{escape(kind)}</code>" for kind in body["content"])
        parts.append(f"<p>{_text(body['description'])}</p><p>Content types: {kinds}</p>")
    parts += [f"<pre>{escape(sample['source'])}</pre>" for sample in operation["x-codeSamples"]]
    rows = []
    for status, response in operation["responses"].items():
        kinds = ", ".join(_kind(kind, content) for kind, content in response["content"].items())
        rows.append(f"<tr><td><code>{status}</code><td>{_text(response['description'])}<td>{kinds}")
    parts.append(f"<table><tr><th>Status<th>Meaning<th>Body{''.join(rows)}</table>")
    return "".join(parts)


def _kind(kind: str, content: dict[str, Any]) -> str:
    name = content["schema"].get("$ref", "").rpartition("/")[2]
    return f'<a href="#{escape(name)}">{_breakable(name)}</a>' if name else f"<code>{escape(kind)}</code>"


def _model(name: str, schema: dict[str, Any]) -> str:
    rows = []
    for field, facts in schema["properties"].items():
        kind = facts.get("$ref", "").rpartition("/")[2] or facts.get("type", "")
        meaning = _text(facts.get("description", ""))
        rows.append(f"<tr><td><code>{_breakable(field)}</code><td>{_breakable(kind)}<td>{meaning}")
    heading = f'<h3 id="{escape(name)}">{escape(name)}</h3><p>{_text(schema.get("description", ""))}'
    return f"{heading}<table>{''.join(rows)}</table>"


def _breakable(name: str) -> str:
    """Escaped, with room for a line break between the words of a name: a phone's screen is narrow."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=_)", "<wbr>", escape(name))


def _text(text: str) -> str:
    """Escaped, with `words` in backquotes as code."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if index % 2 else piece for index, piece in enumerate(pieces))
