"""What a run saves, and the folder that holds it."""
