"""Time and memory of importing and exporting a model of random weights."""

import json
import multiprocessing
import pathlib
import resource
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers

from lwm.checkpoint.arrays import ArrayInfo
from lwm.checkpoint.reader import StoredCheckpoint
from lwm.config.model import ModelConfig
from lwm.convert.hugging_face.config import Settings, write_config
from lwm.convert.hugging_face.names import LLAMA, table
from lwm.convert.hugging_face.read import read_hugging_face
from lwm.convert.hugging_face.write import export_hugging_face
from lwm.convert.safetensors import SHARD_BYTES, SafetensorsSink
from lwm.convert.table import their_shapes
from lwm.convert.weights import import_weights

# The sizes of Llama 3.2 3B.
MODEL = ModelConfig(
  num_layers=28,
  width=3072,
  num_heads=24,
  num_kv_heads=8,
  head_dim=128,
  feed_forward_width=8192,
  text_vocab_size=128256,
  tied_head=True,
)
_ROWS = 4096


def measure_conversions(directory: pathlib.Path, model: ModelConfig) -> Iterator[dict[str, Any]]:
  """Writes random bfloat16 weights as a Hugging Face directory, imports them, and exports them.

  Args:
    directory: has room for three times the weights.
    model: the sizes.

  Yields:
    For each conversion: its name, seconds, peak_gb (resident memory of its process), and what that
    memory must stay below, limit_gb: three times the largest tensor plus 2 GB.
  """
  source, imported, exported = (directory / name for name in ("source", "imported", "exported"))
  largest = _in_own_process(_write_random, source, model)[0]
  for name, function, paths in (
    ("import", _import, (source, imported)),
    ("export", _export, (imported, exported)),
  ):
    _, seconds, peak = _in_own_process(function, *paths)
    limit = 3 * largest + 2e9
    yield {"name": name, "seconds": seconds, "peak_gb": peak / 1e9, "limit_gb": limit / 1e9}


def _import(source: pathlib.Path, output: pathlib.Path) -> None:
  import_weights(read_hugging_face(source), output)


def _export(source: pathlib.Path, output: pathlib.Path) -> None:
  export_hugging_face(StoredCheckpoint(source), output)


def _in_own_process(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float, float]:
  """What a function returns, its seconds, and the peak resident bytes of a process that ran it."""
  context = multiprocessing.get_context("spawn")
  with futures.ProcessPoolExecutor(1, mp_context=context) as pool:
    return pool.submit(_measured, function, *arguments).result()


def _measured(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float, float]:
  start = time.perf_counter()
  result = function(*arguments)
  seconds = time.perf_counter() - start
  return result, seconds, 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _write_random(directory: pathlib.Path, model: ModelConfig) -> int:
  """Writes the directory; returns the bytes of its largest tensor."""
  directory.mkdir()
  dtype = np.dtype(ml_dtypes.bfloat16)
  shapes = their_shapes(table(LLAMA, model), model)
  tensors = {name: ArrayInfo(shape, dtype) for name, shape in shapes.items()}
  generator = np.random.default_rng(0)
  with SafetensorsSink(directory, tensors, SHARD_BYTES) as sink:
    for name, shape in shapes.items():
      weights = np.empty(shape, dtype)
      for row in range(0, shape[0], _ROWS):
        part = weights[row : row + _ROWS]
        part[...] = 0.02 * generator.standard_normal(part.shape, np.float32)
      sink.write(name, weights)
  settings = Settings(LLAMA, model, rope_theta=5e5, context=131072)
  (directory / "config.json").write_text(json.dumps(write_config(settings, dtype.name, {}, None)))
  words = {"<unk>": 0, "<s>": 1, "</s>": 2}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
  tokenizer.save(str(directory / "tokenizer.json"))
  return max(info.nbytes for info in tensors.values())
