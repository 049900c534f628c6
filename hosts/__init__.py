"""Model hosts: what the cores need from a model, one module per framework."""
