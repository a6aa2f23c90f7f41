#!/bin/bash
# Trains on two slices of a cluster that xpk made. Run it from a checkout:
#
#   CLUSTER=... IMAGE=... experiments/launch/xpk.sh \
#       --config=configs/lwm_text_7b.py --workdir=/shared/runs/text
#
# IMAGE must contain what pip install --constraint pins.txt '.[tpu]' installs; xpk adds the
# checkout. Workdir and data must be on a disk that `xpk storage attach` mounts into every pod.
set -eu
cd "$(dirname "$0")/../.."
printf -v arguments ' %q' "$@"
# By default, xpk restarts only after signals.
xpk workload create --workload="${WORKLOAD:-lwm}" --cluster="$CLUSTER" \
    --tpu-type=v5p-128 --num-slices=2 --base-docker-image="$IMAGE" --script-dir=. \
    --max-restarts=100 --restart-on-exit-codes=75 \
    --command="python -m experiments.train$arguments"
