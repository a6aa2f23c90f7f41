import json

import pytest


@pytest.mark.slow
def test_benchmark_prints_figures_that_agree(start_program, prepared):
  process = start_program(
    "benchmark", "train", "--json", "--steps=2", "--rounds=1", "--stages=text_64"
  )
  output, errors = process.communicate(timeout=300)
  assert process.returncode == 0, errors
  result = json.loads(output)
  (stage,) = result["stages"]
  assert (stage["stage"], stage["sequence_length"]) == ("text_64", 64)
  assert 0 < stage["mfu"] < 1
  assert stage["outside"] == pytest.approx(
    1 - stage["compiled_step_seconds"] / stage["step_seconds"]
  )
  assert stage["estimated_step_seconds"] > 0
  assert stage["estimate_ratio"] == pytest.approx(
    stage["compiled_step_seconds"] / stage["estimated_step_seconds"]
  )
  # 8 rows of 64 tokens, and few of them padding.
  tokens = stage["tokens_per_second"] * stage["step_seconds"]
  assert 0.8 * 512 < tokens <= 512
  assert result["peak_flops_per_device"] > 0 and "cores" in result["machine"]


def test_an_unknown_stage_is_one_sentence(start_program):
  _, errors = start_program("benchmark", "train", "--stages=nosuch").communicate(timeout=120)
  assert errors == "error: --stages=nosuch: the experiment's stages are text_64, video_128.\n"
