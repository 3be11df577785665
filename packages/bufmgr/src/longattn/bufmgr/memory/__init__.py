"""Where host memory comes from: blocks, allocators that stack, the arena, and how full memory is."""
