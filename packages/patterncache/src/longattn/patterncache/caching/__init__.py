"""The thread-safe cache of plans, and plans for devices and other processes."""
