"""The engine on a GPU: bases of 1B and 8B with random weights, against PEFT in one process and on one base."""
