"""The batch stream on one process with eight devices, on two with four each, and after a resume."""

import json
import os
import pickle
import socket

import pytest

from lwm.config.batch import FIELDS
from tests import programs


def _stream(experiment, directory, num_processes, start_step=0):
  """What each process reports, in a run of its own."""
  directory.mkdir()
  (directory / "experiment.pickle").write_bytes(pickle.dumps(experiment))
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
  outs = [directory / f"{rank}.json" for rank in range(num_processes)]
  processes = [
    programs.Program(
      "tests.lwm.data.stream_worker",
      directory / "experiment.pickle",
      out,
      8 // num_processes,
      port,
      num_processes,
      rank,
      start_step,
      environment=dict(os.environ),
    )
    for rank, out in enumerate(outs)
  ]
  try:
    assert [process.wait(timeout=120) for process in processes] == [0] * num_processes
  finally:
    for process in processes:
      process.kill()
  return [json.loads(out.read_text()) for out in outs]


@pytest.mark.slow
def test_two_processes_and_a_resume_give_the_stream_of_one(experiment, tmp_path):
  experiment.stages[0].steps = 6
  (one,) = _stream(experiment, tmp_path / "one", 1)
  two = _stream(experiment, tmp_path / "two", 2)
  resumed = _stream(experiment, tmp_path / "resumed", 2, start_step=4)
  for mesh, whole in one.items():
    hashes = whole["hashes"]
    assert len(hashes) >= 6 * len(FIELDS) * 4
    halves = [process[mesh]["hashes"] for process in two]
    assert halves[0] | halves[1] == hashes
    # Each process holds a half of its own, and reads that, plus the target after each slice.
    assert not halves[0].keys() & halves[1].keys()
    read = [process[mesh]["tokens_read"] for process in two]
    assert max(read) < 0.65 * whole["tokens_read"]
    assert sum(read) < 1.1 * whole["tokens_read"]
    rest = {}
    for process in resumed:
      rest |= process[mesh]["hashes"]
    assert rest == {place: digest for place, digest in hashes.items() if int(place.split()[0]) >= 4}
    assert rest
