"""What is shown of runs: a page, pictures, and lines on a terminal."""
