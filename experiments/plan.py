"""Whether an experiment fits a machine that need not be there, and roughly how fast it would be.

    python -m experiments.plan --config=configs/lwm_text_7b.py --topology=v5p:8x8x4 --stage=1m

Compiles the train step that training would run, ahead of time, on a CPU: TPU slices by
`pip install libtpu`, GPUs (h100:4x8, four hosts of eight) by JAX's CUDA plugin. Settings are flags,
as in training: --config.stages[4].mesh.ring=8, --config.model.remat=attention.
"""

import json
import os

from absl import flags
import jax

from experiments import flags as experiment_flags
from lwm.errors import UserError
from lwm.experiment import Experiment
from lwm.experiment import Stage
from lwm.plan import load
from lwm.plan import plan_stage
from lwm.plan import report
from lwm.validate import check_devices
from lwm.validate import validate

_CONFIG = experiment_flags.define_config()
_TOPOLOGY = flags.DEFINE_string("topology", None, "The machine: v5p:8x8x8, v5e:16x16, h100:4x8.")
_STAGE = flags.DEFINE_string("stage", None, "Name or number (from 0) of a stage; all unless given.")
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object a line for each plan instead.")
flags.mark_flag_as_required("topology")


def main(argv: list[str]) -> None:
  del argv
  experiment = _CONFIG.value
  validate(experiment)
  experiment.stages = chosen_stages(experiment, _STAGE.value)
  topology = load(_TOPOLOGY.value)
  check_devices(experiment, len(topology.devices))
  plans = []
  for stage in experiment.stages:
    plan = plan_stage(experiment, stage, topology)[0]
    plans.append(plan)
    print(json.dumps(plan.as_json()) if _JSON.value else report.stage_report(plan) + "\n",
          flush=True)
  if len(plans) > 1 and not _JSON.value:
    print(report.table(plans))


def chosen_stages(experiment: Experiment, choice: str | None) -> list[Stage]:
  """The stage of that name or number, or all of them."""
  if choice is None:
    return experiment.stages
  names = [stage.name for stage in experiment.stages]
  if choice in names:
    return [experiment.stages[names.index(choice)]]
  if choice.isdigit() and int(choice) < len(names):
    return [experiment.stages[int(choice)]]
  raise UserError(f"--stage={choice}: the experiment's stages are {', '.join(names)}, from 0.")


if __name__ == "__main__":
  # Compilers only: a TPU or GPU that is here stays free for others. libtpu's start is noisy.
  os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
  os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
  jax.config.update("jax_platforms", "cpu")
  experiment_flags.run(main)
