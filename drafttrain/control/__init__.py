"""What to publish and when: acceptance measured on recorded rollouts, and the gate over it."""
