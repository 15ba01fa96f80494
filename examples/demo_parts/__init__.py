"""The parts of the demo, one per step or two. Read ../demo.py first."""
