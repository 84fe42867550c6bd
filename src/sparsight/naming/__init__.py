"""Names of latents, found without looking: vocabularies, methods, and how sure each name is."""
