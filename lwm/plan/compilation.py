"""A program compiled ahead of time, and its buffers according to XLA.

The sizes come from the compiler's dump of its buffer assignment: it exists even for a program that
does not fit, and only it says which operation a buffer belongs to.
"""

import dataclasses
import pathlib
import re
import resource
import tempfile
import textwrap
import time

import jax
from jax.experimental.compilation_cache import compilation_cache

from lwm.errors import UserError

# Memory spaces ("colors") of XLA's buffer assignment: 0 is the device's main memory on every
# platform, 1 is memory for collectives on GPUs but a scratchpad on TPUs, 5 is the host's memory.
_DEVICE_SPACES = {"tpu": {0}, "gpu": {0, 1}, "cuda": {0, 1}, "cpu": {0}}
_HOST_SPACE = 5
_ALLOCATION = re.compile(r"allocation \d+: size (\d+)(?:, color (\d+))?(?:, page \d+)?(.*)")
_VALUE = re.compile(
  r" value: <\d+ (\S+?)(?:\{[^ ]*)?( \(phi\))? @\d+> \(size=(\d+),offset=(\d+)\): (.*)"
)
# A tuple of shapes, as XLA writes it, layouts and comments included.
_SHAPES = re.compile(r"\((?:(?:/\*.*?\*/)?[a-z]\w*\[[\d,]*\](?:\{[^}]*\})?(?:, |(?=\))))+\)")
_OPERATION = re.compile(r'^\s*(?:ROOT )?%?(\S+) = .*op_name="([^"]*)"', re.MULTILINE)
# Errors that come after buffers are assigned and don't change the answer: too little memory on the
# device (not a kernel's vector memory, which no other mesh would fix), and an assembler on this
# machine that is too old for the devices.
_SETTLED = re.compile(
  r"RESOURCE_EXHAUSTED.*\bhbm\b|ptxas exited with non-zero", re.IGNORECASE | re.DOTALL
)

# libtpu unrolls the loops of convolutions as far as the scratchpad that it grants them allows, and
# takes seconds to generate the code of each. With 5 instead of 16 MiB, the step of
# configs/vqgan_lwm.py compiles for eight v5p in seven minutes of one core; with 16 MiB it does not
# end in nine. Its memory stays 7.7 GiB. One of its copies does not fit in 4 MiB.
_QUICK_CONVOLUTIONS = {"xla_tpu_scoped_vmem_limit_kib": "5120"}


@dataclasses.dataclass(frozen=True)
class Buffer:
  """One of a device's buffers.

  Attributes:
    bytes: its size, with padding.
    shape: as XLA writes it: `bf16[32,2,32768,4096]`.
    operation: JAX's name of the operation that it belongs to; "" if the operation is XLA's own.
  """

  bytes: int
  shape: str
  operation: str


@dataclasses.dataclass(frozen=True)
class Compilation:
  """A compiled program; sizes are bytes per device.

  Attributes:
    text: the optimised HLO.
    arguments: all arguments, donated or not.
    temporaries: the heap for everything between arguments and results.
    total: arguments, temporaries, results that share no memory with arguments, and constants.
    host: bytes in the host's memory.
    buffers: the largest first. Of buffers that reuse the same memory, only the largest is listed.
    seconds: time to compile.
    peak_rss: most bytes of memory that this process has used so far, the compiler included.
  """

  text: str
  arguments: int
  temporaries: int
  total: int
  host: int
  buffers: tuple[Buffer, ...]
  seconds: float
  peak_rss: int


def compile_ahead(lowered: jax.stages.Lowered, platform: str) -> Compilation:
  """Compiles for the devices that the program was lowered for. Too large a program is no error.

  Args:
    lowered: the result of `jax.jit(...).lower(...)`.
    platform: `jax.Device.platform` of those devices.

  Raises:
    UserError: the compiler refuses the program before it knows its memory.
  """
  if platform == "tpu" and _is_convolutional(lowered.as_text()):
    try:
      return _compile(lowered, platform, _QUICK_CONVOLUTIONS)
    except UserError as error:
      # One of the operations may need more of the scratchpad.
      if "ScopedVmem" not in str(error):
        raise
  return _compile(lowered, platform, {})


def _compile(lowered: jax.stages.Lowered, platform: str, options: dict[str, str]) -> Compilation:
  started = time.perf_counter()
  with tempfile.TemporaryDirectory() as folder:
    dumped = {"xla_dump_to": folder, "xla_dump_hlo_as_text": True}
    failure = None
    # A program from the cache would leave no dump. JAX reads the setting once, and again after a
    # reset.
    was_enabled = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    compilation_cache.reset_cache()
    try:
      lowered.compile(compiler_options=options | dumped)
    except jax.errors.JaxRuntimeError as error:
      failure = error
    finally:
      jax.config.update("jax_enable_compilation_cache", was_enabled)
      compilation_cache.reset_cache()
    dumps = sorted(pathlib.Path(folder).glob("*after_optimizations-buffer-assignment.txt"))
    if not dumps or (failure is not None and not _SETTLED.search(str(failure))):
      reason = first_sentence(str(failure))
      raise UserError(f"XLA cannot compile this for {platform}: {reason}") from failure
    text = pathlib.Path(str(dumps[-1]).replace("-buffer-assignment.txt", ".txt")).read_text()
    return read_assignment(dumps[-1].read_text(), text, platform, time.perf_counter() - started)


def _is_convolutional(text: str) -> bool:
  """Whether a program, as StableHLO, has convolutions, and no kernels that need the scratchpad."""
  return "stablehlo.convolution" in text and "tpu_custom_call" not in text


def first_sentence(error: str) -> str:
  """The first sentence of an XLA error. "(...)" replaces lists of shapes, which fill a page."""
  line = error.strip().partition("\n")[0]
  sentence = re.split(r"(?<=[.!?])\s+(?=[A-Z])", _SHAPES.sub("(...)", line))[0]
  return textwrap.shorten(sentence.rstrip(".: ") + ".", 250, placeholder=" ...")


def read_assignment(assignment: str, text: str, platform: str, seconds: float) -> Compilation:
  """Reads XLA's dump `*-buffer-assignment.txt`, and the HLO of the same module for names."""
  operations = {name: path.replace("\\'", "'") for name, path in _OPERATION.findall(text)}
  arguments = temporaries = total = host = 0
  slots = []  # (bytes, allocation, offset, shape, operation)
  counted, allocation = False, 0
  for line in assignment.splitlines():
    if match := _ALLOCATION.match(line):
      size, space, kind = int(match[1]), int(match[2] or 0), match[3]
      counted = space in _DEVICE_SPACES[platform] and "thread-local" not in kind
      allocation += 1
      if space == _HOST_SPACE:
        host += size
      if counted:
        total += size
        arguments += size if " parameter " in kind else 0
        temporaries += size if "preallocated-temp" in kind else 0
    elif counted and (match := _VALUE.match(line)):
      name, phi, bytes_, offset, shape = match.groups()
      if not shape.startswith("("):
        # Loops carry a buffer under other names; the operation that made it says more.
        operation = "" if phi else operations.get(name, "")
        slots.append((int(bytes_), allocation, int(offset), shape.split("{")[0], operation))
  # Linux counts in KiB; the compilers for other machines exist for Linux only.
  peak_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
  return Compilation(text, arguments, temporaries, total, host, _largest(slots), seconds, peak_rss)


def _largest(slots: list[tuple[int, int, int, str, str]], count: int = 12) -> tuple[Buffer, ...]:
  """The largest values, no two of which share memory."""
  slots.sort(key=lambda slot: (-slot[0], slot[4] == ""))
  taken: list[tuple[int, int, int]] = []
  buffers: list[Buffer] = []
  for size, allocation, offset, shape, operation in slots:
    if any(a == allocation and offset < stop and start < offset + size for a, start, stop in taken):
      continue
    taken.append((allocation, offset, offset + size))
    buffers.append(Buffer(size, shape, operation))
    if len(buffers) == count:
      break
  return tuple(buffers)
