"""Who is a duplicate of whom: exact and perceptual signatures, their components, and what is removed."""
