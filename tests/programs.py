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
TIMEOUT = 600
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


# Flags that tests/conftest.py sets for eight devices. Processes of pytest-xdist have them twice.
_FOR_EIGHT_DEVICES = (
  "--xla_force_host_platform_device_count",
  "--xla_cpu_enable_concurrency_optimized_scheduler",
  "--xla_cpu_collective_call_terminate_timeout_seconds",
)


def one_device() -> dict[str, str]:
  """The environment of a process with one CPU device, as on most machines."""
  flags = os.environ["XLA_FLAGS"].split()
  flags = [flag for flag in flags if not flag.startswith(_FOR_EIGHT_DEVICES)]
  environment = {name: value for name, value in os.environ.items() if name != "PJRT_NPROC"}
  return environment | {"XLA_FLAGS": " ".join(flags)}


def run(program: str, *arguments: object, several_devices: bool = False):
  """Runs `python -m program`, or `python -c program` if it has several lines, in the checkout.

  Returns:
    A subprocess.CompletedProcess. The program had one device, or all those of this process.
  """
  with tempfile.TemporaryDirectory() as folder:
    paths = [pathlib.Path(folder, name) for name in ("stdout", "stderr")]
    command = [program, *map(str, arguments)]
    process = _start(command, dict(os.environ) if several_devices else one_device(), paths)
    process.join(TIMEOUT)
    if process.is_alive():
      process.kill()
      raise subprocess.TimeoutExpired(command, TIMEOUT)
    output, errors = (path.read_text() if path.exists() else "" for path in paths)
    return subprocess.CompletedProcess(command, process.exitcode, output, errors)


def start(program: str, *arguments: object) -> multiprocessing.process.BaseProcess:
  """Starts what `run` runs, with one device and without its output, and does not wait."""
  null = pathlib.Path(os.devnull)
  return _start([program, *map(str, arguments)], one_device(), [null, null])


def _start(
  command: list[str], environment: dict[str, str], paths: list[pathlib.Path]
) -> multiprocessing.process.BaseProcess:
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(list(LIBRARIES))
  process = context.Process(target=_run, args=(command, environment, paths))
  process.start()
  return process


def _run(command: list[str], environment: dict[str, str], paths: list[pathlib.Path]) -> None:
  for descriptor, path in enumerate(paths, start=1):
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
  os.environ.clear()
  os.environ.update(environment)
  os.chdir(ROOT)
  program, *arguments = command
  sys.argv = ["-c", *arguments]
  if "\n" in program:
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    exec(compile(program, "<string>", "exec"), main.__dict__)
  else:
    runpy.run_module(program, run_name="__main__", alter_sys=True)
