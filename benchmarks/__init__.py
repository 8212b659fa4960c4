"""Measurements that users and maintainers can run again: ``python -m benchmarks.<name>``."""
