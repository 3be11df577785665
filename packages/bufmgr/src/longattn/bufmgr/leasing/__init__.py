"""Who uses which memory: leases, slots, the caches between them, and the counts that say nobody sees a buffer."""
