"""The jobs of `make faults`: each breaks something under load, or watches what grows."""
