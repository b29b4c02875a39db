"""A small mixture-of-experts language model on bytes: what examples/train_lm.py is made of."""
