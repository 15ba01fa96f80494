"""The worker's side of exporting curves to W&B, MLflow and other trackers."""
