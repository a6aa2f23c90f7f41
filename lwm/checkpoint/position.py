"""Where a run is: stage, step, and the batches that were skipped."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Position:
  """Where a run is: `step` steps of stage `stage` are done, `total_steps` over all stages.

  Attributes:
    passed_over: ranges [first, stop) of the stage's batches that no step was, or will be, made of.
    losses: the last good batches of the stage and their losses, if spikes are looked for.
  """

  stage: int
  step: int
  total_steps: int
  passed_over: tuple[tuple[int, int], ...] = ()
  losses: tuple[tuple[int, float], ...] = ()

  @property
  def next_batch(self) -> int:
    """The stage's batch that the next step takes."""
    return self.step + sum(stop - first for first, stop in self.passed_over)

  def at_stage(self, stage: int) -> "Position":
    """The start of a stage, after all of those before."""
    return Position(stage=stage, step=0, total_steps=self.total_steps)

  @property
  def just_passed_over(self) -> int:
    """How many batches without a step since the last one."""
    first, stop = self.passed_over[-1] if self.passed_over else (0, 0)
    return stop - first if stop == self.next_batch else 0

  def after_step(self, losses: tuple[tuple[int, float], ...]) -> "Position":
    return dataclasses.replace(
      self, step=self.step + 1, total_steps=self.total_steps + 1, losses=losses
    )

  def passing_over(self, stop: int) -> "Position":
    """The next batch is `stop`; all from here to there are passed over."""
    just = self.just_passed_over
    before = self.passed_over[:-1] if just else self.passed_over
    return dataclasses.replace(self, passed_over=(*before, (self.next_batch - just, stop)))
