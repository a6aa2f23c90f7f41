#!/bin/bash
# Trains on the GPUs of a SLURM cluster. Run it from a checkout on a disk that all nodes share, with
# a .venv in which pip install --constraint pins.txt '.[gpu]' has been run:
#
#   sbatch --nodes=4 --time=24:00:00 experiments/launch/slurm.sh \
#       --config=configs/lwm_text_7b.py --workdir=/shared/runs/text
#
# Arguments of sbatch come before the script, arguments of experiments.train after it. The processes
# find each other by SLURM's variables.
#
# One process runs per GPU. JAX gives each process the GPU with its number on the node, so do not
# hide the other GPUs with --gpus-per-task or --gpu-bind.
#SBATCH --job-name=lwm
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive
# After a lost node, and after exit status 75 (below), SLURM queues the job again and it resumes.
#SBATCH --requeue
#SBATCH --open-mode=append
# SIGTERM comes this many seconds before the time limit: enough for the two steps that may be in
# flight and for a checkpoint. Raise it for steps of more than five minutes.
#SBATCH --signal=TERM@900
set -u

# The other processes name a lost one and end by themselves: let SLURM wait for that.
srun --kill-on-bad-exit=0 --wait=300 .venv/bin/python -m experiments.train "$@"
status=$?

# srun returns the highest of all statuses. Above 128, a signal killed a process, and the others
# exited with 75.
if [ "$status" -eq 75 ] || [ "$status" -gt 128 ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$status"
