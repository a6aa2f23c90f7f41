"""Another codebase's model, ready to be converted, and its conversion to a checkpoint."""

import dataclasses
import pathlib
from collections.abc import Mapping

from lwm.checkpoint.parameters import write_parameters
from lwm.config.experiment import Experiment, Stage
from lwm.config.model import ModelConfig
from lwm.convert.table import Tensor, arrays_of, convert_in, write_manifest
from lwm.convert.tensors import Source

# Name of the stage that imported parameters come from.
STAGE = "imported"


@dataclasses.dataclass(frozen=True)
class Weights:
  """What a format's reader returns.

  Attributes:
    name: of the model.
    config: of the model.
    rope_theta: base of RoPE that it was trained with.
    context: tokens of its longest context.
    source: its tensors.
    table: of their format, for `config`.
    tokenizer_files: as `lwm.data.tokenizer.tokenizer_files` returns them.
  """

  name: str
  config: ModelConfig
  rope_theta: float
  context: int
  source: Source
  table: list[Tensor]
  tokenizer_files: Mapping[str, bytes]


def import_weights(weights: Weights, output: pathlib.Path) -> None:
  """Writes the model as a checkpoint, with a manifest of the tensors that it came from.

  Raises:
    UserError: tensors are missing, unknown or of another shape, or cannot be read or written. Then
      nothing is left.
  """
  arrays = arrays_of(weights.source, weights.table, weights.config)
  stage = Stage(
    name=STAGE,
    sequence_length=weights.context,
    tokens_per_batch=weights.context,
    rope_theta=weights.rope_theta,
  )
  experiment = Experiment(name=weights.name, model=weights.config, stages=[stage])
  experiment.tokenizer = next(iter(weights.tokenizer_files))
  with write_parameters(output, experiment, weights.tokenizer_files, arrays) as writer:
    manifest = convert_in(weights.source, weights.table, writer, arrays)
    write_manifest(writer.item.parent, manifest)
