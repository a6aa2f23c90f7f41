"""Reads Parquet files: one record per row."""

import itertools
from collections.abc import Iterator
from typing import BinaryIO

from pyarrow import parquet

from lwm.data.sources.record import Problem, Value, fields, reason

# A row may be a whole book or film, so few are in memory at a time.
_ROWS_PER_BATCH = 64


def read(file: BinaryIO) -> Iterator[tuple[str, Value | Problem]]:
  """Reads the rows, numbered from 1, as fields by column name."""
  table = parquet.ParquetFile(file, page_checksum_verification=True)
  names = table.schema_arrow.names
  numbers = itertools.count(1)
  for batch in table.iter_batches(_ROWS_PER_BATCH):
    for row in range(batch.num_rows):
      number = str(next(numbers))
      try:
        yield number, fields((name, batch.column(i)[row].as_py()) for i, name in enumerate(names))
      except ValueError as error:  # A string that is not UTF-8, or two columns of one name.
        yield number, Problem(reason(error))
