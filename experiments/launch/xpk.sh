#!/bin/bash
# Trains on a cluster that xpk made, on two slices; from a checkout:
#
#   CLUSTER=... IMAGE=... experiments/launch/xpk.sh \
#       --config=configs/lwm_text_7b.py --workdir=/shared/runs/text
#
# IMAGE has what pip install --constraint pins.txt '.[tpu]' installs; xpk adds the checkout.
# Workdir and data lie on a disk that `xpk storage attach` mounts into every pod.
set -eu
cd "$(dirname "$0")/../.."
printf -v arguments ' %q' "$@"
# Of itself, xpk starts again after signals.
xpk workload create --workload="${WORKLOAD:-lwm}" --cluster="$CLUSTER" \
    --tpu-type=v5p-128 --num-slices=2 --base-docker-image="$IMAGE" --script-dir=. \
    --max-restarts=100 --restart-on-exit-codes=75 \
    --command="python -m experiments.train$arguments"
