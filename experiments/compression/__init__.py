"""Questions about context compression, and their measured answers."""
