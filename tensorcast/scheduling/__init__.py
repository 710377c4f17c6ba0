"""Every request of a trace through an engine's own scheduler, on the product's own step prices."""
