"""A causal language model of transformers as a teacher: loaded, split among devices, named."""
