"""What a run is, and which settings may change when it resumes.

What a run has computed is fixed: a setting that would have changed it cannot change. What is still
to come may change: the steps of the current stage, later stages, and datasets that no stage so far
has read. Settings in FREE change nothing but the order of float32 sums and may always change.
"""

import dataclasses
import hashlib
import json
import re
import typing
from typing import Any

from lwm.checkpoint.position import Position
from lwm.config.experiment import AnyExperiment

# Settings that may always change, as regular expressions over their paths.
FREE = (
  r"name",
  # Read only where there is no checkpoint yet.
  r"init_from",
  # The tokenizer's bytes are compared instead, and datasets by their manifests: files may move.
  r"tokenizer",
  r"datasets\..*\.path",
  r"data\..*",
  r"checkpoint\..*",
  r"evaluation\..*",
  r"faults\..*",
  # The same batches and the same mathematics, divided differently.
  r"stages\[\d+\]\.(mesh\..*|layout|accumulation_steps)",
  r"model\.(remat|head_groups|feed_forward_chunk|loss_chunk|vocab_multiple|attention_backend)",
  r"model\.experts\.(placement|spare_slots|load_decay)",
  r"optimizer\.offload",
)


@dataclasses.dataclass(frozen=True)
class Identity:
  """What a run is. Runs with the same identity and position continue in the same way.

  Attributes:
    experiment: its settings.
    tokenizer_files: contents of the tokenizer's file and of its settings, by name, its own first;
      a VQGAN has none.
    manifests: SHA-256 of each dataset's manifest, by the dataset's name.
  """

  experiment: AnyExperiment
  tokenizer_files: dict[str, bytes]
  manifests: dict[str, str]

  @property
  def tokenizer(self) -> bytes:
    """Content of the tokenizer's file."""
    return next(iter(self.tokenizer_files.values()), b"")


def manifest_digest(manifest: dict[str, Any]) -> str:
  """SHA-256 of a dataset's manifest."""
  return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def with_defaults(stored: Any, kind: Any) -> Any:
  """A stored experiment with the defaults of settings that did not exist when it was stored.

  Args:
    stored: the experiment, or a part of it, as nested dicts and lists.
    kind: the type of that part, as the dataclass that holds it declares it.
  """
  if isinstance(stored, dict) and dataclasses.is_dataclass(kind):
    kinds = {field.name: field.type for field in dataclasses.fields(kind)}
    known = {name: with_defaults(value, kinds.get(name)) for name, value in stored.items()}
    return dataclasses.asdict(typing.cast(Any, kind)()) | known
  if isinstance(stored, list) and typing.get_origin(kind) is tuple:
    return tuple(stored)  # JSON has lists only.
  if isinstance(stored, list) and typing.get_origin(kind) is list:
    return [with_defaults(entry, *typing.get_args(kind)) for entry in stored]
  return stored


def as_dataclass(stored: Any, kind: Any) -> Any:
  """A stored experiment, complete, as the dataclasses that it was stored from.

  Args:
    stored: the experiment, or a part of it, as `with_defaults` returns it.
    kind: the type of that part, as the dataclass that holds it declares it.
  """
  if isinstance(stored, list):
    return [as_dataclass(entry, *typing.get_args(kind)) for entry in stored]
  if not isinstance(stored, dict):
    return stored
  # A setting that may be None holds a group of settings here.
  kind = next(
    (member for member in typing.get_args(kind) if dataclasses.is_dataclass(member)), kind
  )
  kinds = {field.name: field.type for field in dataclasses.fields(kind)}
  return kind(**{name: as_dataclass(value, kinds[name]) for name, value in stored.items()})


def change_of_the_past(
  stored: dict[str, Any], current: dict[str, Any], position: Position
) -> str | None:
  """The first setting whose change would have changed what a run has computed so far.

  Args:
    stored: the experiment that the run was made with, as nested dicts and lists, complete (see
      `with_defaults`).
    current: the experiment that is to resume the run, likewise.
    position: where the run is.

  Returns:
    "config.PATH=STORED, not CURRENT", or None if the run can resume with the current experiment.
  """
  if len(current["stages"]) <= position.stage:
    return f"{len(stored['stages'])} config.stages, not {len(current['stages'])}"
  here = position.stage
  for index in range(here + 1):
    names = tuple(e["stages"][index]["name"] for e in (stored, current))
    if names[0] != names[1]:
      return "config.stages[{}].name={!r}, not {!r}".format(index, *names)
  used = [datasets_of_the_past(e, position) for e in (stored, current)]
  if used[0] != used[1]:
    return "stages that read {}, not {}".format(*(" and ".join(sorted(names)) for names in used))
  planned, steps = (e["stages"][here]["steps"] for e in (stored, current))
  if steps < position.step:
    setting = f"config.stages[{here}].steps"
    return f"{setting}={planned}, of which {position.step} are done, not {steps}"
  return first_difference(_past(stored, position), _past(current, position))


def datasets_of_the_past(experiment: dict[str, Any], position: Position) -> set[str]:
  """Names of the datasets that the stages up to the current one read."""
  stages = experiment["stages"][: position.stage + 1]
  return {entry["dataset"] for stage in stages for entry in stage["mixture"]}


def _past(experiment: dict[str, Any], position: Position) -> dict[str, Any]:
  """The settings that what was computed depends on, with datasets by name."""
  stages = [dict(stage) for stage in experiment["stages"][: position.stage + 1]]
  del stages[-1]["steps"]
  used = datasets_of_the_past(experiment, position)
  datasets = {entry["name"]: entry for entry in experiment["datasets"] if entry["name"] in used}
  return experiment | {"stages": stages, "datasets": datasets}


def first_difference(stored: Any, current: Any, path: str = "") -> str | None:
  """The first setting, except those in FREE, in which two experiments differ.

  Args:
    stored: an experiment, or the part of one at `path`, as nested dicts and lists.
    current: the same of the other experiment.
    path: from the root of the experiment.

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
