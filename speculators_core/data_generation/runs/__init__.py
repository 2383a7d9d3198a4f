"""A run of data generation, from its plan to its last unit."""
