"""One file per paper that trains something."""
