"""How does the candidate do once it is served? Packed as for publishing, loaded by a fresh model server, and asked.

The server is the command ``python -m serving.model_server``, reached over a socket in TensorFlow Serving's protocol.
Candidate and server live in a temporary folder: nothing that could be served is left.
"""

import ctypes
import math
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
from rich.console import Console

from digits import contract
from digits.errors import DigitsError
from training.params import Params
from training.verify import compare_answers, predict_saved_model, read_golden
from training.workspace import Workspace, import_tensorflow_quietly, load_split, write_json

_CODE = Path(__file__).resolve().parent.parent
_READY_S = 120.0
_WARMUP_CALLS = 20
_TIMED_CALLS = 200


class ProbeFailed(DigitsError):
    """The candidate could not be served, so nothing is known about how it would be."""

    code = "probe_failed"


def probe(workspace: Workspace, params: Params, console: Console) -> None:
    """The stage: write probe.json, with the size, the load time, the latency and the parity of the served candidate.

    Raises:
        ProbeFailed: the server did not start, or did not load it.
    """
    with tempfile.TemporaryDirectory(prefix="probe-") as name, _model_server(Path(name)) as server:
        folder = Path(name) / contract.MODEL_NAME / "1"
        sha256 = _pack(workspace, params, folder)  # TensorFlow loads here while it loads there
        golden = read_golden(folder)
        load_s = server.load(folder.parent)
        served, milliseconds = server.ask(golden.images)
        result = {
            "schema": 1,
            "model_sha256": sha256,
            "size_bytes": sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()),
            "load_s": round(load_s, 3),
            "latency_ms": round(float(np.median(milliseconds)), 3),
            "latency_p99_ms": round(float(np.quantile(milliseconds, 0.99)), 3),
            "golden_images": len(golden.images),
            **_parity("saved_model", *compare_answers(golden, *predict_saved_model(folder, golden.images))),
            **_parity("server", *compare_answers(golden, *served)),
        }
    write_json(workspace.stage_dir("probe") / "probe.json", result)
    console.print(
        f"{result['size_bytes'] / 1e6:.1f} MB, loaded in {load_s:.2f} s, an image in {result['latency_ms']} ms, 99 of "
        f"100 within {result['latency_p99_ms']} ms; differs from Keras by at most {result['server_difference']}"
    )


def _pack(workspace: Workspace, params: Params, folder: Path) -> str:
    """Write the candidate's version folder; the identity of its weights."""
    import_tensorflow_quietly()
    from training.export import choose_golden, pack
    from training.model import load_model, model_sha256

    model = load_model(workspace.artifact("train", "model.keras"))
    held_out = load_split(workspace.artifact("prepare", "validation.npz"))
    folder.parent.mkdir()
    golden = choose_golden(held_out, params.export.golden_images)
    pack(folder, model, params.data.classes, golden, params.export.warmup_batch_sizes)
    return model_sha256(model)


def _parity(who: str, difference: float, digits_differing: int) -> dict[str, Any]:
    """What JSON can hold of a comparison with Keras: a difference that is no number becomes null."""
    finite = round(difference, 9) if math.isfinite(difference) else None
    return {f"{who}_difference": finite, f"{who}_digits_differing": digits_differing}


@contextmanager
def _model_server(folder: Path) -> Iterator["_ModelServer"]:
    """A fresh model server without a model, listening on a socket in ``folder``; it is gone at the end."""
    (folder / "models.config").write_text("model_config_list {}\n")
    socket, log = folder / "grpc.sock", folder / "server.log"
    command = [
        sys.executable, "-m", "serving.model_server", "--port=0", f"--grpc_socket_path={socket}",
        f"--model_config_file={folder / 'models.config'}", "--model_config_file_poll_wait_seconds=0",
        "--prefer_tflite_model=true",  # as it will be served
    ]  # fmt: skip
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=_CODE, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            preexec_fn=_end_with_parent(),  # this process has no other threads yet
        )  # fmt: skip
    try:
        with grpc.insecure_channel(f"unix:{socket}") as channel:
            yield _ModelServer(process, channel, log)
    finally:
        process.kill()  # it holds nothing that a gentler end would save
        process.wait()


def _end_with_parent() -> Any:
    """What a child calls so that Linux ends it when its parent is killed; None elsewhere."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, pr_set_pdeathsig = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(pr_set_pdeathsig, int(signal.SIGKILL), 0, 0, 0)


class _ModelServer:
    """The other end of the socket. Its methods need TensorFlow to be imported."""

    def __init__(self, process: subprocess.Popen[bytes], channel: grpc.Channel, log: Path) -> None:
        self._process, self._channel, self._log = process, channel, log

    def load(self, base_path: Path) -> float:
        """Have the version in ``base_path`` loaded and warmed: seconds from the request until it is AVAILABLE."""
        from tensorflow_serving.apis import model_management_pb2, model_service_pb2_grpc

        models = model_service_pb2_grpc.ModelServiceStub(self._channel)
        self._await_start(models)
        request = model_management_pb2.ReloadConfigRequest()
        request.config.model_config_list.config.add(
            name=contract.MODEL_NAME, base_path=str(base_path), model_platform="tensorflow"
        )
        started = time.perf_counter()
        try:
            answer = models.HandleReloadConfigRequest(request, timeout=_READY_S)
        except grpc.RpcError as err:
            raise ProbeFailed(f"the model server did not load the candidate: {_said(err)}") from err
        if answer.status.error_code:
            raise ProbeFailed(f"the model server did not load the candidate: {answer.status.error_message}")
        return time.perf_counter() - started

    def ask(self, images: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        """Predict images uint8 (N, 28, 28) one by one, in turns.

        Returns:
            probabilities (N, classes) and digits (N,); the time of each of 200 calls after warm-up, in milliseconds.
        """
        import tensorflow as tf
        from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

        predict = prediction_service_pb2_grpc.PredictionServiceStub(self._channel).Predict
        requests = []
        for image in images:
            request = predict_pb2.PredictRequest()
            request.model_spec.name = contract.MODEL_NAME
            request.model_spec.signature_name = contract.SIGNATURE
            request.inputs[contract.INPUT_IMAGES].CopyFrom(tf.make_tensor_proto(image[None]))
            requests.append(request)
        answers, took = {}, []
        try:
            for i in range(_WARMUP_CALLS + max(_TIMED_CALLS, len(images))):
                started = time.perf_counter()
                answers[i % len(images)] = predict(requests[i % len(images)], timeout=_READY_S)
                took.append(1e3 * (time.perf_counter() - started))
        except grpc.RpcError as err:
            raise ProbeFailed(f"the model server did not answer: {_said(err)}") from err
        probabilities, digits = (
            np.concatenate([tf.make_ndarray(answers[k].outputs[name]) for k in range(len(images))])
            for name in (contract.OUTPUT_PROBABILITIES, contract.OUTPUT_DIGIT)
        )
        return (probabilities, digits), np.array(took[_WARMUP_CALLS:])

    def _await_start(self, models: Any) -> None:
        """Wait until the server answers for its models, which it does once it has imported TensorFlow."""
        from tensorflow_serving.apis import get_model_status_pb2

        request = get_model_status_pb2.GetModelStatusRequest()
        request.model_spec.name = contract.MODEL_NAME
        deadline = time.monotonic() + _READY_S
        while True:
            try:
                models.GetModelStatus(request, timeout=5)
            except grpc.RpcError as err:
                if err.code() is grpc.StatusCode.NOT_FOUND:  # it is up, and has no model yet
                    return
                if self._process.poll() is not None:
                    raise ProbeFailed(f"the model server ended at once: {self._last_line()}") from err
                if time.monotonic() > deadline:
                    raise ProbeFailed(f"the model server did not answer within {_READY_S:.0f} s: {_said(err)}") from err
            time.sleep(0.05)

    def _last_line(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"


def _said(err: grpc.RpcError) -> str:
    return " ".join(f"{err.code().name}: {err.details()}".split())[:300]
