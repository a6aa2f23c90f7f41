"""What a run is, and whether two runs are one: the settings that a resumed run may change."""

import dataclasses
import re
import typing
from typing import Any

from lwm.config.experiment import Experiment

# Settings, as regular expressions over their paths, that may differ from the run being resumed.
FREE = (
  r"name",
  # The tokenizer's bytes are compared instead; data is found wherever it has moved to.
  r"tokenizer",
  r"datasets\[\d+\]\.path",
  r"data\..*",
  r"checkpoint\..*",
  r"evaluation\..*",
  r"faults\..*",
  # The same batches and the same mathematics, cut up in another way.
  r"stages\[\d+\]\.(mesh\..*|layout|accumulation_steps)",
  r"model\.(remat|head_groups|feed_forward_chunk|loss_chunk)",
  r"optimizer\.offload",
)


@dataclasses.dataclass(frozen=True)
class Identity:
  """What a run is: two runs with one identity and one progress go on in the same way.

  `tokenizer` is the content of its file, `manifests` the SHA-256 of each dataset's, by name.
  """

  experiment: Experiment
  tokenizer: bytes
  manifests: dict[str, str]


def with_defaults(stored: Any, kind: Any) -> Any:
  """A stored experiment as nested dicts and lists; settings newer than it are at their defaults.

  Args:
    stored: of an experiment, or of a part of one.
    kind: the type of that part, as the dataclass that holds it declares it.
  """
  if isinstance(stored, dict) and dataclasses.is_dataclass(kind):
    kinds = {field.name: field.type for field in dataclasses.fields(kind)}
    known = {name: with_defaults(value, kinds.get(name)) for name, value in stored.items()}
    return dataclasses.asdict(kind()) | known
  if isinstance(stored, list) and typing.get_origin(kind) is list:
    return [with_defaults(entry, *typing.get_args(kind)) for entry in stored]
  return stored


def first_difference(stored: Any, current: Any, path: str = "") -> str | None:
  """The first setting in which two experiments (as nested dicts and lists) differ, but for FREE.

  Returns:
    "config.PATH=STORED, not CURRENT", or None.
  """
  if any(re.fullmatch(pattern, path) for pattern in FREE):
    return None
  if isinstance(stored, dict) and isinstance(current, dict):
    pairs = [
      (f"{path}.{key}".lstrip("."), stored.get(key), current.get(key)) for key in current | stored
    ]
  elif isinstance(stored, list) and isinstance(current, list) and len(stored) == len(current):
    pairs = [(f"{path}[{index}]", *pair) for index, pair in enumerate(zip(stored, current))]
  elif isinstance(stored, list) and isinstance(current, list):
    return f"{len(stored)} config.{path}, not {len(current)}"
  else:
    return None if stored == current else f"config.{path}={stored!r}, not {current!r}"
  differences = (first_difference(ours, theirs, where) for where, ours, theirs in pairs)
  return next((difference for difference in differences if difference), None)
