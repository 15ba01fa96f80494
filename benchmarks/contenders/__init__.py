"""Programs that a comparison measures: the engine and its baselines. Each runs in its own process."""
