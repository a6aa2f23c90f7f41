"""Conversion of weights from and to other codebases."""

from lwm.convert.hugging_face_read import read_hugging_face
from lwm.convert.hugging_face_write import export_hugging_face
from lwm.convert.weights import Weights, import_weights
