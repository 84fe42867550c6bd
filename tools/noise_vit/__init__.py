"""A small vision transformer trained on procedural noise alone, and the categories it finds."""
