"""What operators see: values of the metrics, lines of the log, and what is in neither."""

import asyncio
import io
import json
import re
import time
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from serving.gateway.logs import Logs
from serving.gateway.metrics import MAX_VERSIONS, Metrics
from serving.protos import digits_pb2 as pb
from tests.serving.gateway.conftest import Here, eventually, random_images
from tests.serving.gateway.pictures import png, stroke


def test_requests_are_counted_by_protocol_route_code_and_version(start: Callable[..., Here]) -> None:
    """And timed under the same labels."""
    here = start()
    for _ in range(3):
        here.classify(bytes(784))
    here.classify(b"hello")
    here.http.get("/nothing/here")
    here.stub.Classify(pb.ClassifyRequest(image=bytes(784)))
    with pytest.raises(grpc.RpcError):
        here.stub.Classify(pb.ClassifyRequest(image=b"hello"))

    def count(protocol: str, route: str, code: str, version: str) -> tuple[float, float]:
        labels = {"protocol": protocol, "route": route, "code": code, "model_version": version}
        return (
            here.metric("digits_requests_total", **labels),
            here.metric("digits_request_duration_seconds_count", **labels),
        )

    eventually(lambda: count("grpc", "Classify", "INVALID_ARGUMENT", "") == (1, 1))
    assert count("rest", "/classify", "200", "3") == (3, 3)
    assert count("rest", "/classify", "400", "") == (1, 1)
    assert count("rest", "unmatched", "404", "") == (1, 1)
    assert count("grpc", "Classify", "OK", "3") == (1, 1)


def test_the_exposition_is_valid_in_both_formats(here: Here) -> None:
    """As Prometheus asks for it: OpenMetrics or the older text."""
    here.classify(bytes(784))
    text = here.http.get("/metrics")
    assert text.headers["content-type"].startswith("text/plain")
    names = {family.name for family in parse_text(text.text)}
    wanted = {
        "digits_requests", "digits_request_duration_seconds", "digits_requests_in_flight", "digits_queue_images",
        "digits_batch_images", "digits_queue_wait_seconds", "digits_upstream_duration_seconds",
        "digits_upstream_calls", "digits_upstream_ready", "digits_shed", "digits_predictions",
        "digits_prediction_confidence", "digits_build_info", "process_resident_memory_bytes",
    }  # fmt: skip
    assert wanted <= names
    newer = here.http.get("/metrics", headers={"accept": "application/openmetrics-text; version=1.0.0"})
    assert wanted <= {family.name for family in parse_openmetrics(newer.text)}


def test_labels_hold_nothing_that_a_user_sent(here: Here) -> None:
    """Paths, methods and ids of a user's making leave no series behind."""
    before = len(here.http.get("/metrics").text.splitlines())
    for at in range(30):
        here.http.get(f"/made-up-{at}", headers={"x-request-id": f"made-up-{at}"})
        here.http.request(f"MADEUP{at}", "/classify")
        here.http.get(f"/static/made-up-{at}")
    after = here.http.get("/metrics").text
    assert "made-up" not in after.lower()
    assert len(after.splitlines()) < before + 200


def test_model_versions_are_bounded() -> None:
    """A process that outlives many releases does not gather series for ever."""
    metrics = Metrics()
    for version in range(MAX_VERSIONS + 10):
        metrics.predictions(np.array([1]), np.array([0.9], np.float32), str(version), 10)
    value = metrics.registry.get_sample_value
    assert value("digits_predictions_total", {"digit": "1", "model_version": "other"}) == 10


def test_confidence_is_counted_in_its_bucket() -> None:
    """A value on a bound belongs to the bucket below it, as Prometheus has it."""
    metrics = Metrics()
    metrics.predictions(np.array([1, 2, 3]), np.array([0.5, 0.55, 1.0], np.float32), "3", 10)
    value = metrics.registry.get_sample_value
    name = "digits_prediction_confidence_bucket"
    counts = [value(name, {"le": le, "model_version": "3"}) for le in ("0.4", "0.5", "0.6", "0.999", "1.0", "+Inf")]
    assert counts == [0, 1, 2, 2, 3, 3]


def test_a_duration_is_counted_in_its_bucket() -> None:
    """The same for requests; the sum is theirs."""
    metrics = Metrics()
    for seconds in (0.0004, 0.001, 0.0011, 99.0):
        metrics.request("rest", "/classify", "200", "3", seconds)
    labels = {"protocol": "rest", "route": "/classify", "code": "200", "model_version": "3"}
    value = metrics.registry.get_sample_value
    name = "digits_request_duration_seconds"
    buckets = [value(f"{name}_bucket", {"le": le, **labels}) for le in ("0.0005", "0.001", "0.002", "10.0", "+Inf")]
    assert buckets == [1, 2, 3, 3, 4]
    assert value(f"{name}_sum", labels) == pytest.approx(99.0025)


def test_a_request_is_one_line_with_its_facts(here: Here) -> None:
    """JSON, one object; the level tells whose fault it was."""
    here.classify(bytes(784), **{"x-request-id": "one"})
    here.classify(b"hello", **{"x-request-id": "two"})
    here.http.post("/v1/models/digits:classify", headers={"x-request-id": "three"})

    def mine() -> list[dict[str, Any]]:
        return [line for line in here.log_lines() if line["route"] != "/readyz"]

    eventually(lambda: len(mine()) == 3)
    one, two, three = mine()
    assert (one["protocol"], one["route"], one["code"], one["model_version"]) == ("rest", "/classify", "200", "3")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", one["time"])
    assert one["ms"] > 0
    assert (two["code"], two["error"], two["level"]) == ("400", "bad_image", "info")
    assert (three["code"], three["level"], three["request_id"]) == ("501", "warning", "three")


def test_logs_hold_no_pixels(here: Here) -> None:
    """Neither raw nor encoded, neither for good requests nor for refused ones nor for defects."""
    image = random_images(1)[0]
    picture = png(stroke())
    here.classify(image.tobytes())
    here.classify(picture, "image/png")
    here.classify(picture[:60], "image/png")
    here.classify(b"MARKER" * 200, "application/octet-stream")
    here.behaviour.spoil = lambda _: b"broken"
    here.classify(image.tobytes())
    here.classify(picture, "image/png")
    eventually(lambda: len(here.log_lines()) >= 6)
    text = here.log_text()
    for data in (image.tobytes(), picture):
        for at in range(0, len(data) - 8, 8):
            part = data[at : at + 8]
            if len(set(part)) > 4:
                assert part.hex() not in text
                assert repr(part)[2:-1] not in text
    assert "MARKERMARKER" not in text
    assert max(len(line) for line in text.splitlines()) < 10_000


def test_a_terminal_gets_text_and_a_pipe_gets_json() -> None:
    """Without any setting."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal, pipe = Terminal(), io.StringIO()
    for stream in (terminal, pipe):
        logs = Logs("info", "auto", stream)
        logs.request({"code": "200", "ms": 1.5}, failed=False)
        logs.log.info("listening", rest="http://here")
        logs.flush()
    assert "listening" in terminal.getvalue()
    with pytest.raises(json.JSONDecodeError):
        json.loads(terminal.getvalue().splitlines()[0])
    assert [json.loads(line)["event"] for line in pipe.getvalue().splitlines()] == ["request", "listening"]


def test_the_level_is_kept() -> None:
    """At `warning` a good request leaves no line, a failed one does."""
    out = io.StringIO()
    logs = Logs("warning", "json", out)
    logs.request({"code": "200"}, failed=False)
    logs.request({"code": "503"}, failed=True)
    logs.log.info("listening")
    logs.flush()
    assert [json.loads(line)["code"] for line in out.getvalue().splitlines()] == ["503"]


def test_lines_are_gathered_in_a_loop_and_written_soon() -> None:
    """A write for each request would cost more than the request; none is lost at the end."""
    out = io.StringIO()
    logs = Logs("info", "json", out)

    async def work() -> tuple[str, str]:
        logs.log.info("one")
        early = out.getvalue()
        while not out.getvalue():  # noqa: ASYNC110 - the writer knows no events
            await asyncio.sleep(0.01)
        logs.log.info("two")
        return early, out.getvalue()

    early, later = asyncio.run(work())
    assert (early, later.count("\n")) == ("", 1)
    logs.flush()
    assert out.getvalue().count("\n") == 2


def test_a_log_reader_that_is_gone_does_not_stop_the_gateway() -> None:
    """A closed pipe is no reason to refuse requests."""
    out = io.StringIO()
    logs = Logs("info", "json", out)
    out.close()
    logs.log.info("one")


def test_unsure_readings_are_counted(start: Callable[..., Here]) -> None:
    """Below the setting, by version."""
    here = start(unsure_below=0.9)
    images = random_images(2)
    images[:, 1] = [0, 255]  # confidence 0.502 and 1.0
    for image in images:
        here.classify(image.tobytes())
    assert here.metric("digits_unsure_total", model_version="3") == 1


def test_ink_and_size_of_inputs_are_measured(start: Callable[..., Here]) -> None:
    """Mean ink and the box around it, in pixels; a blank image has no box."""
    here = start()
    image = np.zeros((28, 28), np.uint8)
    image[5:15, 10:13] = 255
    here.classify(image.tobytes())
    eventually(lambda: here.metric("digits_input_ink_share_count") == 1)
    assert here.metric("digits_input_ink_share_sum") == pytest.approx(30 / 784)
    assert here.metric("digits_input_box_width_pixels_sum") == 3
    assert here.metric("digits_input_box_height_pixels_sum") == 10

    def measured_again() -> bool:
        here.classify(bytes(784))
        return here.metric("digits_input_ink_share_count") == 2

    eventually(measured_again)
    assert here.metric("digits_input_box_width_pixels_sum") == 3


def test_the_time_of_the_last_change_of_version_is_told(start: Callable[..., Here]) -> None:
    """One series, of the version that answers requests which name none."""
    here = start()
    name = "digits_model_version_changed_timestamp_seconds"
    here.classify(bytes(784))
    first = here.metric(name, model_version="3")
    assert abs(first - time.time()) < 60
    here.classify(bytes(784))
    assert here.metric(name, model_version="3") == first
    here.behaviour.version = 4
    here.classify(bytes(784))
    assert here.metric(name, model_version="3") == 0
    assert here.metric(name, model_version="4") > first
