"""A run that is killed again and again, whose checkpoints rot and whose disk fills up.

Whatever happens, the same command resumes from the last complete checkpoint, and ends with the
parameters and moments of an undisturbed run, bit for bit.
"""

import contextlib
import os
import pathlib
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

from lwm.errors import RESUME_EXIT_CODE
from tests import programs
from tests.lwm.train.test_resume import (
  complete,
  final_state,
  incomplete,
  kill_when,
  steps_done,
  what_was_learnt,
)

KILLS = 20
# A kill while the program starts costs less than one while it trains.
KINDS = ("starting", "training", "saving")
# From here on it only starts, so that the run does not end before the last kill.
NEAR_THE_END = 36


def assert_as_if_undisturbed(workdir: pathlib.Path, undisturbed: pathlib.Path) -> None:
  assert steps_done(workdir) == list(range(1, 52))
  assert what_was_learnt(workdir) == what_was_learnt(undisturbed)
  for left, right in zip(
    jax.tree.leaves(final_state(workdir)), jax.tree.leaves(final_state(undisturbed)), strict=True
  ):
    np.testing.assert_array_equal(left, right)


def damage(checkpoint: pathlib.Path, generator: random.Random) -> None:
  """Does one of three things to one of a checkpoint's files."""
  # Of these Orbax has no need, nor have we.
  spared = ("commit_success.txt", "_CHECKPOINT_METADATA")
  files = sorted(
    path for path in checkpoint.rglob("*") if path.is_file() and path.name not in spared
  )
  path = generator.choice(files)
  content = bytearray(path.read_bytes())
  kind = generator.choice(("flip", "truncate", "remove"))
  if kind == "flip":
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
  elif kind == "truncate":
    del content[generator.randrange(len(content)) :]
  if kind == "remove":
    path.unlink()
  else:
    path.write_bytes(content)


def whole(workdir: pathlib.Path, rotten: set[int]) -> list[int]:
  """Complete checkpoints that nothing was done to; `rotten` holds the inodes of the others."""
  inode = lambda step: (workdir / "checkpoints" / str(step)).stat().st_ino
  return [step for step in complete(workdir) if inode(step) not in rotten]


def a_moment(kind: str, workdir: pathlib.Path, generator: random.Random) -> Callable[[], bool]:
  """When to kill: told from what the run leaves on disk, and a random few polls later."""
  polls = generator.randrange(50)
  config, done = workdir / "config.txt", max(complete(workdir), default=0)
  steps = done + generator.randint(2, 8)
  begun = config.stat().st_mtime_ns if config.exists() else 0

  def reached() -> bool:
    nonlocal polls
    if not config.exists() or config.stat().st_mtime_ns == begun:
      return False
    # From here on, what is on record is this attempt's.
    if kind == "saving":
      due = bool(incomplete(workdir)) and max(complete(workdir), default=0) > done
    else:
      due = kind == "starting" or max(steps_done(workdir), default=0) >= steps
    polls -= due
    return due and polls < 0

  return reached


@pytest.mark.slow
def test_killed_and_damaged_twenty_times(start_program, undisturbed, tmp_path):
  generator = random.Random(4)
  workdir = tmp_path / "run"
  rotten = set()
  for _ in range(KILLS):
    last = max(whole(workdir, rotten), default=0)
    kind = "starting" if last >= NEAR_THE_END else generator.choice(KINDS)
    process = start_program("train", f"--workdir={workdir}")
    output, errors = kill_when(process, a_moment(kind, workdir, generator))
    assert "Traceback" not in errors, errors
    # If it came so far, it went on from the last whole checkpoint.
    found = re.search(r"^resuming .* after step (\d+) of 51$", output, re.MULTILINE)
    assert not found or int(found[1]) == last
    steps = whole(workdir, rotten)
    assert max(steps, default=0) >= last
    if len(steps) > 1 and generator.random() < 0.5:
      newest = workdir / "checkpoints" / str(steps[-1])
      rotten.add(newest.stat().st_ino)
      damage(newest, generator)
  process = start_program("train", f"--workdir={workdir}")
  output, errors = process.communicate(timeout=600)
  assert process.returncode == 0, errors
  # Nothing is lost that was ever complete and did not come out whole.
  aside = {path.stat().st_ino for path in (workdir / "checkpoints").glob("*.damaged*")}
  assert aside == rotten and len(rotten) > 2
  assert_as_if_undisturbed(workdir, undisturbed)


def wait_for(moment: Callable[[], bool], process: programs.Program) -> None:
  while not moment():
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.005)


def size_of(directory: pathlib.Path) -> int:
  """Bytes that a directory takes on a disk with pages of 4 KiB."""
  return sum(-(-path.stat().st_size // 4096) * 4096 for path in directory.rglob("*"))


@contextlib.contextmanager
def small_disk(path: pathlib.Path, megabytes: int):
  """A file system of so many megabytes."""
  path.mkdir()
  subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", path], check=True)
  try:
    yield path
  finally:
    subprocess.run(["umount", "--lazy", path], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes file systems; see the next test")
def test_ends_with_a_sentence_when_the_disk_is_full(start_program, undisturbed, tmp_path):
  ballast = tmp_path / "disk" / "ballast"
  with small_disk(tmp_path / "disk", 64) as disk:
    workdir = disk / "run"
    newest = 0
    # Two checkpoints of the end do not fit at first; after that, not one does. Those of the
    # beginning are smaller, because moments of ids that were not seen are zero.
    for checkpoints in (1.5, 0.5):
      room = int(checkpoints * size_of(undisturbed / "checkpoints" / "51"))
      with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - room)
      process = start_program("train", f"--workdir={workdir}")
      _, errors = process.communicate(timeout=600)
      assert process.returncode == RESUME_EXIT_CODE, errors
      assert errors.count("\n") == 1 and "No space left on device" in errors
      assert "run the same command again" in errors
      before, newest = newest, max(complete(workdir))
      assert before <= newest < 51
      ballast.unlink()
    process = start_program("train", f"--workdir={workdir}")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert_as_if_undisturbed(workdir, undisturbed)


@pytest.mark.slow
def test_a_checkpoint_that_cannot_be_written_ends_the_run(start_program, tmp_path):
  """By a limit on the size of files, which needs no root."""
  workdir = tmp_path / "run"
  process = start_program("train", f"--workdir={workdir}")
  # After the step is compiled: JAX keeps what it has of a program as if it were whole.
  wait_for(lambda: steps_done(workdir), process)
  resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
  _, errors = process.communicate(timeout=600)
  assert process.returncode == RESUME_EXIT_CODE, errors
  assert errors == (
    f"Checkpoint {workdir}/checkpoints/4 could not be written (File too large), there is none "
    "before it: fix the disk and run the same command again.\n"
  )
  assert list((workdir / "checkpoints").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_stops_when_told_to(start_program, undisturbed, tmp_path, number):
  workdir = tmp_path / "run"
  process = start_program("train", f"--workdir={workdir}")
  wait_for(lambda: max(steps_done(workdir), default=0) >= 5, process)
  process.send_signal(number)
  _, errors = process.communicate(timeout=600)
  assert process.returncode == RESUME_EXIT_CODE, errors
  done = steps_done(workdir)[-1]
  assert errors == (
    f"{number.name}: stopped after step {done} of 51; run the same command again to resume "
    f"from {workdir}/checkpoints/{done}.\n"
  )
  assert complete(workdir)[-1] == done
  if number == signal.SIGTERM:
    process = start_program("train", f"--workdir={workdir}")
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors
    assert_as_if_undisturbed(workdir, undisturbed)
