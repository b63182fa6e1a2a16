"""What came of a search: every trial in a table, the best one's values, and three pictures."""

import csv
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import optuna
from matplotlib.ticker import LogLocator, NullFormatter
from optuna.distributions import CategoricalDistribution
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.markup import escape

from training.figures import BLUE, GREY, ORANGE, STYLE, new_figure, save_figure
from training.params import Params
from training.search.space import experiment_command, fragment, read_values
from training.search.study import PRESENT, best, finished
from training.workspace import whole_file

_TOP_SHARE = 0.25
_STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
_FEW = 8
"""With fewer trials, importances would be noise."""


def write_results(folder: Path, study: optuna.Study, params: Params, console: Console) -> None:
    """Write trials.csv, best.yaml, history.png, values.png and importance.png, and say what is best."""
    trials = finished(study)
    winner = best(study)
    if not trials or winner is None:
        console.print("no trial was trained to its end: there is nothing to choose from")
        return
    _write_trials(folder / "trials.csv", study.get_trials(deepcopy=False), params)
    draw_history(folder / "history.png", trials)
    draw_values(folder / "values.png", trials)
    if len(trials) >= _FEW:
        draw_importance(folder / "importance.png", importances(trials), len(trials))

    values = read_values(params, winner.params)
    told = f"trial {winner.number} of {len(trials)}, validation loss {winner.value:.4f}, accuracy {_accuracy(winner)}"
    command = experiment_command(params, values)
    with whole_file(folder / "best.yaml") as part:
        part.write_text(
            f"# The best: {told}.\n# Replace the same keys of params.yaml, or try them:\n#   {command}\n"
            + fragment(params, values),
            encoding="utf-8",
        )
    console.print(
        f"best: {told}{_against_present(trials, winner)}\n{fragment(params, values)}{escape(command)}", soft_wrap=True
    )
    console.print(f"every trial and the pictures: {folder}")


def importances(trials: Sequence[FrozenTrial]) -> dict[str, float]:
    """How much each parameter decided whether a trial was among the best quarter; they sum to 1.

    By PED-ANOVA (Watanabe, Bansal and Hutter, IJCAI 2023), which only asks which trials are the best. So pruned trials
    count as well: they were worse than the median when they were stopped.
    """
    study = optuna.create_study(direction="minimize")
    for trial in trials:
        if not math.isfinite(loss_of(trial)):
            continue
        study.add_trial(
            optuna.create_trial(value=loss_of(trial), params=trial.params, distributions=trial.distributions)
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the number of trials, which the picture states
        return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=_TOP_SHARE))


def loss_of(trial: FrozenTrial) -> float:
    """A trial's loss, or the last that a pruned one came to; infinite if it came to none."""
    if trial.state is TrialState.COMPLETE:
        assert trial.value is not None
        return trial.value
    return trial.intermediate_values[max(trial.intermediate_values)] if trial.intermediate_values else math.inf


@mpl.rc_context(STYLE)
def draw_history(path: Path, trials: Sequence[FrozenTrial]) -> None:
    """The loss of each trial in the order they were begun, and the best so far."""
    figure = new_figure(8, 4.2)
    axis = figure.subplots()
    complete = [t for t in trials if t.state is TrialState.COMPLETE]
    pruned = [t for t in trials if t.state is TrialState.PRUNED and math.isfinite(loss_of(t))]
    axis.plot([t.number for t in complete], [loss_of(t) for t in complete], "o", color=BLUE, label="trained to its end")
    axis.plot(
        [t.number for t in pruned], [loss_of(t) for t in pruned], "o", color=GREY, mfc="white", label="pruned: its last"
    )
    so_far: list[float] = []
    for trial in complete:
        so_far.append(min([*so_far[-1:], loss_of(trial)]))
    axis.step([t.number for t in complete], so_far, where="post", color=ORANGE, label="best so far")
    axis.set(xlabel="trial", ylabel="validation loss (log)", title=f"{len(trials)} trials, {len(pruned)} pruned")
    _log_scale(axis)
    axis.legend(frameon=False)
    save_figure(figure, path)


@mpl.rc_context(STYLE)
def draw_values(path: Path, trials: Sequence[FrozenTrial]) -> None:
    """The loss over each parameter, a panel each: where the good values lie."""
    names = list(trials[0].distributions)
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(3.1 * columns, 2.7 * rows + 0.4)
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    for axis, name in zip(axes.flat, names, strict=False):
        distribution = trials[0].distributions[name]
        choices = distribution.choices if isinstance(distribution, CategoricalDistribution) else None
        for state, style in (("PRUNED", {"color": GREY, "mfc": "white"}), ("COMPLETE", {"color": BLUE})):
            shown = [t for t in trials if t.state.name == state and math.isfinite(loss_of(t))]
            places = [choices.index(t.params[name]) if choices else t.params[name] for t in shown]
            axis.plot(places, [loss_of(t) for t in shown], "o", ms=4, **style)
            present = [(place, loss_of(t)) for place, t in zip(places, shown, strict=True) if _is_present(t)]
            axis.plot(*zip(*present, strict=True), "D", ms=6, color=ORANGE) if present else None
        axis.set_xlabel(name)
        if choices:
            axis.set_xticks(range(len(choices)), [str(choice) for choice in choices])
            axis.margins(x=0.15)
        elif getattr(distribution, "log", False):
            axis.set_xscale("log")
            _label_decades(axis.xaxis)
        _log_scale(axis)
    for row in axes:
        row[0].set_ylabel("validation loss (log)")
    figure.suptitle("Validation loss by parameter (hollow: pruned; diamond: params.yaml)")
    save_figure(figure, path)


@mpl.rc_context(STYLE)
def draw_importance(path: Path, shares: dict[str, float], count: int) -> None:
    """A bar for each parameter, the most important at the top."""
    figure = new_figure(7.5, 0.36 * len(shares) + 1.3)
    axis = figure.subplots()
    names = list(shares)[::-1]
    bars = axis.barh(names, [shares[name] for name in names], color=BLUE)
    axis.bar_label(bars, fmt="{:.0%}", padding=3)
    axis.grid(visible=False)
    axis.set_xticks([])
    axis.spines["bottom"].set_visible(False)
    axis.margins(x=0.12)
    figure.suptitle(f"What decided whether a trial was among the best quarter of {count}")
    save_figure(figure, path)


def _log_scale(axis: Any) -> None:
    axis.set_yscale("log")
    _label_decades(axis.yaxis, (1.0, 1.5, 2.0, 3.0, 5.0, 7.0))


def _label_decades(axis: Any, at: tuple[float, ...] = (1.0, 2.0, 5.0)) -> None:
    axis.set_major_locator(LogLocator(subs=at))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _write_trials(path: Path, trials: Sequence[FrozenTrial], params: Params) -> None:
    """A row for each trial, failed ones too; `loss` of a pruned one is its last."""
    names = list(params.search.space)
    with whole_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["trial", "state", "loss", "accuracy", "epochs", "seconds", "reason", *names])
        for trial in trials:
            if trial.state not in _STATES:
                continue
            values = read_values(params, trial.params)
            loss, facts = loss_of(trial), trial.user_attrs
            writer.writerow(
                [
                    trial.number,
                    _STATES[trial.state],
                    f"{loss:.5f}" if math.isfinite(loss) else "",
                    facts.get("accuracy", ""),
                    len(trial.intermediate_values),
                    facts.get("seconds", ""),
                    facts.get("reason", ""),
                    *(values.get(name, "") for name in names),
                ]
            )


def _accuracy(trial: FrozenTrial) -> str:
    return f"{trial.user_attrs['accuracy']:.2%}"


def _against_present(trials: Sequence[FrozenTrial], winner: FrozenTrial) -> str:
    present = next((t for t in trials if _is_present(t) and t.state is TrialState.COMPLETE), None)
    if present is None:
        return ""
    if present.number == winner.number:
        return " (what params.yaml says now)"
    return f" (params.yaml now: {loss_of(present):.4f}, {_accuracy(present)})"


def _is_present(trial: FrozenTrial) -> bool:
    return bool(trial.user_attrs.get(PRESENT))
