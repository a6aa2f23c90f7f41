"""Where a run is: the stage, the step, and the batches that it skipped."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Position:
  """Where a run is: after `step` steps of stage `stage`, `total_steps` steps over all stages.

  Batches are a function of the stage and the batch's number, so this is the position in the data
  too.

  Attributes:
    passed_over: ranges [first, stop) of the stage's batches that the run skips.
    losses: (batch, loss) of the stage's last good batches; empty unless spikes are looked for.
  """

  stage: int
  step: int
  total_steps: int
  passed_over: tuple[tuple[int, int], ...] = ()
  losses: tuple[tuple[int, float], ...] = ()

  @property
  def next_batch(self) -> int:
    """Number of the stage's batch that the next step takes."""
    return self.step + sum(stop - first for first, stop in self.passed_over)

  @property
  def just_passed_over(self) -> int:
    """Number of batches skipped since the last step."""
    first, stop = self.passed_over[-1] if self.passed_over else (0, 0)
    return stop - first if stop == self.next_batch else 0

  def at_stage(self, stage: int) -> "Position":
    """The start of a stage, after the last step of the stage before it."""
    return Position(stage=stage, step=0, total_steps=self.total_steps)

  def after_step(self, losses: tuple[tuple[int, float], ...]) -> "Position":
    """The position one step later, with the losses to remember."""
    return dataclasses.replace(
      self, step=self.step + 1, total_steps=self.total_steps + 1, losses=losses
    )

  def passing_over(self, stop: int) -> "Position":
    """The same step, with all batches before `stop` skipped."""
    just = self.just_passed_over
    before = self.passed_over[:-1] if just else self.passed_over
    return dataclasses.replace(self, passed_over=(*before, (self.next_batch - just, stop)))


# Where a run that has no checkpoint starts.
START = Position(stage=0, step=0, total_steps=0)
