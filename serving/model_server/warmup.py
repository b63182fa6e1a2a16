"""Warm-up: a version's own requests, ``assets.extra/tf_serving_warmup_requests``, are run before it serves."""

from pathlib import Path

from google.protobuf.message import DecodeError
from tensorflow_serving.apis import prediction_log_pb2

from serving.model_server import examples, runtime, tensors
from serving.model_server.errors import Code, ServingError, invalid_argument
from serving.model_server.model import Model

FILE = Path("assets.extra/tf_serving_warmup_requests")
MAX_RECORDS = 1000


def replay(model: Model, iterations: int = 1) -> int:
    """Run the records of a version, each ``iterations`` times; the number of records, 0 without the file.

    Raises:
        ServingError: the file is damaged or holds too many records, or the model fails on one of them.
    """
    path = model.path / FILE
    if not path.is_file():
        return 0
    count = 0
    try:
        for record in runtime.tf_record_iterator(str(path)):
            count += 1
            if count > MAX_RECORDS:
                raise invalid_argument(f"Number of warmup records exceeds the maximum ({MAX_RECORDS}) at {path}")
            for _ in range(iterations):
                _run(model, prediction_log_pb2.PredictionLog.FromString(record))
    except runtime.OpError as err:
        raise ServingError(Code.DATA_LOSS, f"{FILE} is damaged: {err.message}") from err
    except DecodeError as err:
        raise ServingError(Code.DATA_LOSS, f"{FILE}: record {count} is no PredictionLog") from err
    return count


def _run(model: Model, log: prediction_log_pb2.PredictionLog) -> None:
    kind = log.WhichOneof("log_type")
    if kind == "predict_log":
        predict = log.predict_log.request
        inputs = {alias: tensors.to_array(proto, alias) for alias, proto in predict.inputs.items()}
        model.run(predict.model_spec.signature_name, inputs, list(predict.output_filter))
    elif kind == "classify_log":
        classify = log.classify_log.request
        examples.classify(model, classify.model_spec.signature_name, classify.input)
    elif kind == "regress_log":
        regress = log.regress_log.request
        examples.regress(model, regress.model_spec.signature_name, regress.input)
    elif kind == "multi_inference_log":
        examples.multi_inference(model, log.multi_inference_log.request.tasks, log.multi_inference_log.request.input)
    else:
        raise ServingError(Code.UNIMPLEMENTED, f"Unsupported log_type for warmup: {kind}")
