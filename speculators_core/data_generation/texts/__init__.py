"""Texts of data sets as token ids with exact loss masks."""
