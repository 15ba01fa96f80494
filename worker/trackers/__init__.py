"""Curves to W&B, MLflow and others: the worker's side."""
