"""drafttrain keeps a drafter in step with its policy while the policy is trained by RL."""

__version__ = "0.1.0"
