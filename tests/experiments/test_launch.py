"""The launchers, with stand-ins for the programs of the clusters."""

import os
import pathlib
import stat
import subprocess

import pytest
import yaml

from lwm.errors import RESUME_EXIT_CODE

LAUNCH = pathlib.Path(__file__).parents[2] / "experiments" / "launch"
ARGUMENTS = ["--config=configs/lwm_text_7b.py", "--workdir=/shared/a run"]


@pytest.fixture
def launch(tmp_path):
  """Runs a script with stand-ins first in PATH; each call to a stand-in adds a line to `calls`."""

  def launch(script, *arguments, stand_ins, output=subprocess.PIPE, **variables):
    for name, body in stand_ins.items():
      path = tmp_path / name
      log = f'echo "{name} $*" | tr "\\n" " " >> {tmp_path}/calls; echo >> {tmp_path}/calls'
      path.write_text(f"#!/bin/bash\n{log}\n{body}\n")
      path.chmod(path.stat().st_mode | stat.S_IXUSR)
    process = subprocess.run(
      ["bash", LAUNCH / script, *arguments],
      text=True,
      timeout=120,
      stdout=output,
      stderr=output,
      env=os.environ
      | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "RESTART_SECONDS": "0"}
      | variables,
    )
    calls = tmp_path / "calls"
    return process, calls.read_text().splitlines() if calls.exists() else []

  return launch


@pytest.mark.parametrize("script", ["slurm.sh", "tokenize_slurm.sh", "tpu_vm.sh", "xpk.sh"])
def test_scripts_parse(script):
  subprocess.run(["bash", "-n", LAUNCH / script], check=True)


@pytest.mark.parametrize(
  "status,restarts,requeued",
  [(0, 0, False), (1, 0, False), (RESUME_EXIT_CODE, 0, True), (137, 3, True), (75, 100, False)],
)
def test_slurm_requeues_a_job_that_asks_for_it(launch, status, restarts, requeued):
  process, calls = launch(
    "slurm.sh",
    *ARGUMENTS,
    stand_ins={"srun": f"exit {status}", "scontrol": ""},
    SLURM_JOB_ID="7",
    SLURM_RESTART_COUNT=str(restarts),
  )
  assert process.returncode == status, process.stderr
  assert calls[0].endswith("-m experiments.train " + " ".join(ARGUMENTS) + " ")
  assert calls[1:] == ["scontrol requeue 7 "] * requeued


def tpu_vm(directory, *starts):
  """Stand-ins: gcloud runs its command here; `starts` are the exit statuses of the hosts."""
  python = directory / "lwm" / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text('#!/bin/bash\n[ "$1 $2" = "-m experiments.train" ] && exit $STATUS\n')
  python.chmod(0o755)
  told = " ".join(f"'{' '.join(map(str, statuses))}'" for statuses in starts)
  return {
    "pkill": "exit 1",
    "gcloud": f"""
[[ $* == *experiments.train* ]] || exit 0
cd {directory}
starts=({told})
count=$(cat count 2> /dev/null || echo 0)
echo $((count + 1)) > count
for argument; do
  if [[ $argument == --command=* ]]; then
    for status in ${{starts[$count]}}; do
      STATUS=$status bash -c "${{argument#--command=}}"
    done
  fi
done
""",
  }


@pytest.mark.parametrize(
  "starts,status",
  [
    ([(0, 0)], 0),
    # A killed process, a host that prints nothing and a run that asks to be resumed: restart.
    ([(75, 137), (75,), (), (75, 75), (0, 0)], 0),
    ([(75, 75), (1, 1)], 1),
  ],
)
def test_tpu_vms_are_restarted_until_they_are_done(launch, tmp_path, starts, status):
  stand_ins = tpu_vm(tmp_path, *starts)
  process, calls = launch("tpu_vm.sh", "zone-a", "slice", *ARGUMENTS, stand_ins=stand_ins)
  assert process.returncode == status, process.stderr
  assert calls[0].startswith("gcloud compute tpus tpu-vm scp")
  assert calls[0].endswith("slice:lwm.tar.gz --zone=zone-a --worker=all --quiet ")
  assert "pip install" in calls[1]
  trained = [call for call in calls[2:] if call.startswith("gcloud")]
  assert len(trained) == len(starts)
  for call in trained:
    assert "-m experiments.train --config=configs/lwm_text_7b.py --workdir=/shared/a\\ run" in call


def test_tpu_vm_keeps_its_output_from_before_a_restart(launch, tmp_path):
  """Also in a file, as with nohup, which opening /dev/stderr again would truncate."""
  stand_ins = tpu_vm(tmp_path, (75,), (0,))
  with (tmp_path / "log").open("w") as log:
    launch("tpu_vm.sh", "zone-a", "slice", *ARGUMENTS, stand_ins=stand_ins, output=log)
  lines = (tmp_path / "log").read_text().splitlines()
  statuses = [line.split(" on ")[0] for line in lines if line.startswith("exit status")]
  assert statuses == ["exit status 75", "exit status 0"]
  assert "restarting (1 of 100): the exit statuses were 75 " in lines


def test_tpu_vm_dry_run_prints_the_commands_and_runs_none(launch):
  process, calls = launch(
    "tpu_vm.sh", "--dry_run", "zone-a", "one,two", *ARGUMENTS, stand_ins={"gcloud": ""}
  )
  assert process.returncode == 0, process.stderr
  assert calls == []
  printed = subprocess.run(
    ["bash"], text=True, input="gcloud() { echo call; }\n" + process.stdout, capture_output=True
  )
  # Copy, set up and start, on each of two slices.
  assert printed.stdout == "call\n" * 6 and not printed.stderr
  assert all(f" {name}" in process.stdout for name in ("one", "two"))


def test_tpu_vm_prints_its_usage(launch):
  process, _ = launch("tpu_vm.sh", stand_ins={})
  assert process.returncode == 1
  assert "experiments/launch/tpu_vm.sh [--dry_run] ZONE NAME" in process.stderr


def test_xpk_passes_the_flags_and_restarts_on_the_resume_code(launch):
  process, calls = launch("xpk.sh", *ARGUMENTS, stand_ins={"xpk": ""}, CLUSTER="c", IMAGE="i")
  assert process.returncode == 0, process.stderr
  assert f"--restart-on-exit-codes={RESUME_EXIT_CODE}" in calls[0]
  assert "experiments.train --config=configs/lwm_text_7b.py --workdir=/shared/a\\ run" in calls[0]


def test_jobset_restarts_after_everything_but_errors():
  jobset = yaml.safe_load((LAUNCH / "jobset.yaml").read_text())
  assert jobset["kind"] == "JobSet"
  (replicated,) = jobset["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  assert job["parallelism"] == job["completions"]
  assert job["backoffLimit"] == 0
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  assert container["command"] == ["python", "-m", "experiments.train"]
  (rule,) = job["podFailurePolicy"]["rules"]
  assert rule["action"] == "FailJob"
  assert rule["onExitCodes"] == {
    "containerName": container["name"],
    "operator": "In",
    "values": [1],
  }
  assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
  assert jobset["spec"]["failurePolicy"]["rules"] == [
    {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
  ]


def test_workers_of_kubernetes_share_all_the_work(tmp_path):
  job = yaml.safe_load((LAUNCH / "tokenize_job.yaml").read_text())["spec"]
  [container] = job["template"]["spec"]["containers"]
  assert job["completionMode"] == "Indexed"
  assert f"--num_shards={job['completions']}" in container["args"]
  python = tmp_path / "python"
  python.write_text('#!/bin/sh\necho "$@"\n')
  python.chmod(0o755)
  variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "JOB_COMPLETION_INDEX": "7"}
  command = container["command"] + container["args"]
  done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
  shown = ["-m", "experiments.tokenize_video", "--shard_index=7", *container["args"]]
  assert done.stdout.split() == shown
