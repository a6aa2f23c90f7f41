"""Compares runs by their answers to one evaluation, or by their held-out losses.

    python -m experiments.compare needle --output=runs/compared \\
        stages=runs/stages_0,runs/stages_1 long=runs/long_0,runs/long_1
    python -m experiments.compare losses --output=runs/compared \\
        dense=runs/dense experts=runs/experts

Each variant is a name and workdirs, usually of several seeds. `needle` is one of the evaluations of
`experiments.evaluate`, which has asked all runs the same questions: OUTPUT/by_context.png shows the
mean score of each run by context, and OUTPUT/VARIANT.png the heat map of a variant over all of its
runs. `losses` writes OUTPUT/losses.png, the held-out losses of each run by step.
"""

import pathlib
from typing import Any

from absl import flags

from experiments import flags as experiment_flags
from lwm.errors import UserError
from lwm.evals import report
from lwm.evals.answers import AnswerFile
from lwm.evals.evaluations import EVALUATIONS
from lwm.report.held_out import summary
from lwm.report.metrics import FILE_NAME, read_metrics
from lwm.report.plots import plot_held_out

_OUTPUT = flags.DEFINE_string("output", None, "Directory of the pictures.", required=True)

_LOSSES = "losses"

Record = dict[str, Any]


def answers(workdir: str, evaluation: str) -> list[Record]:
  """A run's answers."""
  path = pathlib.Path(workdir) / "evals" / evaluation / "answers.jsonl"
  if not path.is_file():
    raise UserError(f"{path} does not exist: run `experiments.evaluate {evaluation}` first.")
  return AnswerFile(path, {}).records


def compare_losses(variants: dict[str, list[str]], output: pathlib.Path) -> None:
  """Prints the last held-out losses of each run, and draws all of them."""
  runs = {name: [evaluations(workdir) for workdir in own] for name, own in variants.items()}
  for name, own in variants.items():
    for workdir, records in zip(own, runs[name]):
      last = records[-1]
      print(f"{name}: {workdir}: step {last['total_steps']:,}: {summary(last['held_out'])}")
  plot_held_out(runs, output / "losses.png")


def evaluations(workdir: str) -> list[Record]:
  """A run's records of held-out losses, from its metrics.jsonl."""
  path = pathlib.Path(workdir) / FILE_NAME
  records = [record for record in read_metrics(path) if record["kind"] == "evaluation"]
  if not records:
    raise UserError(f"{path} has no held-out losses: name the workdir of a run that has evaluated.")
  return records


def compare_answers(evaluation: str, variants: dict[str, list[str]], output: pathlib.Path) -> None:
  """Prints the scores of each run by context, and draws them."""
  runs = {name: [answers(workdir, evaluation) for workdir in own] for name, own in variants.items()}
  for name, own in variants.items():
    for workdir, records in zip(own, runs[name]):
      lowest: dict[int, float] = {}
      for (context, _), score in report.mean_scores(records).items():
        lowest[context] = min(score, lowest.get(context, 1.0))
      for context, score in report.by_context(records).items():
        print(
          f"{name}: {workdir}: context {context:,}: {score:.1%}, lowest cell {lowest[context]:.1%}"
        )
  first = {record["case"] for record in next(iter(runs.values()))[0]}
  for name, each in runs.items():
    if any({record["case"] for record in records} != first for records in each):
      raise UserError(
        f"The runs of {name} were asked other questions than the first run: evaluate all runs with "
        "the same flags."
      )
  report.plot_by_context(
    {name: [report.by_context(records) for records in each] for name, each in runs.items()},
    evaluation,
    output / "by_context.png",
  )
  for name, each in runs.items():
    together = [record for records in each for record in records]
    title, varies = f"{evaluation}: {name}", EVALUATIONS[evaluation].varies
    report.heat_map(together, title, varies, output / f"{name}.png")


def main(argv: list[str]) -> None:
  if (
    len(argv) < 3
    or argv[1] not in (_LOSSES, *EVALUATIONS)
    or not all("=" in text for text in argv[2:])
  ):
    raise UserError(
      "Name an evaluation, or losses, and variants: needle stages=WORKDIR,WORKDIR long=WORKDIR."
    )
  output = pathlib.Path(_OUTPUT.value or "")
  pairs = (text.split("=", 1) for text in argv[2:])
  variants = {name: workdirs.split(",") for name, workdirs in pairs}
  if argv[1] == _LOSSES:
    compare_losses(variants, output)
  else:
    compare_answers(argv[1], variants, output)
  print(f"{argv[1]}: {output}")


if __name__ == "__main__":
  experiment_flags.run(main, takes_arguments=True)
