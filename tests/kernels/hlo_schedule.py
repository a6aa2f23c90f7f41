"""Finds the kernels that a compiled TPU program schedules during each transfer."""

import re
from typing import NamedTuple

_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) .*\{$")
_INSTRUCTION = re.compile(r"^  (?:ROOT )?%(\S+) = (.*?) ([a-z][a-z0-9-]*)\((.*)$")
_CALLS = re.compile(
  r"(?:calls|to_apply|body|branch_computations|true_computation|false_computation)="
  r"(\{[^}]*\}|%[^,\s]+)"
)
_NAME = re.compile(r"%([^\s,(){}]+)")
_TRANSFERS = ("collective-permute", "ragged-all-to-all")


class Transfer(NamedTuple):
  """One collective-permute or ragged all-to-all of the program.

  Attributes:
    array: the transferred array, such as "bf16[1,65536,1,128]".
    times: how often it runs, given the loops around it.
    kernels: the Pallas kernels and matrix products scheduled between its start and its done, also
      in branches of conditionals and bodies of loops; one name per call in the program's text.
  """

  array: str
  times: int
  kernels: frozenset[str]


class _Instruction(NamedTuple):
  name: str
  shape: str
  opcode: str
  rest: str

  @property
  def calls(self) -> list[str]:
    return [name for group in _CALLS.findall(self.rest) for name in _NAME.findall(group)]


class Schedule:
  """A scheduled HLO module, as `jax.stages.Compiled.as_text()` prints it."""

  def __init__(self, text: str):
    header, *lines = text.splitlines()
    if "is_scheduled=true" not in header:
      raise ValueError("The order of this program's instructions is not that of their execution.")
    self._computations, self._entry = {}, None
    for line in lines:
      if match := _COMPUTATION.match(line):
        instructions = self._computations.setdefault(match[1], [])
        if line.startswith("ENTRY"):
          self._entry = match[1]
      elif match := _INSTRUCTION.match(line):
        instructions.append(_Instruction(*match.groups()))

  def kernels(self) -> frozenset[str]:
    """All calls of Pallas kernels, and all matrix products."""
    return self._kernels(self._computations[self._entry])

  def transfers(self) -> list[Transfer]:
    """All of them. One that is not asynchronous overlaps with no kernel."""
    return self._transfers(self._entry, 1)

  def _kernels(self, instructions) -> frozenset[str]:
    found = set()
    for instruction in instructions:
      is_kernel = instruction.opcode == "custom-call" and '"tpu_custom_call"' in instruction.rest
      if is_kernel or instruction.opcode == "convolution":
        found.add(instruction.name)
      for called in instruction.calls:
        found |= self._kernels(self._computations[called])
    return frozenset(found)

  def _transfers(self, computation: str, times: int) -> list[Transfer]:
    found = []
    instructions = self._computations[computation]
    for index, instruction in enumerate(instructions):
      if (transfer := self._transfer(instruction)) is not None:
        array = re.search(r"\w+\[[0-9,]*\]", transfer.shape)[0]
        last = self._done(instructions, index)
        found.append(Transfer(array, times, self._kernels(instructions[index:last])))
        continue
      inner = [item for called in instruction.calls for item in self._transfers(called, times)]
      # The bound of a loop without transfers may depend on data.
      if instruction.opcode == "while" and inner:
        trips = self._trips(instruction)
        inner = [item._replace(times=item.times * trips) for item in inner]
      found += inner
    return found

  def _transfer(self, instruction: _Instruction) -> _Instruction | None:
    """The transfer that an instruction does or starts."""
    if instruction.opcode.removesuffix("-start") in _TRANSFERS:
      return instruction
    if instruction.opcode != "async-start":
      return None
    (called,) = instruction.calls
    root = self._computations[called][-1]
    return root if root.opcode in _TRANSFERS else None

  def _done(self, instructions, start: int) -> int:
    """The index of what waits for a transfer; its own if it is not asynchronous."""
    if instructions[start].opcode in _TRANSFERS:
      return start
    done = instructions[start].opcode.replace("-start", "-done")
    return next(
      index
      for index, instruction in enumerate(instructions)
      if instruction.opcode == done
      and _NAME.search(instruction.rest)[1] == instructions[start].name
    )

  def _trips(self, loop: _Instruction) -> int:
    """Of a loop that counts from 0: the one constant of its condition."""
    condition = re.search(r"condition=%([^,\s]+)", loop.rest)[1]
    (bound,) = (
      instruction.rest.split(")")[0]
      for instruction in self._computations[condition]
      if instruction.opcode == "constant"
    )
    return int(bound)
