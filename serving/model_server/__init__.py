"""TensorFlow Serving's API on the TensorFlow runtime."""
