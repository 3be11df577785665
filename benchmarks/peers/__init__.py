"""What longattn is compared with: the same tensors in, the same layout out."""
