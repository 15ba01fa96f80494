"""The soak: a chaos test with hundreds of jobs on one service and a random fault every few seconds."""
