"""Two processes of four devices train as one of eight; a lost one is named, and both resume."""

import json
import os
import pathlib
import resource
import shutil
import signal
import socket
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lwm.errors import RESUME_EXIT_CODE
from lwm.report.metrics import read_metrics
from tests import programs

CONFIG = pathlib.Path(__file__).with_name("pair.py")
STEPS = 14
# Of a machine under load.
PATIENCE = 600


class Run:
  """`experiments.train` on pair.py, on eight devices: one process, or two of four.

  In overrides, PROCESS is the number of the process.
  """

  def __init__(self, prepared, workdir, num_processes, *overrides):
    with socket.socket() as probe:
      probe.bind(("127.0.0.1", 0))
      port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
    environment |= {
      "JAX_NUMPY_RANK_PROMOTION": "raise",
      "XLA_FLAGS": os.environ["XLA_FLAGS"].replace(
        "device_count=8", f"device_count={8 // num_processes}"
      ),
    }
    self.workdir = workdir
    self.processes = []
    for process in range(num_processes):
      peers = [
        f"--coordinator=127.0.0.1:{port}",
        f"--num_processes={num_processes}",
        f"--process_id={process}",
        "--peer_timeout=20",
      ]
      self.processes.append(
        programs.Program(
          "experiments.train",
          f"--config={CONFIG}:{prepared}",
          f"--workdir={workdir}",
          *(peers if num_processes > 1 else []),
          *(override.replace("PROCESS", str(process)) for override in overrides),
          environment=environment,
        )
      )

  def finish(self) -> str:
    """Waits for a good end; returns what process 0 printed."""
    outputs = [process.communicate(timeout=PATIENCE) for process in self.processes]
    for process, (_, errors) in zip(self.processes, outputs):
      assert process.returncode == 0, errors
    return outputs[0][0]

  def ends(self) -> list[tuple[int, str, str]]:
    """Waits for the end; returns exit status, output and errors of each."""
    said = [process.communicate(timeout=PATIENCE) for process in self.processes]
    return [(process.returncode, *texts) for process, texts in zip(self.processes, said)]

  def reach(self, step: int) -> None:
    """Waits until `step` is on record; the next one is in flight at that moment."""
    while max(losses(self.workdir), default=0) < step:
      assert all(process.poll() is None for process in self.processes), self.errors()
      time.sleep(0.001)

  def kill(self, victim: int, step: int) -> None:
    """SIGKILL for one process after `step`; the other says so and asks to be resumed."""
    self.reach(step)
    self.processes[victim].send_signal(signal.SIGKILL)
    assert max(losses(self.workdir)) < STEPS
    survivor = self.processes[1 - victim]
    _, errors = survivor.communicate(timeout=PATIENCE)
    assert survivor.returncode == RESUME_EXIT_CODE, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1] == (
      f"error: process {victim} of 2 (host {socket.gethostname()}) has been lost; start the same "
      "command again: it resumes from the last checkpoint."
    )
    assert self.processes[victim].wait() == -signal.SIGKILL

  def errors(self) -> list[str]:
    self.end()
    return [process.communicate()[1] for process in self.processes]

  def end(self) -> None:
    for process in self.processes:
      process.kill()


@pytest.fixture(scope="module")
def run(prepared):
  runs = []

  def start(workdir, num_processes, *overrides):
    runs.append(Run(prepared, workdir, num_processes, *overrides))
    return runs[-1]

  yield start
  for started in runs:
    started.end()


@pytest.fixture(scope="module")
def pair(run, tmp_path_factory) -> pathlib.Path:
  """The workdir of an undisturbed run of two processes."""
  workdir = tmp_path_factory.mktemp("pair")
  run(workdir, 2).finish()
  return workdir


@pytest.fixture(scope="module")
def single(run, tmp_path_factory) -> pathlib.Path:
  """The workdir of an undisturbed run of one process."""
  workdir = tmp_path_factory.mktemp("single")
  run(workdir, 1).finish()
  return workdir


def losses(workdir) -> dict[int, float]:
  """The loss of each step on record."""
  path = workdir / "metrics.jsonl"
  lines = path.read_text().splitlines(keepends=True) if path.exists() else []
  # A line may be half written.
  records = [json.loads(line) for line in lines if line.endswith("\n")]
  return {r["total_steps"]: r["loss"] for r in records if r["kind"] == "train"}


def batches(workdir) -> list[dict]:
  """What metrics.jsonl says of each step's batch."""
  counts = ("total_steps", "tokens", "attended_pairs", "text_targets", "vision_targets")
  records = [r for r in read_metrics(workdir / "metrics.jsonl") if r["kind"] == "train"]
  return [{name: record[name] for name in counts if name in record} for record in records]


def checkpoints(workdir) -> list[int]:
  return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def final_state(workdir) -> list[np.ndarray]:
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  leaves = []
  with ocp.StandardCheckpointer() as checkpointer:
    for item in ("params", "optimizer"):
      path = workdir / "checkpoints" / str(STEPS) / item
      abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        checkpointer.metadata(path).item_metadata,
      )
      leaves += map(np.asarray, jax.tree.leaves(checkpointer.restore(path, abstract)))
  return leaves


def assert_same_training(one, other) -> None:
  """Same batches, and the same losses and final state but for the order of float32 sums."""
  assert batches(one) == batches(other)
  assert list(losses(one)) == list(losses(other)) == list(range(1, STEPS + 1))
  np.testing.assert_allclose(list(losses(one).values()), list(losses(other).values()), rtol=1e-5)
  for left, right in zip(final_state(one), final_state(other), strict=True):
    np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_two_processes_train_as_one(pair, single):
  assert_same_training(pair, single)


@pytest.mark.slow
def test_killed_in_mid_step_and_resumed_ends_as_if_undisturbed(run, pair, tmp_path):
  run(tmp_path, 2).kill(1, step=6)
  run(tmp_path, 2).kill(0, step=10)
  output = run(tmp_path, 2).finish()
  assert f"resuming {tmp_path} after step" in output
  assert losses(tmp_path) == losses(pair)
  for left, right in zip(final_state(tmp_path), final_state(pair), strict=True):
    np.testing.assert_array_equal(left, right)


@pytest.mark.slow
def test_sigterm_for_one_stops_both_after_the_same_step(run, tmp_path):
  """While they train; and started again, while they compile."""
  started = run(tmp_path, 2, "--config.stages[0].steps=500")
  started.reach(6)
  for when in ("training", "compiling"):
    started.processes[1].send_signal(signal.SIGTERM)
    ends = started.ends()
    assert [status for status, _, _ in ends] == [RESUME_EXIT_CODE] * 2, ends
    step = checkpoints(tmp_path)[-1]
    assert 6 <= step == max(losses(tmp_path)) < 500
    for _, _, errors in ends:
      assert f"stopped after step {step} of 500" in errors.splitlines()[-1]
    if when == "training":
      started = run(tmp_path, 2, "--config.stages[0].steps=500")
      while "resuming" not in started.processes[0].output():
        assert started.processes[0].poll() is None, started.errors()
        time.sleep(0.001)


@pytest.mark.slow
def test_a_checkpoint_that_one_cannot_write_ends_both(run, tmp_path):
  started = run(tmp_path, 2, "--config.stages[0].steps=500")
  started.reach(1)
  resource.prlimit(
    started.processes[1].pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY)
  )
  (*end, heard), (*other_end, said) = started.ends()
  assert end[0] == other_end[0] == RESUME_EXIT_CODE, (heard, said)
  message = f"Checkpoint {tmp_path}/checkpoints/4 could not be written (File too large), there is"
  assert said.startswith(f"error: {message}")
  assert heard.startswith(
    f"error: process 1 of 2 (host {socket.gethostname()}) has ended with an error: {message}"
  )
  assert max(losses(tmp_path)) < 500


@pytest.mark.slow
def test_a_workdir_that_is_not_shared_is_one_sentence(run, tmp_path):
  started = run(tmp_path, 2, f"--workdir={tmp_path}/PROCESS")
  for process, (status, _, errors) in enumerate(started.ends()):
    assert status == 1
    assert errors == (
      f"error: --workdir={tmp_path}/{process}: process 1 does not see what process 0 "
      "writes there; use a directory on a disk that all hosts share.\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize("before,after", [(2, 1), (1, 2)])
def test_goes_on_with_another_number_of_processes(run, pair, single, tmp_path, before, after):
  source = {1: single, 2: pair}[before]
  workdir = tmp_path / "run"
  shutil.copytree(source, workdir)
  assert checkpoints(workdir) == [4, 8, 12, STEPS]
  for step in (12, STEPS):
    shutil.rmtree(workdir / "checkpoints" / str(step))
  assert f"resuming {workdir} after step 8 of {STEPS}" in run(workdir, after).finish()
  assert_same_training(workdir, source)
