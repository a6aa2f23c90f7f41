"""Processes that train together: how they find each other, and how they end when one is lost.

JAX's coordination service, which lives in process 0, introduces the processes to each other. What
it does about a loss is not enough: collectives wait for the lost process for ever, and after a
while the service aborts the others with a stack trace. So every process also writes a beat into the
service's table of keys, process 0 reads them all, and the others watch process 0. Whoever loses a
peer says which, and ends with RESUME_EXIT_CODE: start all processes again, and they resume.
"""

import contextlib
import ctypes
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
from jax._src import distributed

from lwm.errors import RESUME_EXIT_CODE, ResumeError, UserError

# Flags of experiments/, and the variables that stand in for them.
_EXPLICIT = {
  "coordinator": "JAX_COORDINATOR_ADDRESS",
  "num_processes": "JAX_NUM_PROCESSES",
  "process_id": "JAX_PROCESS_ID",
}

# A peer is lost after this many beats of one's own without a new one of its; the time-out has room
# for two more. Beats, not seconds: a process that was itself suspended blames no one.
_SILENT_BEATS = 10
_BEAT_KEY = "lwm/beat/"
_END_KEY = "lwm/end"
_GOOD_END = "{}"
_DAY_MS = 24 * 3600 * 1000

# Seconds for an error of a process's own, or JAX's log, to come first; and for process 0, whose end
# takes the service with it, to be heard.
_PATIENCE = 1
_LINGER = 3


@contextlib.contextmanager
def joined(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  peer_timeout: float = 60,
  start_timeout: int = 600,
) -> Iterator[None]:
  """Joins the other processes of the run, if there are any, for what runs inside.

  A coordinator that is given, by argument or environment, comes first; then what JAX detects:
  SLURM, TPU pods of one slice or several, indexed Kubernetes jobs. Without any of it nothing is
  done.

  Inside, a process that loses another prints one sentence that names it, and ends with
  RESUME_EXIT_CODE; an error in one process ends all, with its message and exit status 1. Must be
  entered before anything touches devices.

  Args:
    coordinator: HOST:PORT of process 0, or else JAX_COORDINATOR_ADDRESS.
    num_processes: or else JAX_NUM_PROCESSES.
    process_id: of this process, from 0, or else JAX_PROCESS_ID.
    peer_timeout: seconds without a sign of life after which a process is lost.
    start_timeout: seconds within which all processes must have started.

  Raises:
    UserError: the settings are given halfway, or cannot be.
  """
  settings = explicit_settings(coordinator, num_processes, process_id)
  _initialize(settings, peer_timeout, start_timeout)
  if distributed.global_state.num_processes == 1:
    yield
    return
  watch = Watch(distributed.global_state, peer_timeout)
  try:
    yield
    watch.finish(_DAY_MS)
  except ResumeError as error:
    watch.stop(error)
    raise
  except BaseException as error:
    watch.fail(error)


def explicit_settings(
  coordinator: str | None, num_processes: int | None, process_id: int | None
) -> dict[str, Any]:
  """Arguments of jax.distributed.initialize, empty if neither arguments nor environment say any.

  Raises:
    UserError: one of the three is missing, or makes no sense.
  """
  given = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
  for name, variable in _EXPLICIT.items():
    if given[name] is None:
      given[name] = os.environ.get(variable)
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == 3:
    return {}
  if missing:
    there = " and ".join(f"--{name}={value}" for name, value in given.items() if value is not None)
    absent = " and ".join(f"--{name} ({_EXPLICIT[name]})" for name in missing)
    raise UserError(
      f"{there} without {absent}: give all three, or none where SLURM, a TPU pod or an indexed "
      "Kubernetes job tells them."
    )
  host, _, port = given["coordinator"].rpartition(":")
  if not host or not port.isdigit():
    raise UserError(f"--coordinator={given['coordinator']}: this takes HOST:PORT of process 0.")
  try:
    count, index = int(given["num_processes"]), int(given["process_id"])
  except ValueError:
    count, index = 0, 0
  if not 0 <= index < count:
    raise UserError(
      f"--process_id={given['process_id']} and --num_processes={given['num_processes']}: "
      "processes are numbered from 0 to num_processes - 1."
    )
  return dict(coordinator_address=given["coordinator"], num_processes=count, process_id=index)


def _initialize(settings: dict[str, Any], peer_timeout: float, start_timeout: int) -> None:
  """Calls jax.distributed.initialize, unless this process is alone."""
  if not settings and _told_to_be_alone():
    return
  if settings and settings["process_id"] == 0:
    _see_that_port_is_free(settings["coordinator_address"])

  def give_up() -> None:
    state = distributed.global_state
    who = f"process {state.process_id} of {state.num_processes}"
    where = state.coordinator_address or "the coordinator"
    _exit(
      f"{who} has waited {start_timeout} s for the others at {where}: see that all of them run "
      "and reach it, and start the same command again.",
      RESUME_EXIT_CODE,
    )

  timer = threading.Timer(start_timeout, give_up)
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      **settings,
      # JAX ends a process whose time-outs have passed with abort(): ours come first.
      initialization_timeout=2 * start_timeout,
      heartbeat_timeout_seconds=int(4 * peer_timeout),
      # None: what JAX detects. Empty: all devices of the host.
      local_device_ids=[] if settings or _one_task_a_node() else None,
      cluster_detection_method="deactivate" if settings else None,
    )
  except ValueError as error:
    if "coordinator_address should be defined" not in str(error):
      raise
    if "JOB_COMPLETION_INDEX" in os.environ:
      raise UserError(
        f"this is pod {os.environ['JOB_COMPLETION_INDEX']} of an indexed job, and JAX cannot "
        f"find the others: set {', '.join(_EXPLICIT.values())}, or pip install 'jax[k8s]'."
      ) from error
  except jax.errors.JaxRuntimeError as error:
    # The only one that JAX raises here; a client that does not get through aborts.
    raise _port_is_taken(distributed.global_state.coordinator_address) from error
  finally:
    timer.cancel()


def _see_that_port_is_free(address: str) -> None:
  """Raises a UserError if not: there jaxlib 0.11.2 now and then ends with a segmentation fault."""
  dual = socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if dual else socket.AF_INET
  port = int(address.rpartition(":")[2])
  try:
    socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
  except OSError as error:
    raise _port_is_taken(address) from error


def _port_is_taken(address: str) -> UserError:
  return UserError(
    f"process 0 cannot listen on the port of {address}: another program, or an earlier start, "
    "has it; end that, or take another port."
  )


def _told_to_be_alone() -> bool:
  """Whether this is SLURM's only task, or a Kubernetes pod of no job: JAX would ask in vain."""
  job = ("JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
  pod = "KUBERNETES_SERVICE_HOST" in os.environ and not any(name in os.environ for name in job)
  return pod or os.environ.get("SLURM_NTASKS") == "1"


def _one_task_a_node() -> bool:
  """Whether SLURM has one task on each node: JAX would give it the first GPU and no other."""
  return bool(re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")))


class Watch:
  """Ends this process, with a sentence, when another is lost or has ended with an error."""

  def __init__(self, state: distributed.State, timeout: float):
    """Starts to watch, and to be watched.

    Args:
      state: of jax.distributed.initialize.
      timeout: seconds.
    """
    self._client = state.client
    host, _, port = state.coordinator_address.rpartition(":")
    # The address, not the name: that of a pod is gone with it.
    self._service = socket.getaddrinfo(host.strip("[]"), int(port))[0][4][:2]
    self._timeout = timeout
    self._beat_seconds = (timeout - _PATIENCE - _LINGER) / (_SILENT_BEATS + 2)
    self._process = state.process_id
    self._processes = state.num_processes
    self._finished = threading.Event()
    self._last_words = threading.RLock()
    # Of each peer that this process watches: host, last beat, and own beats since then.
    self._hosts = {self._process: socket.gethostname()}
    self._beats = {}
    self._silence = dict.fromkeys(range(1, self._processes) if self._process == 0 else [0], 0)
    _sleep_before_aborting()
    self._beat(0)
    self._read(0, self._client.blocking_key_value_get(f"{_BEAT_KEY}0", int(1000 * timeout)))
    targets = [self._listen, self._beat_on] + [self._watch_service] * (self._process > 0)
    self._threads = [threading.Thread(target=target, daemon=True) for target in targets]
    for thread in self._threads:
      thread.start()

  def finish(self, timeout_ms: int) -> None:
    """Returns when all processes are here. Raises JaxRuntimeError after `timeout_ms`."""
    self._client.wait_at_barrier("lwm/finish", timeout_ms)
    self._finished.set()
    if self._process == 0:
      self._client.key_value_set(_END_KEY, _GOOD_END)
    # A thread in one of JAX's calls must not outlive Python.
    for thread in self._threads[:2]:
      thread.join()

  def stop(self, error: ResumeError) -> None:
    """Returns when all processes stop; ends them all if some do not within the time-out."""
    try:
      self.finish(int(1000 * self._timeout))
    except jax.errors.JaxRuntimeError:
      self._end_all(str(error), RESUME_EXIT_CODE)

  def fail(self, error: BaseException) -> NoReturn:
    """Ends this process, and the others, because of `error`; unless it comes from a lost peer."""
    if isinstance(error, jax.errors.JaxRuntimeError):
      # What a collective says when a peer is gone names no one; the watch soon does.
      time.sleep(self._timeout)
    if not isinstance(error, UserError):
      traceback.print_exception(error)
    self._end_all(str(error).partition("\n")[0] or type(error).__name__, 1)

  def _beat(self, count: int) -> None:
    beat = f"{self._hosts[self._process]} {count}"
    self._client.key_value_set(f"{_BEAT_KEY}{self._process}", beat, allow_overwrite=True)

  def _read(self, process: int, beat: str) -> None:
    if self._beats.get(process) != beat:
      self._beats[process] = beat
      self._hosts[process] = beat.split()[0]
      self._silence[process] = 0

  def _beat_on(self) -> None:
    """Thread: beats; in process 0, reads the beats of all; in others, sees that it answers."""
    count = 0
    while not self._finished.wait(self._beat_seconds):
      count += 1
      # Whether the service is reached is for `_watch_service` to judge.
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        self._beat(count)
        if self._process:
          self._silence[0] = 0
          continue
        for key, beat in self._client.key_value_dir_get(_BEAT_KEY):
          self._read(int(key.rpartition("/")[2]), beat)
        for process in range(1, self._processes):
          self._silence[process] += 1
          if self._silence[process] > _SILENT_BEATS:
            self._tell(**self._lost(process))

  def _watch_service(self) -> None:
    """Thread: notices that process 0 is gone or no longer answers."""
    while not self._finished.is_set():
      self._silence[0] += 1
      if self._silence[0] > _SILENT_BEATS or self._service_is_gone():
        time.sleep(_PATIENCE)
        if not self._finished.is_set():
          self._end(**self._lost(0))

  def _service_is_gone(self) -> bool:
    """Waits for a beat, less if process 0 ends; whether it has ended.

    Its sockets know. Calls to the service do not: none returns while JAX's client aborts.
    """
    try:
      with socket.create_connection(self._service, self._beat_seconds) as connection:
        while connection.recv(1):
          pass
    except ConnectionRefusedError:
      return True
    except TimeoutError:
      return False
    except OSError:
      pass
    self._finished.wait(_PATIENCE)
    return False

  def _listen(self) -> None:
    """Thread: waits for what a peer has told."""
    words = None
    while words is None:
      try:
        words = self._client.blocking_key_value_get(_END_KEY, _DAY_MS)
      except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
          words = json.dumps(self._lost(0))
    if words != _GOOD_END:
      time.sleep(_PATIENCE)
      self._end(**json.loads(words))

  def _tell(self, message: str, status: int) -> None:
    """Has all processes end with this message, this one included, unless they end anyway."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._client.key_value_set(_END_KEY, json.dumps(dict(message=message, status=status)))

  def _end(self, message: str, status: int) -> NoReturn:
    """Ends this process; whoever comes later waits for that."""
    with self._last_words:
      _exit(message, status, linger=_LINGER if self._process == 0 else 0)

  def _end_all(self, message: str, status: int) -> NoReturn:
    """Ends this process with its own error, and the others with word of it."""
    with self._last_words:
      self._tell(f"{self._name(self._process)} has ended with an error: {message}", status)
      self._end(message, status)

  def _name(self, process: int) -> str:
    host = self._hosts.get(process, "unknown")
    return f"process {process} of {self._processes} (host {host})"

  def _lost(self, process: int) -> dict[str, Any]:
    message = (
      f"{self._name(process)} has been lost; start the same command again: it resumes from the "
      "last checkpoint."
    )
    return dict(message=message, status=RESUME_EXIT_CODE)


def _sleep_before_aborting() -> None:
  """Has abort() wait six seconds.

  When process 0 is gone, JAX's client calls abort() from a thread of its own, at once, and no hook
  comes between (its missed_heartbeat_callback fails in jaxlib 0.11.2, with std::bad_cast). A thread
  that aborts calls the handler below with the number of the signal, 6: meanwhile `Watch` has its
  say. No Python runs in the handler, so that nothing can go wrong in a process that is broken.
  """
  libc = ctypes.CDLL(None)
  libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
  libc.signal.restype = ctypes.c_void_p
  libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _exit(message: str, status: int, linger: float = 0) -> NoReturn:
  """Ends at once: after a loss, the usual way out would wait for the collectives in flight."""
  sys.stdout.flush()
  print(f"error: {message}", file=sys.stderr, flush=True)
  time.sleep(linger)
  os._exit(status)
