"""Records of a TensorFlow Datasets dataset."""

import collections
import pathlib
from collections.abc import Collection, Iterator

import tensorflow_datasets as tfds

from lwm.data.sources.record import Record, reason
from lwm.errors import UserError


class TfdsSource:
  """Examples of a TensorFlow Datasets dataset, as fields by the names of its features."""

  kind = "tfds"

  def __init__(
    self,
    name: str,
    split: str = "train",
    features: Collection[str] = (),
    data_dir: str | None = None,
  ):
    """
    Args:
      name: such as `lm1b` or `wiki40b/en:1.3.0` (prepared first if it is not yet), or a directory
        with a dataset_info.json.
      split: in the syntax of TFDS.
      features: names of features that the dataset must have.
      data_dir: where TFDS keeps its datasets; its own default if None.

    Raises:
      UserError: the dataset, split or feature does not exist, or TFDS needs TensorFlow for it.
    """
    self.name, self._split = name, split
    self.left_out: collections.Counter[str] = collections.Counter()
    try:
      if pathlib.Path(name).is_dir():
        self._examples = tfds.builder_from_directory(name).as_data_source(split)
      else:
        self._examples = tfds.data_source(
          name, split=split, data_dir=data_dir, builder_kwargs={"file_format": "array_record"}
        )
    except Exception as error:  # TFDS raises all kinds, from a missing name to a failed download.
      message = str(error).strip().partition("\n")[0]
      raise UserError(
        f"Could not open TFDS dataset {name!r}, split {split!r}: {message}"
      ) from error
    has = self._examples.dataset_info.features
    for feature in features:
      if feature not in has:
        raise UserError(
          f"TFDS dataset {name!r} has no feature {feature!r}, only {', '.join(sorted(has))}."
        )

  def __iter__(self) -> Iterator[Record]:
    for index in range(len(self._examples)):
      key = f"{self._split}:{index}"
      where = f"{self.name}/{key}"
      try:
        value = self._examples[index]
      except Exception as error:  # ArrayRecord and TFDS raise all kinds.
        yield Record(key, where, self.name, None, reason(error))
      else:
        yield Record(key, where, self.name, value)

  def identity(self) -> str:
    """The full name of the dataset, the split, and the number of examples."""
    return f"{self._examples.dataset_info.full_name}:{self._split}:{len(self._examples)}"

  def overlaps(self, other: "TfdsSource") -> bool:
    """Whether this split and another of the same dataset have examples in common."""
    splits = self._examples.dataset_info.splits
    return any(
      one.filename == two.filename
      and max(one.skip, two.skip) < min(one.skip + one.take, two.skip + two.take)
      for one in splits[self._split].file_instructions
      for two in splits[other._split].file_instructions
    )
