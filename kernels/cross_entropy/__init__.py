"""Linear projection and softmax cross-entropy in one, without the logits of a whole sequence."""

from kernels.cross_entropy.api import TokenLosses, linear_cross_entropy
