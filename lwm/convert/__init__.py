"""Conversion of weights from and to other codebases."""

from lwm.convert.formats import read_weights
from lwm.convert.gguf.model import export_gguf
from lwm.convert.hugging_face.read import read_hugging_face
from lwm.convert.hugging_face.write import export_hugging_face
from lwm.convert.lwm_release.release import ReleaseOptions, export_release
from lwm.convert.merged import merged
from lwm.convert.orbax import export_orbax
from lwm.convert.peft import export_adapter, import_adapter, is_adapter
from lwm.convert.stablehlo import Sizes, export_programs
from lwm.convert.upcycle import upcycle
from lwm.convert.vqgan.model import export_vqgan, import_vqgan, is_vqgan
from lwm.convert.vqgan.trained import export_trained_vqgan
from lwm.convert.weights import Weights, import_weights
