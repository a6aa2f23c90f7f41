"""Out of device memory as one sentence, with a profile of what filled it."""

import contextlib
import pathlib
from collections.abc import Iterator

import jax

from lwm.errors import UserError


@contextlib.contextmanager
def explain_out_of_memory(workdir: pathlib.Path, stage: str, advice: str) -> Iterator[None]:
  """Writes a profile of device memory to `workdir` if the block runs out of it.

  The profile lists live arrays by the line that made them. It does not contain what the compiler
  refused to allocate, nor a program's temporaries.

  Args:
    workdir: of the run.
    stage: name of the stage.
    advice: what to try.

  Raises:
    UserError: device memory ran out. Errors about a kernel's scratchpad pass through.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    reason = str(error)
    if not reason.startswith("RESOURCE_EXHAUSTED") or "memory space vmem" in reason:
      raise
    process = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
    path = workdir / f"memory_{stage}{process}.prof"
    jax.profiler.save_device_memory_profile(path)
    raise UserError(
      f"stage {stage} needs more memory than its devices have "
      f"({reason.splitlines()[0].rstrip('.')}): {advice}, and pprof -top {path} shows "
      "what filled it."
    ) from error
