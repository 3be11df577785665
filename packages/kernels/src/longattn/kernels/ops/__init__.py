"""The opaque border to torch: the two ops, their fakes, gradients and transforms."""
