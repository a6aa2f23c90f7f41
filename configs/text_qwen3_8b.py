"""Qwen3 8B to 1M tokens: three stages with a rising RoPE theta, for 64 TPU v5p chips.

The run starts from imported weights, and its datasets are prepared with their tokenizer:

    python -m experiments.import_weights --input=Qwen3-8B-Base --output=weights/qwen3_8b
    python -m experiments.train --config=configs/text_qwen3_8b.py --workdir=/shared/runs/qwen3 \\
        '--config.datasets[0].path=/shared/data/books-100k-200k'

The model reads 32K tokens already. Theta rises with the NTK-aware rule of
configs/text_llama3_8b.py; batches, steps and learning rate are those of LWM's stages of the same
length (configs/lwm_text_7b.py), which also says what the datasets are.
"""

from configs import lwm_text_7b, models
from lwm.config.experiment import Experiment
from lwm.parallel.sharding import MeshConfig

# Stage of LWM's recipe, rope_theta, ring.
_STAGES = {"128k": (4.1e6, 4), "512k": (1.67e7, 8), "1m": (3.38e7, 16)}


def get_config() -> Experiment:
  experiment = lwm_text_7b.get_config()
  experiment.name = "text_qwen3_8b"
  experiment.init_from = "weights/qwen3_8b"
  experiment.tokenizer = "weights/qwen3_8b/tokenizer/tokenizer.json"
  experiment.model = models.qwen3_8b()
  experiment.stages = [stage for stage in experiment.stages if stage.name in _STAGES]
  read = {entry.dataset for stage in experiment.stages for entry in stage.mixture}
  experiment.datasets = [dataset for dataset in experiment.datasets if dataset.name in read]
  for stage in experiment.stages:
    stage.rope_theta, ring = _STAGES[stage.name]
    stage.mesh = MeshConfig(fsdp=-1, ring=ring)
  return experiment
