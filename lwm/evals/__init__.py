"""Measures of trained models."""

from lwm.evals.perplexity import perplexity
