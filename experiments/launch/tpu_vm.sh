#!/bin/bash
# Trains on all hosts of a Cloud TPU slice over ssh, and restarts them after a loss. Run it from a
# checkout on any machine with gcloud:
#
#   experiments/launch/tpu_vm.sh [--dry_run] ZONE NAME[,NAME...] \
#       --config=configs/lwm_text_7b.py --workdir=/mnt/shared/runs/text
#
# Several names are the slices of one queued resource, which train together. The hosts run the
# commit that is checked out. Workdir and data must be on a disk that all hosts share. --dry_run
# only prints the commands.
set -u -o pipefail
cd "$(dirname "$0")/../.."

dry_run=false
if [ "${1:-}" = --dry_run ]; then
  dry_run=true
  shift
fi
if [ $# -lt 3 ]; then
  sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0" >&2
  exit 1
fi
zone=$1
IFS=, read -r -a names <<< "$2"
shift 2

# tpu SUBCOMMAND ARGUMENT... runs the subcommand on all hosts of all slices at the same time, with
# @SLICE@ replaced by the name of the slice.
tpu() {
  local name pids=() failed=0
  for name in "${names[@]}"; do
    local command=(gcloud compute tpus tpu-vm "$1" "${@:2}" --zone="$zone" --worker=all --quiet)
    command=("${command[@]//@SLICE@/$name}")
    if $dry_run; then
      printf '%q ' "${command[@]}"
      echo
    else
      "${command[@]}" &
      pids+=($!)
    fi
  done
  for pid in ${pids[@]+"${pids[@]}"}; do
    wait "$pid" || failed=1
  done
  return "$failed"
}

archive=$(mktemp -d)/lwm.tar.gz
trap 'rm -r "$(dirname "$archive")"' EXIT
git archive --output="$archive" HEAD || exit 1
tpu scp "$archive" @SLICE@:lwm.tar.gz || exit 1
tpu ssh @SLICE@ --command="mkdir -p lwm && tar -xzf lwm.tar.gz -C lwm && cd lwm &&
  { [ -d .venv ] || python3.12 -m venv .venv; } &&
  .venv/bin/python -m pip install --quiet --constraint pins.txt --editable '.[tpu]'" || exit 1

# A TPU serves one process, so first end what an interrupted launch left running. Each host prints
# its exit status, because ssh to several hosts returns only one.
printf -v arguments ' %q' "$@"
python='.venv/bin/python -m experiments.train'
train="pkill -KILL -f '^$python' && sleep 5; cd lwm && $python$arguments
  echo \"exit status \$? on \$(hostname)\""

if $dry_run; then
  tpu ssh @SLICE@ --command="$train"
  exit 0
fi

for restart in {1..100}; do
  statuses=$(tpu ssh @SLICE@ --command="$train" 2>&1 | tee >(cat >&2) \
      | sed -n 's/.*exit status \([0-9]*\) on .*/\1/p' | sort -nu | tr '\n' ' ')
  # Restart after 75, a signal, or a host that printed nothing: the others saw that host as lost.
  case " $statuses" in
    " 0 ") exit 0 ;;
    *" 1 "*) exit 1 ;;
  esac
  echo "restarting ($restart of 100): the exit statuses were ${statuses:-not printed}" >&2
  sleep "${RESTART_SECONDS:-30}"
done
exit 75
