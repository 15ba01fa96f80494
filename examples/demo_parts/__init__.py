"""The parts of the demo, one or two steps per module. Read ../demo.py first."""
