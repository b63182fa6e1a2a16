"""docs/api.md: made from the code, and true of a running gateway."""

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from docs.generate import BETWEEN, generated
from serving.gateway.schema import openapi_document
from tests.docs.conftest import run
from tests.serving.gateway.conftest import Here

DOCUMENT = openapi_document()
SCHEMAS = DOCUMENT["components"]["schemas"]
OPERATIONS = [(path, method) for path, methods in DOCUMENT["paths"].items() for method in methods]


def schema_of(name: str) -> dict[str, Any]:
    """A named shape as a schema that stands alone."""
    return {"$ref": f"#/components/schemas/{name}", "components": {"schemas": SCHEMAS}}


def test_the_page_is_what_the_code_makes() -> None:
    """`make generated` was run after the last change of a route, a message or a comment."""
    for path, text in generated().items():
        assert path.read_text() == text, f"{path.name} is old: run `make generated`"


def test_every_message_field_and_route_is_on_the_page() -> None:
    """Nothing of the OpenAPI document or of a service's .proto file is left out."""
    (page,) = generated().values()
    for path, _ in OPERATIONS:
        assert f"`{path}`" in page
    for proto in ("digits", "open_inference"):
        text = (Path("serving/protos") / f"{proto}.proto").read_text()
        for kind, name in re.findall(r"^ *(message|rpc) (\w+)", text, re.MULTILINE):
            assert re.search(
                rf"^#### (\w+\.)?{name}$" if kind == "message" else rf"^\*\*{name}\*\*", page, re.MULTILINE
            )
        for name in re.findall(r"^ +[\w<>, ]+ (\w+) = \d+;", text, re.MULTILINE):
            assert f"| `{name}` |" in page


@pytest.mark.parametrize("name", [name for name, schema in SCHEMAS.items() if "examples" in schema])
def test_an_example_answer_has_the_shape_it_stands_for(name: str) -> None:
    """Its fields, types and ranges."""
    (example,) = SCHEMAS[name]["examples"]
    jsonschema.validate(example, schema_of(name))


@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_each_routes_command_gets_what_is_documented(here: Here, tmp_path: Path, path: str, method: str) -> None:
    """A reader who pastes it gets a 200 whose body has the documented shape, with the fields of the example."""
    operation = DOCUMENT["paths"][path][method]
    ((kind, content),) = operation["responses"]["200"]["content"].items()
    (tmp_path / ".curlrc").write_text("fail-with-body\nwrite-out = \\n%{content_type}\\n")
    source = operation["x-codeSamples"][0]["source"]
    printed = run(source.replace("localhost:8080", here.url), home=tmp_path)
    *bodies, _ = re.split(rf"\n{re.escape(kind)}[^\n]*\n", printed)
    assert bodies, printed
    for body in bodies:
        if name := content["schema"].get("$ref", "").rpartition("/")[2]:
            answer = json.loads(body)
            jsonschema.validate(answer, schema_of(name))
            assert set(answer) == set(SCHEMAS[name]["examples"][0])


def test_the_grpc_example_reads_a_digit(here: Here) -> None:
    """The page's Python runs as it stands."""
    (source,) = re.findall(r"```python\n(.*?)```", BETWEEN, re.DOTALL)
    digit, confidence, version = run(source.replace("localhost:50051", here.grpc_address), python=True).split()
    assert (digit, version) == ("0", "1")
    assert 0.5 <= float(confidence) <= 1
