"""Group relative policy optimisation: advantages, losses, the forward that gives log-probs, and the loop."""
