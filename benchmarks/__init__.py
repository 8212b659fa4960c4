"""Measurements against other trainers, run by hand: ``python -m benchmarks.train_step``."""
