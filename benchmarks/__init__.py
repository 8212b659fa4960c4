"""What drafttrain costs and withstands, measured on real engines: ``python -m benchmarks.NAME``."""
