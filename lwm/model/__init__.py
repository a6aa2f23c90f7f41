"""The decoder."""

from lwm.model.cache import Cache
from lwm.model.config import ModelConfig
from lwm.model.config import RopeScaling
from lwm.model.model import LossSums
from lwm.model.model import Model
from lwm.model.model import Params
from lwm.model.model import build
