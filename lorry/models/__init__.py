"""What the API returns, as typed objects."""
