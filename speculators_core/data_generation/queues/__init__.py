"""Examples from process to process, and from machine to machine."""
