"""The program that compares runs by their answers."""

import json

import pytest

from tests import programs


@pytest.mark.slow
def test_variants_are_compared_by_context_and_depth(tmp_path):
  scores = {"stages_0": (1, 1), "stages_1": (1, 0), "long_0": (1, 0)}
  for run, (first, last) in scores.items():
    folder = tmp_path / run / "evals" / "needle"
    folder.mkdir(parents=True)
    records = [
      {"case": f"{context}/{place}/0", "context": context, "place": place, "score": score}
      for context, place, score in ((128, 0, 1), (2048, 0, first), (2048, 100, last))
    ]
    lines = [json.dumps(line) + "\n" for line in ({"evaluation": "needle"}, *records)]
    (folder / "answers.jsonl").write_text("".join(lines))
  output = tmp_path / "compared"
  variants = (f"stages={tmp_path}/stages_0,{tmp_path}/stages_1", f"long={tmp_path}/long_0")
  done = programs.run("experiments.compare", "needle", f"--output={output}", *variants)
  assert done.returncode == 0, done.stderr
  assert f"{tmp_path}/stages_1: context 2,048: 50.0%, lowest cell 0.0%" in done.stdout
  pictures = {path.name for path in output.iterdir()}
  assert pictures == {"by_context.png", "stages.png", "long.png"}
  assert all(path.read_bytes().startswith(b"\x89PNG") for path in output.iterdir())

  done = programs.run("experiments.compare", "needle", f"--output={output}", "other=nowhere")
  assert done.returncode == 1
  assert done.stderr.startswith("error: nowhere/evals/needle/answers.jsonl does not exist")


def test_held_out_losses_are_drawn_by_step(tmp_path):
  for run, losses in {"dense": (5.0, 4.0), "experts": (5.5, 3.5)}.items():
    (tmp_path / run).mkdir()
    records = [
      {"kind": "evaluation", "stage": "a", "step": step, "total_steps": step, "held_out": [row]}
      for step, loss in zip((10, 20), losses)
      for row in [
        {"dataset": "text", "modality": "text", "loss": loss, "unigram_entropy": 6.0, "targets": 10}
      ]
    ]
    lines = [json.dumps(record) + "\n" for record in records]
    (tmp_path / run / "metrics.jsonl").write_text("".join(lines))
  (tmp_path / "new").mkdir()
  output = tmp_path / "compared"
  variants = [f"{name}={tmp_path}/{name}" for name in ("dense", "experts")]
  done = programs.run("experiments.compare", "losses", f"--output={output}", *variants)
  assert done.returncode == 0, done.stderr
  assert f"experts: {tmp_path}/experts: step 20: text 3.500" in done.stdout
  assert (output / "losses.png").read_bytes().startswith(b"\x89PNG")

  done = programs.run("experiments.compare", "losses", f"--output={output}", f"new={tmp_path}/new")
  assert done.returncode == 1
  assert done.stderr.startswith(f"error: {tmp_path}/new/metrics.jsonl has no held-out losses")
