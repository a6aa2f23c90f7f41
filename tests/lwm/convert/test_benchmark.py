"""The measurement of conversions, on a tiny model."""

import pytest

from lwm.config.model import ModelConfig
from lwm.convert.benchmark import measure_conversions


@pytest.mark.slow
def test_both_conversions_are_measured(tmp_path):
  model = ModelConfig(num_layers=1, width=16, num_heads=2, head_dim=8, tied_head=True)
  records = list(measure_conversions(tmp_path, model))
  assert [record["name"] for record in records] == ["import", "export"]
  for record in records:
    assert record["seconds"] > 0 and record["peak_gb"] > 0
    assert record["limit_gb"] > 2
  assert (tmp_path / "exported" / "model.safetensors").exists()
