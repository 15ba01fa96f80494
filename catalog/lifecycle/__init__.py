"""The state machine of a job: transitions, fencing, outcomes, recovery and preparation."""
