"""What a draft learns from: texts, run through the verifier, to disk or through a queue."""
