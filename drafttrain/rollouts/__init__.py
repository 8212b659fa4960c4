"""What a rollout is, and how rollouts travel from engines to the trainer: record, spool, replay."""
