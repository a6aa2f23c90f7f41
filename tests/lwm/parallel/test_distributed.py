"""Processes find each other and end together; tests/lwm/train/test_processes.py loses one."""

import os
import re
import socket

import pytest

from lwm.errors import RESUME_EXIT_CODE, UserError
from lwm.parallel.distributed import explicit_settings
from tests.programs import Program

HOST = socket.gethostname()


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def start(process="", num_processes="", coordinator="", action="", start_timeout=300, **variables):
  arguments = [process, num_processes, start_timeout, coordinator, action]
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  return Program(
    "tests.lwm.parallel.joined_worker", *arguments, environment=environment | variables
  )


def results(processes):
  """(exit status, last line of the output, last line of the errors) per process."""
  try:
    ends = [process.communicate(timeout=300) for process in processes]
  finally:
    for process in processes:
      process.kill()
  return [
    (process.returncode, (output.splitlines() or [""])[-1], (errors.splitlines() or [""])[-1])
    for process, (output, errors) in zip(processes, ends)
  ]


def pair(*actions):
  coordinator = f"127.0.0.1:{free_port()}"
  return results([start(process, 2, coordinator, action) for process, action in enumerate(actions)])


def test_alone_nothing_is_initialized():
  assert results([start()]) == [(0, "1 0", "")]


def test_one_task_of_slurm_is_alone():
  variables = dict(SLURM_JOB_ID="1", SLURM_STEP_NODELIST="localhost", SLURM_NTASKS="1")
  assert results([start(**variables, SLURM_LOCALID="0", SLURM_PROCID="0")]) == [(0, "1 0", "")]


def test_slurm_provides_all_settings():
  # JAX computes the port from the number of the job: 65535 - 4095 + number.
  job = free_port() % 4096
  variables = dict(
    SLURM_JOB_ID=str(job), SLURM_STEP_NODELIST="localhost", SLURM_NTASKS="2", SLURM_LOCALID="0"
  )
  ends = results([start(SLURM_PROCID=str(process), **variables) for process in range(2)])
  assert [end[0] for end in ends] == [0, 0]
  assert [end[1] for end in ends] == ["2 0", "2 1"]


@pytest.mark.slow
def test_an_error_in_one_ends_all_with_its_message():
  (waiting, _, heard), (failed, _, said) = pair("wait", "err")
  assert (waiting, failed) == (1, 1)
  assert said == "error: shard 3 is broken."
  assert heard == (
    f"error: process 1 of 2 (host {HOST}) has ended with an error: shard 3 is broken."
  )


def test_processes_stop_together():
  ends = pair("stop", "stop")
  assert [end[0] for end in ends] == [RESUME_EXIT_CODE] * 2
  assert [end[2] for end in ends] == ["stopped by SIGTERM."] * 2


@pytest.mark.slow
def test_a_process_that_never_starts_is_reported():
  (end,) = results([start(1, 2, "127.0.0.1:1", start_timeout=2)])
  assert end[0] == RESUME_EXIT_CODE
  assert end[2] == (
    "error: process 1 of 2 has waited 2 s for the others at 127.0.0.1:1: check that all of "
    "them run and can reach it, and start the same command again."
  )


def test_a_port_that_is_taken_is_named():
  with socket.socket() as taken:
    taken.bind(("0.0.0.0", 0))
    taken.listen()
    coordinator = f"127.0.0.1:{taken.getsockname()[1]}"
    (end,) = results([start(0, 2, coordinator)])
  assert end[0] == 1
  assert end[2].startswith(f"error: process 0 cannot listen on the port of {coordinator}: another")


def test_a_job_whose_pods_cannot_be_found_is_an_error():
  (end,) = results([start(JOB_COMPLETION_INDEX="3")])
  assert end[0] == 1
  assert end[2].startswith("error: this is pod 3 of an indexed job, and JAX cannot find the others")


def test_environment_variables_replace_flags(monkeypatch):
  assert explicit_settings(None, None, None) == {}
  monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "node-0:1234")
  monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
  assert explicit_settings(None, 2, 1) == dict(
    coordinator_address="node-0:1234", num_processes=2, process_id=1
  )


@pytest.mark.parametrize(
  "settings,message",
  [
    (("node:1", 2, None), "--coordinator=node:1 and --num_processes=2 without --process_id"),
    ((None, None, 0), "--process_id=0 without --coordinator (JAX_COORDINATOR_ADDRESS) and"),
    (("node", 2, 1), "--coordinator=node must be HOST:PORT"),
    (("node:1", 2, 2), "--process_id=2 and --num_processes=2: processes are numbered from 0"),
  ],
)
def test_incomplete_settings_are_one_sentence(settings, message):
  with pytest.raises(UserError, match=re.escape(message)):
    explicit_settings(*settings)
