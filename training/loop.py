"""The training loop: one graph that draws images, deforms them, learns from them and averages the weights.

About 50 steps run in one call: Python is out of the way, yet there is time to redraw the progress bar and to notice a
loss that is no number. While one batch is learnt from, the next is being drawn. With several workers each draws and
learns from its share of every batch; gradients and the statistics of normalisations are added up, so all take one step.
"""

import math
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from digits.errors import DigitsError
from training.augment import add_neighbours, build_augment
from training.model import build_optimiser, build_schedule
from training.outliers import draw_outliers
from training.params import Params, TrainParams
from training.workers import Workers
from training.workspace import Split

_OUTLIERS_DRAWN = 0.4  # beforehand, for each training image; deformed anew each time they are used
_NO_CLASS = -1  # an outlier's label: all classes are equally likely


class TrainingDiverged(DigitsError):
    """The loss became NaN or infinite."""

    code = "training_diverged"
    last_good: keras.Model | None = None
    """The network as it was after the last epoch that ended well; None when none had."""


class Loop:
    """The training graph: data, model, optimiser and averaged weights, and a function that takes many steps."""

    def __init__(
        self,
        model: keras.Model,
        learn: Split,
        params: Params,
        total_steps: int,
        workers: Workers,
        drawn_before: int = 0,
        teacher: keras.Model | None = None,
    ) -> None:
        """The graph is built here, once.

        Args:
            model: in the precision to train in, made in the scope of ``workers``; its weights change.
            learn: kept in memory as it is, uint8.
            params: `train`, `augment` and the seed.
            total_steps: over which the learning rate runs its course.
            workers: the processes that train together.
            drawn_before: batches of images drawn with this seed before; none is drawn the same way again.
            teacher: whose answers are learnt instead of the labels.
        """
        self._model = model
        self._workers = workers
        self._share = workers.share(params.train.batch_size)
        self._outlier_count = math.ceil(params.train.outlier_share * params.train.batch_size)  # beside each batch
        self._outlier_share = workers.part(self._outlier_count)
        self._drawn_before = drawn_before
        self._teacher = teacher
        self._setting: TrainParams = params.train
        self._images = tf.constant(learn.images)
        self._labels = tf.constant(learn.labels, tf.int32)
        if self._outlier_count:
            drawn = math.ceil(_OUTLIERS_DRAWN * len(learn.labels))
            self._outliers = tf.constant(draw_outliers(learn, drawn, params.seed))
        self._augment = build_augment(params.augment)
        self._neighbour_share = params.augment.neighbour_share
        self._seed = params.seed
        self._class_count = len(params.data.classes)
        with workers.strategy.scope():
            self._optimiser = build_optimiser(params.train)
            self._optimiser.build(model.trainable_variables)
        self.rate: Callable[[Any], Any] = build_schedule(params.train, total_steps)
        self._average_steps = params.train.average_share * total_steps
        self._averages = (
            [tf.Variable(w.value, trainable=False) for w in model.weights] if self._average_steps > 1 else []
        )
        signature = (tf.TensorSpec((None, params.train.batch_size), tf.int32), tf.TensorSpec((), tf.int32))
        self._take_steps = tf.function(self._build_steps, input_signature=signature).get_concrete_function()

    def run(self, batches: np.ndarray, first_step: int) -> tuple[float, float]:
        """Take one step for each row of indices (S, batch); return the sum of losses and the right answers."""
        try:
            losses, right = self._take_steps(tf.constant(batches), tf.constant(first_step))
        except tf.errors.OpError as err:
            self._workers.check_together(err)
            raise
        losses = losses.numpy()
        bad = np.flatnonzero(~np.isfinite(losses))
        if bad.size:
            step = first_step + int(bad[0])
            raise TrainingDiverged(
                f"the loss is {losses[bad[0]]} at step {step} (learning rate {float(self.rate(step)):.3g}): "
                "lower train.learning_rate in params.yaml, or lengthen train.warmup_share"
            )
        return float(losses.sum()), float(right.numpy())

    def copy_average_to(self, target: keras.Model) -> None:
        """Give ``target`` (same layers) the averaged weights, or the latest ones when averaging is off."""
        source = self._averages or self._model.weights
        target.set_weights([np.asarray(w) for w in source])

    def _draw(self, indices: Any, step: Any) -> tuple[Any, Any]:
        """This worker's share of a batch and of the outliers beside it, deformed: images (N, 28, 28) and labels."""
        mine, seed = indices[self._share], tf.stack([self._seed, self._drawn_before + step])
        images = self._augment(tf.gather(self._images, mine), seed, self._share.start, self._setting.batch_size)
        labels = tf.gather(self._labels, mine)
        if self._neighbour_share:
            images = self._beside_others(images, tf.random.experimental.stateless_fold_in(seed, 3))
        if self._outlier_count:
            share, seeds = self._outlier_share, tf.random.experimental.stateless_split(seed, 2)
            places = tf.random.stateless_uniform((self._outlier_count,), seeds[0], 0, len(self._outliers), tf.int32)
            outliers = tf.gather(self._outliers, places[share])
            images = tf.concat([images, self._augment(outliers, seeds[1], share.start, self._outlier_count)], axis=0)
            labels = tf.concat([labels, tf.fill((share.stop - share.start,), _NO_CLASS)], axis=0)
        return images, labels

    def _beside_others(self, images: Any, seed: Any) -> Any:
        """Some of this worker's images with the edge of any other training image in them."""
        seeds, batch_size = tf.random.experimental.stateless_split(seed, 2), self._setting.batch_size
        places = tf.random.stateless_uniform((batch_size,), seeds[0], 0, len(self._images), tf.int32)
        others = tf.gather(self._images, places[self._share])
        return add_neighbours(images, others, self._neighbour_share, seeds[1], self._share.start, batch_size)

    def _build_steps(self, batches: Any, first_step: Any) -> tuple[Any, Any]:
        count = tf.shape(batches)[0]

        def body(i: Any, images: Any, labels: Any, losses: Any, right: Any) -> tuple[Any, ...]:
            # Independent of this step's gradient, so the runtime draws it meanwhile.
            following = tf.minimum(i + 1, count - 1)
            next_images, next_labels = self._draw(batches[following], first_step + following)
            self._optimiser.learning_rate.assign(self.rate(first_step + i))
            loss, hits = self._workers.strategy.run(self._learn, args=(images, labels))
            self._update_average(first_step + i)
            losses = losses.write(i, loss)
            return i + 1, next_images, next_labels, losses, right + hits

        images, labels = self._draw(batches[0], first_step)
        losses = tf.TensorArray(tf.float32, size=count)
        start = (tf.constant(0), images, labels, losses, tf.constant(0.0))
        _, _, _, losses, right = tf.while_loop(lambda i, *_: i < count, body, start)
        return self._workers.sum(losses.stack()), self._workers.sum(right)

    def _learn(self, images: Any, labels: Any) -> tuple[Any, Any]:
        """One step of gradient descent; this worker's part of the batch's loss and of the number of right answers."""
        teacher = self._teacher
        targets = tf.nn.softmax(teacher(images, training=False)) if teacher else self._smoothed(labels)
        targets = tf.where(labels[:, None] == _NO_CLASS, 1.0 / self._class_count, targets)
        with tf.GradientTape() as tape:
            logits = self._model(images, training=True)
            losses = tf.nn.softmax_cross_entropy_with_logits(targets, logits)
            loss = tf.reduce_sum(losses) / (self._setting.batch_size + self._outlier_count)
            loss = tf.add_n([loss, *(one / self._workers.count for one in self._model.losses)])
        variables = self._model.trainable_variables
        gradients = tape.gradient(loss, [v.value for v in variables])
        self._optimiser.apply(gradients, variables)  # which adds up the gradients of all workers
        hits = tf.reduce_sum(tf.cast(tf.argmax(logits, axis=1, output_type=tf.int32) == labels, tf.float32))
        return loss, hits

    def _smoothed(self, labels: Any) -> Any:
        """Labels (B,) as shares (B, C), with some of it given to the other classes."""
        spread = self._setting.label_smoothing / self._class_count
        return tf.one_hot(labels, self._class_count, 1.0 - self._setting.label_smoothing + spread, spread)

    def _update_average(self, step: Any) -> None:
        at = tf.cast(step, tf.float32)
        # The start counts for little: the average is as young as the run.
        keep = tf.minimum(1.0 - 1.0 / max(self._average_steps, 1.0), (1.0 + at) / (10.0 + at))
        for average, weight in zip(self._averages, self._model.weights, strict=False):
            average.assign_sub((1.0 - keep) * (average - weight.value))
