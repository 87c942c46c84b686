"""The engine on virtual clocks: a cluster of replicas as a discrete-event simulation."""
