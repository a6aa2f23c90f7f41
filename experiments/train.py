"""Trains an experiment, or goes on with it: the same command resumes where its workdir stands.

    python -m experiments.train --config=configs/laptop.py --workdir=runs/laptop

Any setting is a flag: --config.optimizer.peak_learning_rate=1e-3, --config.stages[0].steps=10.
Started on every host of a TPU pod, by SLURM or in an indexed Kubernetes job (experiments/launch/),
the processes find each other; elsewhere, each is told:

    python -m experiments.train ... --coordinator=HOST:PORT --num_processes=2 --process_id=0

All see the same workdir and data. Exit status 75 asks for the same command again on all hosts.
"""

import pathlib

from absl import flags

from experiments import flags as experiment_flags
from experiments.runtime import devices, use_compilation_cache
from lwm.config.validate import check_devices, validate
from lwm.errors import UserError
from lwm.parallel import distributed, xla_flags
from lwm.report.profiling import parse_steps
from lwm.train import loop

_CONFIG = experiment_flags.define_config()
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Where checkpoints, metrics and curves go, and are taken up again."
)
_PROFILE_STEPS = flags.DEFINE_string(
  "profile_steps", None, "Steps to trace for xprof, as in 10:13: total steps 10, 11 and 12."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many processes train together.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")
_PEER_TIMEOUT = flags.DEFINE_integer(
  "peer_timeout", 60, "Seconds without a sign of life after which a process is lost.", 10
)
flags.mark_flag_as_required("workdir")


def main(argv: list[str]) -> None:
  del argv
  experiment = _CONFIG.value
  validate(experiment)
  if "://" in _WORKDIR.value:
    raise UserError(
      f"--workdir={_WORKDIR.value} is no directory: name one on a disk that all hosts see, a "
      "bucket where it is mounted."
    )
  profile_steps = parse_steps(_PROFILE_STEPS.value) if _PROFILE_STEPS.value else range(0)
  steps = sum(stage.steps for stage in experiment.stages)
  if profile_steps and profile_steps[0] > steps:
    raise UserError(f"--profile_steps={_PROFILE_STEPS.value}: the run has {steps} steps.")
  xla_flags.apply(_NUM_PROCESSES.value)
  processes = distributed.joined(
    _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _PEER_TIMEOUT.value
  )
  with processes:
    check_devices(experiment, len(devices()))
    use_compilation_cache()
    loop.train(experiment, pathlib.Path(_WORKDIR.value), profile_steps=profile_steps)


if __name__ == "__main__":
  experiment_flags.run(main)
