"""Sampling from a trained model."""

from lwm.infer.clips import Clip, cut_clip, sampled_codes
from lwm.infer.load import TrainedModel, load_trained
from lwm.infer.sampling import SAMPLED, Choice, sample
from lwm.infer.weights import FORMS, load_params, num_bytes, quantized_params
