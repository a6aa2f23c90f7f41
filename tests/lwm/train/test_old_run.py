"""A run that an older version began (commit ad6fcf5) is resumed by this one.

tests/golden/old_run.tar.gz holds its tokenizer and dataset, its checkpoint after six of its eight
steps and, in final.npz, the parameters with which the older version itself ended.
"""

import pathlib
import tarfile

import jax
import numpy as np
import pytest

from lwm.config.experiment import (
  CheckpointConfig,
  DatasetConfig,
  EvaluationConfig,
  Experiment,
  MixtureEntry,
  OptimizerConfig,
  Stage,
)
from lwm.config.model import ModelConfig
from lwm.train import loop
from tests.lwm.train.test_resume import final_state, steps_done

GOLDEN = pathlib.Path(__file__).parents[2] / "golden" / "old_run.tar.gz"


@pytest.mark.slow
def test_an_older_versions_run_ends_as_it_would_have(tmp_path, capsys):
  with tarfile.open(GOLDEN) as archive:
    archive.extractall(tmp_path, filter="data")
  stage = dict(tokens_per_batch=128, steps=4, warmup_steps=1, mixture=[MixtureEntry("text")])
  experiment = Experiment(
    tokenizer=str(tmp_path / "tokenizer.model"),
    model=ModelConfig(
      num_layers=1,
      width=16,
      num_heads=2,
      num_kv_heads=1,
      head_dim=8,
      feed_forward_width=32,
      text_vocab_size=290,
      compute_dtype="float32",
      remat="none",
    ),
    optimizer=OptimizerConfig(schedule="cosine", peak_learning_rate=1e-2, end_learning_rate=1e-3),
    datasets=[DatasetConfig(name="text", path=str(tmp_path / "text"))],
    stages=[
      Stage(name="short", sequence_length=32, **stage),
      Stage(name="long", sequence_length=64, rope_theta=1e5, **stage),
    ],
    checkpoint=CheckpointConfig(every_steps=2, keep=9),
    evaluation=EvaluationConfig(every_steps=100, rows=2),
  )
  run = tmp_path / "run"
  loop.train(experiment, run, jax.devices()[:1])
  assert f"resuming {run} after step 6 of 8" in capsys.readouterr().out
  assert steps_done(run) == list(range(1, 9))
  params = final_state(run, 8)[0]
  leaves = jax.tree_util.tree_flatten_with_path(params)[0]
  with np.load(tmp_path / "final.npz") as final:
    assert len(final.files) == len(leaves)
    for path, leaf in leaves:
      name = jax.tree_util.keystr(path, simple=True, separator=".")
      np.testing.assert_allclose(leaf, final[name], rtol=1e-5, atol=1e-7, err_msg=name)
