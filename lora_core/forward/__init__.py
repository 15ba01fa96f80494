"""One pass of the model: language, classification, generation."""
