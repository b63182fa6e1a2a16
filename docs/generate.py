"""``python -m docs.generate``: writes docs/api.md from the gateway's OpenAPI document and the ``.proto`` files.

A test compares what is in the repository with what this would write.
"""

import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from google.protobuf.descriptor_pb2 import (
    DescriptorProto,
    FieldDescriptorProto,
    FileDescriptorProto,
    FileDescriptorSet,
    ServiceDescriptorProto,
)
from grpc_tools import protoc

from serving.gateway.rest import STATUS
from serving.gateway.rpc import CODES
from serving.gateway.schema import openapi_document

ROOT = Path(__file__).resolve().parent.parent

HEAD = """\
<!-- Made by `make generated` from serving/gateway/schema.py, examples.py and serving/protos/*.proto; edit those. -->
<!-- commands
curl => tests/docs/test_api.py::test_each_routes_command_gets_what_is_documented
python -c => tests/docs/test_api.py::test_each_routes_command_gets_what_is_documented
import grpc => tests/docs/test_api.py::test_the_grpc_example_reads_a_digit
-->
# API reference

{summary} Version {version}. A running gateway has the same for people at `/docs`, for machines at `/openapi.json`,
and its gRPC services by reflection. In Python, `serving/client.py` is a client of both.

[REST](#rest) · [what REST answers](#answers) · [errors](#errors) · [gRPC](#grpc)

## REST

On port 8080. {description} HEAD is answered wherever GET is.
Where API keys are in use ([who may call](gateway.md#who-may-call)), a request carries one as `Authorization: Bearer
KEY` or `x-api-key: KEY`, except to routes marked *open*. Commands are for a shell in the repository's folder, with
`.venv/bin` in its `PATH`.
"""

BETWEEN = """
## gRPC

On port 50051. Besides what follows: `grpc.health.v1.Health`, server reflection, and, as TensorFlow Serving has them,
`tensorflow.serving.PredictionService/Predict` and `GetModelMetadata`, `tensorflow.serving.ModelService/GetModelStatus`.
A key, where keys are in use, is the metadata `authorization` (`Bearer KEY`) or `x-api-key`.

```python
import grpc
from serving.protos import digits_pb2, digits_pb2_grpc

with grpc.insecure_channel("localhost:50051") as channel, open("docs/seven.png", "rb") as picture:
    answer = digits_pb2_grpc.DigitsStub(channel).Classify(digits_pb2.ClassifyRequest(image=picture.read()), timeout=10)
print(answer.digit, answer.confidence, answer.model_version)
```
"""


def generated() -> dict[Path, str]:
    """The generated files and their text."""
    return {ROOT / "docs" / "api.md": api_reference()}


def api_reference() -> str:
    """The page, in Markdown."""
    document = openapi_document()
    parts = [HEAD.format(**document["info"])]
    for (method, path), variants in _routes(document).items():
        parts.append(_operation(method, path, variants))
    parts.append("\n## Answers\n")
    parts += [_schema(name, schema) for name, schema in document["components"]["schemas"].items()]
    parts += [_errors(), BETWEEN]
    parts += [_proto(file) for file in _files() if file.service]
    return "".join(parts)


def _routes(document: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """Method and path → the operations there and, by their paths, those that do the same for a version or label."""
    routes: dict[tuple[str, str], dict[str, Any]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            base = re.sub(r"/\w+/{\w+}", "", path)
            routes.setdefault((method.upper(), base), {})[path] = operation
    return routes


def _operation(method: str, path: str, variants: dict[str, Any]) -> str:
    operation = variants[path]
    summary = operation["summary"]
    end = "" if summary.endswith("?") else "."
    open_to_all = "" if "security" in operation else " *Open.*"
    others = ", ".join(f"`{other}`" for other in variants if other != path)
    parts = [f"\n### {method} `{path}`\n\n{summary}{end}{open_to_all}{others and f' Also {others}.'}\n"]
    if body := operation.get("requestBody"):
        kinds = ", ".join(f"`{kind}`" for kind in body["content"])
        parts.append(f"\n{body['description']} Content types: {kinds}.\n")
    parameters = {each["name"]: each for variant in variants.values() for each in variant.get("parameters", ())}
    if parameters:
        rows = [(f"`{name}`", each["in"], each["description"]) for name, each in parameters.items()]
        parts.append(_table(("parameter", "in", "meaning"), rows))
    parts += [f"\n```{sample['lang']}\n{sample['source']}\n```\n" for sample in operation["x-codeSamples"]]
    responses = {status: response for variant in variants.values() for status, response in variant["responses"].items()}
    return "".join([*parts, f"\n{_responses(responses)}\n"])


def _responses(responses: dict[str, Any]) -> str:
    """One line: each body, and the statuses that come with it."""
    statuses: dict[str, list[str]] = {}
    for status, response in sorted(responses.items()):
        for kind, content in response["content"].items():
            name = content["schema"].get("$ref", "").rpartition("/")[2]
            statuses.setdefault(_link(name) if name else f"`{kind}`", []).append(status)
    return " · ".join(f"{', '.join(each)}: {body}" for body, each in statuses.items())


def _link(name: str) -> str:
    return f"[{name}](#{name.lower()})"


def _schema(name: str, schema: dict[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        (f"`{field}`", _kind(facts) + ("" if field in required else ", or absent"), facts.get("description", ""))
        for field, facts in schema["properties"].items()
    ]
    parts = [
        f"\n### {name}\n\n{schema['description'].replace('``', '`')}\n",
        _table(("field", "type", "meaning"), rows),
    ]
    parts += [f"\n```json\n{_json(example)}\n```\n" for example in schema.get("examples", ())]
    return "".join(parts)


def _kind(facts: dict[str, Any], plural: str = "") -> str:
    """A JSON schema's type in words."""
    if name := facts.get("$ref", "").rpartition("/")[2]:
        return _link(name)
    if either := facts.get("anyOf"):
        return " or ".join(_kind(each) for each in either if each.get("type") != "null")
    if facts["type"] == "array":
        count = f"{facts['minItems']} " if "maxItems" in facts else ""
        return f"list of {count}{_kind(facts['items'], 's')}"
    bounds = f", {facts['minimum']} to {facts['maximum']}" if "maximum" in facts else ""
    return facts["type"] + plural + bounds


def _json(example: Any) -> str:
    """Indented, but a list of numbers in one line."""
    text = json.dumps(example, indent=2)
    return re.sub(
        r"\[[-\d.,\s]+\]", lambda numbers: re.sub(r"\s+", " ", numbers[0]).replace("[ ", "[").replace(" ]", "]"), text
    )


def _errors() -> str:
    rows = []
    for kind, status in sorted(STATUS.items(), key=lambda each: each[1]):
        code = next((CODES[base].name for base in kind.__mro__ if base in CODES), "")
        rows.append((f"`{kind.code}`", str(status), f"`{code}`" if code else "", _first_sentence(kind)))
    rows.append(("`internal`", "500", "`INTERNAL`", "A defect. The log has its traceback under the request id."))
    table = _table(("code", "HTTP", "gRPC", "when"), rows)
    return f"\n## Errors\n\nThe code is in `error.code` over REST, in the metadata `x-error-code` over gRPC.\n{table}"


def _first_sentence(kind: type) -> str:
    return (kind.__doc__ or "").split("``")[0].split(". ")[0].strip().rstrip(".") + "."


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [_row(head), _row("---" for _ in head), *(_row(row) for row in rows)]
    return "\n" + "\n".join(lines) + "\n"


def _row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.strip().replace("``", "`").replace("|", "\\|") for cell in cells) + " |"


# --- the .proto files -------------------------------------------------------------------------------------------------


def _files() -> list[FileDescriptorProto]:
    """The parsed files, with their comments."""
    names = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "serving" / "protos").glob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "all"
        well_known = Path(protoc.__file__).parent / "_proto"
        words = ["protoc", f"-I{ROOT}", f"-I{well_known}", f"--descriptor_set_out={out}", "--include_source_info"]
        if protoc.main([*words, *(str(ROOT / name) for name in names)]):
            raise SystemExit("protoc refused serving/protos; it says above why")
        return list(FileDescriptorSet.FromString(out.read_bytes()).file)


class _Comments:
    """The comments of one file, by the path of numbers that protobuf gives each element."""

    def __init__(self, file: FileDescriptorProto) -> None:
        self._of = {tuple(place.path): place for place in file.source_code_info.location}

    def before(self, *path: int) -> str:
        place = self._of.get(path)
        return _paragraphs(place.leading_comments) if place else ""

    def of_file(self) -> str:
        """What stands above ``syntax``, whose path is 12."""
        place = self._of[(12,)]
        return _paragraphs("\n".join([*place.leading_detached_comments, place.leading_comments]))


def _paragraphs(comment: str) -> str:
    """Comment lines joined into paragraphs."""
    blocks = comment.strip().split("\n \n") if "\n \n" in comment else comment.strip().split("\n\n")
    return "\n\n".join(" ".join(block.split()) for block in blocks)


def _proto(file: FileDescriptorProto) -> str:
    comments = _Comments(file)
    parts = [f"\n### Package `{file.package}`\n\n[{Path(file.name).name}](../{file.name}). {comments.of_file()}\n"]
    parts += [_service(file, service, comments, 6, index) for index, service in enumerate(file.service)]
    for index, message in enumerate(file.message_type):
        parts += _message(file, message, message.name, comments, (4, index))
    return "".join(parts)


def _service(
    file: FileDescriptorProto, service: ServiceDescriptorProto, comments: _Comments, kind: int, index: int
) -> str:
    parts = [f"\n#### Service `{file.package}.{service.name}`\n"]
    for number, method in enumerate(service.method):
        takes = ("stream of " if method.client_streaming else "") + _reference(file, method.input_type)
        gives = ("stream of " if method.server_streaming else "") + _reference(file, method.output_type)
        parts.append(f"\n**{method.name}**: {takes} → {gives}\n\n{comments.before(kind, index, 2, number)}\n")
    return "".join(parts)


def _message(
    file: FileDescriptorProto, message: DescriptorProto, name: str, comments: _Comments, path: tuple[int, ...]
) -> Iterator[str]:
    """The message and those declared in it; a map's entries are shown with its field."""
    nested = [(index, each) for index, each in enumerate(message.nested_type) if not each.options.map_entry]
    about = comments.before(*path)
    yield f"\n#### {name}\n" + (f"\n{about}\n" if about else "")
    if message.field:
        rows = []
        for index, field in enumerate(message.field):
            one_of = f"one of `{message.oneof_decl[field.oneof_index].name}`. " if field.HasField("oneof_index") else ""
            about = comments.before(*path, 2, index).replace("\n\n", " ")
            rows.append((str(field.number), f"`{field.name}`", _field_kind(file, message, field), one_of + about))
        yield _table(("number", "field", "type", "meaning"), rows)
    else:
        yield "\nNo fields.\n"
    for index, each in nested:
        yield from _message(file, each, f"{name}.{each.name}", comments, (*path, 3, index))


def _field_kind(file: FileDescriptorProto, message: DescriptorProto, field: FieldDescriptorProto) -> str:
    for entry in message.nested_type:
        if entry.options.map_entry and field.type_name.endswith(f".{message.name}.{entry.name}"):
            key, value = (_field_kind(file, entry, each) for each in entry.field)
            return f"map of {key} to {value}"
    kind = _reference(file, field.type_name) if field.type_name else FieldDescriptorProto.Type.Name(field.type)
    kind = kind.removeprefix("TYPE_").lower() if not field.type_name else kind
    return f"repeated {kind}" if field.label == FieldDescriptorProto.LABEL_REPEATED else kind


def _reference(file: FileDescriptorProto, type_name: str) -> str:
    """A link to a message of the same file."""
    name = type_name.removeprefix(f".{file.package}.")
    return f"[{name}](#{name.lower().replace('.', '')})"


if __name__ == "__main__":
    for path, text in generated().items():
        path.write_text(text, encoding="utf-8")
