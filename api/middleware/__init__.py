"""What every request passes: request id, hosts, body limits, headers, connections."""
