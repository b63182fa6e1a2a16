"""gRPC over HTTP/2 in an event loop: what the gateway and the model server both listen with."""
