"""Who uses which memory: leases, slots, the caches between them, and the reference counts that show whether a buffer is in use."""
