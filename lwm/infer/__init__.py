"""Reading prompts and generating text, pictures and films with a trained model."""

from lwm.infer.clips import Clip, cut_clip, sampled_codes
from lwm.infer.engine import (
  CACHE_FORMS,
  Engine,
  Sampling,
  Session,
  cache_bytes_per_token,
  padded_rows,
)
from lwm.infer.grammar import Grammar, Pictures, picture_marks
from lwm.infer.load import TrainedModel, load_stored, load_trained
from lwm.infer.sampling import Choice
from lwm.infer.weights import FORMS, load_params, num_bytes, quantized_params
