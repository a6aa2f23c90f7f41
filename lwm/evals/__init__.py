"""Measures of trained models."""

from lwm.evals import answers, report
from lwm.evals.perplexity import perplexity
