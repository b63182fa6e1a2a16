"""The online half: the gateway, its client, and a model server for machines without TensorFlow Serving."""
