"""``smolquant chat``: a published variant tried in a terminal."""
