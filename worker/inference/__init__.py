"""The HTTP server at which API servers send inference requests, and the requests of the loaded trainer."""
