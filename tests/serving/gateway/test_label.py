"""DIGITS_MODEL_LABEL: which version answers a request that names none, whichever way it came."""

from collections.abc import Callable

import grpc
import pytest

from serving.protos import digits_pb2, open_inference_pb2
from serving.protos import upstream_pb2 as pb
from tests.serving.gateway.conftest import Here, eventually, random_images
from tests.serving.gateway.test_tensorflow_api import METADATA, PREDICT, STATUS, nested
from tests.serving.gateway.test_tensorflow_api import predict as post_predict

IMAGE = random_images(1)


def _tensor() -> pb.PredictRequest:
    request = pb.PredictRequest(model_spec=pb.ModelSpec(name="digits"))
    tensor = request.inputs["images"]
    tensor.dtype = pb.DT_UINT8
    for size in (1, 28, 28):
        tensor.tensor_shape.dim.add(size=size)
    tensor.tensor_content = IMAGE.tobytes()
    return request


def classify(here: Here) -> str:
    return here.classify(IMAGE.tobytes()).json()["model_version"]


def classify_rpc(here: Here) -> str:
    return here.stub.Classify(digits_pb2.ClassifyRequest(image=IMAGE.tobytes())).model_version


def infer(here: Here) -> str:
    tensor = {"name": "images", "datatype": "UINT8", "shape": [1, 28, 28], "data": IMAGE.ravel().tolist()}
    return here.http.post("/v2/models/digits/infer", json={"inputs": [tensor]}).json()["model_version"]


def infer_rpc(here: Here) -> str:
    request = open_inference_pb2.ModelInferRequest(model_name="digits", raw_input_contents=[IMAGE.tobytes()])
    request.inputs.add(name="images", datatype="UINT8", shape=[1, 28, 28])
    answer = here.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")(request.SerializeToString())
    return open_inference_pb2.ModelInferResponse.FromString(answer).model_version


def predict_rpc(here: Here) -> str:
    answer = here.channel.unary_unary(PREDICT)(_tensor().SerializeToString())
    return str(pb.PredictResponse.FromString(answer).model_spec.version.value)


def metadata(here: Here) -> str:
    return here.http.get("/v1/models/digits/metadata").json()["model_spec"]["version"]


def metadata_rpc(here: Here) -> str:
    request = pb.GetModelMetadataRequest(model_spec=pb.ModelSpec(name="digits"), metadata_field=("signature_def",))
    answer = here.channel.unary_unary(METADATA)(request.SerializeToString())
    return str(pb.GetModelMetadataResponse.FromString(answer).model_spec.version.value)


WAYS = [classify, classify_rpc, infer, infer_rpc, predict_rpc, metadata, metadata_rpc]


@pytest.fixture
def here(start: Callable[..., Here]) -> Here:
    """Version 3 is labelled stable, version 4 is newer."""
    started = start(model_label="stable")
    started.behaviour.newest = 4
    return started


def test_on_every_way_the_labels_version_answers(here: Here) -> None:
    """classify, the open inference protocol and TensorFlow Serving's API, each over REST and gRPC."""
    assert {way.__name__: way(here) for way in WAYS} == {way.__name__: "3" for way in WAYS}
    assert post_predict(here, {"instances": nested(IMAGE)}).status_code == 200
    assert here.upstream.last_request.model_spec.version_label == "stable"


def test_without_the_setting_the_newest_answers(start: Callable[..., Here]) -> None:
    """The server chooses: nothing is added to a request."""
    here = start()
    here.behaviour.newest = 4
    assert {way(here) for way in WAYS} == {"4"}


def test_a_label_that_moves_is_followed_at_once(here: Here) -> None:
    """A promotion or rollback needs nothing of the gateway."""
    assert classify(here) == "3"
    here.behaviour.labels = {"stable": 4}
    assert classify(here) == classify_rpc(here) == "4"


@pytest.mark.parametrize("way", WAYS)
def test_while_the_label_is_unknown_the_newest_answers_and_readiness_stays(here: Here, way: Callable) -> None:
    """Before the first promotion no call fails; once the label is there, its version answers without a restart."""
    here.behaviour.labels = {}
    assert [way(here), way(here)] == ["4", "4"]
    assert here.http.get("/readyz").status_code == 200
    here.behaviour.labels = {"stable": 3}
    eventually(lambda: way(here) == "3")


def test_a_version_or_label_that_a_request_names_goes_before(here: Here) -> None:
    """And one of those that is not there is still an error."""
    here.behaviour.labels["canary"] = 4
    images = {"instances": nested(IMAGE)}
    assert post_predict(here, images, "/v1/models/digits/labels/canary:predict").status_code == 200
    assert here.upstream.last_request.model_spec.version_label == "canary"
    assert post_predict(here, images, "/v1/models/digits/versions/3:predict").status_code == 200
    assert here.upstream.last_request.model_spec.version_label == ""
    assert post_predict(here, images, "/v1/models/digits/versions/9:predict").status_code == 404
    assert post_predict(here, images, "/v1/models/digits/labels/none:predict").status_code == 400


def test_the_status_lists_all_versions(here: Here) -> None:
    """It is asked about the model, not about what a request would get."""
    request = pb.GetModelStatusRequest(model_spec=pb.ModelSpec(name="digits"))
    answer = pb.GetModelStatusResponse.FromString(here.channel.unary_unary(STATUS)(request.SerializeToString()))
    assert {one.version for one in answer.model_version_status} == {3, 4}


def test_what_the_model_refuses_is_not_taken_for_an_unknown_label(here: Here) -> None:
    """INVALID_ARGUMENT for the images themselves stays the caller's error, and the label stays in use."""
    here.behaviour.abort = (grpc.StatusCode.INVALID_ARGUMENT, "bad images")
    assert here.classify(IMAGE.tobytes()).status_code == 400
    here.behaviour.abort = None
    assert classify(here) == "3"
    assert here.upstream.last_request.model_spec.version_label == "stable"
