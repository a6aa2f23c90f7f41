"""Trains a language model or a VQGAN; the same command resumes from the workdir's last checkpoint.

    python -m experiments.train --config=configs/laptop.py --workdir=runs/laptop
    python -m experiments.train --config=configs/vqgan_lwm.py --workdir=runs/vqgan

Every setting is a flag: --config.optimizer.peak_learning_rate=1e-3, --config.stages[0].steps=10.
On several hosts, start the same command on each. On a TPU pod, under SLURM or in an indexed
Kubernetes job (experiments/launch/) the processes find each other; elsewhere, tell each process:

    python -m experiments.train ... --coordinator=HOST:PORT --num_processes=2 --process_id=0

All processes need the same workdir and data. A run that exits with status 75 resumes when all hosts
start the same command again.
"""

import pathlib

import jax
from absl import flags

from experiments import flags as experiment_flags
from experiments.runtime import devices, use_compilation_cache
from lwm.config.validate import check_devices, validate
from lwm.errors import UserError
from lwm.parallel import distributed, xla_flags
from lwm.report.profiling import parse_steps
from lwm.train import loop
from lwm.train.mesh_choice import with_chosen_meshes

_CONFIG = experiment_flags.define_config()
_WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "Directory for checkpoints, metrics and curves; a run resumes from what it contains.",
  required=True,
)
_POOL = flags.DEFINE_string(
  "pool",
  None,
  "File of `experiments.plan --pool --json`: whenever the run starts or resumes, each stage takes "
  "the mesh that is fastest for the loads of experts that the run has recorded.",
)
_PROFILE_STEPS = flags.DEFINE_string(
  "profile_steps",
  None,
  "Steps to trace for xprof, counted over all stages: 10:13 traces steps 10, 11 and 12.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0.")
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Number of processes that train together."
)
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Number of this process, from 0.")
_PEER_TIMEOUT = flags.DEFINE_integer(
  "peer_timeout", 60, "Seconds without a heartbeat after which a process is lost.", 10
)


def main(argv: list[str]) -> None:
  del argv
  experiment = _CONFIG.value
  validate(experiment)
  if "://" in _WORKDIR.value:
    raise UserError(
      f"--workdir={_WORKDIR.value} is not a directory: name one on a disk that all hosts share; "
      "for a bucket, name the directory where it is mounted."
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
    workdir, num_devices = pathlib.Path(_WORKDIR.value), len(devices())
    if _POOL.value:
      pool = pathlib.Path(_POOL.value)
      experiment, notes = with_chosen_meshes(experiment, pool, workdir, num_devices)
      for note in notes if jax.process_index() == 0 else ():
        print(note, flush=True)
    check_devices(experiment, num_devices)
    use_compilation_cache()
    loop.train(experiment, workdir, profile_steps=profile_steps)


if __name__ == "__main__":
  experiment_flags.run(main)
