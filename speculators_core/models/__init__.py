"""One file an algorithm: config, model, loss and proposal."""
