"""One file per resource of the HTTP API; each maps calls to requests and answers to models."""
