"""Memory and speed of a stage, on machines you don't need to have."""

from lwm.plan import report
from lwm.plan.compilation import compile_ahead
from lwm.plan.memory import compile_program
from lwm.plan.plan import StagePlan, plan_stage
from lwm.plan.search import longest, pool, search
from lwm.plan.topology import Topology, load
