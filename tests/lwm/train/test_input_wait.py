"""Waits for input: what counts, who is named, and two real processes of which one reads slowly."""

import pickle
import re
import socket
import threading

import pytest

from lwm.report import input_wait
from lwm.report.input_wait import InputWait, InputWatch, notice
from lwm.report.metrics import read_metrics
from tests import programs


class Results:
  """Of a step that ends when told to."""

  def __init__(self):
    self.ended = threading.Event()

  def block_until_ready(self):
    assert self.ended.wait(60)


def wait_for(asked, came, finished):
  """An InputWait whose step ended at `finished`."""
  results = Results()
  wait = InputWait(asked, came, results, clock=lambda: finished)
  results.ended.set()
  return wait


@pytest.mark.parametrize("finished, starved", [(9, 3), (10, 3), (11, 2), (13, 0), (20, 0)])
def test_only_a_device_without_work_is_starved(finished, starved):
  before = wait_for(0, 1, finished)
  wait = wait_for(10, 13, 30)
  assert wait.seconds == 3
  assert wait.starved(before) == starved
  assert wait.starved(None) == 3


def test_noting_the_end_of_a_step_holds_nothing_up():
  results = Results()
  before = InputWait(0, 1, results, clock=lambda: 11)
  # The step runs on, and whoever made the wait is here already.
  assert not results.ended.is_set()
  results.ended.set()
  assert wait_for(10, 13, 30).starved(before) == 2


def test_notices():
  assert notice({"a": 0.1}, 1.0) is None
  assert "idle for 0.50 s of 1.00 s" in notice({"a": 0.5}, 1.0)
  assert notice({"a": 0.01, "b": 0.5}, 1.0) == (
    "input of b is slow and delays the others: 0.50 s of 1.00 s per step, with a median of 0.01 s"
  )
  # None is the culprit where all wait.
  assert "devices are idle" in notice({"a": 0.4, "b": 0.5, "c": 0.45}, 1.0)


def test_a_process_is_named_once():
  said = []
  watch = InputWatch(said.append)
  for _ in range(3 * input_wait.STEPS - 1):
    watch.step(1.0, 0.5)
  assert len(said) == 1


@pytest.mark.slow
def test_the_process_that_reads_slowly_is_named(experiment, tmp_path):
  del experiment.stages[1:]
  experiment.stages[0].steps = 9
  experiment.evaluation.every_steps = experiment.checkpoint.every_steps = 100
  (tmp_path / "experiment.pickle").write_bytes(pickle.dumps(experiment))
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  processes = [
    programs.start(
      "tests.lwm.train.slow_input_worker",
      tmp_path / "experiment.pickle",
      tmp_path / "run",
      port,
      rank,
    )
    for rank in range(2)
  ]
  try:
    outputs = [process.communicate(timeout=300)[0] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [process.returncode for process in processes] == [0, 0]
  (line,) = [line for line in outputs[0].splitlines() if line.startswith("input")]
  match = re.fullmatch(
    rf"input of process 1 \({re.escape(socket.gethostname())}\) is slow and delays the others: "
    r"(\S+) s of (\S+) s per step, with a median of (\S+) s",
    line,
  )
  assert match, line
  longest, step, median = map(float, match.groups())
  assert 0.2 * step <= longest <= step and median < longest / 2
  assert "input" not in outputs[1]
  # Process 0 had its batches: its account does not know why steps took long.
  records = read_metrics(tmp_path / "run" / "metrics.jsonl")
  assert sum(r["starved_seconds"] for r in records if r["kind"] == "train") < longest
