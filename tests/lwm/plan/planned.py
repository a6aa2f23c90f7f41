"""An experiment that compiles for slices of four chips in seconds."""

from configs import models
from lwm.config.experiment import DatasetConfig, Experiment, MixtureEntry, Stage
from lwm.parallel.sharding import MeshConfig


def get_config() -> Experiment:
  model = models.debug(text_vocab_size=512, vision_vocab_size=0)
  model.compute_dtype = "bfloat16"
  model.remat = "full"
  model.num_layers = 4
  model.width = 128
  model.feed_forward_width = 256
  model.feed_forward_chunk = 512
  model.loss_chunk = 256
  return Experiment(
    name="planned",
    tokenizer="none",
    model=model,
    datasets=[DatasetConfig(name="text", path="none")],
    stages=[
      Stage(
        name="long",
        sequence_length=8192,
        tokens_per_batch=8192,
        steps=10,
        mixture=[MixtureEntry("text")],
        mesh=MeshConfig(fsdp=1, ring=2, tensor=2),
      )
    ],
  )
