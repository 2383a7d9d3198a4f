"""How drafts train: single steps, and whole runs beside others."""
