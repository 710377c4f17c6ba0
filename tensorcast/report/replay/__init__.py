"""What a replay tells: words, a terminal, files."""
