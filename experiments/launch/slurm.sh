#!/bin/bash
# Trains on the GPUs of a SLURM cluster. From a checkout that all nodes see, with a .venv in which
# pip install --constraint pins.txt '.[gpu]' has been run:
#
#   sbatch --nodes=4 --time=24:00:00 experiments/launch/slurm.sh \
#       --config=configs/lwm_text_7b.py --workdir=/shared/runs/text
#
# Arguments of sbatch come before the script, those of experiments.train behind it. The processes
# find each other by SLURM's own variables.
#
# One process a GPU. JAX shows each process the GPU of its number on the node, so that no
# --gpus-per-task or --gpu-bind may hide the others.
#SBATCH --job-name=lwm
#SBATCH --gpus-per-node=8
#SBATCH --ntasks-per-node=8
#SBATCH --exclusive
# A lost node, and exit status 75 below, put the job back into the queue; it resumes.
#SBATCH --requeue
#SBATCH --open-mode=append
# Before the time is over, time for the two steps that may be in flight and a checkpoint: longer for
# steps of more than five minutes.
#SBATCH --signal=TERM@900
set -u

# The others name a lost process and end by themselves: SLURM is to wait for that.
srun --kill-on-bad-exit=0 --wait=300 .venv/bin/python -m experiments.train "$@"
status=$?

# srun returns the highest status of all: above 128 a signal killed one, and the others said 75.
if [ "$status" -eq 75 ] || [ "$status" -gt 128 ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -lt 100 ]; then
    scontrol requeue "$SLURM_JOB_ID"
  fi
fi
exit "$status"
