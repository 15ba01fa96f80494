"""Middleware of every request: request id, allowed hosts, body limits, headers, connections."""
