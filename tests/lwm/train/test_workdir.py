"""One run at a time; test_processes.py has processes that do not see the same directory."""

import os
import socket

import pytest

from lwm.errors import ResumeError, UserError
from lwm.train import loop
from lwm.train.workdir import held


def test_a_second_run_is_kept_out_until_the_first_has_ended(experiment, tmp_path):
  workdir = tmp_path / "run"
  for _ in range(2):
    with pytest.raises(ZeroDivisionError), held(workdir):
      with pytest.raises(ResumeError) as error:
        loop.train(experiment, workdir)
      assert str(error.value) == (
        f"{workdir} is in use by another run (process {os.getpid()} on {socket.gethostname()}): "
        "wait until it ends, or use another --workdir; if that run is gone for good, remove "
        f"{workdir}/lock."
      )
      assert [path.name for path in workdir.iterdir()] == ["lock"]
      raise ZeroDivisionError


def test_a_workdir_that_cannot_be_one_is_a_sentence(experiment, tmp_path):
  (tmp_path / "file").touch()
  with pytest.raises(UserError) as error:
    loop.train(experiment, tmp_path / "file")
  assert str(error.value) == (
    f"--workdir={tmp_path}/file cannot be written to (File exists): fix that, or use another "
    "directory."
  )
