"""Work in addition to training: importing base models, tokenizing files, computing plans."""
