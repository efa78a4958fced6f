"""Real faults on real training runs: `make faults`, or `python -m tests.faults --help`."""
