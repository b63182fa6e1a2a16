"""Hidden layers that begin as receptive fields: each unit sees a few pixels, and units that look alike share weights.

A convolution is a dense layer most of whose weights are 0 and the rest repeated (LeCun et al. 1989). Training it in
that form costs a tenth of the weights and finds what a dense layer does not find in any reasonable time; after that the
same function is written as dense layers, which are all that is saved and served. From there every weight may learn on
its own (``train.free_epochs``; d'Ascoli et al., "Finding the needle in the haystack with convolutions", NeurIPS 2019),
from the answers of the tied network, averaged over turned copies of the image. Here that gains nothing for its time.
"""

import math

import keras
import numpy as np
import tensorflow as tf

from training.model import build_model
from training.params import ModelParams

_ROWS_AT_ONCE = 256


def free(tied: keras.Model, params: ModelParams, precision: str) -> keras.Model:
    """The same function as ``tied``, made of dense layers without a bond between their weights.

    Args:
        tied: what ``build_model`` makes of ``params``, trained or not.
        params: with ``receptive_fields``.
        precision: of the new model, as for ``build_model``.

    Returns:
        A perceptron as ``build_model`` makes it without receptive fields: for each of them a hidden layer, as wide as
        it has units, before those of ``hidden_widths``.
    """
    convolutions = [layer for layer in tied.layers if isinstance(layer, keras.layers.Conv2D)]
    widths = (*(math.prod(layer.output.shape[1:]) for layer in convolutions), *params.hidden_widths)
    plain = params.model_copy(update={"receptive_fields": (), "hidden_widths": widths})
    model = build_model(plain, tied.output.shape[-1], precision)
    sources = [layer for layer in tied.layers if layer.weights]
    targets = [layer for layer in model.layers if layer.weights]
    for source, target in zip(sources, targets, strict=True):
        arrays = source.get_weights()
        if isinstance(source, keras.layers.Conv2D):
            arrays[0] = dense_kernel(source)
        # One number a feature becomes one a unit; features are the last axis, so they repeat in order.
        target.set_weights([np.resize(a, w.shape) for a, w in zip(arrays, target.weights, strict=True)])
    return model


def dense_kernel(layer: keras.layers.Conv2D) -> np.ndarray:
    """The matrix, float32 (inputs, units), by which a dense layer does what this convolution does, its offset aside.

    Row i is what the convolution answers to an input that is 1 at place i and 0 elsewhere.
    """
    shape = layer.input.shape[1:]
    kernel = tf.cast(layer.kernel, tf.float32)
    rows = []
    for first in range(0, math.prod(shape), _ROWS_AT_ONCE):
        places = tf.range(first, min(first + _ROWS_AT_ONCE, math.prod(shape)))
        ones = tf.reshape(tf.one_hot(places, math.prod(shape)), (-1, *shape))
        answers = tf.nn.conv2d(ones, kernel, layer.strides, layer.padding.upper()).numpy()
        rows.append(answers.reshape(len(answers), -1))
    return np.concatenate(rows)
