"""ftjax: fine-tuning and alignment of language models as transforms of parameter trees, in JAX and Flax."""

__version__ = "0.1.0"
