import jax
import pytest

from configs import models
from lwm.cost import peak
from lwm.model.flops import body_cost, train_flops


def test_dense_7b_takes_six_flops_per_parameter_and_token():
  """Llama 2 7B: 6.74e9 parameters, of which the embedding (131M) multiplies nothing."""
  model = models.lwm_7b()
  assert body_cost(model).weights == pytest.approx(6.476e9, rel=1e-3)
  flops = train_flops(model, tokens=1, attended_pairs=0, text_targets=1, vision_targets=0)
  assert flops == pytest.approx(6 * (6.74e9 - 131e6), rel=2e-3)


def test_attention_counts_the_pairs_of_the_mask():
  """12 x layers x width per pair: forward 4 x width (two products), backward twice as much."""
  model = models.lwm_7b()
  nothing = {"tokens": 0, "text_targets": 0, "vision_targets": 0}
  assert train_flops(model, attended_pairs=10, **nothing) == 12 * 32 * 4096 * 10


def test_head_counts_the_ids_that_the_softmax_runs_over():
  model = models.debug(text_vocab_size=100, vision_vocab_size=900)
  nothing = {"tokens": 0, "attended_pairs": 0}
  apart = train_flops(model, text_targets=2, vision_targets=3, **nothing)
  assert apart == 6 * 32 * (2 * 100 + 3 * 900)
  both = train_flops(model, text_targets=2, vision_targets=3, softmax_range="all", **nothing)
  assert both == 6 * 32 * 5 * 1000


@pytest.mark.parametrize(
  "kind, teraflops",
  [
    ("TPU v4", 275),
    ("TPU v5 lite", 197),
    ("TPU v5e", 197),
    ("TPU v5", 459),
    ("TPU v5p", 459),
    ("TPU v6 lite", 918),
    ("TPU v6e", 918),
    ("TPU7x", 1153.5),
    ("NVIDIA A100-SXM4-80GB", 312),
    ("NVIDIA H100 80GB HBM3", 989),
    ("NVIDIA H200", 989),
    ("NVIDIA B200", 2250),
    ("Quantum 9000", None),
  ],
)
def test_peaks(kind, teraflops):
  class Device:
    platform = "accelerator"
    device_kind = kind

  assert peak.peak_flops(Device(), "bfloat16") == (teraflops and teraflops * 1e12)


def test_a_cpu_is_measured_and_shared_among_its_devices(monkeypatch):
  monkeypatch.setattr(peak, "measured_flops", lambda device, dtype: 8e11)
  assert peak.peak_flops(jax.devices()[0], "float32") == 8e11 / jax.local_device_count()


def test_measurement_is_plausible():
  assert 1e8 < peak.measured_flops(jax.devices()[0], "float32", size=256) < 1e15
