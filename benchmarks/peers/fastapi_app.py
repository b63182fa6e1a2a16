"""FastAPI before TensorFlow: `uvicorn fastapi_app:app --workers N`."""

from fastapi import FastAPI, Request
from model import Model, answer_of, image_of

app = FastAPI()
model = Model()


@app.post("/classify")
async def classify(request: Request) -> dict:
    """One image a call: a call takes less than a thread's hand-over, so it runs in the loop."""
    return answer_of(model.probabilities(image_of(await request.body())[None])[0])
