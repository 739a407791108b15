"""What was measured, and measures it again: speed, costs of updates, orders of solvers, the papers' claims."""
