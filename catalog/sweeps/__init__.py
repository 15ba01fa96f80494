"""Sweeps: several jobs that differ in stated fields, created by one request. Each trial is an ordinary job."""
