"""Measure the candidate on the test split, once: figures with their uncertainty, and pictures of what went wrong.

Each look at the test split is recorded (training/looks.py), and nothing is chosen by what is seen here.
"""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from digits.certainty import certainty
from training.calibrate import selective_curve
from training.intervals import wilson_interval
from training.looks import CANDIDATE, record_look, record_result
from training.model import build_predict, load_model, model_sha256
from training.params import Params
from training.plots import draw_confusion, draw_mistakes, draw_reliability, draw_selective
from training.report import Findings, write_report
from training.robustness.measure import Robustness, evenly_spaced, measure_robustness
from training.robustness.plots import draw_corruption_curves, draw_corruption_samples, draw_nondigits
from training.workspace import BadArtifact, Split, Workspace, load_split, read_json, whole_file, write_json


def evaluate(workspace: Workspace, params: Params, console: Console) -> None:
    """The stage: write metrics.json, tables, pictures, predictions.npz and report.html, which shows them all.

    metrics.json holds the headline figures alone, so that `dvc metrics show` fits a screen; those of each digit are in
    classes.csv.

    Raises:
        BadArtifact: the test split is not the one that was sealed.
    """
    test = load_split(workspace.artifact("prepare", "test.npz"))
    sealed = read_json(workspace.artifact("prepare", "summary.json")).get("test_sha256")
    if test.sha256() != sealed:
        raise BadArtifact(
            "artifacts/prepare/test.npz is not the test split that was sealed: run `dvc repro -f prepare`"
        )
    model, twin = (load_model(workspace.artifact(stage, "model.keras")) for stage in ("train", "twin"))
    sha256, answer = model_sha256(model), build_predict(model)
    record_look(workspace, params, model_sha256(twin), sealed, len(test.labels), "twin")
    look = record_look(workspace, params, sha256, sealed, len(test.labels), CANDIDATE)
    probabilities = answer(test.images)
    metrics = measure(probabilities, test.labels, params.evaluate.reliability_bins)
    abstain_below = float(model.get_layer("calibration").abstain_below)
    seeds = record_result(workspace, look, metrics["accuracy"])
    metrics.update(measure_abstention(probabilities, test.labels, abstain_below))
    bins, classes = metrics.pop("reliability"), metrics.pop("classes")
    sample = evenly_spaced(test, params.evaluate.robustness_images)
    robustness = measure_robustness(
        answer, build_predict(twin), sample, abstain_below, params.evaluate.nondigit_images, console
    )
    metrics = {"schema": 1, "model_sha256": sha256, "test_sha256": sealed, **metrics, **robustness.figures}

    out = workspace.stage_dir("evaluate")
    with whole_file(out / "predictions.npz") as part:
        np.savez(part, probabilities=probabilities, labels=test.labels)
    names = params.data.classes
    classes = [{**row, "digit": names[row["digit"]]} for row in classes]
    predicted = probabilities.argmax(axis=1)
    answers = zip(test.labels.tolist(), predicted.tolist(), strict=True)
    rows = [{"actual": names[actual], "predicted": names[read]} for actual, read in answers]
    _write_csv(out / "confusion.csv", rows)
    _write_csv(out / "classes.csv", classes)
    _write_csv(out / "reliability.csv", bins)
    _write_csv(out / "corruptions.csv", robustness.corruptions)
    _write_csv(out / "variants.csv", robustness.variants)
    _write_csv(out / "nondigits.csv", robustness.nondigits)
    headline = _draw(out, test, probabilities, names, metrics, bins, params.evaluate.gallery_images)
    _draw_robustness(out, sample, robustness, names)
    training = read_json(workspace.artifact("train", "training.json"))
    twin_training = read_json(workspace.artifact("twin", "twin.json"))
    macro = macro_intervals(test.labels, predicted, len(names))
    floor = calibrated_ece(probabilities, params.evaluate.reliability_bins)
    write_report(
        out,
        Findings(
            metrics, classes, macro, names, test, probabilities, robustness, look, seeds, floor, training, twin_training
        ),
    )
    write_json(out / "metrics.json", metrics)
    console.print(
        f"test accuracy {headline}; macro F1 {metrics['macro_f1']:.4f}, ECE {metrics['ece']:.4f}; "
        f"candidates measured on these images so far: {look.candidates}\n"
        f"damaged images {metrics['corruption_accuracy']:.1%} right (its twin without augmentation "
        f"{metrics['corruption_accuracy_twin']:.1%}); abstains on {metrics['nondigit_abstention']:.1%} of non-digits"
    )


def _draw(
    out: Path,
    test: Split,
    probabilities: np.ndarray,
    names: tuple[str, ...],
    metrics: dict[str, Any],
    bins: list[dict[str, float]],
    gallery_images: int,
) -> str:
    """The pictures of the answers; the headline above them."""
    count, errors = metrics["test_images"], metrics["errors"]
    interval = f"{metrics['accuracy_low']:.2%} to {metrics['accuracy_high']:.2%}"
    headline = f"{metrics['accuracy']:.2%} right (95 % interval {interval}, n = {count:,})"
    confusion = confusion_matrix(test.labels, probabilities.argmax(axis=1), len(names))
    draw_confusion(out / "confusion.png", confusion, names, f"Test images: {headline}")
    title = f"{errors} of {count:,} test images misread; the {min(errors, gallery_images)} surest mistakes, "
    title += "with confidence and index"
    draw_mistakes(out / "mistakes.png", test.images, test.labels, probabilities, names, gallery_images, title)
    draw_reliability(out / "reliability.png", bins, metrics["ece"], count)
    coverage, accuracy = selective_curve(probabilities, test.labels)
    draw_selective(out / "selective.png", coverage, accuracy, metrics["coverage"])
    return headline


def _draw_robustness(out: Path, sample: Split, robustness: Robustness, names: tuple[str, ...]) -> None:
    draw_corruption_curves(out / "corruptions.png", robustness.corruptions, len(sample.labels))
    draw_corruption_samples(out / "corruption_samples.png", sample.images)
    draw_nondigits(out / "nondigits.png", robustness, names)


def measure(probabilities: np.ndarray, labels: np.ndarray, bin_count: int) -> dict[str, Any]:
    """All figures of a set of answers.

    Args:
        probabilities: float (N, C), rows sum to 1.
        labels: int (N,), the true classes.
        bin_count: equal-width bins of confidence for the calibration error.

    Returns:
        accuracy with its 95 % Wilson interval, errors, macro and per-class precision, recall and F1, mean negative
        log-likelihood (nats), Brier score, expected calibration error, and the bins of the reliability diagram. A class
        that was never predicted has precision 0.
    """
    predicted = probabilities.argmax(axis=1)
    class_count = probabilities.shape[1]
    confusion = confusion_matrix(labels, predicted, class_count)
    right = int(np.trace(confusion))
    precision, recall, f1 = _rates(np.diag(confusion), confusion.sum(axis=0), confusion.sum(axis=1))
    low, high = wilson_interval(right, len(labels))
    truth = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    bins = reliability_bins(probabilities, labels, bin_count)
    ece = sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(labels)
    return {
        "test_images": len(labels),
        "errors": len(labels) - right,
        "accuracy": right / len(labels),
        "accuracy_low": low,
        "accuracy_high": high,
        "macro_precision": float(precision.mean()),
        "macro_recall": float(recall.mean()),
        "macro_f1": float(f1.mean()),
        "min_class_recall": float(recall.min()),
        "nll": float(-np.log(np.maximum(truth, 1e-12)).mean()),
        "brier": float(((probabilities - np.eye(class_count)[labels]) ** 2).sum(axis=1).mean()),
        "ece": float(ece),
        "classes": [_class_row(k, confusion) for k in range(class_count)],
        "reliability": bins,
    }


def _rates(right: np.ndarray, read: np.ndarray, true: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Precision, recall and F1 from counts of right answers, of answers, and of images, (..., C) each."""
    return right / np.maximum(read, 1), right / np.maximum(true, 1), 2 * right / np.maximum(read + true, 1)


def _class_row(k: int, confusion: np.ndarray) -> dict[str, Any]:
    """Figures of one class, each with its 95 % Wilson interval: F1 is a share too, of 2 TP in 2 TP + FP + FN."""
    right, read, true = int(confusion[k, k]), int(confusion[:, k].sum()), int(confusion[k].sum())
    row: dict[str, Any] = {"digit": k, "images": true}
    for name, of in (("precision", read), ("recall", true), ("f1", (read + true) / 2)):
        low, high = wilson_interval(right, of)
        row |= {name: right / max(of, 1), f"{name}_low": low, f"{name}_high": high}
    return row


def macro_intervals(labels: np.ndarray, predicted: np.ndarray, class_count: int) -> dict[str, tuple[float, float]]:
    """95 % intervals of the macro figures: 1,000 times as many images drawn with replacement (percentile bootstrap)."""
    pairs, counts = np.unique(labels * class_count + predicted, return_counts=True)
    draws = np.random.default_rng(1).multinomial(len(labels), counts / len(labels), 1000).astype(np.float32)
    true, read = np.eye(class_count, dtype=np.float32)[[pairs // class_count, pairs % class_count]]  # (pairs, C) each
    rates = _rates(draws @ (true * read), draws @ read, draws @ true)  # (1000, C) each
    return {
        f"macro_{name}": tuple(np.quantile(rate.mean(axis=1), (0.025, 0.975)).tolist())
        for name, rate in zip(("precision", "recall", "f1"), rates, strict=True)
    }


def calibrated_ece(probabilities: np.ndarray, bin_count: int) -> tuple[float, float]:
    """The calibration error that answers with these confidences would have if each were right as often as it says.

    It is not 0: bins hold few answers. Mean and 95 % quantile over 200 draws.
    """
    rng = np.random.default_rng(1)
    confidence = probabilities.max(axis=1).astype(np.float64)
    place = _bin_of(confidence, bin_count)
    errors = [
        np.abs(np.bincount(place, (rng.random(len(confidence)) < confidence) - confidence, bin_count)).sum()
        for _ in range(200)
    ]
    shares = np.array(errors) / len(confidence)
    return float(shares.mean()), float(np.quantile(shares, 0.95))


def measure_abstention(probabilities: np.ndarray, labels: np.ndarray, abstain_below: float) -> dict[str, float]:
    """What a caller gets who does without answers whose certainty is below ``abstain_below``.

    Returns:
        abstain_below; coverage, the share of answers that remain; selective_accuracy, the share of those that is right
        (1 when none remains), with its 95 % Wilson interval; surest99_accuracy, the share of the surest 99 % that is
        right, whatever the threshold.
    """
    given = certainty(probabilities) >= abstain_below
    right = int((probabilities.argmax(axis=1) == labels)[given].sum())
    low, high = wilson_interval(right, int(given.sum()))
    coverage, accuracy = selective_curve(probabilities, labels)
    return {
        "abstain_below": abstain_below,
        "coverage": float(given.mean()),
        "selective_accuracy": right / int(given.sum()) if given.any() else 1.0,
        "selective_accuracy_low": low,
        "selective_accuracy_high": high,
        "surest99_accuracy": float(accuracy[np.searchsorted(coverage, 0.99)]),
    }


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, class_count: int) -> np.ndarray:
    """Counts (C, C): row = true class, column = predicted class."""
    counts = np.bincount(labels * class_count + predicted, minlength=class_count**2)
    return counts.reshape(class_count, class_count)


def reliability_bins(probabilities: np.ndarray, labels: np.ndarray, bin_count: int) -> list[dict[str, float]]:
    """Answers by confidence in equal-width bins over 0..1: how many, how sure, how often right (Guo et al. 2017)."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    edges = np.linspace(0.0, 1.0, bin_count + 1)
    place = _bin_of(confidence, bin_count)
    bins = []
    for i in range(bin_count):
        members = place == i
        count = int(members.sum())
        hits = int(right[members].sum())
        low, high = wilson_interval(hits, count)
        bins.append(
            {
                "low": float(edges[i]),
                "high": float(edges[i + 1]),
                "count": count,
                "confidence": float(confidence[members].mean()) if count else 0.0,
                "accuracy": hits / count if count else 0.0,
                "accuracy_low": low,
                "accuracy_high": high,
            }
        )
    return bins


def _bin_of(confidence: np.ndarray, bin_count: int) -> np.ndarray:
    edges = np.linspace(0.0, 1.0, bin_count + 1)
    return np.clip(np.digitize(confidence, edges[1:-1], right=True), 0, bin_count - 1)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with whole_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
