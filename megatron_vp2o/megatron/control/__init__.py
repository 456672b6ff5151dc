"""How far a step may go: trust region and snapshot."""
