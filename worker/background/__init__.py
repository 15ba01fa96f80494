"""Work between two jobs: import base models, tokenize, compute plans."""
