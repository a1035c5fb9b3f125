"""The training loop: from prompts to a better policy, in the order the data flows."""
