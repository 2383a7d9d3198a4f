"""Names of the public documents, translated where they enter."""
