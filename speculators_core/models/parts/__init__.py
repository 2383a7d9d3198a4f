"""What drafts are built of: layers, attention, masks, losses."""
