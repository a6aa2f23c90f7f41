"""Sampling from a trained model."""

from lwm.infer.clips import Clip
from lwm.infer.clips import cut_clip
from lwm.infer.clips import sampled_codes
from lwm.infer.load import load_trained
from lwm.infer.load import TrainedModel
from lwm.infer.sampling import Choice
from lwm.infer.sampling import FREE
from lwm.infer.sampling import sample
