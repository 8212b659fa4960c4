"""Distilling a drafter toward its policy: batches, losses, the trainer, offline pretraining."""
