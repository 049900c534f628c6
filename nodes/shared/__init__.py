"""What nodes share: sockets, inputs, conversions, folders."""
