"""Measurements that are run by hand; docs/ holds what they found."""
