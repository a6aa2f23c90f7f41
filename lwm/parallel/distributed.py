"""Processes that train together: how they find each other, and how they end when one is lost.

JAX's coordination service runs in process 0 and introduces the processes to each other. What it
does about a lost process is not enough: collectives wait for that process forever, and after a
while the service aborts the others with a stack trace. So every process also writes a heartbeat
into the service's key-value store. Process 0 reads all heartbeats, and the others watch process 0.
A process that loses a peer names it and ends with RESUME_EXIT_CODE: start all processes again to
resume.
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

from lwm.errors import RESUME_EXIT_CODE, ResumeError, UserError
from lwm.parallel import coordination

# Flags of experiments/train.py, and the environment variables that replace them.
_EXPLICIT = {
  "coordinator": "JAX_COORDINATOR_ADDRESS",
  "num_processes": "JAX_NUM_PROCESSES",
  "process_id": "JAX_PROCESS_ID",
}

# A peer is lost when it has sent no heartbeat during this many of our own; the time-out leaves room
# for two more. We count heartbeats and not seconds, so that a process that was suspended itself
# blames no other process.
_SILENT_BEATS = 10
_BEAT_KEY = "lwm/beat/"
_END_KEY = "lwm/end"
_GOOD_END = "{}"
_DAY_MS = 24 * 3600 * 1000

# Seconds to wait so that a process's own error, or JAX's log, is printed first.
_PATIENCE = 1
# Seconds for which process 0 stays, so that the others hear its message: the service ends with it.
_LINGER = 3


@contextlib.contextmanager
def joined(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  peer_timeout: float = 60,
  start_timeout: int = 600,
) -> Iterator[None]:
  """Context manager that joins the other processes of the run, if the run has any.

  Settings from the arguments or the environment take precedence over what JAX detects: SLURM, TPU
  pods of one or several slices, and indexed Kubernetes jobs. With neither, this does nothing.

  Inside the context, a process that loses another one prints a sentence that names it and ends
  with RESUME_EXIT_CODE. An error in one process ends all of them with its message and exit status
  1. Enter the context before anything uses devices.

  Args:
    coordinator: HOST:PORT of process 0; JAX_COORDINATOR_ADDRESS if None.
    num_processes: number of processes; JAX_NUM_PROCESSES if None.
    process_id: number of this process, from 0; JAX_PROCESS_ID if None.
    peer_timeout: seconds without a heartbeat after which a process is lost.
    start_timeout: seconds within which all processes must have started.

  Raises:
    UserError: the settings are incomplete or make no sense.
  """
  settings = explicit_settings(coordinator, num_processes, process_id)
  _initialize(settings, peer_timeout, start_timeout)
  if coordination.state.num_processes == 1:
    yield
    return
  watch = Watch(coordination.state, peer_timeout)
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
  """Arguments of jax.distributed.initialize, empty if neither arguments nor environment give any.

  Raises:
    UserError: one of the three is missing, or makes no sense.
  """
  arguments = dict(coordinator=coordinator, num_processes=num_processes, process_id=process_id)
  given: dict[str, Any] = {
    name: os.environ.get(_EXPLICIT[name]) if value is None else value
    for name, value in arguments.items()
  }
  missing = [name for name, value in given.items() if value is None]
  if len(missing) == 3:
    return {}
  if missing:
    present = " and ".join(
      f"--{name}={value}" for name, value in given.items() if value is not None
    )
    absent = " and ".join(f"--{name} ({_EXPLICIT[name]})" for name in missing)
    raise UserError(
      f"{present} without {absent}: give all three, or none where SLURM, a TPU pod or an indexed "
      "Kubernetes job provides them."
    )
  host, _, port = given["coordinator"].rpartition(":")
  if not host or not port.isdigit():
    raise UserError(f"--coordinator={given['coordinator']} must be HOST:PORT of process 0.")
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
  """Calls jax.distributed.initialize, unless this process is the only one."""
  if not settings and _is_known_to_be_alone():
    return
  if settings and settings["process_id"] == 0:
    _check_port_is_free(settings["coordinator_address"])

  def give_up() -> None:
    state = coordination.state
    who = f"process {state.process_id} of {state.num_processes}"
    where = state.coordinator_address or "the coordinator"
    _exit(
      f"{who} has waited {start_timeout} s for the others at {where}: check that all of them run "
      "and can reach it, and start the same command again.",
      RESUME_EXIT_CODE,
    )

  timer = threading.Timer(start_timeout, give_up)
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      **settings,
      # When one of JAX's time-outs passes, JAX calls abort(): ours must pass first.
      initialization_timeout=2 * start_timeout,
      heartbeat_timeout_seconds=int(4 * peer_timeout),
      # None takes what JAX detects, an empty list takes all devices of the host.
      local_device_ids=[] if settings or _has_one_task_per_node() else None,
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
    # JAX raises this only in process 0; a client that cannot connect aborts.
    raise _port_is_taken(str(coordination.state.coordinator_address)) from error
  finally:
    timer.cancel()


def _check_port_is_free(address: str) -> None:
  """Raises a UserError if the port is in use: jaxlib 0.11.2 sometimes crashes on such a port."""
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
    "uses it; end that program, or choose another port."
  )


def _is_known_to_be_alone() -> bool:
  """Whether this is SLURM's only task or a Kubernetes pod outside a job: JAX would find no peer."""
  job = ("JOB_COMPLETION_INDEX", "TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES")
  pod = "KUBERNETES_SERVICE_HOST" in os.environ and not any(name in os.environ for name in job)
  return pod or os.environ.get("SLURM_NTASKS") == "1"


def _has_one_task_per_node() -> bool:
  """Whether SLURM runs one task per node: JAX would give that task only the node's first GPU."""
  return bool(re.fullmatch(r"1(\(x\d+\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")))


class Watch:
  """Ends this process, with a sentence, when another one is lost or has ended with an error."""

  def __init__(self, state: coordination.State, timeout: float):
    """Starts the threads that send this process's heartbeat and watch its peers.

    Args:
      state: this process's view of the coordination service, initialized.
      timeout: seconds without a heartbeat after which a peer is lost.
    """
    assert state.client is not None and state.coordinator_address is not None
    self._client = state.client
    host, _, port = state.coordinator_address.rpartition(":")
    # The address and not the name: the name of a pod disappears with the pod.
    self._service: Any = socket.getaddrinfo(host.strip("[]"), int(port))[0][4][:2]
    self._timeout = timeout
    self._beat_seconds = (timeout - _PATIENCE - _LINGER) / (_SILENT_BEATS + 2)
    self._process = state.process_id
    self._processes = state.num_processes
    self._finished = threading.Event()
    self._last_words = threading.RLock()
    # For each peer that this process watches: host, last heartbeat, and our own heartbeats since.
    self._hosts = {self._process: socket.gethostname()}
    self._beats: dict[int, str] = {}
    self._silence = dict.fromkeys(range(1, self._processes) if self._process == 0 else [0], 0)
    _sleep_before_aborting()
    self._beat(0)
    self._read(0, self._client.blocking_key_value_get(f"{_BEAT_KEY}0", int(1000 * timeout)))
    targets = [self._listen, self._beat_on] + [self._watch_service] * (self._process > 0)
    self._threads = [threading.Thread(target=target, daemon=True) for target in targets]
    for thread in self._threads:
      thread.start()

  def finish(self, timeout_ms: int) -> None:
    """Returns when all processes call this. Raises JaxRuntimeError after `timeout_ms`."""
    self._client.wait_at_barrier("lwm/finish", timeout_ms)
    self._finished.set()
    if self._process == 0:
      self._client.key_value_set(_END_KEY, _GOOD_END)
    # A thread inside one of JAX's calls must not outlive Python.
    for thread in self._threads[:2]:
      thread.join()

  def stop(self, error: ResumeError) -> None:
    """Returns when all processes stop; ends them all if one does not stop within the time-out."""
    try:
      self.finish(int(1000 * self._timeout))
    except jax.errors.JaxRuntimeError:
      self._end_all(str(error), RESUME_EXIT_CODE)

  def fail(self, error: BaseException) -> NoReturn:
    """Ends this process and all others because of `error`, unless a lost peer caused it."""
    if isinstance(error, jax.errors.JaxRuntimeError):
      # A collective that fails because a peer is gone does not name the peer; the watch soon does.
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
    """Thread that sends heartbeats; process 0 also reads them, the others note that it answers."""
    count = 0
    while not self._finished.wait(self._beat_seconds):
      count += 1
      # `_watch_service` decides whether the service can still be reached.
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
    """Thread that notices when process 0 is gone or no longer answers."""
    while not self._finished.is_set():
      self._silence[0] += 1
      if self._silence[0] > _SILENT_BEATS or self._service_is_gone():
        time.sleep(_PATIENCE)
        if not self._finished.is_set():
          self._end(**self._lost(0))

  def _service_is_gone(self) -> bool:
    """Waits for the time of one heartbeat, or until process 0 ends; returns whether it has ended.

    This asks the sockets of process 0. Calls to the service return nothing while JAX's client
    aborts.
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
    """Thread that waits for the message with which a peer ends all processes."""
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
    """Tells all processes, this one included, to end with a message, unless they already end."""
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      self._client.key_value_set(_END_KEY, json.dumps(dict(message=message, status=status)))

  def _end(self, message: str, status: int) -> NoReturn:
    """Ends this process; other threads that want to end it wait meanwhile."""
    with self._last_words:
      _exit(message, status, linger=_LINGER if self._process == 0 else 0)

  def _end_all(self, message: str, status: int) -> NoReturn:
    """Ends this process with its own error, and tells the others to end because of it."""
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
  """Makes abort() wait six seconds, so that `Watch` can print its message first.

  When process 0 is gone, JAX's client calls abort() from a thread of its own at once, and offers no
  hook before it (in jaxlib 0.11.2 its missed_heartbeat_callback fails with std::bad_cast). This
  installs libc's sleep() as the signal handler: abort() calls it with the number of the signal, 6.
  The handler runs no Python, so it is safe in a broken process.
  """
  libc = ctypes.CDLL(None)
  libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
  libc.signal.restype = ctypes.c_void_p
  libc.signal(signal.SIGABRT, ctypes.cast(libc.sleep, ctypes.c_void_p))


def _exit(message: str, status: int, linger: float = 0) -> NoReturn:
  """Ends at once: after a loss, a normal exit would wait for the collectives in flight."""
  sys.stdout.flush()
  print(f"error: {message}", file=sys.stderr, flush=True)
  time.sleep(linger)
  os._exit(status)
