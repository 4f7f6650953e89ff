"""What the harness costs, measured."""
