"""Runs that are killed with SIGKILL, and end as if they had not been."""

import os
import signal
import time
from collections.abc import Callable

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lwm.report.goodput import CATEGORIES
from lwm.report.metrics import read_metrics


def kill_when(process, moment: Callable[[], bool]) -> tuple[str, str]:
  """Sends SIGKILL to the process's group at the first sight of `moment`; returns what it said."""
  while not moment():
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.0005)
  os.killpg(process.pid, signal.SIGKILL)
  said = process.communicate()
  assert process.returncode == -signal.SIGKILL
  return said


def steps_done(workdir) -> list[int]:
  return [r["total_steps"] for r in read_metrics(workdir / "metrics.jsonl") if r["kind"] == "train"]


def complete(workdir) -> list[int]:
  """Complete checkpoints, by their total steps."""
  paths = (workdir / "checkpoints").glob("*")
  return sorted(int(path.name) for path in paths if path.name.isdigit())


def incomplete(workdir) -> list[str]:
  return [path.name for path in (workdir / "checkpoints").glob("*.orbax-checkpoint-tmp*")]


def final_state(workdir, total_steps=51):
  checkpoint = workdir / "checkpoints" / str(total_steps)
  with ocp.StandardCheckpointer() as checkpointer:
    return jax.tree.map(
      np.asarray, [checkpointer.restore(checkpoint / item) for item in ("params", "optimizer")]
    )


def what_was_learnt(workdir) -> list:
  """All that metrics.jsonl says but times."""
  timed = ("seconds", "data_seconds", "starved_seconds", "mfu")
  return [
    {
      name: value
      for name, value in record.items()
      if name not in timed and not name.endswith("_per_second")
    }
    for record in read_metrics(workdir / "metrics.jsonl")
    if record["kind"] in ("train", "evaluation")
  ]


def accounts(workdir) -> list[dict]:
  """The goodput records."""
  return [r for r in read_metrics(workdir / "metrics.jsonl") if r["kind"] == "goodput"]


@pytest.mark.slow
def test_killed_thrice_ends_as_if_undisturbed(start_program, undisturbed, tmp_path):
  killed = tmp_path / "killed"
  began = time.time()

  def run():
    return start_program("train", f"--workdir={killed}")

  # In mid-step: step 45 is on record, and step 46 was dispatched before.
  kill_when(run(), lambda: max(steps_done(killed), default=0) >= 45)
  assert 45 <= steps_done(killed)[-1] <= 46

  # Between stages: the last checkpoint of the first stage is complete, the next has no step yet.
  kill_when(run(), lambda: 46 in complete(killed))
  assert steps_done(killed) == list(range(1, 47))

  # In mid-checkpoint: that of step 50 is being written.
  kill_when(run(), lambda: any(name.startswith("50.") for name in incomplete(killed)))
  assert incomplete(killed) and 50 not in complete(killed)

  process = run()
  output, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors
  assert f"resuming {killed} after step 46 of 51" in output
  assert incomplete(killed) == []
  assert complete(killed) == complete(undisturbed) == [50, 51]
  assert what_was_learnt(killed) == what_was_learnt(undisturbed)
  assert steps_done(killed) == list(range(1, 52))
  left, right = final_state(killed), final_state(undisturbed)
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
    np.testing.assert_array_equal(one, other)

  # No second of any attempt is lost or counted twice.
  first, last = accounts(killed)[0], accounts(killed)[-1]
  whole = accounts(undisturbed)[-1]
  assert (last["attempts"], whole["attempts"]) == (4, 1)
  beginning = first["time"] - first["wall_seconds"]
  assert began < beginning < last["time"] < time.time()
  categories = [last[f"{name}_seconds"] for name in CATEGORIES]
  assert min(categories) >= 0 and sum(categories) == pytest.approx(last["wall_seconds"])
  assert last["wall_seconds"] == pytest.approx(last["time"] - beginning, abs=0.1)
  assert last["restart_seconds"] > whole["restart_seconds"] == 0
  assert f"goodput {last['goodput']:.1%}" in output and "in 4 attempts" in output


@pytest.mark.slow
def test_the_same_command_after_the_end_changes_nothing(start_program, undisturbed):
  before = read_metrics(undisturbed / "metrics.jsonl")
  process = start_program("train", f"--workdir={undisturbed}")
  output, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors
  assert "resuming" in output and str(undisturbed / "checkpoints" / "51") in output
  assert read_metrics(undisturbed / "metrics.jsonl") == before


@pytest.mark.slow
def test_another_config_is_one_sentence(start_program, undisturbed):
  process = start_program("train", f"--workdir={undisturbed}", "--config.seed=5")
  _, errors = process.communicate(timeout=120)
  assert errors == (
    f"error: {undisturbed} holds a run with config.seed=0, not 5: set it back, or start a new "
    "run with another --workdir.\n"
  )
