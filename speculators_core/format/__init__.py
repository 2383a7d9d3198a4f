"""What lies in a speculator's folder: config, proposals, tensors, vocabulary."""
