"""Conversion of weights from and to other codebases."""

from lwm.convert.llama import config_from_hugging_face, from_hugging_face, to_hugging_face
from lwm.convert.weights import Weights, import_weights
