"""Plans: estimates of memory, time and cost of a job before it is submitted, and its warnings."""
