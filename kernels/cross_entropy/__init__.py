"""Linear projection and softmax cross-entropy, without materialising the logits of a sequence."""

from kernels.cross_entropy.api import TokenLosses, linear_cross_entropy
