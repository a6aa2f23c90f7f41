"""Llama 3.1 8B to 1M tokens: two stages with a rising RoPE theta, for 64 TPU v5p chips.

The run starts from imported weights, and its datasets are prepared with their tokenizer:

    python -m experiments.import_weights --input=Llama-3.1-8B --output=weights/llama3_8b
    python -m experiments.train --config=configs/text_llama3_8b.py --workdir=/shared/runs/llama3 \\
        '--config.datasets[0].path=/shared/data/books-500k-1m'

The model reads 128K tokens already. Theta rises with the NTK-aware rule, theta x s^(D / (D - 2))
for a context s times longer and heads of D (bloc97, 2023), on top of the scaled RoPE that the model
was trained with. Batches, steps and learning rate are those of LWM's last two stages
(configs/lwm_text_7b.py), which also says what the datasets are.
"""

from configs import lwm_text_7b, models
from lwm.config.experiment import Experiment
from lwm.parallel.sharding import MeshConfig


def get_config() -> Experiment:
  experiment = lwm_text_7b.get_config()
  experiment.name = "text_llama3_8b"
  experiment.init_from = "weights/llama3_8b"
  experiment.tokenizer = "weights/llama3_8b/tokenizer/tokenizer.json"
  experiment.model = models.llama3_8b()
  experiment.stages = experiment.stages[-2:]
  experiment.datasets = experiment.datasets[-2:]
  for stage, theta, ring in zip(experiment.stages, (2.04e6, 4.13e6), (8, 16)):
    stage.rope_theta = theta
    stage.mesh = MeshConfig(fsdp=-1, ring=ring)
  return experiment
