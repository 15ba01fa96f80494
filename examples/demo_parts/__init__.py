"""The steps of the demo. Read ../demo.py first."""
