"""How workers get jobs: snapshot, claim, charge, preempt, notify."""
