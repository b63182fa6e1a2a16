"""TensorFlow Serving's flags, gRPC and REST API on the TensorFlow runtime, for machines without its binary.

Nothing here imports TensorFlow when it is imported, except ``saved_model``, ``tensors``, ``warmup``, ``api`` and
``rpc``, which need its protocol messages: ``__main__`` reads the flags and binds the ports first.
"""
