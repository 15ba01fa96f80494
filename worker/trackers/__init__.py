"""The worker's side of writing curves to W&B, MLflow and other trackers."""
