import json

import pytest

from lwm.config.batch import FIELDS
from tests import programs

CONFIG = "--config=tests/lwm/plan/planned.py"


def plan(*flags):
  return programs.run("experiments.plan", CONFIG, *flags, several_devices=True)


@pytest.mark.slow
def test_json_of_a_stage_that_fits():
  done = plan("--topology=cpu:4", "--stage=long", "--json")
  assert done.returncode == 0, done.stderr
  answer = json.loads(done.stdout)
  assert answer["fits"] and answer["mesh"]["ring"] == answer["mesh"]["tensor"] == 2
  memory = answer["memory"]
  assert memory["optimizer"] >= 2 * memory["parameters"]  # Two moments.
  parts = ("parameters", "optimizer", "batch", "temporaries", "rest")
  assert sum(memory[part] for part in parts) == memory["total"]
  assert answer["roofline"]["mfu"] > 0


@pytest.mark.slow
def test_gpus_keep_block_inputs_in_the_hosts_memory():
  """With the kernels for Hopper."""
  flags = "model.head_dim=64", "model.remat=offload", "optimizer.offload=true"
  done = plan("--topology=h100:1x4", "--json", *(f"--config.{flag}" for flag in flags))
  assert done.returncode == 0, done.stderr
  answer = json.loads(done.stdout)
  memory = answer["memory"]
  # The inputs of four layers, for a quarter of 8192 tokens, and the moments.
  inputs, moments = 4 * 8192 // 4 * 128 * 2, 2 * memory["parameters"]
  assert answer["fits"]
  assert inputs + moments <= memory["host"] < 1.01 * (inputs + moments)
  # The count of updates is on the device; the batch has one array per field, over two devices.
  assert memory["optimizer"] < 64
  batch = len(FIELDS) * 8192 * 4 // 2
  assert batch <= memory["batch"] < batch + 64


@pytest.mark.parametrize(
  "flags, message",
  [
    (["--topology=v5p:2x2"], "error: --topology=v5p:2x2: no such machine"),
    (["--topology=cpu:4", "--stage=9"], "error: --stage=9: the experiment's stages are long"),
    (
      ["--topology=cpu:4", "--search", "--longest"],
      "error: --search, --longest and --pool exclude each other",
    ),
    (["--topology=cpu:4", "--pool"], "error: --pool is for models with experts: set the meshes"),
    (["--topology=cpu:4", "--loads=runs/x"], "error: --loads chooses among the meshes of --pool"),
    (["--stage=long"], "error: give --config=FILE and --topology=MACHINE, or --table"),
    (
      ["--topology=cpu:4", "--config.stages[0].mesh.ring=3"],
      "error: config.stages[0].sequence_length=8192 does not divide",
    ),
  ],
)
def test_what_is_wrong_is_one_sentence(flags, message):
  done = plan(*flags)
  assert done.returncode == 1
  assert done.stderr.strip().splitlines()[-1].startswith(message), done.stderr


@pytest.mark.parametrize(
  "flags, message",
  [
    # 4096 rows of 2^40 tokens: the lower bound excludes all candidates.
    (
      [
        "--topology=v5e:2x2",
        "--config.stages[0].sequence_length=1099511627776",
        "--config.stages[0].tokens_per_batch=4503599627370496",
      ],
      "error: long: nothing fits v5e:2x2; the smallest lower bound, of ",
    ),
    (
      ["--topology=h100:3x1"],
      "error: long: no mesh of the 3 devices of h100:3x1 divides this model",
    ),
  ],
)
def test_search_says_why_it_finds_nothing(flags, message):
  done = plan("--search", *flags)
  assert done.returncode == 1 and not done.stdout
  assert done.stderr.strip().splitlines()[-1].startswith(message), done.stderr


@pytest.mark.slow
def test_search_prints_what_fits_and_tells_what_it_tries():
  done = plan("--topology=v5e:2x2", "--search", "--top=1", "--json")
  assert done.returncode == 0, done.stderr
  (line,) = done.stdout.splitlines()
  answer = json.loads(line)
  assert answer["fits"] and answer["remat"] and answer["moments"] == "float32"
  assert 0 < answer["compile_seconds"] < 600 and 0 < answer["peak_rss"] < 16e9
  assert "lower bound" in done.stderr


@pytest.mark.slow
def test_a_refused_gpu_program_is_one_short_line():
  """XLA's own warnings, and the shapes in its error, would fill several screens."""
  flags = "model.remat=offload_attention", "model.head_groups=2", "stages[0].mesh.ring=4"
  flags = (*flags, "stages[0].mesh.tensor=1")
  done = plan("--topology=h100:1x4", *(f"--config.{flag}" for flag in flags))
  assert done.returncode == 1 and not done.stdout
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: XLA cannot compile this for gpu: INTERNAL: ")
  assert "Expected instruction to have shape equal to (...)" in line
  assert len(line) < 300


@pytest.mark.slow
def test_a_vqgan_on_a_slice():
  config = "--config=tests/lwm/train/tiny_vqgan.py:unused"
  done = programs.run("experiments.plan", config, "--topology=v5p:2x2x1", "--json")
  assert done.returncode == 0, done.stderr
  answer = json.loads(done.stdout)
  assert answer["fits"] and answer["frames_per_batch"] == 8 and answer["mesh"]["fsdp"] == 4
  assert answer["memory"]["batch"] >= 2 * 16 * 16 * 3
  roofline = answer["roofline"]
  assert roofline["frames_per_second_per_chip"] > 0
  assert [part["what"] for part in roofline["traffic"]] == ["weights", "gradients"]
  done = programs.run("experiments.plan", config, "--topology=v5p:2x2x1", "--search")
  assert done.stderr == (
    "error: --search and --longest are for language models: set a VQGAN's mesh by flags.\n"
  )
