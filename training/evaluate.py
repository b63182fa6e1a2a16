"""Measure the candidate on the test split, once: figures with their uncertainty, and pictures of what went wrong."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from training.calibrate import selective_curve
from training.model import load_model, model_sha256, predict_probabilities
from training.params import Params
from training.plots import draw_confusion, draw_mistakes, draw_reliability, draw_selective
from training.report import write_report
from training.workspace import BadArtifact, Workspace, load_split, read_json, whole_file, write_json


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
    model = load_model(workspace.artifact("train", "model.keras"))
    probabilities = predict_probabilities(model, test.images)
    metrics = measure(probabilities, test.labels, params.evaluate.reliability_bins)
    metrics.update(measure_abstention(probabilities, test.labels, float(model.get_layer("calibration").abstain_below)))
    bins, classes = metrics.pop("reliability"), metrics.pop("classes")
    predicted = probabilities.argmax(axis=1)

    out = workspace.stage_dir("evaluate")
    with whole_file(out / "predictions.npz") as part:
        np.savez(part, probabilities=probabilities, labels=test.labels)
    names = params.data.classes
    classes = [{**row, "digit": names[row["digit"]]} for row in classes]
    answers = zip(test.labels.tolist(), predicted.tolist(), strict=True)
    rows = [{"actual": names[actual], "predicted": names[read]} for actual, read in answers]
    _write_csv(out / "confusion.csv", rows)
    _write_csv(out / "classes.csv", classes)
    _write_csv(out / "reliability.csv", bins)

    count, errors = metrics["test_images"], metrics["errors"]
    interval = f"{metrics['accuracy_low']:.2%} to {metrics['accuracy_high']:.2%}"
    headline = f"{metrics['accuracy']:.2%} right (95 % interval {interval}, n = {count:,})"
    draw_confusion(
        out / "confusion.png", confusion_matrix(test.labels, predicted, len(names)), names, f"Test images: {headline}"
    )
    shown = min(errors, params.evaluate.gallery_images)
    title = f"{errors} of {count:,} test images misread; the {shown} surest mistakes, with confidence and index"
    draw_mistakes(
        out / "mistakes.png", test.images, test.labels, probabilities, names, params.evaluate.gallery_images, title
    )
    draw_reliability(out / "reliability.png", bins, metrics["ece"], count)
    coverage, accuracy = selective_curve(probabilities, test.labels)
    draw_selective(out / "selective.png", coverage, accuracy, metrics["coverage"])
    metrics = {"schema": 1, "model_sha256": model_sha256(model), "test_sha256": sealed, **metrics}
    write_report(out, metrics, classes, names, test, probabilities)
    write_json(out / "metrics.json", metrics)
    console.print(f"test accuracy {headline}; macro F1 {metrics['macro_f1']:.4f}, ECE {metrics['ece']:.4f}")


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
    right = np.diag(confusion).astype(float)
    precision = right / np.maximum(confusion.sum(axis=0), 1)
    recall = right / np.maximum(confusion.sum(axis=1), 1)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    low, high = wilson_interval(int(right.sum()), len(labels))
    truth = probabilities[np.arange(len(labels)), labels].astype(np.float64)
    bins = reliability_bins(probabilities, labels, bin_count)
    ece = sum(b["count"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / len(labels)
    return {
        "test_images": len(labels),
        "errors": int(len(labels) - right.sum()),
        "accuracy": float(right.sum() / len(labels)),
        "accuracy_low": low,
        "accuracy_high": high,
        "macro_precision": float(precision.mean()),
        "macro_recall": float(recall.mean()),
        "macro_f1": float(f1.mean()),
        "min_class_recall": float(recall.min()),
        "nll": float(-np.log(np.maximum(truth, 1e-12)).mean()),
        "brier": float(((probabilities - np.eye(class_count)[labels]) ** 2).sum(axis=1).mean()),
        "ece": float(ece),
        "classes": [
            {
                "digit": k,
                "images": int(confusion[k].sum()),
                "precision": float(precision[k]),
                "recall": float(recall[k]),
                "recall_low": wilson_interval(int(right[k]), int(confusion[k].sum()))[0],
                "recall_high": wilson_interval(int(right[k]), int(confusion[k].sum()))[1],
                "f1": float(f1[k]),
            }
            for k in range(class_count)
        ],
        "reliability": bins,
    }


def measure_abstention(probabilities: np.ndarray, labels: np.ndarray, abstain_below: float) -> dict[str, float]:
    """What a caller gets who does without answers less sure than ``abstain_below``.

    Returns:
        abstain_below; coverage, the share of answers that remain; selective_accuracy, the share of those that is right
        (1 when none remains), with its 95 % Wilson interval.
    """
    given = probabilities.max(axis=1) >= abstain_below
    right = int((probabilities.argmax(axis=1) == labels)[given].sum())
    low, high = wilson_interval(right, int(given.sum()))
    return {
        "abstain_below": abstain_below,
        "coverage": float(given.mean()),
        "selective_accuracy": right / int(given.sum()) if given.any() else 1.0,
        "selective_accuracy_low": low,
        "selective_accuracy_high": high,
    }


def confusion_matrix(labels: np.ndarray, predicted: np.ndarray, class_count: int) -> np.ndarray:
    """Counts (C, C): row = true class, column = predicted class."""
    counts = np.bincount(labels * class_count + predicted, minlength=class_count**2)
    return counts.reshape(class_count, class_count)


def wilson_interval(right: int, count: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927); it stays within 0..1 even when all are right."""
    if count == 0:
        return 0.0, 1.0
    share = right / count
    centre = share + z * z / (2 * count)
    spread = z * np.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    scale = 1 + z * z / count
    return max(0.0, float((centre - spread) / scale)), min(1.0, float((centre + spread) / scale))


def reliability_bins(probabilities: np.ndarray, labels: np.ndarray, bin_count: int) -> list[dict[str, float]]:
    """Answers by confidence in equal-width bins over 0..1: how many, how sure, how often right (Guo et al. 2017)."""
    confidence = probabilities.max(axis=1).astype(np.float64)
    right = probabilities.argmax(axis=1) == labels
    edges = np.linspace(0.0, 1.0, bin_count + 1)
    place = np.clip(np.digitize(confidence, edges[1:-1], right=True), 0, bin_count - 1)
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


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with whole_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
