"""MLServer: a runtime of its own kind before the SavedModel; `mlserver start FOLDER`."""

import numpy as np
from mlserver import MLModel
from mlserver.codecs import NumpyCodec
from mlserver.types import InferenceRequest, InferenceResponse
from model import Model


class Digits(MLModel):
    """The open inference protocol's `images` to `probabilities`."""

    async def load(self) -> bool:
        self.model = Model()
        return True

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        images = NumpyCodec.decode_input(payload.inputs[0]).astype(np.uint8).reshape(-1, 28, 28)
        rows = self.model.probabilities(images)
        return InferenceResponse(model_name=self.name, outputs=[NumpyCodec.encode_output("probabilities", rows)])
