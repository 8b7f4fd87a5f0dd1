"""Tokens in, log-probabilities out."""

import logging
import warnings

# Two messages of libraries that say nothing about the user's work: bitsandbytes misses, on CPU, a
# package of kernels that is not used here; PEFT 0.21 reads an attribute that transformers renamed.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
warnings.filterwarnings(
    "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
)
