"""TensorFlow Serving's flags, gRPC and REST API on the TensorFlow runtime, for machines without its binary.

``__main__`` reads the flags and binds the ports; only then is TensorFlow loaded, by ``runtime`` and by the modules that
need its protocol messages (``model`` and its formats, ``tensors``, ``examples``, ``api``, ``rpc``, ``rest``).
"""
