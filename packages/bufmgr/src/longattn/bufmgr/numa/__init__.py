"""Memory on the nodes of a machine: which there are, where pages shall be, and where they are."""
