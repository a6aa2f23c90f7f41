"""Compares runs by their answers to one evaluation.

    python -m experiments.compare needle --output=runs/compared \\
        stages=runs/stages_0,runs/stages_1 long=runs/long_0,runs/long_1

Each variant is a name and workdirs, usually of several seeds, which `experiments.evaluate` has
asked the same questions. OUTPUT/by_context.png shows the mean score of each run by context, and
OUTPUT/VARIANT.png the heat map of a variant over all of its runs.
"""

import pathlib
from typing import Any

from absl import flags

from experiments import flags as experiment_flags
from lwm.errors import UserError
from lwm.evals import report
from lwm.evals.answers import AnswerFile
from lwm.evals.evaluations import EVALUATIONS

_OUTPUT = flags.DEFINE_string("output", None, "Directory of the pictures.", required=True)

Record = dict[str, Any]


def answers(workdir: str, evaluation: str) -> list[Record]:
  """A run's answers."""
  path = pathlib.Path(workdir) / "evals" / evaluation / "answers.jsonl"
  if not path.is_file():
    raise UserError(f"{path} does not exist: run `experiments.evaluate {evaluation}` first.")
  return AnswerFile(path, {}).records


def main(argv: list[str]) -> None:
  if len(argv) < 3 or argv[1] not in EVALUATIONS or not all("=" in text for text in argv[2:]):
    raise UserError("Name an evaluation and variants: needle stages=WORKDIR,WORKDIR long=WORKDIR.")
  evaluation, output = argv[1], pathlib.Path(_OUTPUT.value or "")
  variants: dict[str, list[list[Record]]] = {}
  for text in argv[2:]:
    name, _, workdirs = text.partition("=")
    variants[name] = [answers(workdir, evaluation) for workdir in workdirs.split(",")]
    for workdir, records in zip(workdirs.split(","), variants[name]):
      lowest: dict[int, float] = {}
      for (context, _), score in report.mean_scores(records).items():
        lowest[context] = min(score, lowest.get(context, 1.0))
      for context, score in report.by_context(records).items():
        print(
          f"{name}: {workdir}: context {context:,}: {score:.1%}, lowest cell {lowest[context]:.1%}"
        )
  first = {record["case"] for record in next(iter(variants.values()))[0]}
  for name, runs in variants.items():
    if any({record["case"] for record in records} != first for records in runs):
      raise UserError(f"The runs of {name} have answers to other questions than the first run.")
  output.mkdir(parents=True, exist_ok=True)
  report.plot_by_context(
    {name: [report.by_context(records) for records in runs] for name, runs in variants.items()},
    evaluation,
    output / "by_context.png",
  )
  for name, runs in variants.items():
    together = [record for records in runs for record in records]
    title, varies = f"{evaluation}: {name}", EVALUATIONS[evaluation].varies
    report.heat_map(together, title, varies, output / f"{name}.png")
  print(f"{evaluation}: {output}")


if __name__ == "__main__":
  experiment_flags.run(main, takes_arguments=True)
