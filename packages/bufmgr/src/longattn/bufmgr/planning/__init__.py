"""Planning ahead: which tensors of a step live when, where each would lie in one block, and which need not be kept."""
