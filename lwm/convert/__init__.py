"""Weights from and to other codebases."""

from lwm.convert.llama import config_from_hugging_face
from lwm.convert.llama import from_hugging_face
from lwm.convert.llama import to_hugging_face
