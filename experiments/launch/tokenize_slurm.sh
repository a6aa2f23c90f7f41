#!/bin/bash
# Tokenises films with an array of independent workers of a SLURM cluster, one GPU each. Run it from
# a checkout on a disk that all nodes share, with a .venv in which pip install --constraint pins.txt
# '.[gpu]' has been run:
#
#   sbatch --array=0-63 experiments/launch/tokenize_slurm.sh --num_shards=64 \
#       --input=/shared/films.jsonl --output=/shared/data/films --vqgan=... --tokenizer=...
#
# Arguments of sbatch come before the script, arguments of experiments.tokenize_video after it. When
# all tasks have ended, give the command without --num_shards and --shard_index to make the dataset.
#SBATCH --job-name=tokenize
#SBATCH --gpus=1
#SBATCH --requeue
#SBATCH --open-mode=append
exec .venv/bin/python -m experiments.tokenize_video --shard_index="$SLURM_ARRAY_TASK_ID" "$@"
