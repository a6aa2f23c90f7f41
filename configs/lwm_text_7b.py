"""LWM-Text 7B: five stages from 32K to 1M tokens (arXiv 2402.08268, table 1 and appendix).

For 256 TPU v4 chips. The run starts from Llama-2 7B, as LWM's did. The datasets are books filtered
by length, one directory per stage, made by `python -m experiments.prepare_data` with the tokenizer
of the imported model. Give the paths of yours by flags:

    python -m experiments.import_weights --input=Llama-2-7b-hf --output=weights/llama2_7b
    python -m experiments.train --config=configs/lwm_text_7b.py --workdir=/shared/runs/text \
        '--config.datasets[0].path=/shared/data/books-10k-100k'

The meshes have the paper's tensor x ring. They fit these chips and half as many
(`python -m experiments.plan --table=recipes`). By the planner's roofline, a ring instead of tensor
parallelism is faster and fits too: the 1M stage with fsdp=4, ring=64, tensor=1 and
--config.model.remat=attention needs 14.2 of 30.75 GiB and four fifths of the time.
"""

from configs import models
from lwm.config.experiment import (
  CheckpointConfig,
  DatasetConfig,
  Experiment,
  MixtureEntry,
  OptimizerConfig,
  Stage,
)
from lwm.parallel.sharding import MeshConfig

# name, sequence length, rope_theta, steps, warm-up steps, tensor, ring, lengths of the books
_STAGES = (
  ("32k", 2**15, 1e6, 1200, 100, 4, 1, "10k-100k"),
  ("128k", 2**17, 1e7, 3000, 200, 8, 1, "100k-200k"),
  ("256k", 2**18, 1e7, 3000, 200, 16, 1, "200k-500k"),
  ("512k", 2**19, 2.5e7, 720, 50, 16, 2, "500k-1m"),
  ("1m", 2**20, 5e7, 450, 25, 16, 4, "1m-up"),
)


def get_config() -> Experiment:
  stages, datasets = [], []
  for name, length, theta, steps, warmup, tensor, ring, books in _STAGES:
    datasets.append(DatasetConfig(name=f"books_{books}", path=f"data/lwm/books_{books}"))
    stages.append(
      Stage(
        name=name,
        sequence_length=length,
        rope_theta=theta,
        tokens_per_batch=2**22,
        steps=steps,
        warmup_steps=warmup,
        mixture=[MixtureEntry(f"books_{books}")],
        mesh=MeshConfig(fsdp=-1, ring=ring, tensor=tensor),
      )
    )
  return Experiment(
    name="lwm_text_7b",
    init_from="weights/llama2_7b",
    tokenizer="weights/llama2_7b/tokenizer/tokenizer.model",
    model=models.lwm_7b(),
    optimizer=OptimizerConfig(
      schedule="constant", peak_learning_rate=4e-5, end_learning_rate=4e-5, weight_decay=0.1
    ),
    datasets=datasets,
    stages=stages,
    # Every four minutes with the shortest rows, every hour with the longest.
    checkpoint=CheckpointConfig(every_steps=20),
  )
