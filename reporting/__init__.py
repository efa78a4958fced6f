"""Pages and charts of runs and evaluations."""
