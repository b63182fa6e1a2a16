"""Run a flow in this process, and learn how it ended from itself.

A client that got no answer to a run's last state sends it again, and Prefect's server answers that the run has ended
already: that state has neither the value nor the error, and a release that was done would be told as failed.
"""

import functools
from typing import TYPE_CHECKING, Any

from digits.errors import DigitsError

if TYPE_CHECKING:
    from prefect import Flow
    from prefect.states import State


class FlowFailed(DigitsError):
    """A flow ended in a failure that is not one of ours."""

    code = "flow_failed"


class FlowRun:
    """One run, from its begin to its end. ``state`` is what Prefect says of that."""

    def __init__(self, flow: "Flow[Any, Any]", *arguments: Any, **named: Any) -> None:
        self._returned: list[Any] = []
        self._raised: Exception | None = None
        function = flow.fn

        @functools.wraps(function)  # Prefect reads its signature
        def observed(*args: Any, **kwargs: Any) -> Any:
            try:
                self._returned = [function(*args, **kwargs)]
            except Exception as err:
                self._raised = err
                raise
            return self._returned[0]

        flow.fn = observed
        try:
            self.state: State[Any] = flow(*arguments, **named, return_state=True)
        finally:
            flow.fn = function

    def result(self) -> Any:
        """What the flow's function returned.

        Raises:
            DigitsError: what stopped it; ``FlowFailed`` if that is none of ours.
        """
        try:
            return self.state.result()
        except DigitsError:
            raise
        except Exception as err:
            if self.state.is_completed() and self._returned:
                return self._returned[0]
            if self.state.is_failed() and isinstance(self._raised, DigitsError):
                raise self._raised from err
            raise FlowFailed(f"it ended as {self.state.name}: {' '.join(str(err).split())}") from err
