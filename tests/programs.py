"""Runs programs as `python -m` does, without importing JAX and the data libraries for each of them.

A server imports the libraries once per test process, and each program runs in a fork of it. The
server never uses a device, so it has no threads that a fork would lose. JAX has read its variables
(JAX_PLATFORMS and others) by then: a test that changes them needs a process of its own.
"""

import atexit
import gc
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import tempfile
import types

import jax

ROOT = pathlib.Path(__file__).parents[1]
TIMEOUT = 600
# What programs import. Programs themselves define flags, so each is imported in its own process.
LIBRARIES = (
  "experiments.flags",
  "experiments.runtime",
  "lwm.train.loop",
  "lwm.infer",
  "lwm.plan",
  "lwm.vision.codec",
  "tensorflow_datasets",
  "pyarrow.parquet",
)


# Flags that tests/conftest.py sets for eight devices. Processes of pytest-xdist have them twice.
_FOR_EIGHT_DEVICES = (
  "--xla_force_host_platform_device_count",
  "--xla_cpu_collective_call_terminate_timeout_seconds",
)


def one_device() -> dict[str, str]:
  """The environment of a process with one CPU device, as on most machines."""
  flags = os.environ["XLA_FLAGS"].split()
  flags = [flag for flag in flags if not flag.startswith(_FOR_EIGHT_DEVICES)]
  environment = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
  return environment | {"XLA_FLAGS": " ".join(flags), "JAX_ENABLE_COMPILATION_CACHE": "true"}


class Program:
  """A program that was started; it has what the tests need of subprocess.Popen."""

  def __init__(self, program: str, *arguments: object, environment: dict[str, str]):
    """Starts `python -m program`, or `python -c program` if it has several lines, in the checkout.

    The process leads a group of its own.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(LIBRARIES))
    self._command = [program, *map(str, arguments)]
    self._folder = tempfile.TemporaryDirectory()
    self._paths = [pathlib.Path(self._folder.name, name) for name in ("stdout", "stderr")]
    for path in self._paths:
      path.touch()
    self._process = context.Process(target=_run, args=(self._command, environment, self._paths))
    self._process.start()
    self.pid = self._process.pid

  @property
  def returncode(self) -> int | None:
    return self._process.exitcode

  def poll(self) -> int | None:
    return self._process.exitcode

  def wait(self, timeout: float = TIMEOUT) -> int:
    self._process.join(timeout)
    if self._process.is_alive():
      raise subprocess.TimeoutExpired(self._command, timeout)
    return self._process.exitcode

  def communicate(self, timeout: float = TIMEOUT) -> tuple[str, str]:
    """Waits for the end; returns all output and all errors."""
    self.wait(timeout)
    return self.output(), self._paths[1].read_text()

  def output(self) -> str:
    """What it has printed so far."""
    return self._paths[0].read_text()

  def send_signal(self, number: int) -> None:
    if self.poll() is None:
      os.kill(self.pid, number)

  def kill(self) -> None:
    self.send_signal(signal.SIGKILL)


def run(program: str, *arguments: object, several_devices: bool = False):
  """Runs a program to its end.

  Returns:
    A subprocess.CompletedProcess. The program had one device, or all those of this process.
  """
  environment = dict(os.environ) if several_devices else one_device()
  started = Program(program, *arguments, environment=environment)
  try:
    output, errors = started.communicate()
  finally:
    started.kill()
  return subprocess.CompletedProcess([program, *arguments], started.returncode, output, errors)


def start(program: str, *arguments: object) -> Program:
  """Starts what `run` runs, with one device, and does not wait."""
  return Program(program, *arguments, environment=one_device())


def _run(command: list[str], environment: dict[str, str], paths: list[pathlib.Path]) -> None:
  os.setsid()
  # Collections need not visit the libraries.
  gc.freeze()
  for descriptor, path in enumerate(paths, start=1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), descriptor)
  os.environ.clear()
  os.environ.update(environment)
  os.chdir(ROOT)
  # JAX has read these variables in the server.
  jax.config.update(
    "jax_numpy_rank_promotion", environment.get("JAX_NUMPY_RANK_PROMOTION", "allow")
  )
  jax.config.update(
    "jax_enable_compilation_cache", environment["JAX_ENABLE_COMPILATION_CACHE"] == "true"
  )
  program, *arguments = command
  sys.argv = ["-c", *arguments]
  try:
    if "\n" in program:
      main = sys.modules["__main__"] = types.ModuleType("__main__")
      exec(compile(program, "<string>", "exec"), main.__dict__)
    else:
      runpy.run_module(program, run_name="__main__", alter_sys=True)
  finally:
    # multiprocessing leaves them out.
    atexit._run_exitfuncs()
