"""`dvc exp`, as README shows it."""

from pathlib import Path

from tests.pipelines.conftest import commit, run


def test_an_experiment_tries_a_value_and_leaves_the_rest(toy: Path) -> None:
    """`dvc exp run -S` sets a parameter and runs what depends on it; `dvc exp show` lists it beside what there was."""
    (toy / "params.yaml").write_text("train: {learning_rate: 0.001}\n")
    dvc_yaml = (toy / "dvc.yaml").read_text()
    (toy / "dvc.yaml").write_text(f"{dvc_yaml}    params: [train.learning_rate]\n")  # the last stage is evaluate
    commit(toy)
    done = run(toy, "dvc", "exp", "run", "-S", "train.learning_rate=0.002", "evaluate")
    assert done.returncode == 0, done.stderr
    assert "learning_rate: 0.002" in (toy / "params.yaml").read_text()
    shown = run(toy, "dvc", "exp", "show", "--csv")
    rows = [line for line in shown.stdout.splitlines() if "0.002" in line]
    assert rows, shown.stdout + shown.stderr
