"""The algorithm: inner loop, meta-step, training, and prediction with adapted weights.

Not here: where images come from (`reptile.data`) and what is measured (`reptile.evaluate`).
"""
