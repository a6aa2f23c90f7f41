"""Trains an experiment, or goes on with it: the same command resumes where its workdir stands.

    python -m experiments.train --config=configs/laptop.py --workdir=runs/laptop

Any setting is a flag: --config.optimizer.peak_learning_rate=1e-3, --config.stages[0].steps=10.
"""

import pathlib

from absl import flags
import jax

from experiments import flags as experiment_flags
from experiments.runtime import use_compilation_cache
from lwm.train import loop
from lwm.train.profiling import parse_steps
from lwm.validate import check_devices
from lwm.validate import validate

_CONFIG = experiment_flags.define_config()
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Where checkpoints, metrics and curves go, and are taken up again."
)
_PROFILE_STEPS = flags.DEFINE_string(
    "profile_steps", None, "Steps to trace for xprof, as in 10:13: total steps 10, 11 and 12."
)
flags.mark_flag_as_required("workdir")


def main(argv: list[str]) -> None:
  del argv
  experiment = _CONFIG.value
  validate(experiment)
  check_devices(experiment, jax.device_count())
  use_compilation_cache()
  profile_steps = parse_steps(_PROFILE_STEPS.value) if _PROFILE_STEPS.value else range(0)
  loop.train(experiment, pathlib.Path(_WORKDIR.value), profile_steps=profile_steps)


if __name__ == "__main__":
  experiment_flags.run(main)
