"""What a run will take: memory, time and disk."""
