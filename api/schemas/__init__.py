"""What goes over the wire: one module per resource, each with its models and the function that shapes a row."""
