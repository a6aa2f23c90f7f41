"""The decoder and its loss."""

from lwm.config.model import ModelConfig, RopeScaling
from lwm.model.cache import Cache
from lwm.model.decoder import stretch_name
from lwm.model.loss import LossSums, sums_by_modality
from lwm.model.model import Model, Params, build
