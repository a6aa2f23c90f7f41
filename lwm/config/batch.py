"""The fields of a batch and the modalities: the one table that data, steps and tests read.

B rows, S sequence_length.
"""

import numpy as np

# The order of the last axis of every array by modality; `modality` of a target is its index here.
MODALITIES = ("text", "vision")

# The fields of a batch, each [B, S]. All are 0 where a row is padding, so that its key interval
# is empty.
FIELDS = {
  "tokens": np.int32,
  # The next token of the same document; 0 (and weight 0) after the last one.
  "targets": np.int32,
  "loss_weights": np.float32,
  # From 0 in every document slice.
  "positions": np.int32,
  # The target's index in MODALITIES.
  "modality": np.int32,
  # The token attends to keys [key_start, key_stop), in global columns of the row. The interval is
  # empty for padding only.
  "key_start": np.int32,
  "key_stop": np.int32,
}
