"""`python -m tests.training.toy_search ROOT`: a search whose worker kills it."""

import sys
from pathlib import Path

from rich.console import Console

from tests.training.toy_worker import kill_the_search_in_the_third_trial
from training.params import load_params
from training.search.search import search
from training.workspace import Workspace


def main() -> None:
    workspace = Workspace(Path(sys.argv[1]))
    params = load_params(workspace.params_file)
    search(workspace, params, Console(quiet=True), name="toy", worker=kill_the_search_in_the_third_trial)


if __name__ == "__main__":
    main()
