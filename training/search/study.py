"""The study on disk: opened or gone on with, and the trials that a search left when it was stopped."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState

from digits.errors import DigitsError
from training.search.space import present_values
from training.search.worker import Task

STUDY_FILE = "study.sqlite"
FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
PRESENT = "present"
"""Marks the trial of what params.yaml says."""
_QUESTION = "question"
_AGAIN = "again"


class SearchStopped(DigitsError):
    """A search cannot begin, or cannot go on."""

    code = "search_stopped"


def open_study(folder: Path, task: Task, space: Mapping[str, BaseDistribution]) -> optuna.Study:
    """The study of this folder, new or as it was left. A new one first tries what params.yaml says now.

    Optuna proposes by the tree-structured Parzen estimator and prunes a trial whose validation loss is worse than the
    median of the others at the same epoch.

    Raises:
        SearchStopped: the study there asks something else: other parameters, space, data or length of a trial.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(
        study_name="digits",
        storage=f"sqlite:///{folder / STUDY_FILE}",
        load_if_exists=True,
        direction="minimize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=2),
    )
    question = _question(task)
    asked = study.user_attrs.get(_QUESTION)
    if asked is None:
        study.set_user_attr(_QUESTION, question)
        if present := present_values(task.params, space):
            study.enqueue_trial(present, user_attrs={PRESENT: True})
    elif asked != question:
        differing = ", ".join(sorted(k for k in question if question[k] != asked.get(k)))
        raise SearchStopped(
            f"{folder} holds a search with other {differing}, whose trials cannot be compared with these: "
            "go on with those, or begin another search with --name"
        )
    # Its draws depend on the seed and on how much was tried before: a search gone on with does not repeat itself.
    study.sampler = optuna.samplers.TPESampler(seed=task.params.seed + len(study.trials))
    return study


def return_unfinished(study: optuna.Study) -> None:
    """Mark the trials that nobody trains any more as failed, and put their values first in the queue."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        study.enqueue_trial(trial.params, user_attrs=_kept(trial.user_attrs))


def lost_trial(study: optuna.Study, trial: optuna.Trial) -> None:
    """Mark the trial of a worker that died as failed; its values are tried once more, if they were not already."""
    study.tell(trial, state=TrialState.FAIL)
    if _AGAIN not in trial.user_attrs:
        study.enqueue_trial(trial.params, user_attrs={**_kept(trial.user_attrs), _AGAIN: trial.number})


def _kept(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {key: facts[key] for key in (PRESENT, _AGAIN) if key in facts}


def finished(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that were trained to their end or pruned."""
    return study.get_trials(deepcopy=False, states=FINISHED)


def best(study: optuna.Study) -> FrozenTrial | None:
    """The trial with the least loss; None while none was trained to its end."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return min(complete, key=lambda trial: (trial.value, trial.number), default=None)


def _question(task: Task) -> dict[str, Any]:
    """What a trial's value depends on besides the values tried, comparable and small."""
    content = task.params.model_dump(by_alias=True, mode="json")
    sections = {name: content[name] for name in ("model", "train", "augment")}
    return {
        "parameters": json.loads(json.dumps(sections)),
        "seed": task.params.seed,
        "space": content["search"]["space"],
        "images": task.params.search.images,
        "training split": _sha256(task.learn),
        "validation split": _sha256(task.held_out),
    }


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
