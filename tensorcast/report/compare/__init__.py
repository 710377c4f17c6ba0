"""The report of a comparison: the answer in words, figures, and a table of candidates, in one page and as files."""
