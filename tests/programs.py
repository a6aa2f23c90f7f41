"""Runs programs as `python -m` does, without importing JAX and the data libraries for each of them.

A server imports the libraries once per test process, and each program runs in a fork of it. The
server never uses a device, so it has no threads that a fork would lose. JAX has read its variables
(JAX_PLATFORMS and others) by then: a test that changes them needs a process of its own.
"""

import multiprocessing
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile
import types

ROOT = pathlib.Path(__file__).parents[1]
# What programs import. Programs themselves define flags, so each is imported in its own process.
LIBRARIES = (
  "experiments.flags",
  "experiments.runtime",
  "lwm.train.loop",
  "lwm.infer",
  "lwm.plan",
  "lwm.vision.fit",
  "tensorflow_datasets",
  "pyarrow.parquet",
)


def run(program: str, *arguments: object, timeout: float = 600) -> subprocess.CompletedProcess:
  """Runs `python -m program`, or `python -c program` if it has several lines, in the checkout."""
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(list(LIBRARIES))
  with tempfile.TemporaryDirectory() as folder:
    paths = [pathlib.Path(folder, name) for name in ("stdout", "stderr")]
    process = context.Process(target=_run, args=(program, list(map(str, arguments)), paths))
    process.start()
    process.join(timeout)
    if process.is_alive():
      process.kill()
      raise subprocess.TimeoutExpired(program, timeout)
    command = [program, *map(str, arguments)]
    return subprocess.CompletedProcess(
      command, process.exitcode, *(path.read_text() for path in paths)
    )


def _run(program: str, arguments: list[str], paths: list[pathlib.Path]) -> None:
  for descriptor, path in enumerate(paths, start=1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
  os.chdir(ROOT)
  sys.argv = ["-c", *arguments]
  if "\n" in program:
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(program, "<string>", "exec"), main.__dict__)
  else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
