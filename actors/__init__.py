"""Ray actors: thin shells around the levels below (level 2)."""
