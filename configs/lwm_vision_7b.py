"""LWM 7B over text and video: five stages from 1K to 1M tokens (arXiv 2402.08268, appendix).

For 512 TPU v4 chips. A run starts from the final parameters of configs/lwm_text_7b.py, as LWM's
did, with new rows for vision ids; name that run's workdir with --config.init_from, or LWM's own
text model, imported (docs/lwm_weights.md). Images and videos have 256 codes per frame, and videos 4
frames per second. The chat stages are one quarter each of text-to-image, image understanding,
text-to-video and video understanding. Give the paths of your datasets by flags, as described in
configs/lwm_text_7b.py, which also covers faster meshes.
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


def _quarters(frames: int) -> dict[str, float]:
  """The mixture of a chat stage whose videos have `frames` frames."""
  return {
    "text_to_image": 0.25,
    "image_understanding": 0.25,
    f"text_to_video_{frames}": 0.25,
    f"video_understanding_{frames}": 0.25,
  }


# name, sequence length, steps, warm-up steps, peak and end learning rate, tensor, ring, mixture.
# The paper gives no meshes for these stages; the meshes here leave at least one row per data shard.
_STAGES = (
  ("1k", 2**10, 45000, 1000, 6e-4, 6e-5, 1, 1, {"text_image": 0.84, "text": 0.16}),
  ("8k", 2**13, 14000, 500, 6e-4, 6e-5, 1, 1, {"text_video_30": 0.84, "text": 0.16}),
  ("32k", 2**15, 1200, 100, 8e-5, 8e-5, 4, 1, _quarters(100)),
  ("128k", 2**17, 450, 50, 8e-5, 8e-5, 8, 1, _quarters(450)),
  ("1m", 2**20, 50, 5, 8e-5, 8e-5, 16, 4, _quarters(4000)),
)
# Question answering: all answers have equal weight, however long the video beside them is.
_BY_EXAMPLE = ("image_understanding", "video_understanding")


def get_config() -> Experiment:
  names = list(dict.fromkeys(name for stage in _STAGES for name in stage[-1]))
  return Experiment(
    name="lwm_vision_7b",
    init_from="runs/lwm_text_7b",
    tokenizer="weights/llama2_7b/tokenizer/tokenizer.model",
    model=models.lwm_7b(vision=True),
    optimizer=OptimizerConfig(
      schedule="cosine", peak_learning_rate=6e-4, end_learning_rate=6e-5, weight_decay=0.1
    ),
    datasets=[
      DatasetConfig(
        name=name,
        path=f"data/lwm/{name}",
        weighting="example" if name.startswith(_BY_EXAMPLE) else "token",
      )
      for name in names
    ],
    stages=[
      Stage(
        name=name,
        sequence_length=length,
        rope_theta=5e7,
        tokens_per_batch=2**23,
        steps=steps,
        warmup_steps=warmup,
        peak_learning_rate=peak,
        end_learning_rate=end,
        mixture=[MixtureEntry(dataset, weight) for dataset, weight in mixture.items()],
        mesh=MeshConfig(fsdp=-1, ring=ring, tensor=tensor),
      )
      for name, length, steps, warmup, peak, end, tensor, ring, mixture in _STAGES
    ],
    # Every minute and a half with the shortest rows, every hour with the longest.
    checkpoint=CheckpointConfig(every_steps=20),
  )
