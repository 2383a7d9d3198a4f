"""Training of drafts on `transformers.Trainer`."""
