"""Reading of requests: JSON, query parameters, idempotency, disconnects."""
