"""Reads Parquet files: one record per row."""

import itertools
from collections.abc import Iterator
from typing import Any, BinaryIO

import pyarrow
from pyarrow import parquet

from lwm.data.sources.record import Problem, Value, fields, reason

# A row may be a whole book or film, so few are in memory at a time.
_ROWS_PER_BATCH = 64


def read(file: BinaryIO) -> Iterator[tuple[str, Value | Problem]]:
  """Reads the rows, numbered from 1, as fields by column name.

  A Problem takes the place of a value that Python cannot hold, so that columns that no document is
  made of do no harm.
  """
  table = parquet.ParquetFile(file, page_checksum_verification=True)
  names = table.schema_arrow.names
  numbers = itertools.count(1)
  for batch in table.iter_batches(_ROWS_PER_BATCH):
    for row in range(batch.num_rows):
      number = str(next(numbers))
      values = (_value(batch.column(i)[row]) for i in range(len(names)))
      try:
        yield number, fields(zip(names, values))
      except ValueError as error:  # Two columns have one name.
        yield number, Problem(reason(error))


def _value(scalar: pyarrow.Scalar) -> Any:
  try:
    return scalar.as_py()
  except Exception as error:  # A string that is not UTF-8, a year above 9999, an unknown time zone.
    return Problem(reason(error))
