"""The decoder."""

from lwm.config.model import ModelConfig, RopeScaling
from lwm.model.cache import Cache
from lwm.model.model import LossSums, Model, Params, build
