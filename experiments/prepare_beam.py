"""Makes a dataset as an Apache Beam pipeline: the same bytes as the plain command.

The first argument is the program, `prepare_data` or `tokenize_video`. Its flags follow, and the
options of Beam after `--`. Without any, the pipeline runs in this process (DirectRunner):

    python -m experiments.prepare_beam tokenize_video --num_shards=64 --input=films.jsonl ...
    python -m experiments.prepare_beam prepare_data --num_shards=16 --input=books/ ... \\
        -- --runner=FlinkRunner --flink_master=HOST:8081
    python -m experiments.prepare_beam tokenize_video --num_shards=64 ... \\
        -- --runner=DataflowRunner --project=PROJECT --region=REGION --sdk_container_image=IMAGE

Each element of the pipeline is one of --num_shards shares of the dataset's parts. Beam's workers
need this package (`pip install '.[beam]'`) and must see the input and the output on the same paths.
A pipeline that fails continues when the command is given again.
"""

import importlib
import sys

from absl import flags

from experiments import flags as experiment_flags
from experiments.shards import ALL, Share
from lwm.errors import UserError

_PROGRAMS = ("prepare_data", "tokenize_video")


def _work(index: int, count: int, program: str, arguments: list[str]) -> None:
  """Makes a share, on a worker of Beam."""
  module = importlib.import_module(f"experiments.{program}")
  if not flags.FLAGS.is_parsed():
    flags.FLAGS([program, *arguments])
  module.work(Share(count, index))


def main(argv: list[str]) -> None:
  try:
    import apache_beam as beam
    from apache_beam.options.pipeline_options import PipelineOptions
  except ImportError as error:
    raise UserError(
      "Apache Beam is missing: run pip install --constraint pins_beam.txt '.[beam]' in an "
      "environment of its own."
    ) from error

  program, *options = argv[1:]
  count = flags.FLAGS.num_shards
  if not count:
    raise UserError("Set --num_shards to the number of shares that Beam's workers make.")
  arguments = [
    argument for argument in sys.argv[2 : len(sys.argv) - len(options)] if argument != "--"
  ]
  with beam.Pipeline(options=PipelineOptions(options)) as pipeline:
    indices = pipeline | beam.Create(range(count)) | beam.Reshuffle()
    indices | "make shares" >> beam.Map(_work, count, program, arguments)
  importlib.import_module(f"experiments.{program}").work(ALL)()


if __name__ == "__main__":
  name = sys.argv[1] if len(sys.argv) > 1 else ""
  if name not in _PROGRAMS:
    sys.exit(f"error: The first argument is {name!r}: make it {' or '.join(_PROGRAMS)}.")
  # Defines the flags of the program.
  importlib.import_module(f"experiments.{name}")
  experiment_flags.run(main, takes_arguments=True)
