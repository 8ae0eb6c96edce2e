"""``adaptrm train --profile``: a trace of a few steps, for TensorBoard's profile page, XProf or Perfetto."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax

from adaptrm.progress import say

WARM_UP = 3  # the first step is compiled, the next ones fill what is read ahead
TRACED = 3


@contextmanager
def profiled(step_fn: Callable, folder: Path) -> Iterator[Callable]:
    """A step that does the same, and writes a trace of some of its calls into a local folder."""
    calls, tracing = 0, False

    def step(state, batch):
        nonlocal calls, tracing
        if calls == WARM_UP:
            jax.block_until_ready(state)  # so that the trace begins with a whole step
            jax.profiler.start_trace(str(folder))
            tracing = True
        with jax.profiler.StepTraceAnnotation("train", step_num=calls + 1):
            result = step_fn(state, batch)
        calls += 1
        if calls == WARM_UP + TRACED:
            jax.block_until_ready(result)
            stop()
        return result

    def stop() -> None:
        nonlocal tracing
        jax.profiler.stop_trace()
        tracing = False
        say(f"profile of {calls - WARM_UP} steps: {folder}; open it with tensorboard --logdir, or in ui.perfetto.dev")

    try:
        yield step
    finally:
        if tracing:
            stop()
        elif calls <= WARM_UP:
            say(f"no profile: it begins after {WARM_UP} steps, and this run had {calls}")
