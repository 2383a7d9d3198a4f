"""Where the rows of training come from."""
