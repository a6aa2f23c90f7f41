"""Where raw documents come from: files of several kinds, and TensorFlow Datasets."""

from lwm.data.sources.files import READERS, FileSource
from lwm.data.sources.record import Problem, Record, Source
from lwm.data.sources.tfds import TfdsSource
